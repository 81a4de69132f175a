"""Adapted layers under `torch.compile`: one graph, and the numbers of the layer itself."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from qdora.adapters import kernels
from qdora.adapters.inject import adapted_layers, inject
from qdora.benchmark.kept import METHODS, build_layer
from tests.axes import adapter_config
from tests.tiny import tiny_config

from .oracle import move_off_the_identity, relative


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def outputs_and_gradients(module, model, x: torch.Tensor, *arguments, **keywords) -> list[torch.Tensor]:
    torch.manual_seed(0)
    x = x.detach().clone().requires_grad_()
    y = module(x, *arguments, **keywords)
    trained = [p for p in model.parameters() if p.requires_grad]
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], g)]


def assert_same(got: list[torch.Tensor], wanted: list[torch.Tensor], bound: float) -> None:
    errors = [relative(a, b) for a, b in zip(got, wanted, strict=True)]
    assert max(errors) <= bound, errors


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_one_graph(method, dtype, bound, dropout):
    """Catches: a version counter, a generator or a number read from a tensor in the forward pass, which break
    the graph; a compiled layer with the norm of an earlier step, since its graph sees no version."""
    layer = build_layer(method, (48, 64), torch.device("cpu"), dtype, trained=0.05, dropout=dropout)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 5, 64).to(dtype)
    assert_same(outputs_and_gradients(compiled, layer, x), outputs_and_gradients(layer, layer, x), bound)
    move_off_the_identity(layer, seed=4)
    assert_same(outputs_and_gradients(compiled, layer, x), outputs_and_gradients(layer, layer, x), bound)


@pytest.mark.parametrize("route", ["torch", "kernels"])
def test_a_decoder_layer_is_one_graph(route, monkeypatch):
    """Catches: an adapted layer that breaks the graph of the decoder layer around it."""
    if route == "kernels":
        monkeypatch.setattr(kernels, "available", torch.compiler.assume_constant_result(lambda device: True))
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config()).bfloat16()
    inject(model, adapter_config("qdora", r=4, alpha=11.0), quantization="nf4")
    for layer in adapted_layers(model).values():
        move_off_the_identity(layer)
    decoder = model.model.layers[0].train()
    x = torch.randn(2, 7, 64).bfloat16()
    rope = model.model.rotary_emb(x, torch.arange(7)[None])
    compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
    got = outputs_and_gradients(compiled, decoder, x, position_embeddings=rope)
    assert_same(got, outputs_and_gradients(decoder, decoder, x, position_embeddings=rope), 3e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_compiles_for_cuda(method, dropout):
    """Catches: an operator that the compiler's own code generator cannot take."""
    layer = build_layer(
        method, (256, 512), torch.device("cuda"), torch.bfloat16, trained=0.05, dropout=dropout
    )
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(64, 512, device="cuda").bfloat16()
    assert_same(outputs_and_gradients(compiled, layer, x), outputs_and_gradients(layer, layer, x), 2e-2)
