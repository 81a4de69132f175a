"""The kernels as torch's operators, `qdora::adapted_tile` and so on.

`torch.compile`, fake tensors and autograd see one operator each.  By the low-level interface: the wrapper of
`torch.library.custom_op` costs the host more than the launch.
"""

from __future__ import annotations

import logging
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from qdora.adapters.kernels import reference
from qdora.errors import not_installed
from qdora.quant.base import StoredWeight

MIN_TRITON = (3, 6)
_WEIGHT = (
    "Tensor values, Tensor? table, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_code, "
    "Tensor? offset, int block_size, int nested_block_size"
)
_FIELDS = len(StoredWeight._fields)

_logger = logging.getLogger(__name__)
_library = torch.library.Library("qdora", "DEF")
_library.define(
    f"adapted_tile({_WEIGHT}, int first, int last, ScalarType dtype, "
    "Tensor? s_O, Tensor? a_RI, Tensor? b_OR, float scale, float factor) -> Tensor"
)
_library.define(f"row_norm({_WEIGHT}, Tensor? a_RI, Tensor? b_OR, float scale) -> Tensor")
_library.define(
    "row_scale(Tensor norm_O, Tensor initial_O, Tensor offset_O, Tensor? b_OR, float factor, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "output_gradients(Tensor g_NO, Tensor? y_NO, Tensor? m_O, Tensor? h_NR, Tensor? s_O, float scale)"
    " -> (Tensor, Tensor)"
)


def available(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device: CUDA, compute capability 8, Triton 3.6."""
    return device.type == "cuda" and _has_triton(device)


# What `torch.compiler.assume_constant_result` does; that imports the compiler, which most runs do not use.
available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _has_triton(device: torch.device) -> bool:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    if lacking := not_installed("triton"):
        _logger.warning("torch computes in place of the kernels, and slower; they need %s", lacking)
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= MIN_TRITON


def _kernels(*tensors: torch.Tensor | None) -> Any:
    """What has the kernels: Triton's modules, or the reference for what Triton does not have."""
    first = tensors[0]
    assert first is not None
    if reference.wide_dtype(*tensors) == torch.float64 or not available(first.device):
        return reference
    return _triton()


@cache
def _triton() -> Any:
    from qdora.adapters.kernels import triton_gradients, triton_kernels

    return SimpleNamespace(
        adapted_tile=triton_kernels.adapted_tile,
        row_norm=triton_kernels.row_norm,
        row_scale=triton_gradients.row_scale,
        output_gradients=triton_gradients.output_gradients,
    )


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


def _scale_cuda(norm_O: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    initial_O, offset_O, b_OR, _, dtype = arguments
    module = reference if dtype == torch.float64 else _kernels(norm_O, initial_O, offset_O, b_OR)
    with torch.cuda.device(norm_O.device):
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = module.row_scale(norm_O, *arguments)
    return result


def _scale_fake(
    norm_O: torch.Tensor,
    initial_O: torch.Tensor,
    offset_O: torch.Tensor,
    b_OR: torch.Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = reference.wide_dtype(norm_O, initial_O, offset_O)
    shape = (0,) if b_OR is None else b_OR.shape
    s_O = norm_O.new_empty(norm_O.shape, dtype=wide)
    return torch.empty_like(s_O), s_O, norm_O.new_empty(shape, dtype=dtype)


def _gradients_cuda(g_NO: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device(g_NO.device):
        result: tuple[torch.Tensor, torch.Tensor] = _kernels(g_NO, *arguments[:4]).output_gradients(
            g_NO, *arguments
        )
    return result


def _gradients_fake(
    g_NO: torch.Tensor,
    y_NO: torch.Tensor | None,
    m_O: torch.Tensor | None,
    h_NR: torch.Tensor | None,
    s_O: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, wide = g_NO.shape[1], reference.wide_dtype(g_NO, y_NO, m_O, s_O)
    shape = (0,) if h_NR is None else (outputs, h_NR.shape[1])
    return g_NO.new_empty(0 if y_NO is None else outputs, dtype=wide), g_NO.new_empty(shape, dtype=wide)


for _name, _cpu, _cuda, _fake in (
    ("adapted_tile", _tile_cpu, _tile_cuda, _tile_fake),
    ("row_norm", _norm_cpu, _norm_cuda, _norm_fake),
    ("row_scale", reference.row_scale, _scale_cuda, _scale_fake),
    ("output_gradients", reference.output_gradients, _gradients_cuda, _gradients_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"qdora::{_name}", _fake, lib=_library)
