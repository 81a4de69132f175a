"""A tiny random LLaMA and a tiny tokenizer on disk, for tests that run the real code paths."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings

CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def tiny_config(**changes: object) -> LlamaConfig:
    settings: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(CHARACTERS) + len(SPECIAL),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(settings | changes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_tiny_model(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: object
) -> Path:
    """A model folder as the hub has them: config, tokenizer, safetensors."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes)).to(dtype)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def cpu_context(fsdp: FsdpSettings | None = None) -> DistributedContext:
    """The context of the CPU ranks that a test has started; of this process alone where it has none."""
    ranks = Accelerator(cpu=True)
    return DistributedContext(ranks.process_index, ranks.num_processes, ranks.device, fsdp, ranks)
