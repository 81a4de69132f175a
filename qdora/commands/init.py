"""`init`: a commented configuration for a model, a data file and a GPU, chosen by the planner."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml

from qdora.config import DatasetConfig, ModelConfig, QuantizationName, RunConfig
from qdora.config_file import find_shipped, parse_config
from qdora.data.chat_templates import use_chat_template
from qdora.data.rows import Example
from qdora.data.tokenize import tokenize_examples
from qdora.errors import DataError, InputError
from qdora.files import write_text
from qdora.models.sources import fetch_tokenizer
from qdora.planner.architecture import Architecture, find_architecture
from qdora.planner.starter import BATCH_SIZE, Starter, choose
from qdora.resources import available_memory, show_size
from qdora.tasks import check_run, load_dataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS: tuple[QuantizationName, ...] = ("none", "nf4")
"""Of the base, in the order of preference: what fits in 16 bits loses nothing."""
_BYTES_PER_TOKEN = 3
"""Of text, where there is no tokenizer to ask: English has about 4, other languages and code fewer."""
_WORDS_TO_COMPARE = 5
"""Of an answer that may be met word for word."""
_TEMPLATE_TOKENS = 32
"""Of a prompt's own text."""


@dataclass(frozen=True)
class _Data:
    """What the file holds.

    Attributes:
        apart: examples that are not trained on.
        template: name of a chat template, for chats and a tokenizer that has none.
        scored: whether answers are numbers or short enough to be compared; else the loss is all there is.
        lengths: tokens of each example.
        answers: tokens of each completion.
        measured: by the model's tokenizer; else estimated from the characters.
    """

    train: DatasetConfig
    apart: int
    scored: bool
    template: str | None
    prompt: Literal["question_answer", "chat"]
    lengths: Sequence[int]
    answers: Sequence[int]
    measured: bool


def init(arguments: argparse.Namespace, output: Path, memory: int | None, reserve: int) -> None:
    """Choose, write, and say what comes next.

    Args:
        arguments: of the command.
        output: file that is not there yet.
        memory: bytes of the GPU; None for this machine's.
        reserve: bytes set aside on it.
    Raises: InputError: the model or the data cannot be had, or nothing fits.
    """
    device: Literal["cpu", "cuda"] = "cuda"
    if memory is None and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    elif memory is None:
        device, reserve, memory = "cpu", 0, available_memory()
    path, folder = arguments.model, arguments.architecture
    architectures = {
        name: find_architecture(ModelConfig(path=path, quantization=name), folder, device) for name in FORMATS
    }
    tokenizer = _tokenizer(str(find_shipped(folder)) if folder else path)
    data = _read(arguments.data, tokenizer)
    context = getattr(architectures["nf4"].config.get_text_config(), "max_position_embeddings", None)
    print(f"{len(data.lengths)} examples; estimating what fits in {show_size(memory)} ...", file=sys.stderr)
    starter = choose(architectures, data.lengths, context, memory - reserve, device)
    place = f"one GPU of {show_size(memory)}" if device == "cuda" else f"a CPU with {show_size(memory)} free"
    lines = _lines(path, data, starter, context, architectures[starter.quantization], place)
    text = _yaml(lines)
    check_run(parse_config(text, RunConfig, str(output)))
    write_text(output, text)
    print(
        f"{output}: estimated to take {show_size(starter.estimate.peak.total)} of {show_size(memory)}"
        f"{f' ({show_size(reserve)} set aside)' if reserve else ''}. Next:\n\n  qdora train --config {output}"
    )


def _tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """None, with a sentence, where it cannot be had."""
    try:
        tokenizer = fetch_tokenizer(path)
        reason = f"{path} has no tokenizer"
    except InputError as error:
        tokenizer, reason = None, str(error)
    if tokenizer is None:
        print(f"{reason}: lengths are estimated from the texts' bytes", file=sys.stderr)
    return tokenizer


def _read(path: str, tokenizer: PreTrainedTokenizerBase | None) -> _Data:
    """The examples of the file, and how their answers can be scored.

    Raises: InputError: it cannot be read.
    """
    source = DatasetConfig(source="file", path=path)
    try:
        examples = load_dataset(source, "stop", needs_gold="all").examples
        scored = True
    except DataError:  # not all answers are numbers
        examples = load_dataset(source, "stop", needs_gold="none").examples
        scored = all(len(e.completion.split()) <= _WORDS_TO_COMPARE and not e.turns for e in examples)
        if scored:
            source = source.model_copy(update={"answer_kind": "text"})
    apart = max(1, min(100, len(examples) // 10))
    if apart >= len(examples):
        raise InputError(f"{path}: {len(examples)} example is too few to train and to hold one out")
    if scored:
        source = source.model_copy(update={"held_out": apart})
    if tokenizer is None:
        answers = [_guess(example.completion) for example in examples]
        lengths = [_guess(e.question) + a + _TEMPLATE_TOKENS for e, a in zip(examples, answers, strict=True)]
        return _Data(source, apart, scored, None, "question_answer", lengths, answers, False)
    template = None
    if not tokenizer.chat_template and any(example.turns for example in examples):
        template = "plain"
        use_chat_template(tokenizer, template)
    prompt: Literal["question_answer", "chat"] = "chat" if tokenizer.chat_template else "question_answer"
    lengths, answers = _measure(examples, tokenizer, prompt)
    return _Data(source, apart, scored, template, prompt, lengths, answers, True)


def _guess(text: str) -> int:
    return math.ceil(len(text.encode()) / _BYTES_PER_TOKEN)


def _measure(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, prompt: str
) -> tuple[list[int], list[int]]:
    """Tokens of each example, and of each completion.

    Raises: InputError: an example has none, or the tokenizer cannot be used.
    """
    tokenized, _ = tokenize_examples(examples, tokenizer, prompt, sys.maxsize, "stop")
    lengths = [len(example.input_ids) for example in tokenized]
    return lengths, [example.labels for example in tokenized]


Line = tuple[str, str, Any, str]
"""Section, key, value, and why; a section's own line has no key."""


def _lines(
    model: str, data: _Data, starter: Starter, context: int | None, architecture: Architecture, place: str
) -> list[Line]:
    launch = starter.launch
    name = Path(str(data.train.path)).name.partition(".")[0]
    train = data.train.model_dump(mode="json", exclude_defaults=True)
    kept = len(data.lengths) - starter.left_out
    steps = math.ceil((kept - data.apart) / BATCH_SIZE)
    epochs = 1 if steps >= 200 else min(3, math.ceil(200 / steps))
    quarter = max(1, steps * epochs // 4)
    apart: Line = ("data", "test", {**train, "split": "test"}, f"the {data.apart} held out")
    by_loss: list[Line] = []
    if not data.scored:
        apart = (
            "data",
            "validation",
            data.apart,
            "examples apart; free answers have a loss, and no exact match",
        )
        by_loss = [
            ("training", "keep_best", "loss", "adapter-best/ is of the lowest validation loss"),
            ("evaluation", "loss_every", quarter, "steps between two of these"),
        ]
    answer = _round_up(max(data.answers))
    most_answer = answer if context is None else min(answer, context // 2)
    source = "measured" if data.measured else f"estimated, {_BYTES_PER_TOKEN} bytes a token"
    return [
        ("", "", None, f"Written by qdora init for {place}. docs/configuration.md has every key."),
        ("model", "path", model, ""),
        ("model", "quantization", starter.quantization, _why_format(starter)),
        ("adapter", "dora", True, "with a quantized base QDoRA; false is (Q)LoRA"),
        ("adapter", "r", launch.adapter.r, "rank of the update: a higher one learns more, and takes more"),
        ("adapter", "alpha", launch.adapter.alpha, "the update is scaled by alpha / r"),
        ("data", "train", train, f"{len(data.lengths)} examples"),
        apart,
        ("data", "prompt", data.prompt, _why_prompt(data)),
        *([("data", "chat_template", data.template, "the tokenizer has none")] if data.template else []),
        ("data", "max_length", launch.max_length, f"tokens; {_why_length(data, starter)} ({source})"),
        *([("data", "bad_rows", "skip", "longer ones are left out and counted")] if starter.left_out else []),
        ("training", "epochs", epochs, f"{steps} steps each"),
        ("training", "batch_size", BATCH_SIZE, "examples a step"),
        ("training", "gradient_accumulation", launch.training.gradient_accumulation, _why_micro(starter)),
        ("training", "gradient_checkpointing", launch.checkpointing, _why_checkpointing(starter)),
        ("training", "learning_rate", 2e-4, "a usual rate for adapters; try 1e-4 and 4e-4"),
        ("training", "warmup_steps", math.ceil(0.03 * steps * epochs), "3% of the steps"),
        ("training", "save_every", quarter, "a checkpoint to go on from with --resume"),
        *([] if data.scored else by_loss),
        ("evaluation", "max_new_tokens", most_answer, f"the longest completion has {max(data.answers)}"),
        ("output", "dir", f"runs/{name}", ""),
    ]


def _round_up(tokens: int) -> int:
    return -(-tokens // 32) * 32


def _why_format(starter: Starter) -> str:
    if starter.quantization == "none":
        return "16 bits fit, and lose nothing; nf4 would take a quarter"
    dense = starter.refused.get(("none", False))
    return "4 bits" if dense is None else f"4 bits; 16 would take {show_size(dense.peak.total)} or more"


def _why_prompt(data: _Data) -> str:
    if data.prompt == "chat":
        return "the template of chats" if data.template else "the tokenizer's chat template"
    return "a plain template; chat takes the tokenizer's own, where it has one"


def _why_length(data: _Data, starter: Starter) -> str:
    longest = max(data.lengths)
    if not starter.left_out:
        return f"the longest example has {longest}"
    return f"{starter.left_out} of {len(data.lengths)} examples are longer, up to {longest}"


def _why_micro(starter: Starter) -> str:
    return f"micro-batches of {starter.launch.micro_batch_size}: the largest that fit"


def _why_checkpointing(starter: Starter) -> str:
    if not starter.launch.checkpointing:
        return "activations fit"
    kept = starter.refused.get((starter.quantization, False))
    return "" if kept is None else f"keeping activations would take {show_size(kept.peak.total)}"


def _yaml(lines: Sequence[Line]) -> str:
    """As YAML, with the comments below one another in each section."""
    text, before = "", ""
    widths: dict[str, int] = {}
    shown = [(section, f"  {key}: {_scalar(value)}", why) for section, key, value, why in lines if key]
    for section, line, _ in shown:
        widths[section] = min(48, max(widths.get(section, 0), len(line)))
    text += "".join(f"# {why}\n" for section, key, _, why in lines if not key)
    for section, line, why in shown:
        text += "" if section == before else f"{section}:\n"
        text += (f"{line:<{widths[section]}}  # {why}" if why else line) + "\n"
        before = section
    return text


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value < 0.001:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    dumped = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return dumped.removesuffix("\n...\n").strip()
