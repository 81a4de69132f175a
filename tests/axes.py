"""Points on the axes quantization, low-rank update and magnitude, by short names, for parametrized tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from qdora.adapters.full import train_everything
from qdora.adapters.inject import InjectionReport, inject
from qdora.config import AdapterConfig


@dataclass(frozen=True)
class Axes:
    """One point.

    Attributes:
        quantization: of the base weight.
        update: `adapter.type`; None where there is none.
        dora: whether there is a magnitude.
        full: every weight is trained.
    """

    quantization: str
    update: str | None
    dora: bool
    full: bool = False


METHODS = {
    "lora": Axes("none", "lora", dora=False),
    "dora": Axes("none", "lora", dora=True),
    "qlora": Axes("nf4", "lora", dora=False),
    "qdora": Axes("nf4", "lora", dora=True),
    "vera": Axes("none", "vera", dora=False),
    "qvera": Axes("nf4", "vera", dora=False),
    "dvora": Axes("none", "vera", dora=True),
    "qdvora": Axes("nf4", "vera", dora=True),
    "gated": Axes("none", "gated_lora", dora=False),
    "qgated": Axes("nf4", "gated_lora", dora=False),
    "gdora": Axes("none", "gated_lora", dora=True),
    "qgdora": Axes("nf4", "gated_lora", dora=True),
    "magnitude": Axes("none", None, dora=True),
    "qmagnitude": Axes("nf4", None, dora=True),
    "full": Axes("none", None, dora=False, full=True),
}


def axes_keys(method: str) -> dict[str, Any]:
    """The point's keys in an adapter section."""
    return {"type": METHODS[method].update or "none", "dora": METHODS[method].dora}


def adapter_config(method: str = "qdora", **settings: Any) -> AdapterConfig:
    """An adapter of the point, with other settings."""
    return AdapterConfig(**axes_keys(method), **settings)


def adapt(model: nn.Module, method: str, *, seed: int = 0, **settings: Any) -> InjectionReport:
    """Give a model what the point trains."""
    if METHODS[method].full:
        return train_everything(model)
    return inject(model, adapter_config(method, **settings), seed=seed)
