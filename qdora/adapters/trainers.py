"""What the trainers of other libraries need of our models: gradients for torch's optimizers, checkpoints.

A 16-bit parameter sums its gradient in float32, and torch's optimizers want it in the parameter's dtype: a
hook rounds it for the step alone.  Trainers save a model by `save_pretrained`, which would write the frozen
base: on an adapted model it writes the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from qdora.errors import InputError
from qdora.files import write_file, write_tensors

TRAINED_FILE = "model.safetensors"
"""Where transformers' Trainer looks for what it goes on from."""


def _summed_wider(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.dtype.itemsize < 4 and p.grad is not None and p.grad_dtype == torch.float32:
                yield p


def _set_gradient(parameter: torch.Tensor, dtype: torch.dtype) -> None:
    grad = parameter.grad
    parameter.grad = None
    parameter.grad_dtype = dtype
    parameter.grad = None if grad is None else grad.to(dtype)


def _round_gradients(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    rounded = [p for p in _summed_wider(optimizer) if p.grad is not None and p.grad.dtype != p.dtype]
    for parameter in rounded:
        _set_gradient(parameter, parameter.dtype)
    optimizer._qdora_rounded = rounded  # type: ignore[attr-defined]


def _sum_wider_again(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
    for parameter in getattr(optimizer, "_qdora_rounded", ()):
        _set_gradient(parameter, torch.float32)


register_optimizer_step_pre_hook(_round_gradients)
register_optimizer_step_post_hook(_sum_wider_again)


def save_as_adapter(model: nn.Module) -> None:
    """Make `model.save_pretrained` write the adapter, where it has such a method."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        # What a trainer need not miss in `TRAINED_FILE`.
        frozen = [name for name in model.state_dict() if name not in trained]
        model._keys_to_ignore_on_save = frozen  # type: ignore[assignment]


def save_as_before(model: nn.Module) -> None:
    """Undo `save_as_adapter`, where it was done."""
    for name in ("save_pretrained", "_keys_to_ignore_on_save"):
        vars(model).pop(name, None)


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    *args: Any,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """The adapter in PEFT's format, and beside it `TRAINED_FILE`, by which a trainer resumes.

    Args:
        model: with an adapter.
        save_directory: made where it is missing.
        is_main_process: False writes nothing.
        args, kwargs: transformers' others; an adapter is one file, whatever they say.
    Raises: InputError: push_to_hub, which uploads no adapter, or the model has none.
    """
    from qdora.adapters.peft_io import save_adapter  # which imports what calls this

    if push_to_hub:
        raise InputError("push_to_hub: save the adapter to a folder, then upload that: hf upload REPO FOLDER")
    if not is_main_process:
        return
    folder = Path(save_directory)
    save_adapter(model, folder)
    trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    write_file(folder / TRAINED_FILE, lambda path: write_tensors(path, trained, {"format": "pt"}))
