"""What a training step on real tensors holds and sends, told apart as an estimate does."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from qdora.adapters.inject import adapted_layers
from qdora.distributed.context import DistributedContext
from qdora.planner.internals import _COLLECTIVES, StepTracker
from qdora.planner.report import Breakdown, Part
from qdora.planner.simulate import Launch, StepRecord, _WorstBatch, shard_sizes


class RealTracker(StepTracker):
    """Answers nothing itself: there are numbers to read."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(kind is torch.distributed.tensor.DTensor for kind in types):
            return NotImplemented
        result = func(*args, **kwargs or {})
        if not self._shapes_only:
            if func in _COLLECTIVES:
                self._count(func, args)
            tree_map_only(torch.Tensor, partial(self._see, func), result)
            self._look()
        return result


def record_real_step(model: PreTrainedModel, launch: Launch, context: DistributedContext) -> StepRecord:
    """As `record_step`, of a loaded and adapted model."""
    tracker = RealTracker(model.config.vocab_size)
    with tracker:
        for layer in adapted_layers(model).values():
            kept = layer._norms._w2_O
            tracker.mark([] if kept is None else [kept], Part.ADAPTERS)
        tracker.follow_fsdp(model)
        trainer = _WorstBatch(model, launch, context, tracker)
        trainer.make_optimizer_state()
        trainer.mark_what_stays()
        at_rest: Breakdown = tracker.current
        tracker.restart()
        trainer.run_step()
    return StepRecord(tracker.peaks, at_rest, shard_sizes(model), dict(tracker.exchanged))
