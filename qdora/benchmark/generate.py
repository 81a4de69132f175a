"""Greedy generation: ours with an adapted 4-bit model against PEFT's, and of our merged export against plain
transformers, each at its best batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import save_adapter
from qdora.benchmark.peers import alternate, autocast, medians, peft_saved, ratio, timed
from qdora.config import EvaluationWeights, RunConfig
from qdora.data.padding import eos_token_ids
from qdora.distributed.context import DistributedContext
from qdora.evaluation.continuous import SPARE_COLUMNS
from qdora.evaluation.generation import Generation, generate, read_answer
from qdora.evaluation.weights import evaluation_weights
from qdora.export.merged import merge_and_export
from qdora.models.load import compute_dtype, load_base

PAIRS = (
    ("qdora", "peft qdora"),
    ("qdora, weights adapted", "peft qdora"),
    ("merged export", "transformers"),
)
"""Arms and peers whose speeds, and answers, are compared."""

MOVED_B, MOVED_M = 0.005, 0.01
"""Standard deviations of B, and of the magnitude's relative offset: off the identity, and still a text."""

Write = Callable[[int], list[Generation]]
"""Answers to all questions, at a batch size."""


@dataclass(frozen=True)
class Questions:
    """Prompts of one task, and how long an answer may be."""

    name: str
    prompts: list[list[int]]
    max_new_tokens: int


def benchmark_generate(
    config: RunConfig,
    questions: Sequence[Questions],
    batch_sizes: Sequence[int],
    device: torch.device,
    rounds: int,
    folder: Path,
) -> dict[str, Any]:
    """Examples and tokens a second of each arm at its best batch size, and the comparisons of `PAIRS`.

    Args:
        config: model and adapter of all arms.
        questions: an arm answers all of them, task by task.
        batch_sizes: each arm tries them all once.
        folder: for the adapter and the merged export; it must exist.
    """
    arms = _arms(config, questions, device, folder)
    best: dict[str, int] = {}
    answers: dict[str, list[Generation]] = {}
    for name, write in arms.items():
        found: dict[int, float] = {}
        for size in tqdm(batch_sizes, desc=name, unit="batch size", leave=False):
            found[size] = timed(partial(_keep, answers, name, write, size), device)
        best[name] = min((seconds, size) for size, seconds in found.items())[1]
    at_best = {name: partial(timed, partial(write, best[name]), device) for name, write in arms.items()}
    seconds = alternate(at_best, rounds, warmup=0, title="generation")
    total = sum(len(each.prompts) for each in questions)
    return {
        "questions": {each.name: len(each.prompts) for each in questions},
        "max_new_tokens": {each.name: each.max_new_tokens for each in questions},
        "batch_sizes": list(batch_sizes),
        "arms": {
            name: {
                "batch_size": best[name],
                "seconds": median,
                "examples_per_second": total / median,
                "tokens_per_second": sum(answer.tokens for answer in answers[name]) / median,
            }
            for name, median in medians(seconds).items()
        },
        "comparisons": [
            {
                "arm": arm,
                "peer": peer,
                "times_as_fast": ratio(seconds, peer, arm),
                "equal_answers": sum(a == b for a, b in zip(answers[arm], answers[peer], strict=True)),
            }
            for arm, peer in PAIRS
        ],
        "stopped": sum(answer.stopped for answer in answers["qdora"]),
    }


def _keep(answers: dict[str, list[Generation]], name: str, write: Write, batch_size: int) -> None:
    answers[name] = write(batch_size)


def _arms(
    config: RunConfig, questions: Sequence[Questions], device: torch.device, folder: Path
) -> dict[str, Write]:
    """What answers all questions at a batch size, by name."""
    settings, dtype = config.model, compute_dtype(config.model.dtype, device)
    load = partial(load_base, dtype=dtype, device=device, revision=settings.revision)
    ours, tokenizer = load(
        settings.path,
        quantization="nf4",
        block_size=settings.block_size,
        double_quantization=settings.double_quantization,
    )
    assert tokenizer is not None
    inject(ours, config.adapter)
    _move_off_the_identity(ours)
    save_adapter(ours, folder / "adapter")
    export = merge_and_export(ours, tokenizer, folder / "merged")
    dense, _ = load(settings.path, quantization="none")
    peer = peft_saved(dense, settings, folder / "adapter", compute=dtype)
    del dense
    merged, _ = load(export, quantization="none")
    plain: nn.Module = AutoModelForCausalLM.from_pretrained(export, dtype=dtype)
    generation: dict[str, Any] = {
        "tokenizer": tokenizer,
        "eos_ids": eos_token_ids(ours, tokenizer),
        "compute": dtype,
    }
    return {
        "qdora": partial(_ours, ours, tokenizer, questions, "auto"),
        "qdora, weights adapted": partial(_ours, ours, tokenizer, questions, "adapted"),
        "peft qdora": partial(_theirs, peer, questions, **generation),
        "merged export": partial(_ours, merged, tokenizer, questions, "auto"),
        "transformers": partial(_theirs, plain.to(device).eval(), questions, **generation),
    }


@torch.no_grad()
def _move_off_the_identity(model: nn.Module) -> None:
    torch.manual_seed(0)
    for layer in adapted_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name.endswith("b_OR"):
                parameter.normal_(std=MOVED_B)
        if layer.magnitude is not None and layer.magnitude.offset_O is not None:
            m_O = layer.magnitude.value()
            layer.magnitude.offset_O.copy_(m_O * torch.randn_like(m_O) * MOVED_M)


def _ours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Questions],
    weights: EvaluationWeights,
    batch_size: int,
) -> list[Generation]:
    """As `evaluate` generates; merging counts."""
    longest = max(len(ids) + each.max_new_tokens for each in questions for ids in each.prompts)
    context = DistributedContext(device=model.device)
    cached = batch_size * (longest + SPARE_COLUMNS)
    with evaluation_weights(model, context, weights, cached):
        return [
            answer
            for each in questions
            for answer in generate(
                model,
                tokenizer,
                each.prompts,
                pad_id=int(tokenizer.pad_token_id or tokenizer.eos_token_id),
                max_new_tokens=each.max_new_tokens,
                batch_size=batch_size,
            )
        ]


@torch.no_grad()
def _theirs(
    model: nn.Module,
    questions: Sequence[Questions],
    batch_size: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    eos_ids: Sequence[int],
    compute: torch.dtype,
) -> list[Generation]:
    """As transformers' users generate: batches of similar length, padded on the left."""
    answers = []
    call = cast("Callable[..., torch.Tensor]", cast(Any, model).generate)
    device = next(model.parameters()).device
    for each in questions:
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=each.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            eos_token_id=list(eos_ids),
        )
        order = sorted(range(len(each.prompts)), key=lambda i: len(each.prompts[i]), reverse=True)
        found: dict[int, Generation] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer.pad(
                {"input_ids": [each.prompts[i] for i in chosen]}, padding_side="left", return_tensors="pt"
            ).to(device)
            with autocast(device, compute):
                ids_BT = call(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]
            for i, ids in zip(chosen, ids_BT.tolist(), strict=True):
                found[i] = read_answer(ids, eos_ids, tokenizer)
        answers += [found[i] for i in range(len(each.prompts))]
    return answers


def table(figures: Mapping[str, Any]) -> list[list[str]]:
    """Rows: arm, batch size, seconds, examples and tokens a second."""
    return [
        [
            name,
            str(arm["batch_size"]),
            f"{arm['seconds']:.1f}",
            f"{arm['examples_per_second']:.2f}",
            f"{arm['tokens_per_second']:.0f}",
        ]
        for name, arm in figures["arms"].items()
    ]
