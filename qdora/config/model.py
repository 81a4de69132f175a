"""The base model and the adapter on it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qdora.config.section import Count, Section

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

QuantizationName = Literal["nf4", "fp4", "int8", "nf3", "nf2", "none"]
UpdateType = Literal["lora", "gated_lora", "vera", "none"]
InitName = Literal["kaiming", "gaussian", "gaussian_sqrt", "orthogonal", "pissa", "olora"]
MagnitudeStart = Literal["quantized", "original"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class ModelConfig(Section):
    """The frozen base model."""

    key = "model"

    path: str
    """Hub id, local safetensors folder, GGUF file, or a packaged model (`pypi:NAME==VERSION`). A path that
    exists comes before a hub id."""
    revision: str | None = None
    """Hub branch, tag or commit; only for a hub id."""
    quantization: QuantizationName = "nf4"
    """Format of the decoder's linear layers (docs/configuration.md). Embeddings, norms and output layer are
    never quantized."""
    dtype: DtypeName = "auto"
    """Compute dtype; `auto` is bfloat16 where the device has it natively, else float32."""
    block_size: Literal[64, 128, 256, 512] = 64
    """Weights that share one quantization scale."""
    double_quantization: bool = True
    """Quantize the scales to 8 bits as well (QLoRA, arXiv:2305.14314 §3)."""


class AdapterConfig(Section):
    """What is trained beside a frozen weight: a low-rank update and a magnitude (DoRA, arXiv:2402.09353).

    In Python a sequence is given as a list, a tuple or one string, a dtype as a name or a `torch.dtype`.

    Raises: InputError: a value that is not allowed, or an unknown setting; the field is named.
    """

    key = "adapter"
    several = ("targets", "magnitude_targets", "trainable_tokens")
    from_: str | None = Field(default=None, alias="from")
    """Folder of an adapter to go on from, ours or PEFT's; what it is made of is taken from it
    (docs/continue.md)."""
    type: UpdateType = "lora"
    """Low-rank update of the weight; `none` trains the magnitude alone. `gated_lora`: LoRA's, times a trained
    number of the layer, its gate (docs/configuration.md)."""
    dora: bool = True
    """Scale each row to a magnitude of its own."""
    magnitude: Literal["trained", "frozen"] = "trained"
    """`frozen`: the magnitude m stays at its start, and s = m / norm of the adapted row follows the update
    alone. An ablation: what of DoRA is the norm, what the trained magnitude."""
    magnitude_start: MagnitudeStart = "quantized"
    """The magnitude starts at the row norms of the weight as it is stored, so that step 0 is the quantized
    model; or of the one that it was quantized from, as published code does, and then it is not. `original` is
    refused by name for weights that come quantized."""
    init: InitName = "kaiming"
    """`lora`, `gated_lora`: how A and B start (docs/configuration.md)."""
    r: Count = 16
    """Rank of the low-rank update. Larger than a layer's smaller side is an error, but for VeRA."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / r (alpha / sqrt(r) with `rslora`). VeRA has no scale."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an input of the low-rank branch."""
    targets: tuple[str, ...] = LLAMA_LINEARS
    """Layers with a low-rank update, linear ones and `Conv2d`: module names, dotted suffixes, or globs over
    the full name. A pattern that matches no layer is an error."""
    magnitude_targets: tuple[str, ...] | None = None
    """Layers with a magnitude; the same as `targets` where not given."""
    rank_pattern: dict[str, Count] = Field(default_factory=dict)
    """Rank of the layers that a pattern matches, instead of `r`; the first that matches counts. Patterns are
    those of `targets`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Alpha of the layers that a pattern matches, instead of `alpha`; the first that matches counts."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    norm_gradient: Literal["detached", "exact"] = "detached"
    """`detached`: the norm is a constant in backward (DoRA §4.3). `exact`: it is differentiated, at a third
    pass over W (Table 7)."""
    dropout_placement: Literal["branch", "published"] = "branch"
    """`published`: with a magnitude, also drop the inputs of (s − 1) ∘ W x, as NVlabs' and PEFT's code do, at
    a second product with W. For reproductions."""
    b_rate_ratio: Annotated[float, Field(gt=0)] = 1.0
    """`lora`, `gated_lora`: the learning rate of B over `training.learning_rate`, which A has (LoRA+,
    docs/training.md)."""
    magnitude_rate_ratio: Annotated[float, Field(gt=0)] = 1.0
    """The learning rate of the magnitude over `training.learning_rate`."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of A, B, VeRA's vectors and the offsets of gate, magnitude and tokens' rows. Full fine-tuning
    stores what it trains in the compute dtype."""
    trainable_tokens: tuple[str, ...] | None = None
    """Tokens whose rows of the embedding and output layer are trained; the tokenizer gets those it lacks, as
    special tokens (docs/continue.md). Not under FSDP."""

    def rate_ratio(self, parameter: str) -> float:
        """The learning rate of a parameter, by its full name, over `training.learning_rate`."""
        ratios = {"b_OR": self.b_rate_ratio, "offset_O": self.magnitude_rate_ratio}
        return ratios.get(parameter.rpartition(".")[2], 1.0)

    @property
    def scale(self) -> float:
        """The factor before BA."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    @model_validator(mode="after")
    def _consistent(self) -> AdapterConfig:
        if not self.targets:
            raise ValueError("adapter.targets is empty; name at least one layer, for example q_proj")
        if self.trainable_tokens is not None and not all(self.trainable_tokens or [""]):
            raise ValueError("adapter.trainable_tokens is empty, or has an empty token; leave it out")
        if self.magnitude_targets == ():
            raise ValueError("adapter.magnitude_targets is empty; leave it out, or set adapter.dora: false")
        has_factors = self.type in ("lora", "gated_lora")
        if not has_factors and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"adapter.type {self.type!r} has one rank for all layers and no alpha: "
                "adapter.rank_pattern and adapter.alpha_pattern do not go with it"
            )
        if not has_factors and self.b_rate_ratio != 1:
            raise ValueError(
                f"adapter.b_rate_ratio {self.b_rate_ratio:g} is about B of lora and gated_lora; adapter.type "
                f"is {self.type!r}"
            )
        if not has_factors and self.init != "kaiming":
            raise ValueError(f"adapter.init {self.init!r} is a start of lora; adapter.type is {self.type!r}")
        if self.init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("adapter.init 'orthogonal' halves the rank: adapter.r must be even")
        if self.magnitude_targets is not None and not self.dora:
            raise ValueError("adapter.magnitude_targets given, but adapter.dora is false")
        return self

    @model_validator(mode="after")
    def _starts_once(self) -> AdapterConfig:
        if self.from_ is not None and self.magnitude_start == "original":
            raise ValueError(
                "adapter.magnitude_start 'original' does not go with adapter.from, whose magnitude is the "
                "start; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _has_the_magnitude_that_it_sets(self) -> AdapterConfig:
        defaults = {"magnitude": "trained", "magnitude_start": "quantized", "magnitude_rate_ratio": 1.0}
        for key, default in defaults.items():
            if getattr(self, key) != default and not self.dora:
                raise ValueError(f"adapter.{key} {getattr(self, key)!r} given, but adapter.dora is false")
        if self.magnitude_rate_ratio != 1 and self.magnitude == "frozen":
            raise ValueError(
                f"adapter.magnitude_rate_ratio {self.magnitude_rate_ratio:g} is a rate of the magnitude, and "
                f"adapter.magnitude is 'frozen'; allowed there: 1"
            )
        if self.type == "none" and self.magnitude == "frozen":
            raise ValueError(
                "adapter.type 'none' with adapter.magnitude 'frozen' trains nothing; choose adapter.type "
                "lora, gated_lora or vera, or adapter.magnitude: trained"
            )
        return self
