"""The same small trainings on one process and, sharded, on several: what both write to be compared.

python -m tests.distributed.sharded OUT MODELS             one process
torchrun --nproc-per-node N -m tests.distributed.sharded OUT MODELS --fsdp
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from qdora.adapters import kernels
from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.full import train_everything
from qdora.adapters.inject import adapted_layers, initial_update_fingerprint, inject
from qdora.adapters.peft_io import save_adapter
from qdora.config import ModelConfig, TrainingConfig
from qdora.data.batches import NO_PACKING, Packing
from qdora.data.rows import Example
from qdora.data.tokenize import TokenizedExample
from qdora.distributed import fsdp
from qdora.distributed.context import DistributedContext
from qdora.distributed.launch import FsdpSettings
from qdora.errors import CheckpointError, InputError
from qdora.evaluation import evaluate as evaluation
from qdora.models.formats import safetensors as safetensors_file
from qdora.models.load import load_model
from qdora.models.sources import open_checkpoint
from qdora.quant.base import FrozenWeight
from qdora.signals import end
from qdora.training.loop import Callbacks, Trainer
from tests.axes import METHODS, adapter_config
from tests.tiny import cpu_context, tiny_tokenizer


@dataclasses.dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: folder in MODELS.
        adapter, training, fsdp: settings other than the common ones.
        double: quantization of the scales.
        quantization: where another than the method's.
        examples: of the training set; where a batch of 8 does not divide it, the last one is uneven.
        generates: also answer questions, from a complete copy and in step.
        kernels: by the kernels' operators, whose reference computes on a CPU.
        packing: how examples share the rows of a micro-batch.
    """

    model: str = "tied"
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    fsdp: dict[str, Any] = dataclasses.field(default_factory=dict)
    double: bool = True
    quantization: str | None = None
    examples: int = 19
    generates: bool = False
    kernels: bool = False
    packing: Packing = NO_PACKING


FLOAT32 = {"dtype": "float32"}
CASES = {
    "qdora": Case(adapter=FLOAT32, training={"max_steps": 20}, generates=True),
    "qdora bf16": Case(training={"max_steps": 20}),
    "qdora awkward": Case("awkward", FLOAT32, {"gradient_checkpointing": True}, generates=True),
    "qdora awkward single": Case("awkward", FLOAT32, double=False),
    "qdora awkward bf16": Case("awkward", double=False),
    "qdora stored": Case("stored", FLOAT32),
    "qdora kept": Case(adapter=FLOAT32, fsdp={"reshard_after_forward": False}, generates=True),
    "qdora one group": Case("awkward", FLOAT32, fsdp={"wrap": False}),
    "qdora one group bf16": Case(fsdp={"wrap": False}),
    "qdora two groups a layer": Case(
        "awkward", FLOAT32, fsdp={"layer_classes": ("LlamaMLP", "LlamaAttention")}
    ),
    "qdora offloaded": Case("awkward", FLOAT32, fsdp={"offload": True}, generates=True),
    "qdora offloaded bf16": Case(fsdp={"offload": True}),
    "qdora recomputed": Case(adapter=FLOAT32, fsdp={"activation_checkpointing": True}),
    "qdora accumulated": Case(adapter=FLOAT32, training={"gradient_accumulation": 2, "max_steps": 20}),
    "qdora kernels": Case("awkward", FLOAT32, {"gradient_checkpointing": True}, generates=True, kernels=True),
    "qdora kernels accumulated": Case(
        training={"gradient_accumulation": 2, "max_steps": 20}, adapter=FLOAT32, kernels=True
    ),
    "fp4": Case("awkward", FLOAT32, {"max_steps": 20}, generates=True, quantization="fp4"),
    "int8": Case(adapter=FLOAT32, training={"max_steps": 20}, generates=True, quantization="int8"),
    "nf3": Case("awkward", FLOAT32, quantization="nf3"),
    "int8 awkward single": Case("awkward", FLOAT32, double=False, quantization="int8"),
    "qdora joined": Case(adapter=FLOAT32, training={"max_steps": 20}, packing=Packing(joined=True)),
    "qdora joined accumulated": Case(
        "awkward",
        FLOAT32,
        {"gradient_accumulation": 2, "gradient_checkpointing": True},
        packing=Packing(joined=True),
    ),
    "qdora filled": Case(adapter=FLOAT32, training={"max_steps": 8}, packing=Packing(True, row_tokens=64)),
    "qdora exact": Case(adapter=FLOAT32 | {"norm_gradient": "exact"}),
    "qlora": Case(adapter=FLOAT32 | {"method": "qlora"}, training={"max_steps": 20}),
    "qlora accumulated": Case(
        adapter=FLOAT32 | {"method": "qlora"},
        training={"gradient_accumulation": 2, "gradient_checkpointing": True},
    ),
    "dora": Case(adapter=FLOAT32 | {"method": "dora"}, training={"max_steps": 20}),
    "dora accumulated": Case(
        "awkward", FLOAT32 | {"method": "dora"}, {"gradient_accumulation": 2, "gradient_checkpointing": True}
    ),
    "magnitude": Case(adapter=FLOAT32 | {"method": "magnitude"}, training={"max_steps": 20}),
    "qmagnitude accumulated": Case(
        "awkward",
        FLOAT32 | {"method": "qmagnitude"},
        {"gradient_accumulation": 2, "gradient_checkpointing": True},
    ),
    "qdvora": Case(adapter=FLOAT32 | {"method": "qdvora", "r": 16}),
    "gated frozen": Case("awkward", FLOAT32 | {"method": "qgdora", "magnitude": "frozen"}),
    "published bf16": Case(
        "awkward",
        {"alpha": 4, "init": "gaussian_sqrt", "magnitude_start": "original"},
        {"master_weights": False},
    ),
    "head": Case("awkward", FLOAT32 | {"method": "qdora", "targets": ("q_proj", "lm_head")}),
    "wide": Case("wide", training={"max_steps": 1}),
    "wide dense": Case("wide", {"method": "dora"}, {"max_steps": 1}),
    "sgd": Case(
        "awkward", FLOAT32, {"optimizer": "sgd", "optimizer_options": {"momentum": 0.9}, "learning_rate": 0.1}
    ),
    "rmsprop": Case("awkward", FLOAT32, {"optimizer": "rmsprop", "max_steps": 4, "learning_rate": 5e-4}),
    "kahan_adamw": Case("awkward", FLOAT32, {"optimizer": "kahan_adamw"}),
    "radam": Case("awkward", FLOAT32, {"optimizer": "radam"}),
    "ranger": Case("awkward", FLOAT32, {"optimizer": "ranger", "optimizer_options": {"k": 2}}),
    "adan": Case("awkward", FLOAT32, {"optimizer": "adan"}),
    "lion": Case("awkward", FLOAT32, {"optimizer": "lion", "learning_rate": 1e-4}),
    "full": Case(adapter={"method": "full"}),
    "full awkward": Case("awkward", {"method": "full"}),
}


def main(out: Path, models: Path, fsdp: bool) -> None:
    """Run all cases; process 0 writes OUT/NAME/, every process OUT/NAME/rank-N.json."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    for name, case in CASES.items():
        settings = FsdpSettings(**case.fsdp) if fsdp else None
        with mock.patch.object(kernels, "available", lambda device, found=case.kernels: found):
            run_case(
                out / name,
                models,
                case,
                cpu_context(settings),
            )
    if fsdp:
        (out / f"refused-{accelerator.process_index}").write_text(refusal(models, accelerator))
        fail_in_the_middle(
            out,
            models,
            cpu_context(FsdpSettings()),
        )
    accelerator.end_training()


def load(settings: ModelConfig, adapt: Any, context: DistributedContext) -> Any:
    """The model as the commands load it, and what `adapt` returned."""
    return load_model(open_checkpoint(settings.path), settings, context, adapt, progress=False)


def refusal(models: Path, accelerator: Accelerator) -> str:
    """What a launch that names a layer which the model does not have is told."""
    context = cpu_context(FsdpSettings(layer_classes=("LlamaDecoderLayr",)))
    try:
        load(ModelConfig(path=str(models / "tied")), lambda m: None, context)
    except InputError as error:
        return str(error)
    return "nothing"


def fail_in_the_middle(out: Path, models: Path, context: DistributedContext) -> None:
    """The last rank's disk fails halfway through the weights; every rank writes what it was told."""
    read, calls = safetensors_file.read_bytes, 0

    def failing(path: Path, start: int, count: int) -> Any:
        nonlocal calls
        calls += 1
        if calls > 12 and context.rank == context.world_size - 1:
            raise CheckpointError(f"{path}: truncated")
        return read(path, start, count)

    safetensors_file.read_bytes = failing
    try:
        settings = ModelConfig(path=str(models / "tied"), dtype="float32")
        load(settings, lambda m: inject(m, adapter_config(r=4)), context)
        told = "nothing"
    except InputError as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        safetensors_file.read_bytes = read
    (out / f"told-{context.rank}").write_text(told)


def adapt(model: torch.nn.Module, case: Case) -> Any:
    """What the case trains, put into a model."""
    if METHODS[case.adapter.get("method", "qdora")].full:
        return train_everything(model)
    return inject(model, adapter_config(**({"r": 4, "alpha": 12} | case.adapter)), seed=3)


def run_case(out: Path, models: Path, case: Case, context: DistributedContext) -> None:
    """One training, from the model's folder to the adapter's."""
    method = METHODS[case.adapter.get("method", "qdora")]
    model_config = ModelConfig(
        path=str(models / case.model),
        quantization=case.quantization or method.quantization,
        dtype="float32",
        double_quantization=case.double,
    )
    with CountedReads() as reads:
        model, report = load(model_config, lambda m: adapt(m, case), context)
    facts = {
        "bytes_read": reads.bytes,
        "resident": {n: _local(p).nbytes for n, p in model.named_parameters() if not p.requires_grad},
        "rows": {n: len(_local(p)) for n, p in model.named_parameters() if isinstance(p, DTensor)},
        "report": str(report),
        "fingerprint": base_fingerprint(model),
        "initial_a": initial_update_fingerprint(model),
    }
    state = weights(model)
    norms = {
        name: layer.magnitude.initial_O.clone()
        for name, layer in adapted_layers(model).items()
        if layer.magnitude is not None
    }
    training = TrainingConfig(**({"max_steps": 6, "batch_size": 8, "learning_rate": 2e-3} | case.training))
    data = examples(model.config.vocab_size, case.examples)
    trainer = Trainer(model, data, training, context, pad_id=0, packing=case.packing)
    steps = []
    trainer.run(
        0,
        Callbacks(
            log=lambda m: steps.append((m.loss, m.grad_norm)),
            save=lambda step: None,
            evaluate=lambda step: None,
        ),
    )
    out.mkdir(parents=True, exist_ok=True)
    save_adapter(model, out / "adapter" if context.is_main else None)
    if context.fsdp is not None:
        save_from_one_process(out / "alone", model, model_config, case, context.is_main)
    if case.generates:
        answers = {"gathered": generate(model, context)}
        with NoRoom():
            answers["in step"] = generate(model, context)
        facts["answers"] = answers
    (out / f"rank-{context.rank}.json").write_text(json.dumps(facts))
    if context.is_main:
        save_file(state, out / "weights.safetensors")
        save_file(norms or {"none": torch.zeros(1)}, out / "norms.safetensors")
        (out / "steps.json").write_text(json.dumps(steps))


def save_from_one_process(
    out: Path, model: torch.nn.Module, settings: ModelConfig, case: Case, main: bool
) -> None:
    """What one process writes from the same state."""
    state = {name: _whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}
    if not main:
        return
    alone, _ = load(settings, lambda m: adapt(m, case), DistributedContext())
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name])
    save_adapter(alone, out)


def generate(model: Any, context: DistributedContext) -> list[str]:
    """Answers to questions that do not divide over the processes, and their options ranked with shots that
    all prompts share; every process's list."""
    questions = [Example("?" * (1 + 3 * i % 11), "x", str(i), "sums", f"q:{i}") for i in range(7)]
    options = ("yes", "n", "it may be so")
    choices = [dataclasses.replace(each, answer="n", task="ARC-Easy", options=options) for each in questions]
    (ranked,) = evaluation.evaluate(
        model,
        tiny_tokenizer(),
        choices,
        prompt="cloze",
        max_new_tokens=1,
        batch_size=6,
        method="rank",
        shots={"ARC-Easy": choices[3:4]},
        context=context,
        show_progress=False,
    )
    best = [str(p.extracted) for p in ranked.predictions]
    with mock.patch.object(evaluation, "generate", wraps=evaluation.generate) as generate_batches:
        (scores,) = evaluation.evaluate(
            model,
            tiny_tokenizer(),
            questions,
            prompt="question_answer",
            max_new_tokens=6,
            batch_size=2,
            context=context,
            show_progress=False,
        )
    outputs = [p.output for p in scores.predictions]
    return [str(generate_batches.call_args.kwargs["synced"]), *outputs, *best]


class NoRoom:
    """No memory for a complete copy while entered."""

    def __enter__(self) -> None:
        self._free = fsdp.free_memory
        fsdp.free_memory = lambda device: 0

    def __exit__(self, *_: object) -> None:
        fsdp.free_memory = self._free


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every frozen parameter and statistic, whole; all processes must ask."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            tensors[name] = _whole(parameter.detach())
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            tensors |= {f"{name}.{key}": b.clone() for key, b in module.named_buffers(recurse=False)}
    return tensors or {"none": torch.zeros(1)}


def examples(vocabulary: int, count: int) -> list[TokenizedExample]:
    """Random tokens in sequences of very different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 48, (count,), generator=generator).tolist()
    return [
        TokenizedExample(torch.randint(4, vocabulary, (n,), generator=generator).tolist(), 1 + n // 3, str(i))
        for i, n in enumerate(lengths)
    ]


class CountedReads:
    """Bytes of weights that this process reads while entered."""

    def __enter__(self) -> CountedReads:
        self.bytes, self._read = 0, safetensors_file.read_bytes

        def counted(path: Path, start: int, count: int) -> Any:
            self.bytes += count
            return self._read(path, start, count)

        safetensors_file.read_bytes = counted
        return self

    def __exit__(self, *_: object) -> None:
        safetensors_file.read_bytes = self._read


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), fsdp="--fsdp" in sys.argv)
    end(0)
