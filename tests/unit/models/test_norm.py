"""The RMSNorm that models are built with: against float64, transformers' modules, and what it may replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from qdora.models.build import build_architecture
from qdora.models.load import load_base
from qdora.models.norm import RMSNorm, fuse_norms
from qdora.quant import Quantization
from tests import tiny
from tests.tiny import tiny_config

SIZES = tiny.SIZES | {"head_dim": 16}
EPS = 0.3
"""As large as a mean square: one that is left out is seen."""


def norm_64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def case(dtype: torch.dtype, features: int = 576) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, features, generator=random) * torch.linspace(0.1, 30, 7)[:, None]
    weight, g = torch.rand(features, generator=random) + 0.2, torch.randn(x.shape, generator=random)
    return x.to(dtype), weight.to(dtype), g.to(dtype)


def results(apply, x, weight, g) -> list[torch.Tensor]:
    """The output and the gradients of x and of the weight."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = apply(x, weight)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], g)]


def of_transformers(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    module = LlamaRMSNorm(len(weight), EPS)
    return torch.func.functional_call(module, {"weight": weight}, x)


def of_ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    module = RMSNorm(nn.Parameter(weight.detach()), EPS)
    return torch.func.functional_call(module, {"weight": weight}, x)


def errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [
        float((a.double() - b.double()).detach().norm() / b.double().norm())
        for a, b in zip(got, exact, strict=True)
    ]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.bfloat16, 2.5e-3)])
def test_as_near_to_float64_as_transformers(dtype, bound):
    """Catches: a gradient without the part through the mean, an eps left out or added to the root, a second
    rounding, a weight's gradient summed in 16 bits."""
    x, weight, g = case(dtype)
    exact = results(lambda x, w: norm_64(x, w, EPS), x.double(), weight.double(), g.double())
    ours, theirs = (
        errors(results(of_ours, x, weight, g), exact),
        errors(results(of_transformers, x, weight, g), exact),
    )
    assert max(ours) <= bound
    # Below float32's own spacing it is the order of a sum that decides, which is the library's on each CPU.
    spacing = torch.finfo(torch.float32).eps
    assert all(a <= max(1.05 * b, spacing) for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_gives_what_transformers_gives(dtype):
    """Catches: answers that change in a last bit, a training that computes another model than evaluation."""
    x, weight, _ = case(dtype)
    with torch.no_grad():
        ours, theirs = of_ours(x, weight), of_transformers(x, weight)
    assert torch.equal(ours, of_ours(x.requires_grad_(), weight))
    if dtype == torch.float32:
        assert torch.equal(ours, theirs)
    exact = norm_64(x.double(), weight.double(), EPS)
    assert errors([ours], [exact])[0] <= errors([theirs], [exact])[0]


def test_only_what_is_needed_is_kept_for_backward():
    """Catches: a float32 copy of a 16-bit input, or the normalized input, kept beside the input."""
    x, weight, _ = case(torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        of_ours(x.requires_grad_(), weight)
    assert sorted(t.numel() for t in kept) == [3 * 7, 576, x.numel()]
    assert [t.dtype for t in kept if t.numel() == x.numel()] == [torch.bfloat16]


class OtherEps(LlamaRMSNorm):
    """Says one eps and adds another."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 3 * self.variance_epsilon).rsqrt()


class Gated(LlamaRMSNorm):
    """An RMSNorm that takes a second input as well."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


class Scale(nn.Module):
    """A vector without a norm."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x):
        return x * self.weight


def test_what_computes_something_else_is_left_alone():
    """Catches: a module taken for an RMSNorm by its name or its attributes."""
    others = [OtherEps(8, 1e-6), Gated(8, 1e-6), Scale(), nn.LayerNorm(8, bias=False), nn.Linear(8, 8)]
    model = nn.Sequential(LlamaRMSNorm(8, 1e-6), *others)
    weight = model[0].weight
    fuse_norms(model)
    assert isinstance(model[0], RMSNorm)
    assert model[0].weight is weight
    assert list(model)[1:] == others


FAMILIES = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "phi3": 5, "gemma": 0, "gemma2": 0, "olmo2": 9}
"""Norms of two layers and the last one that are replaced; a Gemma's multiply by 1 + weight."""


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_their_numbers_and_their_names(family, tmp_path):
    """Catches: a Gemma's norm replaced, a query's or key's norm missed, a weight under another name."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(4, 24).view(2, 10)
    built = build_architecture(config, torch.float32, Quantization("none"), torch.float32)
    assert sum(isinstance(m, RMSNorm) for m in built.modules()) == FAMILIES[family]
    names = [name for name, _ in built.named_parameters() if "base" not in name]
    assert set(names) <= set(dict(theirs.named_parameters()))
    wanted = theirs(input_ids=ids).logits
    ours, _ = load_base(str(tmp_path), quantization="none", dtype="float32")
    assert errors([ours(input_ids=ids).logits.detach()], [wanted.detach()])[0] < 1e-6


def test_a_model_of_our_own_configuration_has_no_other_norm():
    """Catches: the replacement switched off where a model is built without a checkpoint."""
    model = build_architecture(tiny_config(), torch.bfloat16, Quantization("nf4"), torch.bfloat16)
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(type(m) is RMSNorm and m.weight.is_meta for m in norms)
