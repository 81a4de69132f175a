"""What an adapted layer computes on a CPU beside its products, by C++ functions compiled at their first use.

At the sides of a small model these dozen operators of torch cost more in being started than in computing.
The functions need a C++ compiler and ninja; where there is none, and for what they do not know, torch
computes.

    N tokens   O out_features   I in_features   R rank
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qdora.quant.base import StoredWeight, codes_per_byte

NAME = "qdora"
LONGEST_BUILD = 60
"""Seconds after which a process that compiles, which takes one or two, is taken for dead."""
MAX_RANK = 512
"""As many ranks as the functions have room for."""
DTYPES = (torch.float32, torch.bfloat16)
_TYPES = (torch.Tensor, torch.nn.Parameter)
_FLAGS = {
    "AVX2": ["-mavx2"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
"""Instructions that a CPU has, by torch's name of its capability."""
_logger = logging.getLogger(__name__)


def takes(
    float32: Sequence[torch.Tensor | None],
    either: Sequence[torch.Tensor | None] = (),
    codes: Sequence[torch.Tensor] = (),
) -> bool:
    """Whether the functions take these tensors: contiguous, on a CPU, and no fake ones.

    Args:
        float32: which must be in float32.
        either: which may be in bfloat16 as well.
        codes: which must be uint8.
    """
    if torch.compiler.is_compiling() or _library() is None:
        return False
    for tensors, dtypes in ((float32, DTYPES[:1]), (either, DTYPES), (codes, (torch.uint8,))):
        for t in tensors:
            if t is not None and not (
                type(t) in _TYPES and t.dtype in dtypes and t.is_cpu and t.is_contiguous()
            ):
                return False
    return True


@cache
def _library() -> Any:
    """The compiled functions; None where they cannot be compiled."""
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None:
        return None
    source = Path(__file__).with_name("native.cpp").read_text(encoding="utf-8")
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ["-O3", "-fopenmp", "-ffp-contract=off", *_FLAGS.get(capability, [])]
    # The folder serves all processes and versions of this machine, so what differs is in the name.
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    name = f"{NAME}_{capability.lower()}_{digest}"
    folder = _cache() / name
    try:
        path = folder / f"{name}.so"
        _wait_for(folder / "lock")
        if not path.exists():
            from torch.utils import cpp_extension

            folder.mkdir(parents=True, exist_ok=True)
            _find_ninja()
            cpp_extension.load_inline(
                name,
                source,
                extra_cflags=flags,
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                no_implicit_headers=True,
                is_python_module=False,
            )
        return declare(ctypes.CDLL(str(path)))
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = str(error).splitlines()[0]
        _logger.warning("the functions for CPUs were not compiled, torch computes: %s", reason)
        return None


def _wait_for(lock: Path) -> None:
    """Wait while another process compiles, whose lock it is; torch would also wait for a killed one."""
    with suppress(FileNotFoundError):
        while time.time() - lock.stat().st_mtime < LONGEST_BUILD:
            time.sleep(0.1)
        lock.unlink()


def _cache() -> Path:
    """Where torch keeps what it compiles; asking it would import its builder, in every process."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"


def _find_ninja() -> None:
    """Let torch find the ninja of this environment, also where the environment is not activated."""
    import ninja

    path = os.environ.get("PATH", "").split(os.pathsep)
    if ninja.BIN_DIR not in path:
        os.environ["PATH"] = os.pathsep.join([*path, ninja.BIN_DIR])


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Say what the functions take."""
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    factors = [integer, pointer]  # whether it is in bfloat16, and where it is
    takes: dict[str, list[Any]] = {
        "tile": [pointer, integer, *[pointer] * 6, *[integer] * 6, pointer, real],
        "dot": [pointer, integer, *[pointer] * 3, integer, integer],
        "norm": [pointer, pointer, *factors, pointer, *factors, integer, integer, real],
        "row_scale": [*[pointer] * 2, *factors, *[pointer] * 2, *factors, pointer, integer, integer, real],
    }
    for name, types in takes.items():
        function = getattr(library, f"qdora_{name}")
        function.argtypes, function.restype = types, None
    return library


def write_tile(
    out: torch.Tensor, weight: StoredWeight, first: int, last: int, s_O: torch.Tensor | None, factor: float
) -> None:
    """Write rows `first` to `last` of f s ∘ W, rounded once; to the bit as `FrozenWeight.tiles`.

    Args:
        out: (last - first, I), float32 or bfloat16.
        weight: in codes.
        s_O: (O,) float32; None where f s is 1.
    """
    _library().qdora_tile(
        out.data_ptr(),
        out.dtype == torch.bfloat16,
        *map(_address, weight[:6]),
        weight.block_size,
        weight.nested_block_size,
        codes_per_byte(weight.table),
        first,
        last,
        out.shape[1],
        _address(s_O),
        factor,
    )


def magnitude_gradient(g_NO: torch.Tensor, y_NO: torch.Tensor, m_O: torch.Tensor) -> torch.Tensor:
    """Σ_N g ∘ y / m: (O,) float32, of g and y of one dtype."""
    tokens, outputs = g_NO.shape
    grad_O = torch.empty(outputs)
    addresses = (tensor.data_ptr() for tensor in (g_NO, y_NO, m_O))
    _library().qdora_dot(grad_O.data_ptr(), g_NO.dtype == torch.bfloat16, *addresses, tokens, outputs)
    return grad_O


def factored_norm(
    w2_O: torch.Tensor, wa_OR: torch.Tensor, gram_RR: torch.Tensor, b_OR: torch.Tensor, scale: float
) -> torch.Tensor:
    """||W + c B A|| of each row from ||W||², W Aᵀ and A Aᵀ: (O,) float32."""
    norm_O = torch.empty_like(w2_O)
    _library().qdora_norm(
        norm_O.data_ptr(),
        w2_O.data_ptr(),
        wa_OR.dtype == torch.bfloat16,
        wa_OR.data_ptr(),
        gram_RR.data_ptr(),
        b_OR.dtype == torch.bfloat16,
        b_OR.data_ptr(),
        *b_OR.shape,
        scale,
    )
    return norm_O


def row_scale(
    norm_O: torch.Tensor,
    initial_O: torch.Tensor,
    offset_O: torch.Tensor,
    b_OR: torch.Tensor | None,
    factor: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `qdora.adapters.kernels.row_scale`."""
    if b_OR is not None and b_OR.dtype != offset_O.dtype:
        b_OR, offset_O = b_OR.float(), offset_O.float()
    m_O, s_O = torch.empty_like(norm_O), torch.empty_like(norm_O)
    b_scaled_OR = None if b_OR is None else torch.empty(b_OR.shape, dtype=dtype)
    _library().qdora_row_scale(
        m_O.data_ptr(),
        s_O.data_ptr(),
        dtype == torch.bfloat16,
        _address(b_scaled_OR),
        norm_O.data_ptr(),
        initial_O.data_ptr(),
        offset_O.dtype == torch.bfloat16,
        offset_O.data_ptr(),
        _address(b_OR),
        len(norm_O),
        0 if b_OR is None else b_OR.shape[1],
        factor,
    )
    return m_O, s_O, b_scaled_OR


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
