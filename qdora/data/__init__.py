"""From files to batches: `readers` give rows, tasks make examples of them, `templates` and `tokenize` turn
those into token ids, `batches` into tensors."""
