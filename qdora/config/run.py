"""One run: training, evaluation, output, and what goes together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qdora.config.data import DataConfig
from qdora.config.model import AdapterConfig, ModelConfig, QuantizationName
from qdora.config.section import MOST, Count, Section

EvaluationWeights = Literal["auto", "merged", "adapted"]
EvaluationMethod = Literal["generate", "rank", "both"]
OptimizerName = Literal[
    "adamw",
    "sgd",
    "rmsprop",
    "adafactor",
    "adamw8bit",
    "paged_adamw",
    "paged_adamw8bit",
    "kahan_adamw",
    "stableadamw",
    "radam",
    "ranger",
    "adan",
    "lion",
]
ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "polynomial",
    "cosine_with_minimum",
    "cosine_with_restarts",
    "inverse_sqrt",
    "warmup_stable_decay",
]


class TrainingConfig(Section):
    """The optimization."""

    key = "training"
    mode: Literal["adapter", "full"] = "adapter"
    """`full` trains every weight, in the compute dtype; there is no adapter then."""
    max_steps: Count | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training set, fractions allowed, rounded up to full steps; give this or `max_steps`."""
    batch_size: Count = 16
    """Sequences per optimizer step, over all processes and micro-batches; with `data.packing: stream` rows of
    `data.max_length` tokens. It must divide by `gradient_accumulation` times the number of processes."""
    gradient_accumulation: Count = 1
    """Micro-batches into which a process splits its share of the batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Largest rate, reached after the warm-up."""
    schedule: ScheduleName = "linear"
    """After warm-up: down to 0 on a line or half a cosine, constant, or one of transformers' schedules
    (docs/training.md)."""
    schedule_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the schedule, by transformers' names."""
    warmup_steps: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Steps before the full rate: of N steps, step i (from 1) has i / (N + 1) of it."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None
    """The same as a fraction of all steps, rounded up. Not beside `warmup_steps`."""
    optimizer: OptimizerName = "adamw"
    """Which one, and from which library: docs/training.md."""
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    """Settings of the optimizer that have no key of their own, by its library's names: `{eps: 1e-6}`."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """The optimizer's weight decay (AdamW's is decoupled), on A, B and the offsets of gate and magnitude."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's decay of the first moment. Refused with an optimizer that is not of Adam's kind."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's decay of the second moment, likewise. AdamW's epsilon is 1e-8 unless `optimizer_options` has
    it."""
    master_weights: bool = True
    """Step float32 masters of parameters in 16 bits. `false`: parameter, moments and the step are in their
    own dtype, as in published bf16 training, and updates smaller than half a spacing are lost (docs/math.md).
    Gradients are summed and clipped in float32 either way. Refused with `adapter.dtype: float32`, which has
    no use for it."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null switches clipping off."""
    gradient_checkpointing: bool = False
    """Recompute decoder layers in backward instead of keeping their activations."""
    checkpoint_every: Count = 1
    """With `gradient_checkpointing`: recompute every k-th layer, counted from the first; the others keep
    their activations. 1 recomputes each, 4 a quarter of them."""
    offload_activations: bool = False
    """With `gradient_checkpointing`: keep the inputs of recomputed layers in CPU memory, pinned, until
    backward. GPU only."""
    compile: bool = False
    """Compile the decoder layers with `torch.compile` (docs/performance.md). The first step then compiles;
    that needs a C++ compiler on a CPU, Triton and a C compiler on a GPU, and Python's headers. Not with
    `data.packing`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of A, of the data order and of dropout."""
    save_every: Count | None = None
    """Steps between checkpoints. One is always written at the end, and when the run is stopped."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    keep_best: Literal["loss", "exact_match"] | None = None
    """Also keep the adapter of the best validation, by its loss or by generated answers."""
    patience: Count | None = None
    """Stop after so many validations in a row without a better one; null: never."""
    async_checkpoints: bool = False
    """Write checkpoints while the next steps compute, from a copy of the trained state in CPU memory
    (docs/run-directory.md). The last one, and that of a stopped run, are waited for."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml"], ...] = ()
    """Experiment trackers, through accelerate. The tracker's own package must be installed."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.max_steps and training.epochs")
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ValueError(
                f"training.warmup_steps {self.warmup_steps} and training.warmup_ratio {self.warmup_ratio} "
                f"are both given; give one of them"
            )
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"training.batch_size {self.batch_size} does not divide into "
                f"training.gradient_accumulation {self.gradient_accumulation} micro-batches"
            )
        return self

    @model_validator(mode="after")
    def _checkpointing_is_on(self) -> TrainingConfig:
        for key, default in (("checkpoint_every", 1), ("offload_activations", False)):
            if getattr(self, key) != default and not self.gradient_checkpointing:
                came = f"training.{key} {getattr(self, key)} is about layers that are recomputed"
                raise ValueError(f"{came}: set training.gradient_checkpointing: true, or leave it out")
        return self


class EvaluationConfig(Section):
    """Generation, ranking and scoring."""

    method: EvaluationMethod = "generate"
    """`generate`: answers are generated and read. `rank`: the options of a choice are ranked by their
    likelihood, nothing is generated, and `likelihood` gives the headline score. `both`: the rankings stand
    beside the generated answers, whose scorer keeps the headline. Answers that are no choice are refused with
    the last two."""
    shots: Annotated[int, Field(ge=0, le=MOST)] = 0
    """Training examples that stand, with their completions, before every question: few-shot prompts."""
    shots_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of their choice and order."""
    limit: Count | None = None
    """Score only the first so many test examples."""
    batch_size: Count = 32
    """Sequences generated, or options ranked, together, per process. One that has ended leaves, and a waiting
    prompt enters (docs/performance.md)."""
    max_new_tokens: Count = 256
    """Longest generated answer in tokens."""
    every: Count | None = None
    """Steps between evaluations during training; none where not given. Their scores go to the terminal, the
    trackers and `evaluation/step-N/`."""
    loss_every: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """Steps between validations, which measure the loss on `data.validation`; 0 or null: none."""
    weights: EvaluationWeights = "auto"
    """What answers are computed with: `merged`, one dense matrix a layer in the compute dtype, beside the
    stored weights; `adapted`, weight and adapter as they are trained. `auto` merges where the free memory has
    room for the copies and the key-value cache, says so where it has not, and leaves 16-bit weights that are
    not quantized as they are, since rounding could lose a small update. A sharded model is never merged. The
    report says which it was."""
    quantization: QuantizationName | None = None
    """`training.mode: full` only: quantize the linear layers of what was trained to this format, in blocks of
    64, before it is scored; `export` does the same, `export --quantize FORMAT` overrides it."""


class OutputConfig(Section):
    """Where a run is written."""

    dir: str
    """Run directory."""
    overwrite: bool = False
    """Replace a run or comparison that is already there. Only files that a run writes are removed."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig
    """See `model`."""
    adapter: AdapterConfig = AdapterConfig()
    """See `adapter`."""
    data: DataConfig
    """See `data`."""
    training: TrainingConfig
    """See `training`."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """See `evaluation`."""
    output: OutputConfig
    """See `output`."""

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> RunConfig:
        """Full fine-tuning needs no adapter section: the resolved configuration says that there is none."""
        if self.training.mode != "full" or "adapter" in self.model_fields_set:
            return self
        return self.model_copy(update={"adapter": AdapterConfig(type="none", dora=False)})

    @model_validator(mode="after")
    def _validates_on_something(self) -> RunConfig:
        training, every = self.training, self.evaluation.loss_every
        for key, needs in (("keep_best", training.keep_best), ("patience", training.patience)):
            if needs and not every:
                raise ValueError(
                    f"training.{key} {needs!r} is about validations during training, and there are none: "
                    f"set evaluation.loss_every to the steps between them, or leave it out"
                )
        if every and self.data.validation is None:
            raise ValueError(
                f"evaluation.loss_every {every} measures the loss on data.validation, which is null: say "
                f"what to leave out of training for it, or leave evaluation.loss_every out"
            )
        return self

    @model_validator(mode="after")
    def _streams_a_number_of_steps(self) -> RunConfig:
        if not self.data.train.streaming:
            return self
        if self.training.max_steps is None:
            raise ValueError(
                "data.train.streaming does not know how many steps an epoch has: set training.max_steps, not "
                "training.epochs"
            )
        if self.evaluation.shots:
            raise ValueError(
                f"evaluation.shots {self.evaluation.shots} are drawn from the full training set, which "
                "data.train.streaming never has; allowed there: 0"
            )
        return self

    @model_validator(mode="after")
    def _compiles_without_packing(self) -> RunConfig:
        if self.training.compile and self.data.packing != "none":
            came = f"training.compile does not go with data.packing {self.data.packing!r}"
            raise ValueError(f"{came}, whose lengths would make a graph of every batch; allowed there: none")
        return self

    @model_validator(mode="after")
    def _evaluates_something(self) -> RunConfig:
        if self.evaluation.every and self.data.test is None:
            raise ValueError(
                f"evaluation.every {self.evaluation.every} scores data.test during training, and it is not "
                "set: name a test set, or leave evaluation.every out"
            )
        return self

    @model_validator(mode="after")
    def _masters_are_of_16_bits(self) -> RunConfig:
        float32 = self.training.mode == "adapter" and self.adapter.dtype == "float32"
        if float32 and not self.training.master_weights:
            raise ValueError(
                "training.master_weights false is about parameters of 16 bits, and adapter.dtype is "
                "'float32': set adapter.dtype: bfloat16, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> RunConfig:
        has_adapter = self.adapter.type != "none" or self.adapter.dora
        if self.training.mode == "full" and self.adapter.trainable_tokens is not None:
            raise ValueError(
                "training.mode 'full' trains all rows of the embedding: leave out adapter.trainable_tokens"
            )
        if self.training.mode == "full" and self.adapter.from_ is not None:
            raise ValueError(
                "training.mode 'full' does not go with adapter.from: merge that adapter into its base "
                "(`qdora export`), and name the merged folder as model.path"
            )
        if self.training.mode == "full":
            if has_adapter:
                raise ValueError(
                    "training.mode 'full' trains every weight and no adapter: leave out the adapter section, "
                    "or set adapter.type: none and adapter.dora: false"
                )
            if self.model.quantization != "none":
                raise ValueError(
                    f"training.mode 'full' does not go with model.quantization {self.model.quantization!r}; "
                    "allowed there: none (evaluation.quantization quantizes what was trained)"
                )
        elif not has_adapter:
            raise ValueError(
                "adapter.type 'none' with adapter.dora false trains nothing; choose adapter.type lora, "
                "gated_lora or vera, adapter.dora: true, or training.mode: full"
            )
        elif self.evaluation.quantization is not None:
            raise ValueError("evaluation.quantization goes with training.mode 'full' only")
        return self
