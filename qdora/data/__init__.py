"""Data: from sources to tokens.

`sources` give `Example`s, `leakage` removes test questions from the training
set, `prompts` and `tokenize` turn examples into ids, `batches` into tensors;
`prepare` composes them.
"""
