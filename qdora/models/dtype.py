"""Which dtype a model computes in on a device."""

from __future__ import annotations

import torch

from qdora.config import DtypeName


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
