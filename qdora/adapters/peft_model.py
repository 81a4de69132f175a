"""`accelerate`: the DoRA layers of a PEFT model computed by our product, and `restore`, which undoes it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from qdora.adapters.label_logits import logits_at_labels
from qdora.errors import InputError, suggest

DropoutPlacement = Literal["published", "branch"]
MagnitudeStorage = Literal["stored", "float32", "offset"]
Logits = Literal["all", "labelled"]


@dataclass(frozen=True)
class AccelerationReport:
    """What `accelerate` did.

    Attributes:
        accelerated: full names of the layers that compute by our product.
        left: full names of the DoRA layers that PEFT computes as before, and why.
        frozen: what keeps magnitudes from learning, in one sentence; empty where nothing does.
    """

    accelerated: tuple[str, ...]
    left: Mapping[str, str]
    frozen: str = ""

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} DoRA layers accelerated"]
        for reason, count in Counter(self.left.values()).items():
            example = next(name for name, why in self.left.items() if why == reason)
            lines.append(f"{count} left to PEFT ({example}{', ...' if count > 1 else ''}): {reason}")
        return "\n".join([*lines, *([self.frozen] if self.frozen else [])])


def accelerate(
    model: nn.Module,
    *,
    dropout_placement: DropoutPlacement = "published",
    magnitude: MagnitudeStorage = "stored",
    logits: Logits = "all",
) -> AccelerationReport:
    """Compute the DoRA layers of a PEFT model by our product, in place, until `restore`.

    Parameters, bytes and modules stay PEFT's: nothing is copied or quantized again, and saving, loading,
    merging and switching adapters go on as they did.  An adapter that is added later is accelerated where its
    layer is; called again, this takes in layers that have come since, and sets the options anew.

    Args:
        model: of `get_peft_model` or `PeftModel.from_pretrained`, or any model with such layers.
        dropout_placement: `published` drops as PEFT does, also the inputs of (s - 1) W x, at a second product
            with W; `branch` those of the low-rank update alone.
        magnitude: how magnitudes are held: as `stored`; in `float32`; or as m = start + `offset`, of which
            the offset is trained, in the dtype that the magnitude has, where 16 bits learn too.  All are
            saved as PEFT saves them.  Not to be changed once there is an optimizer.
        logits: at which positions a training step with `labels` computes them: `all`, or the `labelled` ones
            alone, for the same loss (`logits_at_labels`).
    Returns: which layers are accelerated, and why others are not.
    Raises: InputError: PEFT is not installed, an option is none of the allowed ones, no layer has a DoRA
        adapter, or labelled logits of a model whose loss is no causal one of transformers.
    """
    _refuse_option("dropout_placement", dropout_placement, DropoutPlacement)
    _refuse_option("magnitude", magnitude, MagnitudeStorage)
    _refuse_option("logits", logits, Logits)
    layers = _peft_layers()
    found = list(_dora_layers(model))
    if not found:
        raise InputError(
            f"this {type(model).__name__} has no layer with a DoRA adapter of PEFT's; expected a model of "
            f"get_peft_model(model, LoraConfig(..., use_dora=True))"
        )
    logits_at_labels(model, logits == "labelled")
    accelerated: list[str] = []
    left: dict[str, str] = {}
    said: list[str] = []
    for name, layer in found:
        kind = type(layer)
        if kind not in (*layers.ACCELERATED, *layers.ACCELERATED.values()):
            left[name] = _foreign(layer)
            continue
        if why := _why_left(layers, layer, name):
            left[name] = why
            continue
        layer.__class__ = layers.ACCELERATED.get(kind, kind)
        layer.qdora = layers.Acceleration(name, dropout_placement, said)
        accelerated.append(name)
    frozen = _hold_magnitudes(layers, model, magnitude)
    if frozen:
        said.append(frozen)
        warnings.warn(frozen, stacklevel=2)
    return AccelerationReport(tuple(accelerated), left, frozen)


def restore(model: nn.Module) -> None:
    """Let PEFT compute every layer again.

    A magnitude that is held as an offset becomes PEFT's parameter, in float32; one that `accelerate` holds in
    float32 stays so.  In 16 bits they would lose what they have learned.
    """
    layers = _peft_layers()
    kinds = {ours: theirs for theirs, ours in layers.ACCELERATED.items()}
    for module in model.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]
            del module.qdora
        elif isinstance(module, layers.OffsetMagnitude):
            module.revert(torch.float32)
    logits_at_labels(model, on=False)


def _peft_layers() -> Any:
    try:
        from qdora.adapters import peft_layers
    except ImportError as error:
        raise InputError(f"accelerate needs PEFT 0.18 or later ({error}): pip install 'peft>=0.18'") from None
    return peft_layers


def _dora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        of_adapters = getattr(module, "use_dora", None)
        if isinstance(of_adapters, dict) and any(of_adapters.values()):
            yield name, module


def _foreign(layer: Any) -> str:
    base = type(layer.get_base_layer())
    if base.__name__ == "Linear8bitLt":
        return "8-bit layers of bitsandbytes are left as they are"
    return f"adapters on a {base.__name__} are left as they are"


def _why_left(layers: Any, layer: Any, name: str) -> str | None:
    adapters = [adapter for adapter, dora in layer.use_dora.items() if dora]
    reasons: list[str | None] = [layers.why_left(layer, adapter) for adapter in adapters]
    if all(reasons):
        return reasons[0]
    if not all(layer.lora_magnitude_vector[adapter].weight.all() for adapter in adapters):
        return "its magnitude has zeros"
    try:
        layers.adopt_linear(layer.base_layer, name)
    except InputError as error:
        return str(error).removeprefix(f"{name} is ")
    return None


def _hold_magnitudes(layers: Any, model: nn.Module, storage: MagnitudeStorage) -> str:
    """Hold the magnitudes of accelerated layers as asked; the sentence about those that cannot learn."""
    accelerated: list[Any] = [m for m in model.modules() if type(m) in layers.ACCELERATED.values()]
    found = [magnitude for layer in accelerated for magnitude in layer.lora_magnitude_vector.values()]
    for magnitude in found:
        offset = isinstance(magnitude, layers.OffsetMagnitude)
        if storage == "offset" and not offset:
            layers.OffsetMagnitude.convert(magnitude)
        elif storage == "float32" and offset:
            magnitude.revert(torch.float32)
        elif storage == "float32" and magnitude.weight.dtype.itemsize < 4:
            magnitude.weight.data = magnitude.weight.data.float()
    narrow = [
        magnitude.weight
        for magnitude in found
        if magnitude.weight.requires_grad and magnitude.weight.dtype.itemsize < 4
    ]
    return layers.frozen_sentence(narrow) if narrow else ""


def _refuse_option(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise InputError(f"{name}: got {value!r}; {suggest(str(value), get_args(allowed))}")
