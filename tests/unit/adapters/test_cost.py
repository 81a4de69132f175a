"""What a layer builds and keeps: asserted by watching every operator, never by a clock."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdora.adapters import kernels, product
from qdora.adapters.kernels import native
from qdora.adapters.layer import AdaptedLinear, OutputLinear
from qdora.planner.internals import fake_tensors
from qdora.quant import base as tiling
from tests.axes import METHODS, adapter_config
from tools import gpu_account

from .oracle import move_off_the_identity

TOKENS, INPUTS, OUTPUTS, R = 32, 512, 384, 8
TILE_ROWS = 64
ADAPTED = [name for name, spec in METHODS.items() if not spec.full]


def storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


class Watch(TorchDispatchMode):
    """The operators that run, and the sizes of the tensors that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, int] = {}
        self.calls: dict[str, int] = {}
        self.products: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in ("aten::mm", "aten::mm.out", "aten::addmm", "aten::addmm_"):
            self.products.append((args[-2].shape, args[-1].shape))
        given = {storage(leaf).data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and storage(leaf).data_ptr() not in given:  # a view makes nothing
                self.made[name] = max(self.made.get(name, 0), storage(leaf).nbytes())
        return result

    def base_products(self) -> int:
        """Tiles that multiplied the tokens; every tile has TILE_ROWS rows."""
        tile = {torch.Size((INPUTS, TILE_ROWS)), torch.Size((TILE_ROWS, INPUTS))}
        return sum(right in tile and left[0] == TOKENS for left, right in self.products)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 64 rows, all of whose work is seen: the functions for CPUs are no operators of torch."""
    monkeypatch.setitem(tiling.TILE_BYTES, "cpu", TILE_ROWS * INPUTS * 4)
    monkeypatch.setattr(native, "_library", lambda: None)


def make_layer(method: str, **changes) -> AdaptedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False).to(torch.bfloat16)
    config = adapter_config(method=method, r=R, **({"dropout": 0.05} | changes))
    return move_off_the_identity(
        AdaptedLinear.from_linear(linear, config, quantization=METHODS[method].quantization)
    ).train()


def watch_step(layer: AdaptedLinear) -> tuple[Watch, Watch]:
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    with Watch() as forward:
        y = layer(x)
    g = torch.randn_like(y)
    with Watch() as backward:
        y.backward(g)
    return forward, backward


@pytest.mark.parametrize("norm", ["detached", "exact"])
@pytest.mark.parametrize("method", ADAPTED)
def test_the_largest_temporary_is_a_tile(method, norm):
    """Catches: BA, an identity matrix or a whole W in forward or backward."""
    layer = make_layer(method, norm_gradient=norm)
    allowed = 4 * max(TILE_ROWS * INPUTS, TOKENS * INPUTS, TOKENS * OUTPUTS, R * INPUTS)
    assert allowed < OUTPUTS * INPUTS  # bytes: not even W in one byte each would pass
    for watch in watch_step(layer):
        assert max(watch.made.values()) <= allowed, watch.made


@pytest.mark.parametrize("method", ADAPTED)
def test_one_base_product_each_way(method):
    """Catches: a second product with W for the norm or, with dropout, for the published placement."""
    forward, backward = watch_step(make_layer(method))
    tiles = OUTPUTS // TILE_ROWS
    assert forward.base_products() == tiles
    assert backward.base_products() <= tiles


def test_the_published_dropout_costs_a_second_base_product():
    """Catches: a placement that is not what it says; the counter-example of the test above."""
    forward, _ = watch_step(make_layer("qdora", dropout_placement="published"))
    assert forward.base_products() == 2 * OUTPUTS // TILE_ROWS


def kept_for_backward(layer: AdaptedLinear) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    x = torch.randn(TOKENS, INPUTS, requires_grad=True)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x)
    return kept, x, y


@pytest.mark.parametrize("method", ADAPTED)
def test_what_is_kept_for_backward(method):
    """Catches: a dequantized W, BA, an identity matrix, or a second output-sized tensor kept for backward."""
    layer = make_layer(method)
    spec = METHODS[method]
    kept, x, y = kept_for_backward(layer)
    large = [t for t in kept if t.numel() >= TOKENS * min(INPUTS, OUTPUTS)]
    storages = {storage(t).data_ptr() for t in large}
    expected = {storage(x).data_ptr()} if spec.update in ("lora", "gated_lora") else set()
    if spec.dora:
        expected.add(storage(y).data_ptr())  # the output itself, not one more tensor
    assert storages == expected
    rest = [t for t in kept if storage(t).data_ptr() not in storages]
    assert all(t.numel() <= R * max(INPUTS, OUTPUTS, TOKENS) for t in rest)
    y.sum().backward()


def test_kept_with_a_bias():
    """Catches: a bias that is taken for part of what the magnitude scales when it is divided out again."""
    layer = make_layer("qdora")
    layer.bias = nn.Parameter(torch.randn(OUTPUTS), requires_grad=False)
    kept, x, y = kept_for_backward(layer)
    large = {storage(t).data_ptr() for t in kept if t.numel() >= TOKENS * OUTPUTS}
    assert len(large) == 2
    assert storage(x).data_ptr() in large
    assert storage(y).data_ptr() not in large


def test_no_norm_work_in_seven_of_eight_forwards():
    """Catches: W Aᵀ, or anything else of the norm, computed again under gradient accumulation."""
    layer = make_layer("qdora")
    watches = [watch_step(layer)[0] for _ in range(8)]
    with_a = [
        sum(right == torch.Size((INPUTS, R)) and left[0] == TILE_ROWS for left, right in watch.products)
        for watch in watches
    ]
    assert with_a == [OUTPUTS // TILE_ROWS] + [0] * 7
    assert sum(watch.calls.get("aten::sqrt_", 0) for watch in watches) == 1


def test_changing_the_output_in_place_is_an_error_and_no_wrong_gradient():
    """Catches: a gradient of the magnitude from an output that somebody has overwritten."""
    layer = make_layer("qdora")
    y = layer(torch.randn(TOKENS, INPUTS, requires_grad=True))
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("dora", "most"), [(True, 11), (False, 9)], ids=["qdora", "qlora"])
def test_launches_of_a_layer_on_a_gpu(dora, most, monkeypatch):
    """Catches: an operator on vectors or rank-sized matrices beside the kernels, as dear to the host."""
    monkeypatch.setitem(tiling.TILE_BYTES, "cpu", tiling.TILE_BYTES["cuda"])
    monkeypatch.setattr(kernels, "available", lambda device: True)
    monkeypatch.setattr(product, "mm_wide", gpu_account.mm_wide)
    with fake_tensors():
        counted = gpu_account.account((1024, 4096), 512, dora)
    assert counted.launches <= most, counted.names


@pytest.mark.parametrize("widened", [False, True])
def test_logits_of_last_tokens_copy_no_weight(widened):
    """Catches: hidden states that lie apart made a batch of products, with a copy of the vocabulary's matrix
    for each sequence: two thirds of the time of short answers."""
    layer = OutputLinear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    if widened:
        layer.widen(torch.float32)
    dtype = torch.float32 if widened else torch.bfloat16
    hidden_BTI = torch.randn(4, 5, INPUTS, dtype=dtype)
    with torch.no_grad(), Watch() as watch:
        logits_B1V = layer(hidden_BTI[:, -1:])
    assert "aten::bmm" not in watch.calls
    assert max(watch.made.values()) <= 4 * OUTPUTS * dtype.itemsize
    expected = hidden_BTI[:, -1:].float() @ layer.weight.float().T
    torch.testing.assert_close(logits_B1V.float(), expected, rtol=1e-2, atol=1e-2)
