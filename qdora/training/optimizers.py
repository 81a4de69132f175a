"""Optimizers by name: the library that each comes from, what it is told, and where it cannot be used."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qdora.config import TrainingConfig
from qdora.errors import InputError, suggest


@dataclass(frozen=True)
class OptimizerKind:
    """One row of the table.

    Attributes:
        module, name: of the class in its library.
        takes_betas: whether `training.beta1` and `beta2` are its betas; otherwise it has its own defaults.
        not_sharded: why it cannot update shards, or None: an element's update depends on that element alone.
        cuda_only: whether it needs a CUDA GPU.
        fixed: arguments that are always given.
    """

    module: str
    name: str
    takes_betas: bool = True
    not_sharded: str | None = None
    cuda_only: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def make(self, groups: Sequence[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
        """The optimizer.

        Args:
            groups: parameters, each group with its learning rate.
        """
        given: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        if self.takes_betas:
            given["betas"] = (config.beta1, config.beta2)
        if self.module == "optimi" and groups[0]["params"][0].device.type == "cpu":
            given["triton"] = False  # StableAdamW would choose it there too
        found: torch.optim.Optimizer = self._class(
            list(groups), **given, **self.fixed, **config.optimizer_options
        )
        return found

    def options(self) -> list[str]:
        """What `training.optimizer_options` may say."""
        known = inspect.signature(self._class.__init__).parameters
        elsewhere = _ELSEWHERE if self.takes_betas else _ELSEWHERE.keys() - {"betas"}
        return [name for name in known if name not in {*_NO_OPTIONS, *elsewhere, *self.fixed}]

    @property
    def _class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


_ROWS = "it keeps means over rows and columns of a full matrix"
_NORM = "it scales an update by the norm of the full tensor"
_BLOCKS = "bitsandbytes keeps moments in blocks of a full tensor"

OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind("torch.optim", "AdamW", fixed={"fused": True}),
    "sgd": OptimizerKind("torch.optim", "SGD", takes_betas=False),
    "rmsprop": OptimizerKind("torch.optim", "RMSprop", takes_betas=False),
    "adafactor": OptimizerKind("torch.optim", "Adafactor", takes_betas=False, not_sharded=_ROWS),
    "adamw8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit", not_sharded=_BLOCKS),
    "paged_adamw": OptimizerKind(
        "bitsandbytes.optim", "PagedAdamW32bit", not_sharded=_BLOCKS, cuda_only=True
    ),
    "paged_adamw8bit": OptimizerKind(
        "bitsandbytes.optim", "PagedAdamW8bit", not_sharded=_BLOCKS, cuda_only=True
    ),
    "kahan_adamw": OptimizerKind("optimi", "AdamW"),
    "stableadamw": OptimizerKind("optimi", "StableAdamW", not_sharded=_NORM),
    "radam": OptimizerKind("optimi", "RAdam"),
    "ranger": OptimizerKind("optimi", "Ranger"),
    "adan": OptimizerKind("optimi", "Adan", takes_betas=False),
    "lion": OptimizerKind("optimi", "Lion", takes_betas=False),
}
"""By the name in `training.optimizer`."""

_ELSEWHERE = {
    "lr": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "betas": "training.beta1 and training.beta2",
}
"""Arguments that have keys of their own."""
_NO_OPTIONS = {
    *("self", "params", "args", "optim_bits", "is_paged", "block_wise", "amsgrad", "maximize"),
    *("foreach", "fused", "capturable", "differentiable", "triton", "gradient_release"),
    *("max_lr", "decouple_lr"),
}
"""Arguments that choose an implementation, or would change what the other keys mean."""


def check_optimizer(config: TrainingConfig, device: torch.device, *, sharded: bool) -> None:
    """Refuse an optimizer or options of it that cannot be used, before a weight is read.

    Raises: InputError: the key, what came and what is allowed.
    """
    name, kind = config.optimizer, OPTIMIZERS[config.optimizer]
    allowed = kind.options()
    for option in config.optimizer_options:
        if option in allowed:
            continue
        if option in _ELSEWHERE:
            raise InputError(f"training.optimizer_options.{option}: set {_ELSEWHERE[option]} instead")
        raise InputError(f"training.optimizer_options: {name} has no {option!r}; {suggest(option, allowed)}")
    if not kind.takes_betas and (config.beta1, config.beta2) != _default_betas():
        raise InputError(
            f"training.beta1 and training.beta2 are Adam's and mean nothing to {name!r}; leave them out"
            + (", or set training.optimizer_options.betas" if "betas" in allowed else "")
        )
    if sharded and kind.not_sharded:
        others = ", ".join(other for other, row in OPTIMIZERS.items() if not row.not_sharded)
        raise InputError(
            f"training.optimizer {name!r} cannot train a sharded model: {kind.not_sharded}, of which a rank "
            f"has a shard; allowed under FSDP: {others}"
        )
    if kind.cuda_only and device.type != "cuda":
        raise InputError(
            f"training.optimizer {name!r} moves its moments between a CUDA GPU and the CPU, and this run "
            f"computes on {device.type!r}; allowed here: "
            f"{', '.join(other for other, row in OPTIMIZERS.items() if not row.cuda_only)}"
        )
    try:
        kind.make([{"params": [nn.Parameter(torch.zeros(2, 2))]}], config)
    except (TypeError, ValueError) as error:
        raise InputError(f"training.optimizer_options {config.optimizer_options}: {error}") from None


def _default_betas() -> tuple[float, float]:
    fields = TrainingConfig.model_fields
    return fields["beta1"].default, fields["beta2"].default
