"""What a run shows: its data, a bar while it trains, and a table at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from tabulate import tabulate
from tqdm import tqdm

from qdora.adapters.gated import GATES
from qdora.adapters.inject import InjectionReport
from qdora.adapters.saved import CONFIG_FILE
from qdora.config import DataConfig
from qdora.data.token_table import have_gaps, labels_of, lengths_of
from qdora.errors import not_installed
from qdora.files import read_json
from qdora.run import RunDirectory
from qdora.tasks.prepare import PreparedData
from qdora.training.metrics import StepMetrics, ValidationMetrics

_FORMAT = "{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}"
"""Short enough that all of it stands in 80 columns; the bar takes what is left of a wider terminal."""


class TrainingBar:
    """Steps done, time left, losses, tokens per second and memory, on standard error of the main rank."""

    def __init__(self, total_steps: int, start: int, *, shown: bool) -> None:
        # A log file wants a line now and then, a terminal a live bar.
        interval = 0.5 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=total_steps,
            initial=start,
            disable=not shown,
            mininterval=interval,
            dynamic_ncols=True,
            bar_format=_FORMAT,
        )
        self._step: StepMetrics | None = None
        self._validation: ValidationMetrics | None = None

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def show(self, metrics: StepMetrics) -> None:
        """Advance by one step."""
        self._step = metrics
        self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.update()

    def show_validation(self, metrics: ValidationMetrics, *, is_best: bool) -> None:
        """Print a validation above the bar; its loss stays on the bar."""
        self._validation = metrics
        self.say(f"step {metrics.step}: {metrics}{', the best so far' if is_best and metrics.step else ''}")
        self._bar.set_postfix_str(self._figures())

    def working(self, what: str) -> None:
        """Say why the bar stands still."""
        self._bar.set_postfix_str(what)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def _figures(self) -> str:
        figures = []
        if self._step is not None:
            figures.append(f"loss {self._step.loss:.4f}")
        if self._validation is not None:
            figures.append(f"val {self._validation.validation_loss:.4f}")
        if self._step is not None:
            figures.append(f"{self._step.tokens_per_second:,.0f} tok/s")
            figures.append(f"{self._step.peak_memory_bytes / 2**30:.1f} GiB")
        return ", ".join(figures)


def summarize(
    directory: RunDirectory,
    steps: Sequence[StepMetrics],
    validations: Sequence[ValidationMetrics],
    others: Mapping[str, str],
) -> str:
    """The table that a run ends with, and what to do next.

    Args:
        others: rows about what was trained.
    """
    manifest = directory.manifest()
    stopped, best = manifest.get("stopped_early"), manifest.get("best")
    seconds = sum(m.seconds for m in steps)
    rows = [("steps", f"{len(steps)} of {manifest['steps']}, stopped early" if stopped else f"{len(steps)}")]
    if steps:
        rows.append(("loss, first and last", f"{steps[0].loss:.4f} → {steps[-1].loss:.4f}"))
    if validations:
        losses = [m.validation_loss for m in validations]
        lowest = min(validations, key=lambda m: m.validation_loss)
        rows.append(("validation loss", f"{losses[0]:.4f} → {losses[-1]:.4f}"))
        rows.append(("lowest validation loss", f"{lowest.validation_loss:.4f} after step {lowest.step}"))
        found = [
            (m.validation_exact_match, -m.step) for m in validations if m.validation_exact_match is not None
        ]
        if found:
            highest, step = max(found)
            rows.append(("highest exact match", f"{highest:.1%} after step {-step}"))
    rows += others.items()
    if steps:
        rows.append(("tokens/s", f"{sum(m.tokens for m in steps) / seconds:,.0f}"))
        rows.append(("peak memory", f"{max(m.peak_memory_bytes for m in steps) / 2**30:.2f} GiB"))
    validating = sum(m.seconds for m in validations)
    spent = f"{_duration(seconds)} training"
    rows.append(("time", f"{spent}, {_duration(validating)} validating" if validations else spent))
    rows.append(("adapter", str(directory.adapter)))
    if best:
        rows.append(("best adapter", f"{directory.best_adapter}, of step {best['step']}"))
    rows.append(("loss plot", shown_plot(directory)))
    best_option = " [--best]" if best else ""
    examples = manifest["data"]
    if examples["test"] or examples.get("validation"):
        split = "" if examples["test"] else " --split validation"
        rows.append(("score it", f"qdora evaluate --run {directory.path}{best_option}{split}"))
    rows.append(("ask it", f"qdora chat --run {directory.path}{best_option}"))
    rows.append(("export it", f"qdora export --run {directory.path}{best_option} --output DIR"))
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def shown_plot(directory: RunDirectory) -> str:
    """Where the loss plot is, or what it takes to have one."""
    lacking = not_installed("matplotlib")
    return f"not drawn, it needs {lacking}" if lacking else str(directory.loss_plot)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def data_lines(data: PreparedData, config: DataConfig) -> list[str]:
    """What a run says of its data before it trains."""
    lines = [f"{len(data.train)} training examples; no test set (data.test)"]
    if config.test is not None:
        lines = [
            f"{len(data.train)} training examples, {len(data.test)} test examples; "
            f"{data.leaked} training examples removed because their question is a test question"
        ]
    if data.stream is not None:
        lines = [
            "training examples are streamed; what follows is of the first rows of them",
            f"{len(data.train)} examples; {data.leaked} removed because their question is a test question; "
            f"{len(data.test)} test examples",
        ]
    if have_gaps(data.train) or config.loss_on != "assistant":
        share = labels_of(data.train) / sum(lengths_of(data.train))
        lines.append(f"{100 * share:.1f}% of the training tokens carry loss (data.loss_on)")
    if data.validation:
        origin = "left out of training"
        if data.leaked_of_validation is not None:
            origin = f"of data.validation, without {data.leaked_of_validation} that are test questions"
        lines.append(
            f"{len(data.validation)} validation examples {origin}; "
            f"{data.leaked_validation} training examples removed because their question is one of theirs"
        )
    lines += [f"skipped {row}" for row in data.skipped[:5]]
    if len(data.skipped) > 5:
        lines.append(f"... {len(data.skipped)} rows skipped in all")
    if data.special_text:
        parsed = "that token" if config.parse_special_tokens else "ordinary text"
        lines.append(
            f"examples with the text of a special token: {len(data.special_text)}, the first "
            f"{data.special_text[0]}; it is read as {parsed} (data.parse_special_tokens)"
        )
    return lines


def trained_rows(directory: RunDirectory, report: InjectionReport) -> dict[str, str]:
    """Rows of the last table about what was trained."""
    rows = {"trainable parameters": f"{report.trainable:,} ({report.percentage:.2f}%)"}
    gates = list(read_json(directory.adapter / CONFIG_FILE).get(GATES, {}).values())
    if gates:
        spread = f"{min(gates):.4f} to {max(gates):.4f}, mean {sum(gates) / len(gates):.4f}"
        rows["gates"] = f"{spread}; each layer's in adapter/{CONFIG_FILE}"
    return rows
