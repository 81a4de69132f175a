"""The peers that ours is measured against: PEFT's QLoRA and QDoRA on bitsandbytes' 4-bit layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from bitsandbytes.nn import modules
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from qdora.config import AdapterConfig, ModelConfig
from qdora.errors import InputError
from qdora.export.write import merged_tensors


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
    with torch.device(next(dense.parameters()).device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(dense.config, dtype=compute)
    tensors = dict(merged_tensors(dense, compute))
    model.load_state_dict(tensors, strict=not model.config.get_text_config().tie_word_embeddings)
    output = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not output:
            quantized = linear_4bit(
                module.weight.detach(), compute, settings.block_size, settings.double_quantization
            )
            model.set_submodule(name, quantized)
    return _adapt(model, config, list(config.targets), dora)


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
