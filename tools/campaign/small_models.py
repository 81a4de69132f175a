"""Random small models of several architectures, and random settings of an adapter, from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import peft
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# Whether heads may be of any size beside the hidden one, and settings of its own.
FAMILIES: Mapping[str, tuple[type[PreTrainedConfig], bool, Mapping[str, tuple[Any, ...]]]] = {
    "llama": (transformers.LlamaConfig, True, {"attention_bias": (True, False), "mlp_bias": (True, False)}),
    "mistral": (transformers.MistralConfig, True, {"sliding_window": (None, 4)}),
    "qwen2": (transformers.Qwen2Config, False, {}),
    "qwen3": (transformers.Qwen3Config, True, {"attention_bias": (True, False)}),
    "gemma": (transformers.GemmaConfig, True, {}),
    "gemma2": (transformers.Gemma2Config, True, {"attn_logit_softcapping": (None, 5.0)}),
    "phi": (transformers.PhiConfig, False, {"partial_rotary_factor": (0.5, 1.0)}),
    "phi3": (transformers.Phi3Config, False, {}),
}


@dataclass(frozen=True)
class Case:
    """A model and an adapter.

    Attributes:
        settings: PEFT's.
        quantization: of its linear layers but the output layer: `none` or `nf4`.
        zero: rows that are zero in the weights: none, those of `weight`, or of B too (`both`).
        loaded: ours comes from a folder through `load_base`.
    """

    seed: int
    family: str
    config: PreTrainedConfig
    settings: peft.LoraConfig | peft.VeraConfig
    quantization: str
    zero: str
    loaded: bool
    dtype: torch.dtype

    @property
    def dora(self) -> bool:
        """Whether there is a magnitude."""
        return bool(getattr(self.settings, "use_dora", False))

    @property
    def init(self) -> Any:
        """PEFT's start."""
        return getattr(self.settings, "init_lora_weights", True)

    def __str__(self) -> str:
        plain = type(self.settings)()
        own = {k: v for k, v in vars(self.settings).items() if v != getattr(plain, k, None)}
        return (
            f"seed {self.seed}: {self.family}, {self.quantization}, zero rows {self.zero}, "
            f"loaded {self.loaded}, {self.dtype}, {own}"
        )


def make_case(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    family = rng.choice([*FAMILIES])
    quantization = rng.choice(["none", "none", "none", "nf4"])
    config = _config(rng, family, quantization)
    with torch.device("meta"):
        layers = _linear_shapes(AutoModelForCausalLM.from_config(config), tied=config.tie_word_embeddings)
    settings = (_vera if rng.random() < 0.12 else _lora)(rng, layers, config, quantization)
    made = getattr(settings, "init_lora_weights", True) in ("pissa", "olora")
    loaded = quantization == "none" and rng.random() < 0.25
    zero = rng.choice(["none", "none", "weight", "both"])
    if quantization != "none" or made or set(settings.target_modules or ()) == {"lm_head"}:
        zero = "none"
    # Gemma 2's attention computes its probabilities in float32.
    exact = quantization == "none" and not made and not loaded and family != "gemma2"
    dtype = torch.float64 if exact else torch.float32
    return Case(seed, family, config, settings, quantization, zero, loaded, dtype)


def _config(rng: random.Random, family: str, quantization: str) -> PreTrainedConfig:
    kind, free_heads, choices = FAMILIES[family]
    whole = (
        quantization == "nf4"
    )  # bitsandbytes takes wrong scales of rows that are no whole blocks on some CPUs
    heads = rng.choice([1, 2, 4] if whole else [1, 2, 3, 4, 6])
    head = 64 // heads if whole else 4 * rng.randint(1, 4)
    # LLaMA's configuration wants whole heads even where head_dim says another size.
    own_size = free_heads and not whole and rng.random() < 0.7
    hidden = heads * (rng.randint(9, 61) // heads if own_size else head)
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": rng.choice([64, 128]) if whole else rng.randint(7, 90),
        "num_hidden_layers": rng.randint(1, 2),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "vocab_size": rng.randint(24, 71),
        "max_position_embeddings": 64,
        "tie_word_embeddings": rng.random() < 0.4,
    }
    sizes |= {key: rng.choice(values) for key, values in choices.items()}
    if free_heads:
        sizes["head_dim"] = head
    return kind(**sizes, **SPECIAL)


def _linear_shapes(model: nn.Module, tied: bool) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not (tied and name == "lm_head")
    }


def _lora(
    rng: random.Random, layers: Mapping[str, tuple[int, int]], config: PreTrainedConfig, quantization: str
) -> peft.LoraConfig:
    targets = _targets(rng, layers)
    largest = min(min(shape) for name, shape in layers.items() if name.rsplit(".", 1)[-1] in targets)
    dense = ["pissa", "orthogonal"] if quantization == "none" else []  # PEFT makes no others
    init: Any = rng.choice([True, True, True, False, "gaussian", "olora", *dense])
    step = 2 if init == "orthogonal" else 1

    def rank() -> int:
        return step * rng.randint(1, max(1, min(8, largest) // step))

    settings: dict[str, Any] = {}
    inside = [name for name in targets if name != "lm_head"]
    if inside and rng.random() < 0.3:
        ranks = {rng.choice(inside): rank(), rf"layers\.0\..*{inside[0]}": rank()}
        settings["rank_pattern"] = dict(sorted(ranks.items()))  # as PEFT writes them: the first one counts
    if inside and rng.random() < 0.3:
        settings["alpha_pattern"] = {rf".*{rng.choice(inside)}": rng.randint(1, 40)}
    if inside and rng.random() < 0.15:
        settings["layers_to_transform"] = rng.randrange(config.num_hidden_layers)
    if len(inside) > 1 and rng.random() < 0.15:
        settings["exclude_modules"] = [inside[0]]
    return peft.LoraConfig(
        r=rank(),
        lora_alpha=rng.randint(1, 40),
        target_modules=targets,
        use_dora=rng.random() < 0.6,
        use_rslora=rng.random() < 0.4,
        init_lora_weights=init,
        **settings,
    )


def _vera(rng: random.Random, layers: Mapping[str, tuple[int, int]], *_: object) -> peft.VeraConfig:
    return peft.VeraConfig(
        r=rng.randint(1, 12),
        target_modules=_targets(rng, layers),
        projection_prng_key=rng.randint(0, 99),
        save_projection=rng.random() < 0.5,
    )


def _targets(rng: random.Random, layers: Mapping[str, tuple[int, int]]) -> list[str]:
    ends = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return sorted(rng.sample(ends, rng.randint(1, len(ends))))


def make_model(case: Case, least: float = 0.0) -> PreTrainedModel:
    """The case's model, the same at every call; `least` stands in the rows that are zero."""
    torch.manual_seed(case.seed)
    model = AutoModelForCausalLM.from_config(case.config).to(torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if module.bias is not None:
                module.bias.data.normal_(std=0.1)
            if case.zero != "none" and name != "lm_head":
                module.weight.data[0] = 0.0
    model.to(case.dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            if case.quantization == "nf4":
                model.set_submodule(name, _four_bit(module))
            elif case.zero != "none":
                module.weight.data[0] += least
        elif type(module).__name__.endswith("RMSNorm") and case.dtype == torch.float64:
            module.forward = MethodType(_rms_norm, module)  # the original computes in float32
    # bitsandbytes repacks its weights in evaluation, with 16-bit scales; there is no dropout.
    made: PreTrainedModel = model.train()
    return made


def _four_bit(layer: nn.Linear) -> nn.Module:
    new: nn.Module = Linear4bit(  # type: ignore[no-untyped-call]
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        quant_type="nf4",
        compute_dtype=torch.float32,
    )
    new.load_state_dict(layer.state_dict())
    return new.to("cpu")


def _rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    eps = getattr(self, "variance_epsilon", None) or self.eps
    scale = 1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight
    normed: torch.Tensor = scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed
