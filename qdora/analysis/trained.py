"""The linear layers of a model before and after training, one at a time: never two dense models in memory.

O out_features   I in_features   K rank
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qdora.adapters.inject import adapted_layers
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.peft_io import assign_saved, check_base, inject_saved
from qdora.adapters.saved import SavedAdapter, read_saved
from qdora.config import ModelConfig
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.load import load_model, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.run import RunDirectory
from qdora.training.checkpoint import list_checkpoints
from qdora.training.metrics import read_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SavedStep:
    """What a run saved at one step.

    Attributes:
        adapter: folder in PEFT's format.
        step: optimizer steps done.
        final: whether it is what the run ended with.
    """

    adapter: Path
    step: int
    final: bool


def saved_steps(directory: RunDirectory) -> list[SavedStep]:
    """The checkpoints of a run and its final adapter, oldest first; of an equal step the final one alone.

    Raises: InputError: the run has neither.
    """
    folders = {int(path.name.removeprefix("step-")): path for path in list_checkpoints(directory.checkpoints)}
    steps = [SavedStep(path / "adapter", step, final=False) for step, path in sorted(folders.items())]
    if (directory.adapter / "adapter_model.safetensors").is_file() or not steps:
        newest = max(folders, default=0)
        last = max((metrics.step for metrics in read_metrics(directory.metrics_file)), default=newest)
        steps = [saved for saved in steps if saved.step < last]
        steps.append(SavedStep(directory.finished_adapter(), last, final=True))
    return steps


def module_of(name: str) -> str:
    """The last part of a layer's full name: `q_proj`."""
    return name.rpartition(".")[2]


def index_of(name: str) -> int | None:
    """The number of the decoder layer in a full name, from 0; None where it has none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


@dataclass(frozen=True)
class TrainedLayer:
    """One linear layer, before training and after it.

    Attributes:
        name: full name.
        layer: its frozen weight, in the format that was trained on, and its adapter.
        trained_OI: what full fine-tuning made of the weight; None where an adapter was trained, or nothing.
    """

    name: str
    layer: AdaptedLinear
    trained_OI: torch.Tensor | None = None

    @property
    def module(self) -> str:
        """Last part of the name: `q_proj`."""
        return module_of(self.name)

    @property
    def index(self) -> int | None:
        """Number of the decoder layer, from 0; None of a layer outside of one."""
        return index_of(self.name)

    @torch.no_grad()
    def before(self) -> torch.Tensor:
        """The weight at step 0: (O, I), at least float32.

        A quantized one is dequantized; a start that took singular vectors out of it is put back.
        """
        w_OI = self.layer.base.dense()
        update = None if self.trained_OI is not None else self.layer.update
        start = None if update is None else update.subtracted_factors()
        if start is not None:
            a_KI, b_OK = start.combined(w_OI.dtype)
            w_OI.addmm_(b_OK.to(w_OI.device), a_KI.to(w_OI.device), alpha=start.scale)
        return w_OI

    @torch.no_grad()
    def after(self) -> torch.Tensor:
        """The trained weight, its adapter merged: (O, I), at least float32."""
        dtype = self.layer.base.norm_dtype
        if self.trained_OI is not None:
            return self.trained_OI.to(self.layer.base.device, dtype)
        return self.layer.merged(dtype)

    @property
    def is_rescaled(self) -> bool:
        """Whether a magnitude rescales the rows, so that the change is no longer of low rank."""
        return self.trained_OI is None and self.layer.magnitude is not None

    @torch.no_grad()
    def update_factors(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """A (K, I) and B (O, K), float64, of what the low-rank update adds: s ∘ c B A, less its start.

        Without a magnitude B A is the change of the weight.  None where there is no low-rank update.
        """
        update = None if self.trained_OI is not None else self.layer.update
        if update is None:
            return None
        factors, start = update.factors(), update.subtracted_factors()
        a_KI, b_OK = factors.combined(torch.float64)
        b_OK = factors.scale * b_OK
        if self.layer.magnitude is not None:
            s_O = self.layer.magnitude.value().double() / self.layer.weight_norm().double()
            b_OK = s_O[:, None] * b_OK
        if start is not None:
            a_start_KI, b_start_OK = (factor.to(b_OK.device) for factor in start.combined(torch.float64))
            a_KI, b_OK = torch.cat([a_KI, a_start_KI]), torch.cat([b_OK, -start.scale * b_start_OK], dim=1)
        return a_KI, b_OK


class TrainedModel:
    """A base model, and what adapters or full fine-tuning make of it.

    The base is loaded when the first layer is asked for, and again only for an adapter of another kind.

    Args:
        settings: of the base, in the format that was trained on.
    """

    def __init__(self, settings: ModelConfig) -> None:
        self.settings = settings
        self._model: PreTrainedModel | None = None
        self._carries: Any = None

    def layers(self, adapter: Path | None) -> Iterator[TrainedLayer]:
        """The linear layers that were trained; all of the decoder's where no adapter is given.

        Values of one layer exist while it is looked at: keep none of them.

        Args:
            adapter: folder of an adapter or of a fully trained model.
        Raises: InputError: the adapter cannot be used, or belongs to another base.
            CheckpointError: a file is truncated or corrupt.
        """
        saved = None if adapter is None else read_saved(adapter)
        if saved is not None and not saved.is_full:
            for name, layer in adapted_layers(self._with(saved)).items():
                yield TrainedLayer(name, layer)
            return
        model = self._base()
        tensors = {}
        if saved is not None:
            check_base(model, saved)
            tensors = saved.full_tensors
        for name, layer in model.named_modules():
            if isinstance(layer, AdaptedLinear):
                yield TrainedLayer(name, layer, None if saved is None else _own(tensors, name, layer, saved))

    def _with(self, saved: SavedAdapter) -> PreTrainedModel:
        """The model with an adapter on it."""
        shapes = {n: {k: tuple(t.shape) for k, t in parts.items()} for n, parts in saved.layers.items()}
        kind = (saved.settings, shapes)
        if self._model is None or self._carries != kind:
            model = self._base()
            check_base(model, saved)
            inject_saved(model, saved)
            self._carries = kind
        assert self._model is not None
        check_base(self._model, saved)
        assign_saved(self._model, saved)
        model = self._model
        if saved.changes_base:  # the next adapter's start is taken out of the base as it is stored
            self._model = self._carries = None
        return model

    def _base(self) -> PreTrainedModel:
        """The model as it was loaded."""
        if self._model is None or self._carries is not None:
            self._model = self._carries = None  # before the next one is there
            checkpoint = open_checkpoint(self.settings.path, self.settings.revision)
            context = DistributedContext(device=resolve_device("auto"))
            self._model, _ = load_model(checkpoint, self.settings, context, lambda model: None)
        return self._model


def _own(
    tensors: dict[str, torch.Tensor], name: str, layer: AdaptedLinear, saved: SavedAdapter
) -> torch.Tensor:
    """A layer's weight in a fully trained model's file.

    Raises: InputError: it is missing or of another shape.
    """
    trained_OI = tensors.get(f"{name}.weight")
    if trained_OI is None or tuple(trained_OI.shape) != layer.shape:
        got = "missing" if trained_OI is None else f"of shape {tuple(trained_OI.shape)}"
        raise InputError(
            f"{saved.directory}: the weights were made for another base: {name}.weight is {got}, "
            f"expected {layer.shape}"
        )
    return trained_OI
