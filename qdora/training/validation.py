"""Validation during training: the loss on examples left out of it, the best step so far, when to stop.

A validation draws no random number and leaves no trace in the model, so the training's numbers are those of
a run without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from qdora.config import DataConfig
from qdora.data.rows import Example, Skipped
from qdora.data.tokenize import TokenizedExample, tokenize_examples
from qdora.errors import InputError
from qdora.training.attention import training_attention
from qdora.training.best import ValidationState
from qdora.training.loop import DivergedError, Trainer
from qdora.training.metrics import ValidationMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HeldOut = Mapping[str, Sequence[TokenizedExample]]
"""Validation examples by task."""


def hold_out(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> tuple[dict[str, list[TokenizedExample]], list[Skipped]]:
    """Tokenize validation examples as training examples are.

    Returns: the examples by task, and those that are too long.
    Raises: DataError: one is too long, and `data.bad_rows` is `stop`.
        InputError: none is left.
    """
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task, []).append(example)
    found, skipped = {}, []
    for task, of_task in by_task.items():
        fitting, too_long = tokenize_examples(
            of_task,
            tokenizer,
            config.prompt,
            config.max_length,
            config.bad_rows,
            parse_special_tokens=config.parse_special_tokens,
        )
        skipped += too_long
        if fitting:
            found[task] = fitting
    if not found:
        raise InputError(
            f"evaluation.loss_every: no validation example fits into data.max_length {config.max_length}"
        )
    return found, skipped


@torch.no_grad()
def validation_losses(trainer: Trainer, held_out: HeldOut) -> tuple[float, dict[str, float]]:
    """Mean loss over the completion tokens of all tasks, and of each; a collective.

    The ranks share the micro-batches, which do not depend on how many ranks there are.
    """
    model, context = trainer.model, trainer.context
    sums = torch.zeros(2, len(held_out), dtype=torch.float64, device=context.device)
    model.eval()
    with training_attention(model):
        for number, examples in enumerate(held_out.values()):
            for batch in trainer.batches([[example] for example in examples]):
                sums[0, number] += trainer.loss(batch.to(context.device))
                sums[1, number] += len(batch.targets_N)
    losses, tokens = context.sum(sums.flatten()).view(2, -1)
    means = (losses / tokens).tolist()
    return float(losses.sum() / tokens.sum()), dict(zip(held_out, means, strict=True))


class Validator:
    """The callback of the loop that validates.

    Args:
        held_out: of `hold_out`.
        state: as the checkpoint has it from which the run goes on.
        log: takes each validation, and whether it is the best so far; on the main rank.
        keep: takes the state whose last step is the best one; a collective.
        score: fraction of correct answers to the validation examples after a step; a collective. None: the
            best step is that of the lowest loss.
    """

    def __init__(
        self,
        trainer: Trainer,
        held_out: HeldOut,
        state: ValidationState,
        *,
        log: Callable[[ValidationMetrics, bool], None],
        keep: Callable[[ValidationState], None],
        score: Callable[[int], float] | None = None,
    ) -> None:
        self.trainer, self.held_out, self.state = trainer, held_out, state
        self._log, self._keep, self._score = log, keep, score

    def __call__(self, step: int) -> bool:
        """Validate after `step`, unless that was done before a run went on from there.

        Returns: whether `training.patience` is exhausted.
        Raises: DivergedError: the loss is not finite.
        """
        if step > self.state.step:
            self._validate(step)
        patience = self.trainer.config.patience
        return patience is not None and self.state.since >= patience

    def _validate(self, step: int) -> None:
        started = time.perf_counter()
        loss, losses = validation_losses(self.trainer, self.held_out)
        if not math.isfinite(loss):
            raise DivergedError(
                f"step {step}: the validation loss is {loss}. Lower training.learning_rate, or look at the "
                f"validation examples"
            )
        exact_match = None if self._score is None else self._score(step)
        metrics = ValidationMetrics(
            step=step,
            validation_loss=loss,
            seconds=time.perf_counter() - started,
            validation_losses=losses if len(losses) > 1 else {},
            validation_exact_match=exact_match,
        )
        if exact_match is None:
            self.state = self.state.after(step, loss, "loss")
        else:
            self.state = self.state.after(step, exact_match, "exact_match")
        is_best = self.state.best_step == step
        if self.trainer.context.is_main:
            self._log(metrics, is_best)
        if is_best:
            self._keep(self.state)
