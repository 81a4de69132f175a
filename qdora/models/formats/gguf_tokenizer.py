"""A tokenizer as the metadata of a GGUF file, and how llama.cpp splits text by what they say.

llama.cpp names the rule by which byte-level BPE splits text before it merges, `tokenizer.ggml.pre`, and knows
no others. A sentencepiece vocabulary has none: each token has a score, by which llama.cpp merges.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qdora.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A piece of text that is a token is that token, whatever the merges say.  Source: llama.cpp, ignore_merges.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")
_SPLITS = ("llama-bpe", "qwen2", "tekken")
"""Names that are written for a pattern; llama.cpp has others for the same ones."""

_SPACE = "▁"
_BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_GENERATION_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def split_as_llama_cpp(tokenizer: Any, name: str | None) -> None:
    """Let a tokenizer that transformers built from a GGUF file split text as llama.cpp does by that name.

    transformers knows no rule for `smollm` and takes GPT-2's, under which a run of spaces or line breaks
    before a number becomes other tokens than in training; and it merges pieces that are tokens already.

    Source: llama.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM and ignore_merges.
    """
    backend = tokenizer.backend_tokenizer
    if name == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    if name in _IGNORE_MERGES:
        backend.model.ignore_merges = True


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int] = ()
) -> None:
    """Add the metadata of a tokenizer: vocabulary, merges or scores, special tokens, chat template.

    Args:
        rows: of the embedding; ids without a token are filled.
        ends: further ids at which generation stops; llama.cpp stores one beside the EOS token, and knows the
            usual ones by their text.
    Raises: InputError: llama.cpp would not split text as this tokenizer does, or does not know how.
    """
    said = f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r}"
    if not tokenizer.is_fast:
        raise InputError(f"{said} is no tokenizer of the tokenizers library; GGUF files are written of those")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise InputError(f"{said} is {model['type']}; in GGUF files: BPE, byte-level or of sentencepiece")
    tokens, types = _tokens(tokenizer, rows, said)
    steps = _steps(backend["pre_tokenizer"], "pretokenizers")
    if any(step["type"] == "ByteLevel" for step in steps):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(backend, steps, said))
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(backend, steps, said))
        if not (model["byte_fallback"] and model["vocab"].keys() >= _BYTES):
            raise InputError(
                f"{said} has no tokens of single bytes, which llama.cpp takes for what it does not know"
            )
        for i, token in enumerate(tokens):
            if token in _BYTES:
                types[i] = TokenType.BYTE
            elif types[i] == TokenType.USER_DEFINED:  # found in the text before its spaces are marked
                tokens[i] = token.replace(_SPACE, " ")
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        writer.add_token_scores(_scores(tokens, types, [tuple(merge) for merge in model["merges"]], said))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer, said, ends)
    if template := tokenizer.chat_template:
        templates = template if isinstance(template, dict) else {"default": template}
        # Marks of what is trained, which other readers of Jinja refuse.  A condition strips as many spaces.
        plain = {name: _GENERATION_MARK.sub(_as_condition, text) for name, text in templates.items()}
        named = [{"name": name, "template": text} for name, text in plain.items()]
        writer.add_chat_template(named if isinstance(template, dict) else plain["default"])


def _as_condition(mark: re.Match[str]) -> str:
    return f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}"


def _tokens(tokenizer: PreTrainedTokenizerBase, rows: int, said: str) -> tuple[list[str], list[TokenType]]:
    """The token of each row of the embedding, and what it is."""
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if (last := max(by_id)) >= rows:
        raise InputError(f"{said} has {by_id[last]!r}, id {last}, beyond the {rows} rows of the embedding")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [TokenType.NORMAL if i in by_id else TokenType.UNUSED for i in range(rows)]
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return tokens, types


def _steps(step: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer in order, sequences unfolded."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for outer in step[inside] for inner in _steps(outer, inside)]


def _pre_tokenizer(backend: dict[str, Any], steps: list[dict[str, Any]], said: str) -> str:
    """llama.cpp's name for a way to split text, by the steps that the tokenizer itself takes.

    Raises: InputError: it has none.
    """
    keys = ("type", "pattern", "behavior", "invert", "individual_digits", "add_prefix_space", "use_regex")
    found = [{key: step[key] for key in keys if key in step} for step in steps]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    known: dict[str, list[dict[str, Any]]] = {
        "gpt-2": [byte_level],
        "smollm": [{"type": "Digits", "individual_digits": True}, byte_level],
    }
    for name in _SPLITS:
        pattern = {"Regex": GGUF_PRE_TOKENIZER_SPLITS[name]}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        known[name] = [split, byte_level | {"use_regex": False}]
    names = [name for name, expected in known.items() if found == expected]
    if not names:
        raise InputError(
            f"{said} splits text in a way that has no name in llama.cpp that this program knows "
            f"({json.dumps(found, ensure_ascii=False)}); known: {', '.join(known)}"
        )
    (name,) = names
    normalizers = [step["type"] for step in _steps(backend["normalizer"], "normalizers")]
    # llama.cpp does not normalize; typed text is in normal form C as a rule.
    if normalizers not in ([], ["NFC"]):
        raise InputError(
            f"{said} changes text before splitting it ({', '.join(normalizers)}); llama.cpp does not"
        )
    if backend["model"]["ignore_merges"] != (name in _IGNORE_MERGES):
        raise InputError(
            f"{said} splits text as {name!r} does, but with ignore_merges "
            f"{backend['model']['ignore_merges']}, and llama.cpp knows no such rule"
        )
    return name


def _adds_space(backend: dict[str, Any], steps: list[dict[str, Any]], said: str) -> bool:
    """Whether a space is put before a text whose spaces become `▁`.

    llama.cpp puts it before what follows a special token too, and before a space.

    Raises: InputError: they do not, or something else is done.
    """
    before = _steps(backend["normalizer"], "normalizers")
    marks = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prefix = {"type": "Prepend", "prepend": _SPACE}
    if not steps and before in ([marks], [prefix, marks]):
        return len(before) == 2
    if not before and [step["type"] for step in steps] == ["Metaspace"]:
        (step,) = steps
        if step["replacement"] == _SPACE and not step["split"]:
            return bool(step["prepend_scheme"] != "never")
    found = [step["type"] for step in before + steps]
    raise InputError(
        f"{said} is neither byte-level nor marks spaces as sentencepiece does "
        f"({', '.join(found) or 'no step'}), and llama.cpp knows nothing else"
    )


def _scores(
    tokens: list[str], types: list[TokenType], merges: list[tuple[str, str]], said: str
) -> list[float]:
    """Scores by which llama.cpp, which takes the best-scored token of two neighbours, merges in this order.

    Raises: InputError: there are none: the same token is made at several places of the order, or two tokens
        whose text is a token are not merged.
    """
    order = [made for made, _ in groupby(left + right for left, right in merges)]
    ranks = {made: float(-rank) for rank, made in enumerate(order)}
    if len(ranks) != len(order):
        raise InputError(f"{said} has merges that no scores of tokens give, as sentencepiece has them")
    known = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    listed = set(merges)
    for token in known:
        for i in range(1, len(token)):
            pair = (token[:i], token[i:])
            if known.issuperset(pair) and pair not in listed:
                raise InputError(f"{said} does not merge {pair[0]!r} and {pair[1]!r}, as sentencepiece would")
    unmerged = iter(range(len(order), len(order) + len(tokens)))
    return [
        ranks[token] if token in ranks else float(-next(unmerged)) if kind == TokenType.NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _add_special_tokens(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, said: str, ends: Sequence[int]
) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    plain, full = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    begins, stops = full[:1] == [bos] != plain[:1], full[-1:] == [eos] != plain[-1:]
    if full != [bos] * begins + plain + [eos] * stops:
        around = tokenizer.convert_ids_to_tokens(full)
        raise InputError(f"{said} adds other tokens to a text than BOS and EOS: {around}")
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(stops)
    for add, token_id in {
        writer.add_bos_token_id: bos,
        writer.add_eos_token_id: eos,
        writer.add_eot_token_id: eos if tokenizer.chat_template else None,
        writer.add_eom_token_id: next((end for end in ends if end != eos), None),
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }.items():
        if token_id is not None:
            add(token_id)
