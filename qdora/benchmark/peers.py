"""PEFT's layers and models, and the measuring of ours against them: in one process, alternating."""

from __future__ import annotations

import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import modules
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from qdora.config import AdapterConfig, ModelConfig
from qdora.errors import InputError
from qdora.export.merged import merged_tensors
from qdora.run import machine, package_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def peft_module() -> Any:
    """PEFT, which only the benchmarks need.

    Raises: InputError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise InputError("the benchmarks compare with PEFT: pip install peft==0.21.2") from None
    return peft


def peft_layer(w_OI: torch.Tensor, config: AdapterConfig, *, dora: bool, compute: torch.dtype) -> nn.Module:
    """One 4-bit layer with a PEFT adapter, B off zero, in training mode."""
    # PEFT adapts the layers of a model, not a layer.
    model = nn.Sequential(OrderedDict(proj=linear_4bit(w_OI, compute)))
    return _adapt(model, config, ["proj"], dora)


def peft_model(
    dense: PreTrainedModel, settings: ModelConfig, config: AdapterConfig, *, dora: bool, compute: torch.dtype
) -> nn.Module:
    """The transformers model of the same weights in NF4, with a PEFT adapter, in training mode.

    Args:
        dense: from `load_base`, its base dense.
        settings: its block size and double quantization.
    """
    return adapt_4bit(dense_copy(dense, compute), settings, config, dora=dora, compute=compute)


def peft_saved(
    dense: PreTrainedModel, settings: ModelConfig, folder: Path, *, compute: torch.dtype
) -> nn.Module:
    """As `peft_model`, with a saved adapter, in evaluation mode.

    Args:
        folder: in PEFT's format.
    """
    model = dense_copy(dense, compute)
    _quantize_4bit(model, settings, compute)
    loaded: nn.Module = peft_module().PeftModel.from_pretrained(model, folder)
    return loaded.eval()


def dense_copy(dense: PreTrainedModel, compute: torch.dtype) -> PreTrainedModel:
    """The transformers model of the same weights."""
    with torch.device(next(dense.parameters()).device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(dense.config, dtype=compute)
    tensors = dict(merged_tensors(dense, compute))
    model.load_state_dict(tensors, strict=not model.config.get_text_config().tie_word_embeddings)
    return model


def adapt_4bit(
    model: PreTrainedModel, settings: ModelConfig, config: AdapterConfig, *, dora: bool, compute: torch.dtype
) -> nn.Module:
    """Quantize a dense transformers model to NF4, in place, and give it a PEFT adapter.

    Args, Returns: as `peft_model`.
    """
    _quantize_4bit(model, settings, compute)
    return _adapt(model, config, list(config.targets), dora)


def _quantize_4bit(model: PreTrainedModel, settings: ModelConfig, compute: torch.dtype) -> None:
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not output:
            quantized = linear_4bit(
                module.weight.detach(), compute, settings.block_size, settings.double_quantization
            )
            model.set_submodule(name, quantized)


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    """How PEFT's users compute in bf16, `Trainer(bf16=True)` for them: float32 adapters multiply in bf16.

    Without it PEFT casts every input up to its adapter's float32.  No effect with another dtype.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=compute == torch.bfloat16)


def linear_4bit(
    w_OI: torch.Tensor, compute: torch.dtype, block_size: int = 64, double_quantization: bool = True
) -> nn.Module:
    """bitsandbytes' own layer, quantized to NF4."""
    out_features, in_features = w_OI.shape
    nf4: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": double_quantization}
    layer: nn.Module = modules.Linear4bit(  # type: ignore[no-untyped-call]
        in_features, out_features, bias=False, compute_dtype=compute, **nf4
    )
    layer.weight = modules.Params4bit(w_OI.cpu(), requires_grad=False, blocksize=block_size, **nf4)
    return layer.to(w_OI.device)


def dequantize(layer: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """(O, I) of a `linear_4bit`, as its forward pass does it."""
    weight: Any = layer.weight
    weight.quant_state.dtype = dtype
    return bnb.dequantize_4bit(weight.data, weight.quant_state)


def _adapt(model: nn.Module, config: AdapterConfig, targets: list[str], dora: bool) -> nn.Module:
    peft = peft_module()
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        target_modules=targets,
        use_dora=dora,
    )
    adapted: nn.Module = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted.train()


Arm = Callable[[], float]
"""Does its work once; returns the seconds of the part that counts."""

GEMM_SIDE = {"cpu": 2048, "cuda": 8192}
"""Side of the square product whose rate counts as the machine's."""


def alternate(
    arms: Mapping[str, Arm], rounds: int, *, warmup: int = 2, title: str = ""
) -> dict[str, list[float]]:
    """Run every arm once a round, each second round in the opposite order.

    A machine that becomes slower for a while slows all arms of its rounds, and no arm always
    follows the same other one, whose data lie in the caches.

    Args:
        warmup: rounds before the first that counts.
    Returns: seconds of each round, by arm.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for i in tqdm(range(rounds + warmup), desc=title, unit="round", leave=False):
        for name in names if i % 2 else reversed(names):
            taken = arms[name]()
            if i >= warmup:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median over rounds of each arm's seconds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratio(seconds: Mapping[str, Sequence[float]], arm: str, peer: str) -> float:
    """The median over rounds of how many times as long as its peer an arm takes."""
    return statistics.median(a / b for a, b in zip(seconds[arm], seconds[peer], strict=True))


def ratios(seconds: Mapping[str, Sequence[float]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """`ratio` of each pair of an arm and its peer, as plain values."""
    return [{"arm": arm, "peer": peer, "ratio": ratio(seconds, arm, peer)} for arm, peer in pairs]


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device synchronized before and after."""
    started = now(device)
    work()
    return now(device) - started


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    _synchronize(device)
    return time.perf_counter()


def square_product(dtype: torch.dtype, device: torch.device) -> tuple[Arm, int]:
    """A large square product whose rate counts as the machine's, and its flops."""
    side = GEMM_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: timed(lambda: torch.mm(a, b, out=out), device), 2 * side**3


def gemm_rate(dtype: torch.dtype, device: torch.device, rounds: int = 9) -> float:
    """Flops a second of the machine, the median of some rounds."""
    product, flops = square_product(dtype, device)
    return flops / statistics.median(product() for _ in range(rounds))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names and versions that a figure depends on."""
    here = machine()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else here["processor"],
        "threads": here["threads"],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": package_versions("peft", "triton"),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
