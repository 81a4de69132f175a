"""`data`: what a run would be trained on, before it is; no weight is loaded."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
from tabulate import tabulate

from qdora.commands.train import read_inputs
from qdora.config import RunConfig
from qdora.data.batches import BatchPlan, describe_batches
from qdora.data.rows import Skipped
from qdora.data.token_table import labels_of, lengths_of
from qdora.data.tokenize import TokenizedExample
from qdora.tasks.prepare import PreparedData
from qdora.training.identity import packing_of
from qdora.training.loop import count_steps, micro_batch_size
from qdora.training.progress import data_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BARS, _WIDTH = 12, 40
_REASONS = 3
_GREEN, _GREY, _END = "\x1b[32m", "\x1b[90m", "\x1b[0m"


def show_data(config: RunConfig, shown: int, *, stats: bool) -> int:
    """Print what the data of a run come to.

    Args:
        shown: how many training examples are printed, the first in the order of use.
        stats: whether also lengths, repeated rows and all reasons are.
    Returns: 1 where a run would stop at a row that cannot be used, else 0.
    Raises: InputError: as `read_inputs`.
    """
    lenient = config.data.model_copy(update={"bad_rows": "skip"})
    _, tokenizer, data = read_inputs(config.model_copy(update={"data": lenient}))
    lines = data_lines(data, config.data)
    print(*(line for line in lines if not line.startswith(("skipped", "..."))), sep="\n")
    stops = config.data.bad_rows == "stop" and bool(data.skipped)
    print(*_left_out(data.skipped, None if stats else _REASONS), sep="\n")
    if stops:
        print("a run stops at the first of them (data.bad_rows: stop)")
    if stats:
        print(*_repeated(data), sep="\n")
        print(_histogram(lengths_of(data.train), config.data.max_length))
    if data.stream is None:
        print(*_batches(config, data), sep="\n")
    for example in islice(data.train, shown):
        print(f"\n{_headline(example)}\n{_rendered(example, tokenizer, coloured=_coloured())}")
    return int(stops)


def _left_out(skipped: Sequence[Skipped], most: int | None) -> Iterator[str]:
    """How many rows are left out for which reason, and the first of each."""
    if not skipped:
        yield "no row is left out"
        return
    # Numbers and texts apart, the reasons of rows are alike.
    kinds = Counter(re.sub(r"'[^']*'|\d+", "…", row.reason) for row in skipped)
    firsts = {re.sub(r"'[^']*'|\d+", "…", row.reason): row for row in reversed(skipped)}
    yield f"{len(skipped)} rows are left out:"
    for kind, count in kinds.most_common(most):
        yield f"  {count} as {firsts[kind]}"
    if most is not None and len(kinds) > most:
        yield f"  ... {len(kinds)} reasons in all, shown with --stats"


def _repeated(data: PreparedData) -> Iterator[str]:
    repeats = data.repeated_questions
    yield (
        f"{repeats} training examples repeat the question of another one"
        if repeats
        else ("no training example repeats the question of another one")
    )


def _histogram(lengths: Sequence[int], most: int) -> str:
    """Lengths of training examples in bars."""
    least, longest = min(lengths), max(lengths)
    width = -(-(longest - least + 1) // _BARS)
    firsts = range(least, longest + 1, width)
    counts, _ = np.histogram(lengths, bins=[*firsts, firsts[-1] + width])
    rows = [
        (
            f"{first} to {first + width - 1}" if width > 1 else first,
            count,
            "█" * round(_WIDTH * count / max(counts)),
        )
        for first, count in zip(firsts, counts.tolist(), strict=True)
    ]
    table = tabulate(rows, headers=["tokens", "examples", ""], colalign=["right", "right", "left"])
    median, late = np.percentile(lengths, (50, 95))
    return (
        f"lengths in tokens: mean {np.mean(lengths):.1f}, median {median:.0f}, 95% up to {late:.0f}, longest "
        f"{longest} (data.max_length {most})\n{table}"
    )


def _batches(config: RunConfig, data: PreparedData) -> Iterator[str]:
    """What a batch and an epoch are, on one process."""
    training, packing, lengths = config.training, packing_of(config), lengths_of(data.train)
    plan = BatchPlan(lengths, training.batch_size, training.seed, packing.row_tokens)
    tokens, labels = sum(lengths), labels_of(data.train)
    total, micro = count_steps(training, plan.steps_per_epoch), micro_batch_size(training, 1)
    yield describe_batches(plan, lengths, total, micro, packing)
    yield (
        f"a step has {training.batch_size} rows, {micro} computed at once on one process; an epoch has "
        f"{plan.steps_per_epoch} steps and {tokens:,} tokens, of which {labels:,} carry loss; "
        f"the run has {total} steps, {total / plan.steps_per_epoch:.2f} epochs"
    )


def _coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _headline(example: TokenizedExample) -> str:
    return f"{example.origin}: {len(example.input_ids)} tokens, {example.labels} carry loss"


def _rendered(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase, *, coloured: bool) -> str:
    """The text of an example, tokens that carry loss in green, or between [[ and ]]."""
    opens, closes = (_GREEN, _END) if coloured else ("[[", "]]")
    plain, plain_end = (_GREY, _END) if coloured else ("", "")
    edges = [0, max(1, example.prompt_length)]
    for start, end in example.gaps:
        edges += [start, end]
    edges.append(len(example.input_ids))
    parts = []
    for number, (start, end) in enumerate(pairwise(edges)):
        text = _printable(str(tokenizer.decode(example.input_ids[start:end])))
        if start < end:
            parts.append(f"{opens}{text}{closes}" if number % 2 else f"{plain}{text}{plain_end}")
    return "".join(parts)


def _printable(text: str) -> str:
    """Without codes that would command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
