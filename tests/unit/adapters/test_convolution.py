"""Convolutions with an adapter against PEFT's and against a dense weight in float64."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from qdora.adapters.convolution import AdaptedConv2d, plain_layer
from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import load_adapter, save_adapter
from qdora.errors import InputError
from tests.axes import adapter_config

from .oracle import dense_weight, move_off_the_identity, relative

KERNELS = {
    "1x1": {"kernel_size": 1},
    "1x1-strided": {"kernel_size": 1, "stride": 2, "bias": False},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x2-strided": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1)},
    "same": {"kernel_size": (3, 5), "padding": "same", "bias": False},
    "valid": {"kernel_size": 2, "padding": "valid"},
}


class Block(nn.Module):
    """A convolution in a model."""

    def __init__(self, **settings) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.conv = nn.Conv2d(6, 10, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def adapted(block: Block, method: str = "dora", **settings) -> AdaptedConv2d:
    given = {"r": 4, "alpha": 11.0, "targets": ("conv",), "dtype": "float32"} | settings
    inject(block, adapter_config(method, **given), seed=3)
    (layer,) = adapted_layers(block).values()
    move_off_the_identity(layer, 5)
    return layer


@pytest.mark.parametrize("method", ["dora", "lora"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_convolution_is_that_of_peft(kernel, method, tmp_path):
    """Catches: a norm over other axes, a scaled bias, an update that is transposed or lacks its scale, sides
    of an output that are swapped, a file that PEFT reads otherwise."""
    block = Block(**KERNELS[kernel])
    theirs = copy.deepcopy(block)
    layer = adapted(block, method)
    save_adapter(block, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True)
    x = torch.randn(3, 6, 7, 9, generator=torch.Generator().manual_seed(0))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    y, expected = block(inputs[0]), theirs(inputs[1])
    assert y.is_contiguous()
    assert relative(y, expected) < 1e-6
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(g)
    expected.backward(g)
    assert relative(inputs[0].grad, inputs[1].grad) < 1e-6
    peft_layer = theirs.base_model.model.conv
    pairs = {
        layer.update.a_RI: peft_layer.lora_A["default"].weight,
        layer.update.b_OR: peft_layer.lora_B["default"].weight,
    }
    if layer.magnitude is not None:
        pairs[layer.magnitude.offset_O] = peft_layer.lora_magnitude_vector["default"].weight
    for own, other in pairs.items():
        assert relative(own.grad, other.grad.reshape(own.shape)) < 1e-5

    merged = plain_layer(layer)
    assert relative(merged(x), y) < 1e-6
    assert relative(merged.weight, theirs.merge_and_unload().conv.weight) < 1e-6
    again = Block(**KERNELS[kernel])
    load_adapter(again, tmp_path / "ours")
    assert relative(again(x[0]), y[0]) < 1e-6


def test_sixteen_bits_are_rounded_once():
    """Catches: a small magnitude step that a second rounding in bfloat16 takes back."""
    block = Block(kernel_size=3, padding=1).bfloat16()
    layer = adapted(block, dtype="bfloat16")
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    w_OI, update = dense_weight(layer, torch.bfloat16), layer.update
    sum_OI = w_OI + update.scale * update.b_OR.double() @ update.a_RI.double()
    s_O = layer.magnitude.value().double() / sum_OI.norm(dim=1)
    w_OCHW = (s_O[:, None] * sum_OI).view(layer.weight.shape)
    expected = F.conv2d(x.double(), w_OCHW, layer.bias.double(), padding=1)
    y = block(x)
    assert y.dtype == torch.bfloat16
    assert relative(y, expected) < 3e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kernel_size": 3, "groups": 2}, "conv is a Conv2d with groups 2, which has no adapter here"),
        ({"kernel_size": 3, "dilation": 2}, r"conv is a Conv2d with dilation \(2, 2\)"),
        ({"kernel_size": 3, "padding_mode": "circular"}, "with padding_mode 'circular'"),
        ({"kernel_size": 2, "padding": "same"}, "with padding 'same'"),
    ],
)
def test_other_convolutions_are_refused_by_name(settings, words):
    """Catches: a convolution of groups that is adapted as if it had none."""
    block = Block(**settings)
    with pytest.raises(InputError, match=words):
        inject(block, adapter_config(r=4, targets=("conv",)))
    assert type(block.conv) is nn.Conv2d
    assert block.conv.weight.requires_grad


def test_vera_and_other_dimensions_are_refused_by_name():
    """Catches: 'matches no linear layer' of a layer that is there, an adapter that no other tool reads."""
    with pytest.raises(InputError, match=r"adapter\.type 'vera' is for linear layers alone"):
        inject(Block(kernel_size=1), adapter_config("dvora", r=4, targets=("conv",)))
    block = Block(kernel_size=1)
    block.conv = nn.Conv1d(6, 10, 3)
    with pytest.raises(InputError, match="conv is a Conv1d; only linear layers and Conv2d are supported"):
        inject(block, adapter_config(r=4, targets=("conv",)))


def test_a_convolution_that_computes_in_its_own_way_is_refused():
    """Catches: a scaled or gated convolution that loses what it does beside the product."""

    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    block = Block(kernel_size=1)
    block.conv = Doubled(6, 10, 1)
    with pytest.raises(InputError, match=r"conv is a Doubled .* computes in a way of its own"):
        inject(block, adapter_config(r=4, targets=("conv",)))


def test_a_model_without_embeddings_is_saved_and_loaded(tmp_path):
    """Catches: an adapter that is lost after its training, for transformers can name no embeddings there."""

    def resnet() -> ResNetForImageClassification:
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
        return ResNetForImageClassification(config).eval()

    model, x = resnet(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inject(model, adapter_config("dora", r=2, targets=("*.layer.*.convolution",), dtype="float32"))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    save_adapter(model, tmp_path)
    again = resnet()
    load_adapter(again, tmp_path)
    theirs = peft.PeftModel.from_pretrained(resnet(), tmp_path)
    for other in (again, theirs):
        assert relative(other(x).logits, model(x).logits) < 1e-5
