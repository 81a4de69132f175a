"""`--format lora`: a plain LoRA for servers that refuse DoRA, by SVD of what training changed in each weight.

With a magnitude that is W' - W = (s - 1) ∘ W + s ∘ c B A, whose first part has full rank: a LoRA keeps a
share of it, which is said.

O out_features   I in_features   R rank
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.nn import functional as F

from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.inject import adapted_layers, refuse_overflow
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.saved import CONFIG_FILE, FINGERPRINT, PREFIX, WEIGHTS_FILE
from qdora.adapters.tokens import token_rows
from qdora.errors import InputError
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.export.job import ExportJob
from qdora.export.verify import compare, logits, random_tokens
from qdora.files import write_json, write_tensors
from qdora.models.formats.write import save_tokenizer

ADAPTER = "adapter"
"""Folder of a LoRA that stands beside weights."""
REPORT = "kept.json"
"""What a LoRA keeps of each layer's change, beside it."""

LITTLE = 0.9
"""Share of the squared norm below which a LoRA is another model than the one that was trained."""

_OVERSAMPLING, _ITERATIONS = 16, 8
"""Of the randomized SVD: columns beyond the rank, subspace iterations (arXiv:0909.4061 §4)."""


def check(job: ExportJob) -> None:
    """As `Format.check`."""
    job.check_onto()
    if job.options.score and job.config.data.test is None:
        raise InputError("--score: the run has no test set (data.test)")


def write(job: ExportJob, folder: Path) -> str:
    """As `Format.write`."""
    model, r = job.model, job.options.r
    layers = adapted_layers(model)
    _refuse_unfit(model, layers, job)
    refuse_overflow(model, "the model")
    updates, kept = {}, {}
    for name, layer in layers.items():
        original_OI = job.checkpoint.read(f"{name}.weight") if job.options.onto == "original" else None
        change_OI = change_of(layer, original_OI)
        a_RI, b_OR, share = truncate(change_OI, r)
        updates[name] = a_RI.cpu(), b_OR.cpu()
        kept[name] = share, float(change_OI.norm()) ** 2  # of that squared norm
    total = sum(norm for _, norm in kept.values())
    share = sum(share * norm for share, norm in kept.values()) / total if total else 1.0
    fingerprint = base_fingerprint(model)
    metadata = {FINGERPRINT: fingerprint} if fingerprint else {}
    write_lora(folder, updates, base=job.base_name, metadata=metadata)
    of_layers = {name: share_of_layer for name, (share_of_layer, _) in kept.items()}
    write_json(folder / REPORT, {"r": r, "onto": job.options.onto, "kept": share, "layers": of_layers})
    save_tokenizer(folder, job.tokenizer)
    least = min(of_layers, key=lambda name: of_layers[name])
    said = (
        f"a LoRA of rank {r} that keeps {100 * share:.1f}% of the squared norm of the change of the weights "
        f"(least, {100 * of_layers[least]:.1f}%, in {least}; every layer: {REPORT})"
    )
    if share < LITTLE:
        print(
            f"WARNING: {said}: this is another model than the one that was trained. With a magnitude the "
            f"change has full rank. Raise --r, score it (--score), or serve --format nf4 or merged weights",
            file=sys.stderr,
        )
    return said


def _refuse_unfit(model: torch.nn.Module, layers: Mapping[str, AdaptedLinear], job: ExportJob) -> None:
    """Raises: InputError: what was trained is more than linear layers, or the rank does not fit one."""
    if not layers:
        raise InputError("--format lora: full fine-tuning leaves no adapter; allowed: --format merged, nf4")
    if token_rows(model):
        raise InputError(
            "--format lora: trained rows of tokens (adapter.trainable_tokens) are no low-rank update of a "
            "layer; allowed: --format merged, nf4"
        )
    for name, layer in layers.items():
        if job.options.r > min(layer.shape):
            raise InputError(
                f"--r {job.options.r}: larger than the smaller side of {name} "
                f"({layer.out_features}x{layer.in_features}); allowed: 1 to {min(layer.shape)}"
            )
        if layer.update is not None and layer.update.subtracted_factors() and job.options.onto == "nf4":
            raise InputError(
                f"--format lora: the update of {name} started from its weight, which a server holds without "
                f"that change; allowed: --onto original"
            )


@torch.no_grad()
def change_of(layer: AdaptedLinear, original_OI: torch.Tensor | None = None) -> torch.Tensor:
    """(O, I) float32: the merged weight less the one that a server holds.

    Args:
        original_OI: that one; the frozen weight of the layer where None.
    """
    merged_OI = layer.merged(torch.float32)
    held_OI = layer.base.dense(torch.float32) if original_OI is None else original_OI
    return merged_OI.sub_(held_OI.to(merged_OI))


@torch.no_grad()
def truncate(change_OI: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The nearest matrix of rank r, as A (R, I) and B (O, R), and its share of the squared norm."""
    total = float(change_OI.norm()) ** 2
    if not total:
        return change_OI[:1].expand(r, -1).clone(), change_OI[:, :1].expand(-1, r).clone(), 1.0
    devices = [change_OI.device] if change_OI.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        columns = min(r + _OVERSAMPLING, *change_OI.shape)
        u_OR, sigma_R, v_IR = torch.svd_lowrank(change_OI, columns, _ITERATIONS)
    root_R = sigma_R[:r].sqrt()
    share = float(sigma_R[:r].square().sum()) / total
    return root_R[:, None] * v_IR[:, :r].T, u_OR[:, :r] * root_R, min(share, 1.0)


def verify(job: ExportJob, folder: Path) -> str:
    """As `Format.verify`: the LoRA on the base that the server holds; how far it is, there is no bound."""
    ids_BT = random_tokens(job.model)
    adapted_BTV = logits(job.model, ids_BT)
    job.release()
    held = {"quantization": "none"} if job.options.onto == "original" else {}
    served_BTV = logits(job.load(folder, **held), ids_BT)
    result = compare(folder, served_BTV, adapted_BTV, math.inf)
    said = (
        f"read back onto the {'original' if held else 'quantized'} base: logits differ by "
        f"{result.relative_error:.1e} relative from the adapted model's, the same next token at "
        f"{100 * result.same_next_token:.1f}% of {result.positions} positions"
    )
    if not job.options.score:
        return said
    served = job.config.model_copy(update={"model": job.config.model.model_copy(update=held)})
    pairs = zip(
        evaluate_adapter(job.config, job.adapter, job.context),
        evaluate_adapter(served, folder, job.context),
        strict=True,
    )
    lines = [
        f"{before.task}: {before.metric.replace('_', ' ')} {100 * before.score:.1f}% as trained, "
        f"{100 * after.score:.1f}% as this LoRA ({100 * (after.score - before.score):+.1f} points, "
        f"{before.total} questions)"
        for before, after in pairs
    ]
    return "\n".join([said, *lines])


def write_lora(
    directory: Path,
    updates: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    base: str,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write a LoRA in PEFT's format, with one rank and a scale of 1, as servers take it.

    Args:
        directory: made where missing.
        updates: A (R, I) and B (O, R) by layer; a smaller rank is padded with zeros.
        base: what it goes onto.
        metadata: of the weights file.
    Returns: the rank.
    """
    r = max(a_RI.shape[0] for a_RI, _ in updates.values())
    settings = {
        "peft_type": LoraUpdate.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": r,
        "lora_dropout": 0.0,
        "target_modules": sorted(updates),
        "use_dora": False,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    a_key, b_key = LoraUpdate.peft_keys.values()
    tensors = {}
    for name, (a_RI, b_OR) in updates.items():
        missing = r - a_RI.shape[0]
        tensors[f"{PREFIX}{name}.{a_key}"] = F.pad(a_RI, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{name}.{b_key}"] = F.pad(b_OR, (0, missing)).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CONFIG_FILE, settings)
    write_tensors(directory / WEIGHTS_FILE, tensors, {"format": "pt", **(metadata or {})})
    return r
