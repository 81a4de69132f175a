"""Random small architectures and adapters against PEFT: outputs, gradients, merged weights, files both ways.

A case follows from its seed alone: `python -m tools.campaign architectures --count 1 --seed N` repeats it.

Dense bases compute in float64, where nothing but the order of operations differs: a step in float32 anywhere
shows as 1e-8.  4-bit bases, starts and attention that are made in float32, and models that `load_base` reads
compute in float32; there the sums of up to 128 products in up to 3 layers with their norms leave some tens of
its 6e-8.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from torch import nn
from transformers import PreTrainedModel

from qdora.adapters.inject import adapted_layers, merge_adapters, unmerge_adapters
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.lora import LoraUpdate
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.errors import InputError
from qdora.export.merged import merged_tensors
from qdora.models.load import load_base
from tools.campaign.report import Report
from tools.campaign.small_models import Case, make_case, make_model

BOUNDS = {torch.float64: 1e-10, torch.float32: 2e-5}
"""Largest relative error, as a norm; of what went through a float32 file, the second one."""

ROUNDINGS = 20
"""A gradient may be as far off float64's as so many roundings of all weights would move it: where its terms
cancel, one moves it by forty times its own size, and it passes dozens of operators."""
SPREAD = 3
"""Or so many times as far as PEFT's own after a rounding of all weights: a softmax near its end cancels terms
that such a rounding moves alike, and float32 does not."""

LEAST = {torch.float64: 1e-100, torch.float32: 1e-15}
"""A row whose square is no longer seen beside others, and whose norm PEFT still divides by."""


class DiffersError(Exception):
    """Ours and PEFT's are not equal; says what and by how much."""


def check(case: Case, folder: Path) -> str:
    """Try one case.

    Returns: how it ended as promised.
    Raises: DiffersError: it did not.
    """
    theirs: Any = _with_values(peft.get_peft_model(make_model(case), case.settings), case)
    theirs.save_pretrained(folder / "theirs")
    outcome = "equal"
    if case.zero == "both" and case.dora:
        if not bool(_outputs(theirs, case).isfinite().all()):
            outcome = "equal, where PEFT alone gives NaN"
        theirs = peft.PeftModel.from_pretrained(
            make_model(case, LEAST[case.dtype]), folder / "theirs", is_trainable=True
        )
        theirs.train().to(case.dtype)
    if case.init in ("pissa", "olora"):  # the factors were made of a base that PEFT has changed by now
        theirs = peft.PeftModel.from_pretrained(
            make_model(case), folder / "theirs", is_trainable=True
        ).train()
    ours = _ours(case, folder)
    load_adapter(ours, folder / "theirs")
    bound = BOUNDS[case.dtype]
    if case.init == "olora":  # W - c B A, and c B A beside it: what rounding leaves of them grows with c
        bound *= max(1.0, *(layer.update.scale for layer in adapted_layers(ours).values() if layer.update))
    _compare("outputs", _outputs(ours, case), _outputs(theirs, case), bound)
    _compare_gradients(ours, theirs, case, bound, folder / "theirs")
    _compare_merged(ours, theirs, case, bound)
    _move(ours, case)
    save_adapter(ours, folder / "ours")
    again = _ours(case, folder)
    load_adapter(again, folder / "ours")
    # A magnitude is stored in float32.
    rounded = max(bound, BOUNDS[torch.float32]) if case.dora else bound
    _compare("our file, read here", _outputs(again, case), _outputs(ours, case), rounded)
    if case.init in ("pissa", "olora"):
        return outcome
    base = make_model(case, LEAST[case.dtype] if case.dora and case.zero == "both" else 0.0)
    back = peft.PeftModel.from_pretrained(base, folder / "ours").train().to(case.dtype)
    _compare("our file, read by PEFT", _outputs(ours, case), _outputs(back, case), rounded)
    return outcome


def _ours(case: Case, folder: Path) -> PreTrainedModel:
    if not case.loaded:
        return make_model(case)
    if not (folder / "base").exists():
        make_model(case).save_pretrained(folder / "base")
    model, _ = load_base(folder / "base", quantization="none", dtype="float32", device="cpu")
    model.train()
    return model


@torch.no_grad()
def _with_values(model: nn.Module, case: Case) -> nn.Module:
    """PEFT's model with values off the identity, that float32 holds."""
    model.to(case.dtype)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if "lora_A" not in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter)).add_(
                    0.0 if "magnitude" in name else 0.1 * torch.randn_like(parameter)
                )
            if case.zero == "both" and ("lora_B" in name or "magnitude" in name) and "lm_head" not in name:
                parameter[0] = 0.0
            parameter.copy_(parameter.float())
    return model.train()


@torch.no_grad()
def _move(model: nn.Module, case: Case) -> None:
    """Another state of our adapter: A, B and the offset of the magnitude."""
    for layer in adapted_layers(model).values():
        if isinstance(layer.update, LoraUpdate):
            layer.update.a_RI.mul_(1 + 0.1 * torch.randn_like(layer.update.a_RI))
            layer.update.b_OR.mul_(1 + 0.1 * torch.randn_like(layer.update.b_OR))
        if layer.magnitude is not None:
            offset_O = layer.magnitude.offset_O
            assert offset_O is not None
            moved_O = 0.1 * torch.randn_like(offset_O)
            zero = layer.magnitude.initial_O < 1e-9
            offset_O.copy_(moved_O.masked_fill(zero, 0.0))


def _ids(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed)
    return torch.randint(3, case.config.vocab_size, (2, 7), generator=generator)


def _outputs(model: nn.Module, case: Case) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=_ids(case), use_cache=False).logits
    return logits


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / (expected.norm() + torch.finfo(torch.float64).tiny))


def _compare(what: str, got: torch.Tensor, expected: torch.Tensor, bound: float) -> None:
    error = _error(got, expected)
    if not error <= bound:
        raise DiffersError(f"{what} differ by {error:.1e}, allowed {bound:.0e}")


NAMES = {
    "update.a_RI": "lora_A.default.weight",
    "update.b_OR": "lora_B.default.weight",
    "update.d_R": "vera_lambda_d.default",
    "update.b_O": "vera_lambda_b.default",
    "magnitude.offset_O": "lora_magnitude_vector.default.weight",
}


def _backward(model: nn.Module, case: Case) -> None:
    logits = _outputs(model, case)
    generator = torch.Generator().manual_seed(case.seed + 1)
    (logits * torch.randn(logits.shape, generator=generator)).sum().backward()


def _compare_gradients(ours: nn.Module, theirs: nn.Module, case: Case, bound: float, adapter: Path) -> None:
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = case.dtype
    for model in (ours, theirs):
        _backward(model, case)
    exact: list[nn.Module] = []
    nudged: list[nn.Module] = []
    expected = dict(theirs.named_parameters())
    count = 0
    for name, layer in adapted_layers(ours).items():
        for key, parameter in layer.named_parameters():
            if not parameter.requires_grad:
                continue
            peer = f"base_model.model.{name}.{NAMES[key]}"
            pair = [_gradient(parameter), _gradient(expected[peer])]
            if case.zero == "both" and case.dora and name != "lm_head" and "a_RI" not in key:
                pair = [gradient[1:] for gradient in pair]  # PEFT's are 0/0 of the zero row
            try:
                _compare(f"gradients of {name}.{key}", pair[0], pair[1], bound)
            except DiffersError:
                # PEFT's rounding may be the larger one: ours has to be near the gradient in float64.
                if case.dtype == torch.float64 or case.init == "olora":
                    raise
                exact = exact or [_exact_model(case, adapter, nudge) for nudge in range(4)]
                nudged = nudged or [_nudged(theirs, case, seed) for seed in range(1, 4)]
                true, *moved = (_gradient(m.get_submodule(name).get_parameter(key)) for m in exact)
                peers = [_gradient(model.get_parameter(peer)) for model in nudged]
                allowed = max(bound, ROUNDINGS * max(_error(each, true) for each in moved))
                if true.shape == peers[0].shape:
                    allowed = max(allowed, SPREAD * max(_error(each, true) for each in peers))
                _compare(f"gradients of {name}.{key} and float64's", pair[0], true, allowed)
            count += 1
    if count != sum(parameter.requires_grad for parameter in theirs.parameters()):
        raise DiffersError(f"{count} parameters are trained, PEFT trains another number of them")


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _exact_model(case: Case, adapter: Path, nudge: int) -> nn.Module:
    """The model of a float32 case in float64, after backward.

    Args:
        nudge: 0, or the seed of a rounding of all weights, up or down.
    """
    model = make_model(replace(case, quantization="none", dtype=torch.float64))
    for name, module in make_model(case).named_modules():
        if isinstance(module, Linear4bit):
            model.get_submodule(name).get_parameter("weight").data = _dequantized(module).double()
    load_adapter(model, adapter)
    if nudge:
        _nudge(model, nudge)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad_dtype = torch.float64
    _backward(model, case)
    return model


def _nudged(model: nn.Module, case: Case, seed: int) -> nn.Module:
    """A model in its own dtype, its weights rounded up or down, after backward."""
    copied = copy.deepcopy(model)
    _nudge(copied, seed)
    copied.zero_grad()
    _backward(copied, case)
    return copied


def _nudge(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(1 + 2.0**-24 * torch.randn_like(parameter).sign())


def _compare_merged(ours: PreTrainedModel, theirs: nn.Module, case: Case, bound: float) -> None:
    unmerged = _outputs(ours, case)
    merge_adapters(ours, case.dtype)
    with torch.no_grad():
        _compare("merged outputs", _outputs(ours, case), unmerged, bound)
    unmerge_adapters(ours)
    if case.loaded:
        plain = make_model(case)
        plain.load_state_dict(
            dict(merged_tensors(ours, torch.float32)), strict=not case.config.tie_word_embeddings
        )
        _compare("exported outputs", _outputs(plain, case), unmerged, bound)
    for name, layer in adapted_layers(ours).items():
        of_peft = theirs.get_submodule(f"base_model.model.{name}")
        expected = _merged_by_peft(of_peft, layer, case)
        _compare(f"merged {name}", layer.merged(case.dtype), expected, bound)


@torch.no_grad()
def _merged_by_peft(module: Any, layer: AdaptedLinear, case: Case) -> torch.Tensor:
    base = module.get_base_layer()
    if case.quantization == "none" or type(base) is nn.Linear:
        module.merge()
        merged: torch.Tensor = base.weight.clone()
        module.unmerge()
        return merged
    # Merging into 4 bits rounds: what PEFT would round, from PEFT's own parts.
    w_OI: torch.Tensor = _dequantized(base) + module.get_delta_weight("default")
    if layer.magnitude is not None:
        w_OI *= (module.lora_magnitude_vector["default"].weight / w_OI.norm(dim=1))[:, None]
    return w_OI


def _dequantized(layer: Any) -> torch.Tensor:
    w_OI: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return w_OI


def run(count: int, seed: int, folder: Path) -> Report:
    """Try `count` cases, the first of them with `seed`."""
    report = Report("architectures")
    with _quiet():
        for number in range(seed, seed + count):
            case = make_case(number)
            kind = f"{case.family}, {case.quantization}"
            attempt(report, kind, str(case), partial(check, case, folder / str(case.seed)))
    return report


def attempt(report: Report, kind: str, line: str, trial: Callable[[], str]) -> None:
    """Note how a trial ends: any error is a fault."""
    try:
        report.count(kind, trial())
    except DiffersError as error:
        report.fault(kind, f"{line}: {error}")
    except InputError as error:
        report.fault(kind, f"{line}: refused: {error}")
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        report.fault(kind, f"{line}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice of both libraries, thousands of lines of it."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
