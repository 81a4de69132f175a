"""The scores of one task: results of every scorer, their uncertainty, predictions, and their two files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from pydantic import TypeAdapter, ValidationError

from qdora.data.readers import read_text
from qdora.errors import InputError
from qdora.files import parse_object, read_json, staging_directory, write_json, write_text
from qdora.output import locked
from qdora.tasks.base import Task
from qdora.tasks.scoring import RULES, Verdict


@dataclass(frozen=True)
class PairedDifference:
    """Two sets of answers to the same questions.

    Attributes:
        difference: fraction correct of a minus fraction correct of b, between -1 and 1.
        stderr: standard error of the difference; pairs are compared, so question difficulty cancels.
        p_value: two-sided exact McNemar test of "a and b are equally good".
        total: questions.
    """

    difference: float
    stderr: float
    p_value: float
    total: int


def binomial_stderr(correct: int, total: int) -> float:
    """Standard error of a fraction of correct answers, sqrt(p (1 - p) / n); 0 at p = 0 and 1.

    Raises: ValueError: not 0 <= correct <= total, or total is 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} correct of {total}")
    p = correct / total
    return math.sqrt(p * (1 - p) / total)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95% interval of a fraction of correct answers; unlike p ± 2 stderr it stays honest near 0 and 1.

    Raises: ValueError: not 0 <= correct <= total, or total is 0.
    Source: Wilson, JASA 22 (1927) 209.
    """
    from scipy.stats import binomtest  # half a second to import

    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> PairedDifference:
    """Compare two sets of answers to the same questions, in the same order.

    Raises: ValueError: lengths differ, or there are no questions.
    Source: McNemar, Psychometrika 12 (1947) 153, in its exact (binomial) form.
    """
    from scipy.stats import binomtest

    total = len(correct_a)
    if total != len(correct_b):
        raise ValueError(f"paired comparison of {total} with {len(correct_b)} answers")
    if total == 0:
        raise ValueError("paired comparison of no answers")
    differences = np.asarray(correct_a, dtype=int) - np.asarray(correct_b, dtype=int)
    discordant = int(np.count_nonzero(differences))
    only_a = int(np.count_nonzero(differences > 0))
    return PairedDifference(
        difference=float(differences.mean()),
        stderr=float(differences.std() / math.sqrt(total)),
        p_value=float(binomtest(only_a, discordant).pvalue) if discordant else 1.0,
        total=total,
    )


@dataclass(frozen=True)
class ScorerResult:
    """One scorer's exact match.

    Attributes:
        score: fraction of correct answers, between 0 and 1.
        correct: number of correct answers.
        stderr: binomial standard error of `score`.
        interval: 95% Wilson interval of `score`.
        no_answer: outputs in which the scorer found no answer; they are wrong.
    """

    score: float
    correct: int
    stderr: float
    interval: tuple[float, float]
    no_answer: int


@dataclass(frozen=True)
class RankedOption:
    """An option of a choice.

    Attributes:
        answer: by which it is compared with the gold answer.
        text: what follows the prompt, and whose characters count.
        log_probability: of the text's tokens behind the prompt, summed, in nats.
    """

    answer: str
    text: str
    log_probability: float


@dataclass(frozen=True)
class Prediction:
    """One question with the model's output and its verdicts.

    Attributes:
        origin: `Example.origin`, by which predictions of two models are paired.
        prompt: the text given to the model.
        output: the text generated, without special tokens; empty where options were only ranked.
        extracted, gold, correct: the headline scorer's verdict.
        tokens: generated tokens.
        stopped: whether the output ended with EOS; False where it was cut off at the limit.
        scorers: the verdict of every scorer, by its name, the headline scorer first.
        options: with their log-probabilities, where they were ranked.
    """

    origin: str
    prompt: str
    output: str
    extracted: str | None
    gold: str | None
    correct: bool
    tokens: int
    stopped: bool
    scorers: dict[str, Verdict]
    options: tuple[RankedOption, ...] = ()


@dataclass(frozen=True)
class Scores:
    """The evaluation of one task.

    Attributes:
        task: name of the task.
        metric: `exact_match` of generated answers; `accuracy` where options were only ranked.
        score, correct, stderr, interval: by the headline scorer, see `ScorerResult`.
        total: number of questions.
        scorer: name of the headline scorer.
        per_scorer: the result of every scorer, by its name.
        decoding: how answers were generated, or options ranked.
        generated_tokens: over all questions and processes.
        seconds: wall-clock time of both.
        cut_off: outputs that reached the token limit without EOS.
        predictions: one per question, in the order of the examples.
        rules: version of the rules by which answers were read, `scoring.RULES`; files before 2 do not say it.
    """

    task: str
    metric: str
    score: float
    correct: int
    total: int
    stderr: float
    interval: tuple[float, float]
    scorer: str
    per_scorer: dict[str, ScorerResult]
    decoding: dict[str, object]
    generated_tokens: int
    seconds: float
    cut_off: int
    predictions: tuple[Prediction, ...]
    rules: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall-clock time, over all processes."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.task}: {self.metric.replace('_', ' ')} {100 * self.score:.1f}% ± {100 * self.stderr:.1f} "
            f"({self.correct}/{self.total})"
        )


def summarize(
    task: Task, predictions: Sequence[Prediction], decoding: Mapping[str, object], seconds: float
) -> Scores:
    """Compute the scores of one task from its predictions, by the scorers that these have.

    Raises: ValueError: there are none.
    """
    if not predictions:
        raise ValueError(f"no predictions of task {task.name!r}")
    scorers = list(predictions[0].scorers)
    per_scorer = {name: _result([p.scorers[name] for p in predictions]) for name in scorers}
    result = per_scorer[scorers[0]]
    return Scores(
        task=task.name,
        metric="exact_match" if scorers[0] in task.scorers else "accuracy",
        score=result.score,
        correct=result.correct,
        total=len(predictions),
        stderr=result.stderr,
        interval=result.interval,
        scorer=scorers[0],
        per_scorer=per_scorer,
        decoding=dict(decoding),
        generated_tokens=sum(p.tokens for p in predictions),
        seconds=seconds,
        cut_off=sum(not p.stopped for p in predictions),
        predictions=tuple(predictions),
        rules=RULES,
    )


def _result(verdicts: Sequence[Verdict]) -> ScorerResult:
    correct, total = sum(v.correct for v in verdicts), len(verdicts)
    return ScorerResult(
        stderr=binomial_stderr(correct, total),
        score=correct / total,
        correct=correct,
        interval=wilson_interval(correct, total),
        no_answer=sum(v.extracted is None for v in verdicts),
    )


def write_scores(scores: Scores, directory: str | Path) -> Path:
    """Write one task's two files, over those of an earlier evaluation.

    A `TASK.json` that exists always has its own predictions beside it.

    Args:
        directory: created where it is missing.
    Returns: the path of `TASK.json`; what a file name cannot hold is percent-encoded (`org%2Fname.json`).
    Raises: InputError: they cannot be written; on a full disk those of an earlier evaluation stay.
    """
    tree = asdict(scores) | {"tokens_per_second": scores.tokens_per_second}
    lines = [json.dumps(prediction) + "\n" for prediction in tree.pop("predictions")]
    # Encoded, not replaced: two tasks never have the same file.
    return write_pair(Path(directory), quote(scores.task, safe=""), tree, "predictions", lines)


def write_pair(directory: Path, stem: str, tree: Mapping[str, Any], name: str, lines: Sequence[str]) -> Path:
    """Write `STEM.json` and `STEM.NAME.jsonl`, over those of an earlier evaluation.

    Raises: InputError: as `write_scores`.
    """
    path, lines_path = directory / f"{stem}.json", directory / f"{stem}.{name}.jsonl"
    try:
        # Both are on the disk before one is replaced, so that a full disk changes nothing.
        with staging_directory(directory / stem) as staging:
            write_text(staging / lines_path.name, "".join(lines))
            write_json(staging / path.name, tree)
            path.unlink(missing_ok=True)
            for target in (lines_path, path):
                (staging / target.name).replace(target)
    except (OSError, InputError) as error:
        raise InputError(f"{path}: scores cannot be written: {error}") from error
    return path


@contextmanager
def locked_reports(folder: Path, task: str | None) -> Iterator[None]:
    """Keep other processes from writing the reports of a task, or of all tasks, to a folder.

    Raises: InputError: another process does; the folder cannot be written.
    """
    file, name = folder / ".reports.lock", f"the folder of reports {folder}"
    with ExitStack() as stack:
        stack.enter_context(locked(file, name, shared=task is not None))
        if task is not None:
            own = file.with_name(f".{quote(task, safe='')}.lock")
            stack.enter_context(locked(own, f"{name}, task {task}"))
        yield


def read_scores(path: str | Path) -> Scores:
    """Read one task's scores and predictions back.

    Args:
        path: `TASK.json`; the predictions are in the same folder.
    Raises: InputError: a file is missing, is not what `write_scores` writes, or the two disagree.
    """
    path = Path(path)
    predictions_path = path.with_name(f"{path.stem}.predictions.jsonl")
    tree = read_json(path)
    lines = read_text(predictions_path).split("\n")[:-1]
    predictions = [parse_object(line, f"{predictions_path}:{n}") for n, line in enumerate(lines, 1)]
    try:
        scores = TypeAdapter(Scores).validate_python({**tree, "predictions": predictions})
    except ValidationError as error:
        problem = error.errors()[0]
        at, *key = problem["loc"]
        where = f"{path}: not a score file of this program: {at}"
        if at == "predictions":
            where = f"{predictions_path}:{int(key.pop(0)) + 1}: not a prediction of this program"
        raise InputError(": ".join([where, *map(str, key), problem["msg"]])) from None
    if scores.total != len(lines):
        raise InputError(f"{path}: {scores.total} questions, but {predictions_path} has {len(lines)} lines")
    return scores


def read_reports(folder: Path) -> list[Scores]:
    """`read_scores` of every task that was evaluated into a folder, in order of their file names."""
    return [read_scores(path) for path in sorted(folder.glob("*.json"))]
