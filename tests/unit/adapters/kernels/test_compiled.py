"""Every launch that a large layer makes, compiled for two kinds of GPU without one: nothing spills."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import torch

from qdora.quant import QUANTIZATIONS

triton = pytest.importorskip("triton", reason="needs Triton, which this system has no package of")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.knobs import nvidia  # noqa: E402

from qdora.adapters.kernels import triton_gradients, triton_kernels  # noqa: E402

POINTERS = {
    torch.uint8: "*u8",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
SHAPE = (4096, 14336)


class Recorder:
    """Stands for a kernel, and keeps how it was launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Recorder:
        return self

    def __call__(self, *args: Any, **keywords: Any) -> None:
        self.options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        self.values = dict(zip(self.kernel.arg_names, args, strict=False)) | keywords

    def compile(self, capability: int) -> Any:
        """Compile the launch as Triton's own specialization would."""
        kernel, signature, constants, attributes = self.kernel, {}, {}, {}
        for parameter in kernel.params:
            place, name, value = (parameter.num,), parameter.name, self.values[parameter.name]
            specialized = not parameter.do_not_specialize
            one = specialized and isinstance(value, int) and value == 1
            if parameter.is_constexpr or value is None or one:
                signature[name], constants[place] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if aligned and specialized:
                attributes[place] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)


def launches() -> dict[str, tuple[str, Any]]:
    """By name: which kernel, and a call of its launch on tensors without memory."""
    bf16, f32 = torch.bfloat16, torch.float32

    def empty(*shape: int, dtype: torch.dtype = bf16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(name: str, double: bool = True) -> Any:
        return (
            QUANTIZATIONS[name].on_meta(SHAPE, dtype=bf16, block_size=64, double_quantization=double).stored()
        )

    def update(rank: int, dtype: torch.dtype = bf16) -> tuple[torch.Tensor, torch.Tensor, float]:
        return empty(rank, SHAPE[1], dtype=dtype), empty(SHAPE[0], rank, dtype=dtype), 2.0

    s_O, nothing, rows = empty(SHAPE[0], dtype=f32), (None, None, 1.0), (0, SHAPE[0])
    tile, norm = triton_kernels.adapted_tile, triton_kernels.row_norm
    found: dict[str, tuple[str, Any]] = {}
    for name, double, dtype, factors in (
        ("nf4", True, bf16, update(16)),
        ("nf4", True, bf16, update(64)),
        ("nf4", True, bf16, update(16, f32)),
        ("nf4", True, bf16, update(64, f32)),
        ("nf4", False, torch.float16, update(16, torch.float16)),
        ("nf4", True, bf16, nothing),
        ("fp4", True, f32, update(256)),
        ("int8", True, bf16, update(16)),
        ("none", True, bf16, update(16)),
    ):
        stored = weight(name, double)
        rank = "no update" if factors[0] is None else f"r{factors[0].shape[0]} {factors[0].dtype}"
        label = f"{name} {'double' if double else 'single'} {dtype} {rank}".replace("torch.", "")
        found[f"tile {label}"] = (
            "adapted_tile_kernel",
            lambda stored=stored, dtype=dtype, factors=factors: tile(
                stored, *rows, dtype, s_O, *factors, 1.8
            ),
        )
        if dtype == bf16:
            found[f"norm {label}"] = (
                "row_norm_kernel",
                lambda stored=stored, factors=factors: norm(stored, *factors),
            )
    for rank, dtype in ((0, bf16), (16, bf16), (64, bf16), (16, f32)):
        g_NO, h_NR = empty(2048, SHAPE[0], dtype=dtype), empty(2048, rank, dtype=dtype) if rank else None
        for kernel in ("output_sums_kernel", "output_gradients_kernel"):
            found[f"{kernel} {dtype} r{rank}".replace("torch.", "")] = (
                kernel,
                lambda g_NO=g_NO, h_NR=h_NR: triton_gradients.output_gradients(
                    g_NO, g_NO, s_O, h_NR, s_O, 2.0
                ),
            )
    for dtype in (bf16, f32):
        b_OR, offset_O = empty(SHAPE[0], 16, dtype=dtype), empty(SHAPE[0], dtype=dtype)
        found[f"row_scale {dtype}".replace("torch.", "")] = (
            "row_scale_kernel",
            lambda b_OR=b_OR, offset_O=offset_O: triton_gradients.row_scale(
                s_O, s_O, offset_O, b_OR, 1.8, bf16
            ),
        )
    return found


LAUNCHES = launches()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", LAUNCHES)
def test_nothing_spills(name, capability, monkeypatch, tmp_path, record_property):
    """Catches: block sizes that do not fit the registers, Triton that refuses the source."""
    kernel, launch = LAUNCHES[name]
    recorders = {}
    for module in (triton_kernels, triton_gradients):
        for each in [each for each in vars(module) if each.endswith("_kernel")]:
            recorders[each] = Recorder(getattr(module, each))
            monkeypatch.setattr(module, each, recorders[each])
    launch()
    recorder = recorders[kernel]
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(recorder.compile(capability).asm["cubin"])
    done = subprocess.run(
        [nvidia.cuobjdump.path, "-res-usage", cubin], capture_output=True, text=True, check=True
    )
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    record_property("registers", usage["REG"])
    print(f"{name}, sm_{capability}: {usage['REG']} registers")
    assert usage["STACK"] == usage["LOCAL"] == 0
