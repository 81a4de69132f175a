"""Tokenizers in GGUF files: what is written, and that it is read back as the tokenizer that was meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qdora.data.chat_templates import template_text
from qdora.errors import InputError
from qdora.models.formats.gguf_tokenizer import add_tokenizer, split_as_llama_cpp
from tests.tiny import TEXT, tiny_bpe_tokenizer, tiny_tokenizer

ROWS = 320
TEXTS = (
    TEXT,
    "a",
    "  two",
    "x   12\n\n 345 6789",
    "\n\n\n7",
    "I'LL say it's 1½ größer – 🙂",
    "buys",
    "\t\tHow",
)
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3?"},
]


def metadata(tokenizer: PreTrainedTokenizerBase, rows: int = ROWS, **more: Any) -> dict[str, Any]:
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer, rows, **more)
    return {key.removeprefix("tokenizer."): value.value for key, value in writer.kv_data[0].items()}


def read_back(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: int = ROWS) -> PreTrainedTokenizerBase:
    writer = gguf.GGUFWriter(folder / "t.gguf", "llama")
    add_tokenizer(writer, tokenizer, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file="t.gguf")
    split_as_llama_cpp(again, metadata(tokenizer, rows)["ggml.pre"])
    return again


def sentencepiece_tokenizer(**options: Any) -> tuple[LlamaTokenizer, sentencepiece.SentencePieceProcessor]:
    """A vocabulary that sentencepiece learned, as transformers has those of LLaMA 2, and the original."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3), model_writer=model, model_type="bpe", vocab_size=400,
        byte_fallback=True, character_coverage=1.0, num_threads=1, add_dummy_prefix=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [original.id_to_piece(i) for i in range(original.vocab_size())]
    merges = [
        (-original.get_score(i), token[:k], token[k:])
        for i, token in enumerate(pieces)
        for k in range(1, len(token))
        if token[:k] in pieces and token[k:] in pieces
    ]
    vocabulary = {token: i for i, token in enumerate(pieces)}
    in_order = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    return LlamaTokenizer(vocab=vocabulary, merges=in_order, **options), original


@pytest.mark.parametrize("splits", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_byte_level_tokens_are_read_back(tmp_path: Path, splits: str) -> None:
    """Catches: the name of another rule; merges, ids or special tokens that are lost or swapped; a piece that
    is a token and is merged otherwise."""
    tokenizer = tiny_bpe_tokenizer(splits)
    if splits == "qwen2":
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    written = metadata(tokenizer)
    assert (written["ggml.model"], written["ggml.pre"]) == ("gpt2", splits)
    assert len(written["ggml.tokens"]) == len(written["ggml.token_type"]) == ROWS
    names = ("bos", "eos", "padding")
    assert [written["ggml.tokens"][written[f"ggml.{name}_token_id"]] for name in names] == [
        tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token,
    ]  # fmt: skip
    kinds = dict(zip(written["ggml.tokens"], written["ggml.token_type"], strict=True))
    assert kinds["<|im_end|>"] == TokenType.CONTROL
    assert kinds["Ġ"] == TokenType.NORMAL
    assert kinds["[PAD319]"] == TokenType.UNUSED
    again = read_back(tokenizer, tmp_path)
    for text in TEXTS:
        ids = tokenizer(f"{text}<|im_end|>").input_ids
        assert again(f"{text}<|im_end|>").input_ids == ids
        assert again.decode(ids) == tokenizer.decode(ids)


def test_pieces_that_are_tokens(tmp_path: Path) -> None:
    """Catches: `ignore_merges` that reading a file loses: rare words of LLaMA 3 in other tokens."""
    tokenizer = tiny_bpe_tokenizer("llama-bpe")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    unreachable = "".join(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("größer")[0][0])
    state["model"]["vocab"][unreachable] = len(tokenizer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>"
    )
    assert tokenizer("größer").input_ids == [len(tokenizer) - 1]
    assert read_back(tokenizer, tmp_path)("größer").input_ids == [len(tokenizer) - 1]


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_scores(tmp_path: Path, legacy: bool) -> None:
    """Catches: scores in another order than the merges, the kinds of bytes or of the unknown token lost, a
    prefix of a space that is lost."""
    tokenizer, original = sentencepiece_tokenizer()
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    written = metadata(tokenizer, rows=410)
    assert written["ggml.model"] == "llama"
    assert written["ggml.add_space_prefix"] is True
    count = original.vocab_size()
    kinds = written["ggml.token_type"]
    assert all((kinds[i] == TokenType.BYTE) == original.is_byte(i) for i in range(count))
    assert kinds[tokenizer.unk_token_id] == TokenType.UNKNOWN
    assert kinds[tokenizer.eos_token_id] == TokenType.CONTROL
    merged = [i for i in range(count) if kinds[i] == TokenType.NORMAL and len(original.id_to_piece(i)) > 1]
    by_score = sorted(merged, key=lambda i: -written["ggml.scores"][i])
    assert len(merged) > 20
    assert by_score == sorted(merged, key=lambda i: -original.get_score(i))
    again = read_back(tokenizer, tmp_path, rows=410)
    for text in TEXTS:
        if text.startswith(" "):
            continue  # transformers' Metaspace puts no second space there
        ids = original.encode(text)
        assert again(text, add_special_tokens=False).input_ids == ids, text
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "never", split=False)
    assert metadata(tokenizer, rows=410)["ggml.add_space_prefix"] is False


def test_tokens_that_the_tokenizer_adds(tmp_path: Path) -> None:
    """Catches: a BOS that llama.cpp adds and the tokenizer does not, or the reverse; a sequence of tokens
    that llama.cpp cannot add."""
    tokenizer = tiny_bpe_tokenizer()
    added = metadata(tokenizer)
    assert (added["ggml.add_bos_token"], added["ggml.add_eos_token"]) == (False, False)
    for template, expected in (("<|begin|> $A", (True, False)), ("<|begin|> $A <|im_end|>", (True, True))):
        tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|begin|>", "<|im_end|>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            template, special_tokens=tokens
        )
        added = metadata(tokenizer)
        assert (added["ggml.add_bos_token"], added["ggml.add_eos_token"]) == expected
        assert read_back(tokenizer, tmp_path)("ab").input_ids == tokenizer("ab").input_ids
    tokenizer.eos_token = "<|pad|>"
    with pytest.raises(
        InputError, match=r"adds other tokens to a text than BOS and EOS: \['<\|begin\|>', 'a'"
    ):
        metadata(tokenizer)


def test_added_tokens_of_plain_text(tmp_path: Path) -> None:
    """Catches: a token such as `<think>` that is cut into pieces, or taken for one that is never shown."""
    tokenizer = tiny_bpe_tokenizer()
    tokenizer.add_tokens(["<think>"])
    assert metadata(tokenizer)["ggml.token_type"][len(tokenizer) - 1] == TokenType.USER_DEFINED
    assert read_back(tokenizer, tmp_path)("a<think>b").input_ids == tokenizer("a<think>b").input_ids
    other, _ = sentencepiece_tokenizer()
    other.add_tokens(["▁▁x"])
    written = metadata(other, rows=410)
    assert (written["ggml.tokens"][400], written["ggml.token_type"][400]) == ("  x", TokenType.USER_DEFINED)


def test_tokens_that_end_an_answer() -> None:
    """Catches: generation that goes on after the second EOS token of a model."""
    tokenizer = tiny_bpe_tokenizer()
    eos, other = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert metadata(tokenizer, ends=[eos, other])["ggml.eom_token_id"] == other
    assert "ggml.eom_token_id" not in metadata(tokenizer, ends=[eos])
    assert metadata(tokenizer)["ggml.eot_token_id"] == eos
    tokenizer.chat_template = None
    assert not {"ggml.eot_token_id", "chat_template"} & metadata(tokenizer).keys()


def test_chat_template_without_marks() -> None:
    """Catches: a template that readers without `{% generation %}` refuse, or that says something else."""
    tokenizer = tiny_bpe_tokenizer()
    for name in ("chatml", "plain"):
        tokenizer.chat_template = template_text(name)
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        written = metadata(tokenizer)["chat_template"]
        assert "generation %" not in written
        assert "endif" in written
        tokenizer.chat_template = written
        assert tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == expected
    plain = tokenizer.chat_template
    tokenizer.chat_template = {"default": template_text("plain"), "tool_use": "{{ messages }}"}
    written = metadata(tokenizer)
    assert written["chat_template"] == plain
    assert written["chat_template.tool_use"] == "{{ messages }}"


def lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def unknown_split(tokenizer: Any) -> None:
    split = pre_tokenizers.Split(Regex(r"\w+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])


def prefix_space(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def whole_pieces(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.model.ignore_merges = True


def words(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lower_case, r"changes text before splitting it \(Lowercase\)"),
        (
            unknown_split,
            r"splits text in a way that has no name in llama.cpp .*\\\\w\+.*known: gpt-2, smollm, lla",
        ),
        (prefix_space, "splits text in a way that has no name"),
        (whole_pieces, "splits text as 'smollm' does, but with ignore_merges True"),
        (words, r"neither byte-level nor marks spaces as sentencepiece does \(Whitespace\)"),
    ],
)
def test_refused(change: Callable[[Any], None], message: str) -> None:
    """Catches: a file under which llama.cpp splits text otherwise than in training."""
    tokenizer = tiny_bpe_tokenizer()
    change(tokenizer)
    with pytest.raises(InputError, match=message):
        metadata(tokenizer)


def test_other_vocabularies_are_refused() -> None:
    """Catches: merges that no scores give, taken for those of sentencepiece; a vocabulary that is none of BPE
    or larger than the embedding."""
    with pytest.raises(InputError, match="is WordLevel; in GGUF files: BPE"):
        metadata(tiny_tokenizer())
    with pytest.raises(InputError, match=r"has '.+', id 309, beyond the 309 rows of the embedding"):
        metadata(tiny_bpe_tokenizer(), rows=309)
    tokenizer, _ = sentencepiece_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = state["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    twice = next(i for i, token in enumerate(made) if made.count(token) > 1)
    for changed, message in (
        (merges[1:], "does not merge"),
        ([*merges[:twice], *merges[twice + 1 :], merges[twice]], "no scores of tokens give"),
    ):
        state["model"]["merges"] = changed
        other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))
        with pytest.raises(InputError, match=message):
            metadata(other, rows=410)
    bare = models.BPE(vocab={"▁": 0, "a": 1}, merges=[])
    tokenizer.backend_tokenizer.model = bare
    with pytest.raises(InputError, match="has no tokens of single bytes"):
        metadata(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), rows=410)
