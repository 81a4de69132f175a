"""`demo`: train the shipped quickstart, with answers before and after; its model is loaded once."""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from qdora.adapters.base import describe
from qdora.adapters.inject import adapters_off
from qdora.commands.train import train
from qdora.config import RunConfig
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.export.merged import merge_and_export
from qdora.export.verify import verify_export
from qdora.run import RunDirectory
from qdora.tasks.shots import draw_shots
from qdora.training.metrics import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qdora.evaluation.scores import Prediction, Scores
    from qdora.tasks.prepare import PreparedData

SHOWN = 10
"""Questions with the answers before and after."""
_WIDTH = 100


def demo(arguments: argparse.Namespace, config: RunConfig) -> None:
    """Evaluate before and after training, export, report."""
    started = time.perf_counter()
    context = DistributedContext.from_launch(config.training.trackers, config.output.dir)
    if context.world_size > 1:
        raise InputError("the demo is one process's; start it without a launcher, as make demo does")
    directory, output = RunDirectory(config.output.dir), Path(arguments.export)

    def score(
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData, folder: Path
    ) -> None:
        from qdora.evaluation.evaluate import evaluate_configured  # with transformers' generation
        from qdora.evaluation.scores import write_scores

        shots = draw_shots(config, tokenizer, data.test)
        for scores in evaluate_configured(model, tokenizer, data.test, config, context, shots=shots):
            write_scores(scores, folder)

    def before(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
        _title("Before training")
        # A fresh adapter leaves the quantized base as it is, unless its magnitude is the original weight's.
        moved = config.adapter.magnitude_start == "original"
        with adapters_off(model) if moved else nullcontext():
            score(model, tokenizer, data, directory.base_evaluation)
        _title("Training")

    def after(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreparedData) -> None:
        _title("After training")
        model.eval()
        score(model, tokenizer, data, directory.evaluation)
        _title("Export")
        folder = merge_and_export(model, tokenizer, output, "fp16", overwrite=True)
        print(f"merged weights: {folder}")
        print(verify_export(folder, model))

    train(config, context=context, before=before, after=after)
    print("\n" + summary(config, directory, output, time.perf_counter() - started))


def summary(config: RunConfig, directory: RunDirectory, export: Path, seconds: float) -> str:
    """What was shown, questions with the answers before and after, and the figures."""
    from qdora.evaluation.scores import read_reports

    [before], [after] = read_reports(directory.base_evaluation), read_reports(directory.evaluation)
    manifest = directory.manifest()
    steps = read_metrics(directory.metrics_file)
    trained = manifest["trainable_parameters"]
    total = trained + manifest["base"]["parameters"]
    speed = sum(m.tokens for m in steps) / sum(m.seconds for m in steps)
    method = describe(config.model.quantization, config.adapter, config.training.mode)
    sentence = (
        f"{total - trained:,} parameters, {trained:,} more trained by {method} in {len(steps)} steps: of "
        f"{after.total} questions that it has not seen, the model answers {after.correct} right, and "
        f"answered {before.correct} before."
    )
    rows = [
        ("exact match before", _percent(before)),
        ("exact match after", _percent(after)),
        ("gain", f"{100 * (after.score - before.score):+.1f} points"),
        ("trainable parameters", f"{trained:,} of {total:,} ({100 * trained / total:.2f}%)"),
        ("training speed", f"{speed:,.0f} tokens/s"),
        ("peak memory", f"{max(m.peak_memory_bytes for m in steps) / 2**30:.2f} GiB"),
        ("time", f"{seconds / 60:.1f} minutes"),
        ("run", directory.path),
        ("adapter", directory.adapter),
        ("loss plot", directory.loss_plot),
        ("merged fp16 weights", export),
        ("ask it yourself", f"qdora chat --run {directory.path} --base"),
    ]
    table = tabulate(rows, tablefmt="rounded_outline", disable_numparse=True)
    shown = _answers(before.predictions, after.predictions)
    return f"{textwrap.fill(sentence, _WIDTH)}\n\n{shown}\n\n{table}"


def _answers(before: Sequence[Prediction], after: Sequence[Prediction]) -> str:
    """Questions at equal distances, none chosen by its answer, with both answers."""
    count = min(SHOWN, len(after))
    chosen = [i * len(after) // count for i in range(count)]
    blocks = []
    for number, index in enumerate(chosen, start=1):
        question = _question(after[index].prompt)
        lines = [textwrap.fill(f"{number}. {question}", _WIDTH, subsequent_indent="   ")]
        for when, prediction in (("before", before[index]), ("after", after[index])):
            mark = "right" if prediction.correct else "wrong"
            output = " ".join(prediction.output.split()) or "(nothing)"
            shown = textwrap.shorten(output, 2 * _WIDTH, placeholder=" ...")
            start = f"   {when:<6} {mark}: "
            lines.append(textwrap.fill(start + shown, _WIDTH, subsequent_indent=" " * len(start)))
        blocks.append("\n".join([*lines, f"   it is {after[index].gold}"]))
    return "\n\n".join(blocks)


def _question(prompt: str) -> str:
    """A prompt without the lines of its template, which begin with a # or end with a colon."""
    lines = [line.strip() for line in prompt.splitlines()]
    own = [line for line in lines if line and not line.startswith("#") and not line.endswith(":")]
    return " ".join(own)


def _title(title: str) -> None:
    print(f"\n== {title}", file=sys.stderr, flush=True)


def _percent(scores: Scores) -> str:
    return f"{100 * scores.score:.1f}% ± {100 * scores.stderr:.1f}  ({scores.correct}/{scores.total})"
