"""What an evaluation of one task comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qdora.evaluation.answers import SCORERS, Verdict
from qdora.evaluation.statistics import binomial_stderr, wilson_interval
from qdora.evaluation.tasks import Task


@dataclass(frozen=True)
class ScorerResult:
    """One scorer's exact match.

    Attributes:
        score: share of correct answers, between 0 and 1.
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
class Prediction:
    """One question, what the model made of it, and how it was judged.

    Attributes:
        origin: `Example.origin`, by which predictions of two models are paired.
        prompt: the text given to the model.
        output: the text generated, without special tokens.
        extracted, gold, correct: the headline scorer's verdict.
        tokens: generated tokens.
        stopped: whether the output ended with EOS; False where it was cut off at the limit.
        scorers: the verdict of every scorer, by its name.
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


@dataclass(frozen=True)
class Scores:
    """The evaluation of one task.

    Attributes:
        task: name of the task.
        metric: always `exact_match`.
        score, correct, stderr, interval: by the headline scorer, see `ScorerResult`.
        total: number of questions.
        scorer: name of the headline scorer.
        per_scorer: the result of every scorer, by its name.
        decoding: how answers were generated.
        generated_tokens: over all questions and processes.
        seconds: wall-clock time of the generation.
        cut_off: outputs that reached the token limit without EOS.
        predictions: one per question, in the order of the examples.
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

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall-clock time, over all processes."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        return (
            f"{self.task}: exact match {100 * self.score:.1f}% ± {100 * self.stderr:.1f} "
            f"({self.correct}/{self.total})"
        )


def summarize(
    task: Task, predictions: Sequence[Prediction], decoding: Mapping[str, object], seconds: float
) -> Scores:
    """Add up the predictions of one task.

    Raises: ValueError: there are none.
    """
    per_scorer = {name: _result([p.scorers[name] for p in predictions]) for name in SCORERS[task.kind]}
    headline = SCORERS[task.kind][0]
    result = per_scorer[headline]
    return Scores(
        task=task.name,
        metric="exact_match",
        score=result.score,
        correct=result.correct,
        total=len(predictions),
        stderr=result.stderr,
        interval=result.interval,
        scorer=headline,
        per_scorer=per_scorer,
        decoding=dict(decoding),
        generated_tokens=sum(p.tokens for p in predictions),
        seconds=seconds,
        cut_off=sum(not p.stopped for p in predictions),
        predictions=tuple(predictions),
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
