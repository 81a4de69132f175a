"""Score a model as a run's configuration says: what training and the evaluate command share."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.config import RunConfig
from qdora.data.example import Example
from qdora.evaluation.evaluate import Scores, evaluate
from qdora.parallel.processes import Processes


def score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: RunConfig,
    processes: Processes,
    *,
    show_progress: bool = True,
) -> list[Scores]:
    """Exact match on test examples, split over the processes; one entry a task.

    Raises: InputError: prompt and answer do not fit into the model's context.
    """
    return evaluate(
        model,
        tokenizer,
        examples[: config.evaluation.limit],
        prompt=config.data.prompt,
        max_new_tokens=config.evaluation.max_new_tokens,
        batch_size=config.evaluation.batch_size,
        kind=config.data.test.answer_kind,
        rank=processes.rank,
        world_size=processes.count,
        gather=processes.gather,
        show_progress=show_progress and processes.is_main,
    )
