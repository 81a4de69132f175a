"""The kernels as torch's operators `qdora::adapted_tile`, `qdora::row_norm` and `qdora::column_dot`.

`torch.compile`, fake tensors and autograd see one operator each.  By the low-level interface: the wrapper of
`torch.library.custom_op` costs the host more than the launch.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from qdora.adapters.kernels import reference
from qdora.quant.base import StoredWeight

MIN_TRITON = (3, 6)
_WEIGHT = (
    "Tensor values, Tensor? table, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int block_size, int nested_block_size"
)
_FIELDS = len(StoredWeight._fields)

_library = torch.library.Library("qdora", "DEF")
_library.define(
    f"adapted_tile({_WEIGHT}, int first, int last, ScalarType dtype, "
    "Tensor? s_O, Tensor? a_RI, Tensor? b_OR, float scale) -> Tensor"
)
_library.define(f"row_norm({_WEIGHT}, Tensor? a_RI, Tensor? b_OR, float scale) -> Tensor")
_library.define("column_dot(Tensor g_NO, Tensor y_NO) -> Tensor")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def available(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: CUDA, compute capability 8, Triton 3.6."""
    return device.type == "cuda" and _has_triton(device)


@cache
def _has_triton(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= MIN_TRITON


def _kernels(*tensors: torch.Tensor | None) -> Any:
    """The module that computes: Triton's, or the reference for what Triton does not have."""
    first = tensors[0]
    assert first is not None
    if reference.wide_dtype(*tensors) == torch.float64 or not available(first.device):
        return reference
    from qdora.adapters.kernels import triton_kernels

    return triton_kernels


def _tile_cpu(*arguments: Any) -> torch.Tensor:
    return reference.adapted_tile(StoredWeight(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _tile_cuda(*arguments: Any) -> torch.Tensor:
    weight = StoredWeight(*arguments[:_FIELDS])
    first, last, dtype, *rest = arguments[_FIELDS:]
    module = reference if dtype == torch.float64 else _kernels(weight.values, *rest[:3])
    with torch.cuda.device(weight.values.device):
        result: torch.Tensor = module.adapted_tile(weight, first, last, dtype, *rest)
    return result


def _tile_fake(values: torch.Tensor, table: torch.Tensor | None, *arguments: Any) -> torch.Tensor:
    first, last, dtype = arguments[_FIELDS - 2 : _FIELDS + 1]
    return values.new_empty(last - first, StoredWeight(values, table).shape[1], dtype=dtype)


def _norm_cpu(*arguments: Any) -> torch.Tensor:
    return reference.row_norm(StoredWeight(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _norm_cuda(*arguments: Any) -> torch.Tensor:
    weight, rest = StoredWeight(*arguments[:_FIELDS]), arguments[_FIELDS:]
    with torch.cuda.device(weight.values.device):
        result: torch.Tensor = _kernels(weight.values, *rest[:2]).row_norm(weight, *rest)
    return result


def _norm_fake(values: torch.Tensor, *arguments: Any) -> torch.Tensor:
    dtype = reference.wide_dtype(values, *arguments[_FIELDS - 1 : _FIELDS + 1])
    return values.new_empty(values.shape[0], dtype=dtype)


def _dot_cuda(g_NO: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
    with torch.cuda.device(g_NO.device):
        result: torch.Tensor = _kernels(g_NO, y_NO).column_dot(g_NO, y_NO)
    return result


def _dot_fake(g_NO: torch.Tensor, y_NO: torch.Tensor) -> torch.Tensor:
    return g_NO.new_empty(g_NO.shape[1], dtype=reference.wide_dtype(g_NO, y_NO))


for _name, _cpu, _cuda, _fake in (
    ("adapted_tile", _tile_cpu, _tile_cuda, _tile_fake),
    ("row_norm", _norm_cpu, _norm_cuda, _norm_fake),
    ("column_dot", reference.column_dot, _dot_cuda, _dot_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"qdora::{_name}", _fake, lib=_library)
