"""Load a model, one way at any world size: build on the meta device, inject adapters, shard, load weights,
reset the adapters.

A linear layer is quantized the moment its rows arrive, so the peak is a rank's quantized shard and about one
tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from qdora.adapters.base import refuse_non_finite
from qdora.adapters.fingerprint import combine, sample_digest, sample_rows, set_base_fingerprint
from qdora.adapters.full import quantize_layers
from qdora.adapters.inject import adapted_layers, refuse_lost_original, refuse_overflow
from qdora.adapters.layer import AdaptedLinear
from qdora.adapters.magnitude import original_norms
from qdora.adapters.peft_io import assign_saved, check_base, inject_saved
from qdora.adapters.saved import CONFIG_FILE, SavedAdapter, read_saved
from qdora.adapters.tiles import has_native_bfloat16
from qdora.adapters.tokens import SETTING
from qdora.config import DtypeName, ModelConfig, QuantizationName
from qdora.data.chat_templates import use_chat_template, use_saved_template
from qdora.distributed.context import DistributedContext
from qdora.distributed.fsdp import replace_parameter, reset_adapters, shard_like, shard_model
from qdora.errors import InputError
from qdora.files import read_json, write_file
from qdora.models.build import MetaModel, build_model
from qdora.models.formats import Checkpoint
from qdora.models.formats.safetensors import read_tokenizer
from qdora.models.formats.write import save_tokenizer
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.quant.base import FULL, FrozenWeight, Shard, parameter_like
from qdora.quant.stored import is_statistic
from qdora.resources import WORTH_TRIMMING, release_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


def load_base(
    path_or_id: str | Path,
    *,
    quantization: QuantizationName = "nf4",
    dtype: DtypeName | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    block_size: int = 64,
    double_quantization: bool = True,
    progress: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a frozen causal language model, its linear layers ready for adapters.

    Args:
        path_or_id: hub id, safetensors folder (plain, or quantized to 4 bits by bitsandbytes), GGUF
            file, or packaged model.
        quantization: format of the decoder's linear layers; `none` keeps the stored 16 bits.
        dtype: compute dtype; 16-bit tensors stay 16-bit in memory where it is float32.
        device: where the model goes; `auto` prefers CUDA.
        revision: of a hub id.
        block_size: weights that share one quantization scale.
        double_quantization: quantize the scales as well (QLoRA, arXiv:2305.14314 §3).
        progress: show a bar on standard error.
    Returns: the model in evaluation mode, nothing trainable; its tokenizer, None where it has none.
    Raises: InputError: no such model, an unsupported architecture or quantization, a setting that is not
            allowed; it is named.
        CheckpointError: a file is missing, truncated or corrupt, or does not fit its configuration.
    """
    settings = ModelConfig(
        path=str(path_or_id),
        revision=revision,
        quantization=quantization,
        dtype=dtype,  # type: ignore[arg-type]  # a dtype becomes its name
        block_size=block_size,  # type: ignore[arg-type]  # checked there
        double_quantization=double_quantization,
    )
    context = DistributedContext(device=resolve_device(device))
    checkpoint = open_checkpoint(settings.path, settings.revision)
    model, _ = load_model(checkpoint, settings, context, lambda model: None, progress=progress)
    return model, checkpoint.tokenizer()


def load_model(
    checkpoint: Checkpoint,
    settings: ModelConfig,
    context: DistributedContext,
    adapt: Callable[[PreTrainedModel], T],
    *,
    progress: bool | None = None,
) -> tuple[PreTrainedModel, T]:
    """Load a model with adapters, sharded where the launch asks for FSDP; a collective.

    Args:
        checkpoint: of `open_checkpoint(settings.path, ...)`.
        adapt: gives the model, which is on the meta device, its adapters: `inject` with its settings, say.
        progress: show a bar on standard error; on the main rank where None.
    Returns: the model in evaluation mode; what `adapt` returned.
    Raises: InputError: as `build_model` and `adapt`; on all ranks where it happened to one.
            A weight holds NaN or infinite values.
        CheckpointError: a file became shorter.
    """
    meta, report = build_adapted(checkpoint, settings, context, adapt)
    _WeightLoader(meta, context).run(context.is_main if progress is None else progress)
    reset_adapters(meta.model, context)
    return meta.model, report


def build_adapted(
    checkpoint: Checkpoint,
    settings: ModelConfig,
    context: DistributedContext,
    adapt: Callable[[PreTrainedModel], T],
) -> tuple[MetaModel, T]:
    """Build, inject and shard on the meta device, as `load_model` does before it reads a weight.

    Args, Raises: as `load_model`.
    """
    with context.raise_on_all_ranks():
        meta = build_model(
            checkpoint, compute_dtype(settings.dtype, context.device), Quantization.of(settings)
        )
        report = adapt(meta.model)
        for name, layer in adapted_layers(meta.model).items():
            kept = meta.stored.get(f"{name}.weight")
            if kept is not None and layer.magnitude is not None and layer.magnitude.start == "original":
                refuse_lost_original(name, kept.kind.quantization)
        shard_model(meta.model, context)
    return meta, report


def load_with_adapter(
    checkpoint: Checkpoint,
    settings: ModelConfig,
    context: DistributedContext,
    adapter: Path | None,
    quantize: Quantization | None = None,
) -> PreTrainedModel:
    """The configured model with a saved adapter on it, sharded where the launch asks for FSDP; a collective.

    Args:
        adapter: folder in PEFT's format; None leaves the base alone.
        quantize: format of a fully trained model's linear layers, after it is loaded.
    Raises: InputError: anything that cannot be loaded or does not fit.
    """
    with context.raise_on_all_ranks():
        saved = None if adapter is None else read_saved(adapter)
        if saved is not None:
            refuse_sharded_base(saved, context)
    injected = None if saved is None or saved.is_full else saved
    model, _ = load_model(
        checkpoint, settings, context, lambda m: None if injected is None else inject_saved(m, injected)
    )
    if saved is not None:
        put_saved(model, saved, context)
    with context.raise_on_all_ranks():
        if quantize is not None:
            quantize_layers(model, quantize)
    return model


def refuse_sharded_base(saved: SavedAdapter, context: DistributedContext) -> None:
    """Raises: InputError: an adapter that changes the base's full weights, which no rank has under FSDP."""
    if context.fsdp is not None and (saved.is_full or saved.changes_base or saved.has_tokens):
        what = "a fully trained model" if saved.is_full else "an adapter that started from full weights"
        what = "an adapter with trained rows of tokens" if saved.has_tokens else what
        raise InputError(f"{saved.directory}: {what} does not go onto a sharded base; use it without FSDP")


def put_saved(model: PreTrainedModel, saved: SavedAdapter, context: DistributedContext) -> None:
    """Write a saved adapter's values onto the loaded base that was injected for it; a collective.

    Raises: InputError: the adapter was made for another base, or its norms overflow.
    """
    with context.raise_on_all_ranks():
        check_base(model, saved)
        assign_saved(model, saved)
        if context.fsdp is None:
            refuse_overflow(model, str(saved.directory))


def adapter_rows(adapter: Path | None, rows: int) -> int:
    """Rows of the embedding with those that an adapter adds to the `rows` of its base."""
    if adapter is None or not (adapter / CONFIG_FILE).is_file():
        return rows
    named = read_json(adapter / CONFIG_FILE).get(SETTING) or {}
    ids = [i for of_layer in (named.values() if isinstance(named, dict) else [named]) for i in of_layer]
    return max([rows, *(i + 1 for i in ids if isinstance(i, int))])


def required_tokenizer(
    checkpoint: Checkpoint,
    chat_template: str | None = None,
    *,
    adapter: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with the chat template that was trained.

    Args:
        chat_template: of `data.chat_template`.
        adapter: folder of an adapter; the tokenizer and the chat template that are saved there come first.
        say: told what a chat template changes.
    Raises: InputError: it comes without one, or with one that cannot be used; as `use_chat_template`.
    """
    saved = None if adapter is None else read_tokenizer(adapter)
    tokenizer = checkpoint.tokenizer() if saved is None else saved
    if tokenizer is None:
        raise InputError(f"{checkpoint.origin}: the model comes without a tokenizer")
    if adapter is not None and use_saved_template(tokenizer, adapter):
        return tokenizer
    if chat_template is not None:
        changed = use_chat_template(tokenizer, chat_template)
        if say is not None:
            say(changed)
    return tokenizer


def save_beside_adapter(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a tokenizer with the chat template that was trained, each file atomically.

    Raises: InputError: it cannot be saved.
    """
    with TemporaryDirectory() as made:
        save_tokenizer(Path(made), tokenizer)
        for path in sorted(Path(made).iterdir()):
            write_file(folder / path.name, partial(copyfile, path))


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises: InputError: no such device.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device {device!r}: no such device; allowed: auto, cpu, cuda, cuda:N") from None
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {str(device)!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return resolved


def compute_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    """The named dtype; `auto` is bfloat16 where the device multiplies it natively, else float32.

    On a CPU without bfloat16 units such products are several times slower than float32 ones.
    """
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    return torch.bfloat16 if has_native_bfloat16(device) else torch.float32


class _WeightLoader:
    """Reads a checkpoint into a model on the meta device; of a sharded parameter this rank's rows."""

    def __init__(self, meta: MetaModel, context: DistributedContext) -> None:
        self.meta, self.model, self.checkpoint = meta, meta.model, meta.checkpoint
        self.context = context
        modules = self.model.named_modules()
        layers = {f"{name}.weight": m for name, m in modules if isinstance(m, AdaptedLinear)}
        self.bases = {name: layer.base for name, layer in layers.items()}
        self.from_original = {
            name: layer.magnitude
            for name, layer in layers.items()
            if layer.magnitude is not None and layer.magnitude.start == "original"
        }
        self.plain = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.samples: dict[str, torch.Tensor] = {}

    def run(self, progress: bool) -> None:
        names = self.checkpoint.names()
        for name in tqdm(names, "Loading", unit="tensor", leave=False, mininterval=1, disable=not progress):
            self._load(name)
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.context.device)
        set_base_fingerprint(self.model, self._fingerprint())

    def _load(self, name: str) -> None:
        if name in self.bases:
            self._load_frozen(name, self.bases[name])
        elif is_statistic(name) or name in self.meta.unused:
            with self.context.raise_on_all_ranks():
                self._read(name, self._local_rows(name))
        elif name in self.plain:  # other tensors are those that the architecture says may be there
            self._load_plain(name, self.plain[name])
        info = self.checkpoint.info(name)
        if info.dtype.itemsize * torch.Size(info.shape).numel() >= WORTH_TRIMMING:
            release_freed_memory()

    def _load_frozen(self, name: str, base: FrozenWeight) -> None:
        """A linear layer: quantized here, or stored so."""
        shard = self._shard_of(next(base.parameters()))
        stored = self.meta.stored.get(name)
        with self.context.raise_on_all_ranks():
            if stored is not None:
                tensors = stored.read(self.checkpoint.read, shard, self.context.device)
                self._read(name, self._local_rows(name))
                refuse_non_finite({f"{name}.{k}": t for k, t in tensors.items()}, self.checkpoint.origin)
            else:
                w_RI = self._read(name, base.rows_to_read(shard)).to(self.context.device)
                refuse_non_finite({name: w_RI}, self.checkpoint.origin)
        if stored is None:
            # Outside the block above: the ranks gather the scales of each other here.
            tensors = base.from_rows(w_RI, shard, self.context.gather_rows)
            if name in self.from_original:
                first, own = base.rows_to_read(shard).start, shard.rows(base.out_features)
                norm_O = original_norms(w_RI[own.start - first : own.stop - first])
                norm_O = self.context.gather_rows(norm_O, base.out_features)
                self.from_original[name].start_from(norm_O.to(base.norm_dtype))
        base.assign({key: self._like(getattr(base, key), tensor) for key, tensor in tensors.items()})

    def _load_plain(self, name: str, target: nn.Parameter | torch.Tensor) -> None:
        """An embedding, a norm weight, a bias, a buffer."""
        with self.context.raise_on_all_ranks():
            rows = None if self._shard_of(target) == FULL else self._local_rows(name)
            tensor = self._read(name, rows).to(self.context.device, target.dtype)
            if isinstance(target, nn.Parameter):  # a buffer may be a mask of infinities
                refuse_non_finite({name: tensor}, self.checkpoint.origin)
        if isinstance(target, nn.Parameter):
            replace_parameter(self.model, target, parameter_like(target, self._like(target, tensor)))
        else:
            module_name, _, leaf = name.rpartition(".")
            self.model.get_submodule(module_name)._buffers[leaf] = tensor

    def _like(self, old: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
        if not isinstance(old, DTensor):
            return local
        return shard_like(old, local.to(self.context.storage_device))

    def _shard_of(self, parameter: torch.Tensor) -> Shard:
        return self.context.shard if isinstance(parameter, DTensor) else FULL

    def _local_rows(self, name: str) -> slice:
        shape = self.checkpoint.info(name).shape
        return self.context.shard.rows(shape[0] if shape else 1)

    def _read(self, name: str, rows: slice | None) -> torch.Tensor:
        """Read rows and sample this rank's own: the ranks sample each row once, however much each reads."""
        tensor = self.checkpoint.read(name, rows)
        shape, first_row = self.checkpoint.info(name).shape, 0 if rows is None else rows.start
        self.samples[name] = sample_rows(tensor, shape, self._local_rows(name), first_row)
        return tensor

    def _fingerprint(self) -> str:
        of_ranks = self.context.gather([self.samples])
        full = {name: torch.cat([samples[name] for samples in of_ranks]) for name in self.samples}
        digest_of = {n: sample_digest(n, self.checkpoint.info(n).shape, sample) for n, sample in full.items()}
        return combine(digest_of)
