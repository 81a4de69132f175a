"""The operators: what fake tensors, compilation and a machine without Triton see of the kernels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.adapters import kernels
from qdora.adapters.kernels import ops
from qdora.quant import QUANTIZATIONS
from qdora.quant.blockwise import code_values
from tests.unit.adapters.kernels.cases import CASES, Case, make

ops_qdora = torch.ops.qdora


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_operators_keep_torchs_rules(case: Case):
    """Catches: a fake result of another shape, dtype or layout; an operand that is written to."""
    layer = make(case)
    update = (layer.a_RI, layer.b_OR, layer.scale)
    torch.library.opcheck(
        ops_qdora.adapted_tile.default, (*layer.weight, 1, 9, torch.bfloat16, layer.s_O, *update, 1.8)
    )
    torch.library.opcheck(
        ops_qdora.adapted_tile.default, (*layer.weight, 2, 5, torch.float64, None, None, None, 1.0, 1.0)
    )
    torch.library.opcheck(ops_qdora.row_norm.default, (*layer.weight, *update))
    torch.library.opcheck(ops_qdora.row_norm.default, (*layer.weight, None, None, 1.0))
    s_O, g_NO = layer.s_O, layer.b_OR.T
    for b_OR in (layer.b_OR, None):
        torch.library.opcheck(ops_qdora.row_scale.default, (s_O, s_O, s_O, b_OR, 1.8, torch.bfloat16))
    h_NR = g_NO[:, :4].clone()
    for y_NO, m_O, h in ((g_NO, s_O, h_NR), (g_NO, s_O, None), (None, None, h_NR)):
        torch.library.opcheck(ops_qdora.output_gradients.default, (g_NO, y_NO, m_O, h, s_O, 2.0))
    torch.library.opcheck(ops_qdora.output_gradients.default, (g_NO, None, None, h_NR, None, 1.0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", sorted(QUANTIZATIONS))
def test_fake_tensors_have_the_shapes(name: str, device: str):
    """Catches: an estimate for a GPU that needs one; a table that stays fake after it."""
    frozen = QUANTIZATIONS[name].on_meta(
        (48, 200), dtype=torch.bfloat16, block_size=64, double_quantization=True
    )
    on_meta = [*frozen.named_parameters(), *frozen.named_buffers()]
    with FakeTensorMode(allow_non_fake_inputs=True):
        frozen.assign({name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in on_meta})
        weight = frozen.stored()
        assert weight is not None
        assert weight.shape == (48, 200)
        a_RI, b_OR = (torch.empty(s, dtype=torch.bfloat16, device=device) for s in ((3, 200), (48, 3)))
        tile = kernels.adapted_tile(
            weight, slice(8, 40), torch.bfloat16, s_O=torch.empty(48, device=device), a_RI=a_RI, b_OR=b_OR
        )
        assert (tuple(tile.shape), tile.dtype, tile.device.type) == ((32, 200), torch.bfloat16, device)
        norm_O = kernels.row_norm(weight, a_RI, b_OR)
        assert (tuple(norm_O.shape), norm_O.dtype, norm_O.device.type) == ((48,), torch.float32, device)
        m_O, s_O, b_scaled_OR = kernels.row_scale(norm_O, norm_O, norm_O, b_OR, 1.8, torch.bfloat16)
        h_NR = torch.empty(3, 7, device=device)
        grad_O, grad_OR = kernels.output_gradients(b_OR.T, b_OR.T, m_O, h_NR, s_O, 2.0)
        made = [
            (m_O, (48,), torch.float32),
            (s_O, (48,), torch.float32),
            (b_scaled_OR, (48, 3), torch.bfloat16),
            (grad_O, (48,), torch.float32),
            (grad_OR, (48, 7), torch.float32),
        ]
        for tensor, shape, dtype in made:
            assert tensor is not None
            assert (tuple(tensor.shape), tensor.dtype, tensor.device.type) == (shape, dtype, device)
    if name != "none":
        assert type(code_values(name, torch.device("cpu"))) is torch.Tensor


def test_compiled_code_calls_the_operators():
    """Catches: a graph break at a kernel."""
    layer = make(CASES[1])

    def both(s_O: torch.Tensor) -> torch.Tensor:
        norm_O = kernels.row_norm(layer.weight, **layer.update())
        return kernels.adapted_tile(
            layer.weight, slice(3, 9), torch.float32, s_O=s_O / norm_O, **layer.update()
        )

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(layer.s_O), both(layer.s_O))


def test_a_cpu_has_no_kernels():
    """Catches: Triton asked for where there is none."""
    assert not kernels.available(torch.device("cpu"))
    assert kernels.available(torch.device("cuda")) <= torch.cuda.is_available()


def test_the_package_does_without_triton():
    """Catches: Triton imported with the package, on a system that has none."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from qdora.adapters.kernels import output_gradients\n"
        "g, y, m = torch.ones(3, 2), torch.full((3, 2), 2.0), torch.full((2,), 0.5)\n"
        "assert output_gradients(g, y, m, None, None, 1.0)[0].tolist() == [12.0, 12.0]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_where_triton_is_missing_torch_computes(monkeypatch):
    """Catches: a GPU without Triton, or float64, that reaches a kernel which is not there."""
    layer = make(CASES[0])
    monkeypatch.setattr(ops, "available", lambda device: False)
    assert ops._kernels(layer.weight.values, None) is ops.reference
    monkeypatch.setattr(ops, "available", lambda device: True)
    assert ops._kernels(layer.weight.values, layer.a_RI.double()) is ops.reference


def test_the_mark_of_a_constant_is_the_one_that_torch_makes():
    """Catches: a torch whose compiler looks for another mark, and breaks its graph at every layer."""
    marked = torch.compiler.assume_constant_result(lambda device: True)
    assert vars(marked) == vars(ops.available) == {"_dynamo_marked_constant": True}
