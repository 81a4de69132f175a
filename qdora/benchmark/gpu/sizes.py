"""The sizes of the measurement: LLaMA-3-8B's for a GPU, and toy ones that run every stage on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig


@dataclass(frozen=True)
class Size:
    """Everything that a stage takes from the size of the run.

    Attributes:
        model: settings of the transformers configuration, without the number of decoder layers.
        depths: decoder layers of the two shallow models whose times give those of the full one.
        layers: decoder layers of the full model.
        batches: (sequences, tokens) of a step; the goals are of the first.
        shapes: (out, in) of the model's linear layers; the goal of the tile is of the first.
        tokens: inputs of a layer by itself.
        kept: (out, in, tokens) of the layer whose small moves are measured.
        rounds: alternating rounds that count.
        repeats: of a kernel.
        copy_bytes, gemm_side: of the ceilings.
        flush_bytes: written between two kernels, so that the next finds nothing in the caches.
        decoding: prompts generated at once.
        prompt, new_tokens: tokens of each prompt and of each answer.
        demo: overrides of the demo's configuration.
    """

    model: Mapping[str, Any]
    depths: tuple[int, int]
    layers: int
    batches: tuple[tuple[int, int], ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: int
    kept: tuple[int, int, int]
    rounds: int
    repeats: int
    copy_bytes: int
    gemm_side: int
    flush_bytes: int
    decoding: tuple[int, ...]
    prompt: int
    new_tokens: int
    demo: tuple[str, ...] = ()

    def config(self, layers: int | None = None) -> LlamaConfig:
        """The model's configuration with so many decoder layers, all where None."""
        from transformers import LlamaConfig

        return LlamaConfig(**self.model, num_hidden_layers=self.layers if layers is None else layers)


FULL = Size(
    model={
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    depths=(2, 6),
    layers=32,
    batches=((1, 2048), (4, 512), (1, 512)),
    shapes=((4096, 14336), (14336, 4096), (4096, 4096), (1024, 4096)),
    tokens=2048,
    kept=(4096, 4096, 1024),
    rounds=5,
    repeats=20,
    copy_bytes=2 << 30,
    gemm_side=8192,
    flush_bytes=512 << 20,
    decoding=(1, 8, 32),
    prompt=128,
    new_tokens=32,
)
TOY = Size(
    model={
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    },
    depths=(1, 2),
    layers=3,
    batches=((1, 32), (2, 16)),
    shapes=((128, 192), (64, 128)),
    tokens=32,
    kept=(192, 128, 256),
    rounds=2,
    repeats=2,
    copy_bytes=1 << 20,
    gemm_side=128,
    flush_bytes=1 << 10,
    decoding=(1, 3),
    prompt=8,
    new_tokens=4,
    demo=("training.max_steps=2", "data.train.count=32", "data.test.count=4", "training.batch_size=4"),
)
STAGE_NAMES = (
    "ceilings",
    "correctness",
    "kernels",
    "steps",
    "profile",
    "training",
    "fsdp",
    "decoding",
    "tests",
    "demo",
)
"""The stages of `stages.py`, the most telling first: a time limit cuts the last ones off."""
SIZES = {"full": FULL, "toy": TOY}
