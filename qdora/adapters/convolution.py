"""A convolution with an adapter: the layer of all adapters, on the patches of its input.

A convolution is the product of its weight, as one row for each output channel, with the patches that its
kernel sees.  So every start, magnitude and norm of a linear layer is there, and numbers and tensors are those
of PEFT's Conv2d: A is a convolution with the same kernel, B one of 1x1, and the norm is that of all weights
of an output channel.  Patches take the memory of the input times the size of the kernel.

N batch   C in_channels   O out_channels   P positions of the output   I = C · height · width of the kernel
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qdora.adapters.layer import AdaptedLinear
from qdora.errors import InputError
from qdora.quant.base import FrozenWeight
from qdora.quant.dense import DenseWeight


class AdaptedConv2d(AdaptedLinear):
    """y = s ∘ (W * x + c B A drop(x)) + bias,  s = m / ||W + c BA|| of each output channel.

    Dropout drops entries of patches, of which a value of x has several, where PEFT drops values of x.

    Attributes:
        base: the weight as (O, I).
        kernel_size, stride, padding: as in `nn.Conv2d`, (height, width).
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take over the weight of a convolution that `refuse_convolution` lets pass; it is not copied."""
        super().__init__(DenseWeight(conv.weight.detach().flatten(1)), conv.bias)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride, self.padding = (
            _pair(conv.kernel_size),
            _pair(conv.stride),
            _padding(conv),
        )

    @property
    def weight(self) -> torch.Tensor:
        """As `AdaptedLinear.weight`: (O, C, height, width)."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        return super().weight.view(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer.

        Args:
            x: (N, C, height, width) or (C, height, width), compute dtype.
        Returns: (N, O, height, width) or (O, height, width), dtype of x.
        """
        sides = zip(x.shape[-2:], self.kernel_size, self.stride, self.padding, strict=True)
        size = [(side + 2 * padding - kernel) // stride + 1 for side, kernel, stride, padding in sides]
        patches_NIP = F.unfold(x, self.kernel_size, padding=self.padding, stride=self.stride)
        y_NPO = super().forward(patches_NIP.transpose(-1, -2))
        return y_NPO.transpose(-1, -2).reshape(*x.shape[:-3], self.out_channels, *size).contiguous()

    def merged(self, dtype: torch.dtype, onto: FrozenWeight | None = None) -> torch.Tensor:
        """As `AdaptedLinear.merged`: (O, C, height, width)."""
        return super().merged(dtype, onto).view(self.weight.shape)


def plain_layer(layer: AdaptedLinear, dtype: torch.dtype | None = None) -> nn.Linear | nn.Conv2d:
    """A layer of torch's that computes the same: its weight is s (W + c BA).

    Args:
        dtype: of that; the dtype of W unless told otherwise, float32 where W is quantized.
    """
    plain: nn.Linear | nn.Conv2d
    if isinstance(layer, AdaptedConv2d):
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            bias=False,
            device="meta",
        )
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.merged(dtype or layer.weight.dtype), requires_grad=False)
    plain.bias = layer.bias
    return plain


def refuse_convolution(conv: nn.Conv2d, name: str, update: str) -> None:
    """Refuse a convolution for which PEFT's DoRA is not defined.

    Args:
        name: of the layer.
        update: `adapter.type`.
    Raises: InputError: the layer and what it has are named.
    """
    plain = conv.weight.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if not plain or type(conv).forward is not nn.Conv2d.forward:
        raise InputError(
            f"{name} is a {type(conv).__name__} with a weight of {conv.weight.dtype}: it holds no "
            f"plain weight, or computes in a way of its own; allowed: nn.Conv2d in 16 bits or more"
        )
    odd = {
        "groups": conv.groups != 1,
        "dilation": conv.dilation != (1, 1),
        "padding_mode": conv.padding_mode != "zeros",
        "padding": conv.padding == "same" and not all(side % 2 for side in conv.kernel_size),
    }
    for setting in (setting for setting, given in odd.items() if given):
        raise InputError(
            f"{name} is a Conv2d with {setting} {getattr(conv, setting)!r}, which has no adapter here: leave "
            f"it out of adapter.targets"
        )
    if update == "vera":
        raise InputError(
            f"{name} is a Conv2d, and adapter.type 'vera' is for linear layers alone: leave it out of "
            f"adapter.targets"
        )


def _padding(conv: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(conv.padding, str):
        return _pair(conv.padding)
    height, width = conv.kernel_size
    return (height // 2, width // 2) if conv.padding == "same" else (0, 0)


def _pair(sides: tuple[int, ...]) -> tuple[int, int]:
    height, width = sides
    return height, width
