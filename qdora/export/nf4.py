"""`--format nf4`: QDoRA served in 4 bits, its base not quantized a second time.

    s ∘ (W + c B A) = (s ∘ W) + (s ∘ c B) A

To scale a row that is a multiple of the block size is to scale its block scales: the codes stay as they
are, and what is left is a plain LoRA.  The folder is a checkpoint of bitsandbytes with float32 scales, 4.5
bits a weight in blocks of 64, and in `adapter/` a LoRA in PEFT's format.

O out_features   I in_features   R rank
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdora.adapters.inject import refuse_overflow
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.saved import read_saved
from qdora.errors import InputError
from qdora.export.job import ExportJob
from qdora.export.lora import ADAPTER, write_lora
from qdora.export.merged import DTYPES, model_tensors, write_tensors
from qdora.export.verify import (
    VerificationError,
    bound_for,
    compare,
    load_exported,
    logits,
    random_tokens,
)
from qdora.models.build import output_name
from qdora.models.formats.write import cast_checked
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.quant.base import FULL
from qdora.quant.blockwise import BlockwiseWeight, import_bitsandbytes
from qdora.quant.stored import STORED_TYPES, as_stored, parse_state, state_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST_ERROR = 1e-5
"""Largest relative error of a layer's weight, base and LoRA, against s ∘ (W + c B A): float32's rounding."""


def check(job: ExportJob) -> None:
    """As `Format.check`."""
    base = job.config.model.quantization
    if base not in STORED_TYPES and not job.options.requantize and job.config.training.mode == "adapter":
        _refuse_format(f"model.quantization {base!r}")


def _refuse_format(what: str) -> None:
    allowed = " and ".join(STORED_TYPES)
    raise InputError(
        f"--format nf4: {what}: a server of bitsandbytes' 4-bit checkpoints holds no such weights; allowed: "
        f"{allowed}, or --requantize, which quantizes the merged weights"
    )


def write(job: ExportJob, folder: Path) -> str:
    """As `Format.write`."""
    model, dtype = job.model, DTYPES[job.options.dtype]
    refuse_overflow(model, "the model")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AdaptedLinear)}
    dense = _dense_layers(model, layers, job.options.requantize)
    kinds = {
        layer.base.quantization for name, layer in layers.items() if name not in dense
    } & STORED_TYPES.keys() or {"nf4"}
    if len(kinds) > 1:
        raise InputError(f"--format nf4: the model has layers in {' and '.join(sorted(kinds))}")
    [kind] = kinds
    block_size = job.config.model.block_size

    def tensors_of(name: str, layer: AdaptedLinear) -> Iterator[tuple[str, torch.Tensor]]:
        weight = f"{name}.weight"
        if name in dense:
            yield weight, cast_checked(weight, layer.merged(torch.float32), dtype)
        elif job.options.requantize:
            again = requantized(layer.merged(torch.float32), kind, block_size)
            yield from _stored_tensors(weight, again, again.scales(), dtype)
        else:
            yield from _stored_tensors(weight, as_stored(layer.base), scaled_scales(layer, name), dtype)

    output = output_name(model)
    skipped = sorted({*dense, *([] if output is None else [output])})
    settings = _quantization_config(kind, dtype, skipped)
    write_tensors(folder, model, job.tokenizer, dtype, model_tensors(model, dtype, tensors_of), settings)
    updates = {} if job.options.requantize else served_updates(layers, dense)
    if not updates:
        return "4-bit weights"
    r = write_lora(folder / ADAPTER, updates, base=job.options.push_to_hub or str(job.output))
    return f"4-bit weights, and in {ADAPTER}/ a LoRA of rank {r}"


def _dense_layers(
    model: PreTrainedModel, layers: Mapping[str, AdaptedLinear], requantize: bool
) -> frozenset[str]:
    """Layers that are written merged, in 16 bits: the output layer, and those that a checkpoint left dense.

    Raises: InputError: a layer is quantized in another way, or its rows cannot be scaled by their blocks.
    """
    output = output_name(model)
    if requantize:
        return frozenset(name for name, layer in layers.items() if name == output or layer.in_features % 2)
    dense = frozenset(name for name, layer in layers.items() if layer.base.quantization == "none")
    for name, layer in layers.items():
        base = layer.base
        if name in dense:
            continue
        if base.quantization not in STORED_TYPES:
            _refuse_format(f"{name} is {base.quantization}")
        block_size = as_stored(base).block_size
        if layer.magnitude is not None and base.in_features % block_size:
            raise InputError(
                f"--format nf4: {name} has rows of {base.in_features} weights, not a multiple of the block "
                f"size {block_size}: a magnitude cannot go into scales that two rows share; allowed: rows "
                f"that are, or --requantize"
            )
    if dense >= layers.keys() - {output}:
        _refuse_format("no layer is quantized")
    return dense


def _scale(layer: AdaptedLinear) -> torch.Tensor | None:
    """(O, 1) s; None without a magnitude."""
    return None if layer.magnitude is None else (layer.magnitude.value() / layer.weight_norm())[:, None]


def scaled_scales(layer: AdaptedLinear, name: str) -> torch.Tensor:
    """(blocks,) float32: the block scales of s ∘ W."""
    scales, s_O1 = as_stored(layer.base).scales(), _scale(layer)
    if s_O1 is not None:
        scales = (scales.view(layer.out_features, -1) * s_O1).view(-1)
    return cast_checked(f"{name}.weight.absmax", scales, torch.float32)


@torch.no_grad()
def served_updates(
    layers: Mapping[str, AdaptedLinear], dense: frozenset[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (R, I) and s ∘ c B (O, R) of each layer with an update, float32 on the CPU.

    Args:
        dense: layers that are merged.
    """
    updates = {}
    for name, layer in layers.items():
        if layer.update is None or name in dense:
            continue
        factors = layer.update.factors()
        a_RI, b_OR = factors.combined(torch.float32)
        b_OR, s_O1 = b_OR * factors.scale, _scale(layer)
        updates[name] = (a_RI.cpu(), (b_OR if s_O1 is None else b_OR * s_O1).cpu())
    return updates


def requantized(w_OI: torch.Tensor, kind: str, block_size: int) -> BlockwiseWeight:
    """A weight quantized anew, with float32 scales."""
    return as_stored(Quantization(kind, block_size, double_quantization=False).from_dense(w_OI))  # type: ignore[arg-type]


def _stored_tensors(
    weight: str, base: BlockwiseWeight, scales: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Codes and statistics under the names of bitsandbytes' serialization.

    Args:
        dtype: of the weight that a reader dequantizes.
    """
    bnb = import_bitsandbytes()
    yield weight, base.packed.detach().reshape(-1, 1).cpu()
    state = bnb.QuantState(
        absmax=scales.cpu(),
        shape=torch.Size((base.out_features, base.in_features)),
        code=base.code_values(torch.device("cpu")).clone(),
        blocksize=base.block_size,
        quant_type=base.quantization,
        dtype=dtype,
    )
    for leaf, tensor in state.as_dict(packed=True).items():
        yield f"{weight}.{leaf}", tensor


def _quantization_config(kind: str, dtype: torch.dtype, skipped: list[str]) -> dict[str, Any]:
    """Of config.json, as transformers writes it.

    Source: `BitsAndBytesConfig` of transformers 5.23 and 4.57.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def verify(job: ExportJob, folder: Path) -> str:
    """As `Format.verify`: layer by layer against s ∘ (W + c B A), then by logits of bitsandbytes' layers."""
    model, dtype, exact = job.model, DTYPES[job.options.dtype], not job.options.requantize
    updates = _read_updates(folder)
    errors = layer_errors(model, folder, updates)
    if exact and not errors.largest <= LARGEST_ERROR:
        raise VerificationError(
            f"{folder}: the weight of {errors.where} differs by {errors.largest:.2e} relative from the "
            f"adapted one; the bound is {LARGEST_ERROR:.0e}"
        )
    ids_BT = random_tokens(model)
    adapted_BTV, bound = logits(model, ids_BT), bound_for(model, dtype) if exact else math.inf
    del model
    job.release()
    result = compare(folder, served_logits(folder, updates, ids_BT, job.context.device), adapted_BTV, bound)
    again = (
        f"merged and quantized again, all weights together differ by {errors.again:.1e} relative, where "
        f"training moved them by {errors.moved:.1e}"
    )
    if not exact:
        return f"{result}\n{again}"
    return (
        f"{result}\neach weight, its LoRA added, differs by at most {errors.largest:.1e} relative (bound "
        f"{LARGEST_ERROR:.0e}); {again}"
    )


def served_logits(
    folder: Path,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ids_BT: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """(B, T, V) of the checkpoint in transformers with bitsandbytes' layers, and of the LoRA's products.

    Raises: VerificationError: as `load_exported`.
    """
    import_bitsandbytes()
    model = load_exported(folder, device_map={"": device}, dtype="auto")

    def add_update(
        factors: tuple[torch.Tensor, torch.Tensor], module: nn.Module, arguments: Any, y: torch.Tensor
    ) -> torch.Tensor:
        x: torch.Tensor = arguments[0]
        a_RI, b_OR = (factor.to(x) for factor in factors)
        return y + (x @ a_RI.T) @ b_OR.T

    if device.type == "cpu":
        widen(model)
    for name, factors in updates.items():
        model.get_submodule(name).register_forward_hook(partial(add_update, factors))
    return logits(model, ids_BT)


def widen(model: nn.Module) -> None:
    """Have a 4-bit model of transformers compute in float32 on a CPU.

    `from_pretrained(dtype=torch.float32)` leaves what is stored in 16 bits as it is.  With AVX512-BF16
    bitsandbytes rounds block scales and products to bfloat16.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    layers: Iterator[Any] = (module for module in model.modules() if hasattr(module, "compute_dtype"))
    for layer in layers:
        layer.compute_dtype, layer.support_avx512bf16_for_cpu = torch.float32, False


@dataclass(frozen=True)
class LayerErrors:
    """How far a server's weights are from the adapted ones, relative, in Frobenius norms.

    Attributes:
        largest: of a layer's weight as it is read back, its LoRA added.
        where: that layer.
        again: of all weights together, merged and quantized again.
        moved: how far training moved them.
    """

    largest: float
    where: str
    again: float
    moved: float


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel,
    folder: Path,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> LayerErrors:
    """Compare what was written with s ∘ (W + c B A), one layer in memory.

    Args:
        updates: as `served_updates`, read back.
    """
    checkpoint = open_checkpoint(str(folder))
    names = frozenset(checkpoint.names())
    errors, again, moved, total = {"": 0.0}, 0.0, 0.0, 0.0
    for name, layer in model.named_modules():
        weight = f"{name}.weight"
        state = state_name(weight, names)
        if not isinstance(layer, AdaptedLinear) or state is None:
            continue
        adapted_OI = layer.merged(torch.float32)
        stored = parse_state(weight, checkpoint.read(state), layer.shape)
        read = stored.on_meta()
        read.assign(stored.read(checkpoint.read, FULL, adapted_OI.device))
        served_OI = read.dense(torch.float32)
        if name in updates:
            a_RI, b_OR = (factor.to(served_OI) for factor in updates[name])
            served_OI.addmm_(b_OR, a_RI)
        norm = float(adapted_OI.norm())
        # An all-zero weight must be served as one.
        errors[name] = float(served_OI.sub_(adapted_OI).norm()) / (norm or 1e-30)
        anew_OI = requantized(adapted_OI, stored.kind.quantization, stored.block_size).dense(torch.float32)
        again += float(anew_OI.sub_(adapted_OI).norm()) ** 2
        moved += float(layer.base.dense(torch.float32).sub_(adapted_OI).norm()) ** 2
        total += norm**2
    where = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    total = total or 1.0
    return LayerErrors(errors[where], where, math.sqrt(again / total), math.sqrt(moved / total))


def _read_updates(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The LoRA beside the checkpoint; empty where there is none."""
    if not (folder / ADAPTER).is_dir():
        return {}
    a_key, b_key = LoraUpdate.peft_keys.values()
    return {name: (parts[a_key], parts[b_key]) for name, parts in read_saved(folder / ADAPTER).layers.items()}
