"""Load a base model: its tensors stream from disk straight into their frozen layers.

A linear layer of the decoder becomes NF4 the moment its weight arrives, so the peak is the
4-bit model plus about one tensor.  Embeddings, norms and the output layer are not quantized.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapters.fingerprint import combine, sample_digest, sample_rows, set_base_fingerprint
from qdora.config import BaseKind, DtypeName
from qdora.distributed.fsdp import replace_parameter, shard_like
from qdora.memory import WORTH_TRIMMING, release_freed_memory
from qdora.models.build import Quantization, Skeleton, build_skeleton
from qdora.models.formats import TensorInfo
from qdora.models.formats.prequantized import check_quantization, is_part, read_stored
from qdora.models.hub import open_checkpoint
from qdora.models.peers import Alone, Peers
from qdora.quant.nf4 import NF4Weight
from qdora.quant.nf4_quantize import NF4Parts, block_count, quantize_share, rows_to_read
from qdora.quant.share import WHOLE, Share


def load_base(
    path_or_id: str,
    *,
    base: BaseKind = "nf4",
    dtype: DtypeName = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    block_size: int = 64,
    double_quantization: bool = True,
    progress: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a frozen causal language model, its linear layers ready for adapters.

    Args:
        path_or_id: hub id, safetensors folder (plain, or quantized to NF4 by bitsandbytes), GGUF
            file, or packaged model.
        base: `nf4` quantizes the decoder's linear layers; `dense` keeps the stored 16 bits.
        dtype: compute dtype; 16-bit tensors stay 16-bit in memory where it is float32.
        device: where the model goes; `auto` prefers CUDA.
        revision: of a hub id.
        block_size: weights that share one NF4 scale.
        double_quantization: quantize the scales as well (QLoRA, arXiv:2305.14314 §3).
        progress: show a bar on standard error.
    Returns: the model in evaluation mode, nothing trainable; its tokenizer, None where it has none.
    Raises: InputError: no such model, an unsupported architecture or quantization.
        CheckpointError: a file is missing, truncated or corrupt, or does not fit its configuration.
    """
    target = resolve_device(device)
    skeleton = open_skeleton(
        path_or_id,
        base=base,
        dtype=dtype,
        device=target,
        revision=revision,
        block_size=block_size,
        double_quantization=double_quantization,
    )
    return fill(skeleton, target, progress=progress), skeleton.checkpoint.tokenizer()


def open_skeleton(
    path_or_id: str,
    *,
    base: BaseKind = "nf4",
    dtype: DtypeName = "auto",
    device: torch.device,
    revision: str | None = None,
    block_size: int = 64,
    double_quantization: bool = True,
) -> Skeleton:
    """Find a model and build its structure; no weight is read, and no memory taken for one.

    Args: as `load_base`.
    Raises: as `load_base`.
    """
    checkpoint = open_checkpoint(path_or_id, revision)
    quantized = check_quantization(checkpoint, base)
    wanted = None if base == "dense" or quantized else Quantization(block_size, double_quantization)
    return build_skeleton(checkpoint, compute_dtype(dtype, device), wanted)


def fill(
    skeleton: Skeleton, device: torch.device, *, peers: Peers | None = None, progress: bool = False
) -> PreTrainedModel:
    """Read the weights of a skeleton and put them in place.

    Where a parameter is a DTensor, sharded by FSDP, only the rows of this process's share are read.

    Args:
        skeleton: of `build_skeleton`; its parameters are on the meta device.
        device: where the model computes.
        peers: the processes that fill their shares together; nobody else where None.
        progress: show a bar on standard error.
    Returns: the skeleton's model, its base fingerprint set.
    Raises: CheckpointError: a file became shorter; on every process where it happened to one.
    """
    return _Filler(skeleton, device, peers or Alone()).run(progress)


class _Filler:
    def __init__(self, skeleton: Skeleton, device: torch.device, peers: Peers) -> None:
        self.skeleton, self.model, self.checkpoint = skeleton, skeleton.model, skeleton.checkpoint
        self.device, self.peers = device, peers
        self.samples: dict[str, torch.Tensor] = {}

    def run(self, progress: bool) -> PreTrainedModel:
        names = self.checkpoint.names()
        places = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        with tqdm(
            total=len(names), desc="Loading", unit="tensor", leave=False, mininterval=1, disable=not progress
        ) as bar:
            for name in names:
                self._place(name, self.checkpoint.info(name), places)
                bar.update()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)
        generation_config = self.checkpoint.generation_config()
        if generation_config is not None:
            self.model.generation_config = generation_config
        set_base_fingerprint(self.model, self._fingerprint())
        return self.model

    def _place(self, name: str, facts: TensorInfo, places: dict[str, nn.Parameter | torch.Tensor]) -> None:
        layer = self._quantized_layer(name)
        if layer is not None:
            self._place_quantized(name, facts, layer)
        elif is_part(name) or name in self.skeleton.unused:
            with self.peers.together():
                self._sample(name, facts, self._read(name, facts, self._own_rows(facts)))
        else:
            self._place_plain(name, facts, places)
        if facts.dtype.itemsize * torch.Size(facts.shape).numel() >= WORTH_TRIMMING:
            release_freed_memory()

    def _quantized_layer(self, name: str) -> NF4Weight | None:
        module_name, _, leaf = name.rpartition(".")
        if leaf != "weight":
            return None
        try:
            base = self.model.get_submodule(f"{module_name}.base")
        except AttributeError:
            return None
        return base if isinstance(base, NF4Weight) else None

    def _place_quantized(self, name: str, facts: TensorInfo, layer: NF4Weight) -> None:
        """A linear layer of the decoder: quantized here, or stored so."""
        share = self._share_of(layer.packed)
        device = self.device
        stored = self.skeleton.stored.get(name)
        shape = (layer.out_features, layer.in_features)
        with self.peers.together():
            if stored is not None:
                parts = read_stored(self.checkpoint, stored, share, device)
                self._sample(name, facts, self._read(name, facts, self._own_rows(facts)))
            else:
                rows = rows_to_read(shape, layer.block_size, share)
                w_RI = self._read(name, facts, rows)
                self._sample(name, facts, w_RI, rows.start)
                quantize = partial(
                    quantize_share,
                    w_RI.to(device),
                    shape,
                    block_size=layer.block_size,
                    double_quantization=layer.nested_absmax is not None,
                    share=share,
                )
                del w_RI
        if stored is None:
            # Outside the block above: every process waits here for the scales of the others.
            parts = quantize(gather_scales=self._gather_blocks(block_count(shape, layer.block_size), share))
        self._put_parts(layer, parts)

    def _gather_blocks(self, blocks: int, share: Share) -> Callable[[torch.Tensor], torch.Tensor]:
        if share.count == 1:
            return lambda scales: scales
        return lambda scales: self.peers.gather_rows(scales, blocks)

    def _put_parts(self, layer: NF4Weight, parts: NF4Parts) -> None:
        layer.packed = self._parameter(layer.packed, parts.packed)
        layer.absmax = self._parameter(layer.absmax, parts.absmax)
        layer.nested_absmax, layer.nested_code = parts.nested_absmax, parts.nested_code
        layer.offset = parts.offset

    def _place_plain(
        self, name: str, facts: TensorInfo, places: dict[str, nn.Parameter | torch.Tensor]
    ) -> None:
        target = places.get(self._parameter_name(name))
        if target is None:
            return  # one of those that the architecture says may be there
        rows = self._own_rows(facts)
        with self.peers.together():
            whole = self._share_of(target) == WHOLE
            tensor = self._read(name, facts, None if whole else rows)
            self._sample(name, facts, tensor, 0 if whole else rows.start)
            tensor = tensor.to(self.device, target.dtype)
        if isinstance(target, nn.Parameter):
            replace_parameter(self.model, target, self._parameter(target, tensor))
        else:
            module_name, _, leaf = name.rpartition(".")
            self.model.get_submodule(module_name)._buffers[leaf] = tensor

    def _parameter_name(self, name: str) -> str:
        """Name of the model's parameter: a linear layer holds its weight in its base."""
        module_name, _, leaf = name.rpartition(".")
        try:
            self.model.get_submodule(module_name).get_submodule("base")
        except AttributeError:
            return name
        return f"{module_name}.base.weight" if leaf == "weight" else name

    def _parameter(self, old: torch.Tensor, own: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(shard_like(old, own, self.peers.storage), requires_grad=old.requires_grad)

    def _share_of(self, parameter: torch.Tensor) -> Share:
        return self.peers.share if isinstance(parameter, DTensor) else WHOLE

    def _own_rows(self, facts: TensorInfo) -> slice:
        return self.peers.share.rows(facts.shape[0] if facts.shape else 1)

    def _read(self, name: str, facts: TensorInfo, rows: slice | None) -> torch.Tensor:
        return self.checkpoint.read(name, rows if facts.shape else None)

    def _sample(
        self, name: str, facts: TensorInfo, tensor: torch.Tensor, first_row: int | None = None
    ) -> None:
        """Of its own rows: together the processes sample each row once, whoever reads how much."""
        rows = self._own_rows(facts)
        first = rows.start if first_row is None else first_row
        self.samples[name] = sample_rows(tensor, facts.shape, rows, first)

    def _fingerprint(self) -> str:
        parts = self.peers.gather([self.samples])
        return combine(
            {
                name: sample_digest(
                    name, self.checkpoint.info(name).shape, torch.cat([p[name] for p in parts])
                )
                for name in self.samples
            }
        )


def resolve_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def compute_dtype(dtype: DtypeName, device: torch.device) -> torch.dtype:
    """The named dtype; `auto` is bfloat16 where the device multiplies it natively, else float32.

    On a CPU without bfloat16 units such products are several times slower than float32 ones.
    """
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32


def _has_native_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
