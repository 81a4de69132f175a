"""What a training step on real tensors holds and sends, told apart as an estimate does."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from qdora.adapters.inject import adapted_layers
from qdora.distributed.context import DistributedContext
from qdora.planner.internals import StepTracker
from qdora.planner.report import Part, StepRecord
from qdora.planner.simulate import Launch, record_worst_step


class RealTracker(StepTracker):
    """Answers nothing itself: there are numbers to read."""

    def _compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


def record_real_step(model: PreTrainedModel, launch: Launch, context: DistributedContext) -> StepRecord:
    """As `record_step`, of a loaded and adapted model."""
    tracker = RealTracker(model.config.vocab_size)
    with tracker:
        for layer in adapted_layers(model).values():
            kept = [layer._norms._w2_O, layer._norms._norm_O]
            kept += [] if layer.update is None else layer.update.extra_tensors().values()
            tracker.mark((tensor for tensor in kept if tensor is not None), Part.ADAPTERS)
        tracker.follow_fsdp(model)
        return record_worst_step(model, launch, context, tracker)
