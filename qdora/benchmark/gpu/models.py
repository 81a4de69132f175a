"""Random models without a checkpoint, ours and PEFT's, and a tiny one on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qdora.adapters.base import AdapterModule
from qdora.adapters.inject import inject
from qdora.benchmark.peers import adapt_4bit
from qdora.config import AdapterConfig, ModelConfig, QuantizationName
from qdora.data.batches import Batch, collate
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import reset_adapters
from qdora.models.build import build_architecture
from qdora.quant import Quantization
from qdora.quant.base import FrozenWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPUTE = torch.bfloat16
"""Compute dtype of all models here."""
STD = 0.02
"""Standard deviation of the random weights."""

Shared = dict[str, nn.Parameter]
"""Embedding and output layer that several models share: of LLaMA-3-8B two gigabytes."""


def adapter_config(dora: bool) -> AdapterConfig:
    """The adapter of all arms: rank 16 on every linear layer, stored in bf16."""
    return AdapterConfig(dora=dora, r=16, alpha=32.0)


@torch.no_grad()
def random_model(
    config: LlamaConfig,
    device: torch.device,
    *,
    dora: bool,
    quantization: QuantizationName = "nf4",
    shared: Shared | None = None,
) -> PreTrainedModel:
    """Our model with random weights and an adapter off its start, in training mode."""
    model = build_architecture(config, COMPUTE, Quantization(quantization), COMPUTE)
    inject(model, adapter_config(dora))
    shared = {} if shared is None else shared
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            shape = (module.out_features, module.in_features)
            module.requantize(torch.randn(shape, device=device, dtype=COMPUTE) * STD)
        elif not isinstance(module, AdapterModule):
            _materialize(name, module, device, shared)
    reset_adapters(model, DistributedContext(device=device))
    for name, parameter in model.named_parameters():
        if name.endswith("b_OR"):
            parameter.normal_(std=STD)
    model.train()
    return model


def _materialize(name: str, module: nn.Module, device: torch.device, shared: Shared) -> None:
    """An embedding, an output layer, a norm; rotary frequencies."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        full, dtype = f"{name}.{leaf}", parameter.dtype
        if parameter.dim() == 1:
            norm = torch.ones(parameter.shape, device=device, dtype=dtype)
            module.register_parameter(leaf, nn.Parameter(norm, requires_grad=False))
            continue
        if full not in shared:
            value = torch.randn(parameter.shape, device=device, dtype=dtype) * STD
            shared[full] = nn.Parameter(value, requires_grad=False)
        module.register_parameter(leaf, shared[full])
    for leaf, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, leaf, buffer.to(device))


def peft_random_model(config: LlamaConfig, device: torch.device, *, dora: bool, shared: Shared) -> nn.Module:
    """The transformers model with random weights in bitsandbytes' NF4 and PEFT's adapter, in training mode.

    Args:
        shared: of a `random_model`.
    """
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=COMPUTE)
    for name, parameter in shared.items():
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module).register_parameter(leaf, parameter)
    return adapt_4bit(model, ModelConfig(path="random"), adapter_config(dora), dora=dora, compute=COMPUTE)


def random_batch(config: LlamaConfig, sequences: int, tokens: int) -> Batch:
    """Every token with a label."""
    ids_BT = torch.randint(config.vocab_size, (sequences, tokens), generator=torch.Generator().manual_seed(0))
    return collate([TokenizedExample(ids_T, 0, "random") for ids_T in ids_BT.tolist()], pad_id=0)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "\n", *(chr(c) for c in range(32, 127))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_tiny_model(folder: Path) -> None:
    """A random model folder as the hub has them: configuration, safetensors, tokenizer."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=COMPUTE).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
