"""A tiny random LLaMA and a tiny tokenizer on disk, for tests that run the real code paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from accelerate import Accelerator
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from qdora.data.chat_templates import template_text
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings

CHARACTERS = [chr(c) for c in range(32, 127)] + ["\n"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": len(CHARACTERS) + len(SPECIAL),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Of a tiny model of any family, by the names that LLaMA's configuration has."""


def tiny_config(**changes: object) -> LlamaConfig:
    settings = SIZES | {"max_position_embeddings": 512, "tie_word_embeddings": True}
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


TEXT = """
Tom has 33 apples   and buys 4, then    12 more.\n\n  How many?\tHe's got 49; they'll say: "größer – 5½".
def f(x):\n    return x + 1000\n"""


def tiny_bpe_tokenizer(
    splits: str = "smollm", text: str = TEXT, size: int = 310, **special: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that learned its merges from a text, which it splits by a rule that llama.cpp names."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits in ("smollm", "gpt-2"))
    first = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
    if splits not in first:
        first[splits] = [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[splits]), "isolated")]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splits in ("llama-bpe", "tekken")))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first[splits], byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"} | special
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*named.values(), "<|im_start|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.chat_template = template_text("chatml")
    return fast


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


def write_tiny_gguf(path: Path, norm: float = 1.0, context: int = 64, licence: str | None = None) -> Path:
    """A GGUF file with a tiny LLaMA in Q4_1 and a tokenizer of bytes."""
    hidden, inner = 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    if licence is not None:
        writer.add_license(licence)
    writer.add_block_count(1)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    _add_vocabulary(writer)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (260, hidden), "output_norm": (hidden,), "blk.0.attn_norm": (hidden,)}
    shapes |= {"blk.0.ffn_norm": (hidden,), "blk.0.ffn_down": (hidden, inner)}
    shapes |= {f"blk.0.ffn_{part}": (inner, hidden) for part in ("gate", "up")}
    shapes |= {"blk.0.attn_q": (32, hidden), "blk.0.attn_output": (hidden, 32)}
    shapes |= {f"blk.0.attn_{part}": (16, hidden) for part in "kv"}
    for name, shape in shapes.items():
        values = (random.normal(size=shape) * (norm if len(shape) == 1 else 1)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    alphabet = sorted(bytes_to_unicode().values())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ĊĊ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
