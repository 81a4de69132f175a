"""What a run is: its manifest, and what its ranks must agree on."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from qdora.adapters.adapt import Adapted
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.inject import initial_update_fingerprint
from qdora.adapters.saved import SavedAdapter
from qdora.config import RunConfig
from qdora.data.batches import BatchPlan, Packing
from qdora.data.token_table import lengths_of
from qdora.distributed.context import DistributedContext
from qdora.models.load import compute_dtype
from qdora.run import make_manifest
from qdora.tasks.prepare import PreparedData
from qdora.training.loop import count_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packing_of(config: RunConfig) -> Packing:
    """How the run's examples share rows."""
    return Packing.of(config.data.packing, config.data.max_length)


def input_digests(model: PreTrainedModel, data: PreparedData, start: SavedAdapter | None) -> dict[str, str]:
    """Short digests of what every rank must have read the same, each from its own disk."""
    named = {f"the {part} data": value[:16] for part, value in data.fingerprints.items()}
    if start is not None:
        named["the adapter of adapter.from"] = start.digest[:16]
    return {**named, "the base model": str(base_fingerprint(model))[:16]}


def run_manifest(
    config: RunConfig,
    model: PreTrainedModel,
    data: PreparedData,
    adapted: Adapted,
    context: DistributedContext,
) -> dict[str, Any]:
    """What the run directory says about its run, beside the configuration."""
    report, start = adapted.report, adapted.start
    training, lengths = config.training, lengths_of(data.train)
    rows = packing_of(config).row_tokens
    order = hashlib.sha256(
        repr((training.seed, training.batch_size, lengths, *([] if rows is None else [rows]))).encode()
    )
    if data.stream is not None:
        order.update(b"streamed" + data.fingerprints["train"].encode())
    plan = BatchPlan(lengths, training.batch_size, training.seed, rows)
    fields = {
        "base": {"fingerprint": base_fingerprint(model), "parameters": report.total - report.trainable},
        "data": data.counts(),
        "trainable_parameters": report.trainable,
        "initial_a": initial_update_fingerprint(model) if start is None else start.digest,
        "batch_order": order.hexdigest(),
        "steps": count_steps(training, plan.steps_per_epoch),
        "compute_dtype": str(compute_dtype(config.model.dtype, context.device)),
    }
    if start is not None:
        fields["adapter_from"] = {
            "path": str(start.directory.resolve()),
            "fingerprint": start.digest,
            "base_fingerprint": start.fingerprint,
            "base_model": start.settings.get("base_model_name_or_path"),
        }
    return make_manifest(config, world_size=context.world_size, fields=fields)
