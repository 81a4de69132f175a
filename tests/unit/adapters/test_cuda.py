"""The adapted layer on a GPU; without packages that a GPU machine may lack."""

from __future__ import annotations

import pytest
import torch

from .oracle import COMBINATIONS, assert_close, expected_gradients, gradients, make_layer


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("method", "norm"), COMBINATIONS)
def test_cuda_matches_the_closed_form(method, norm, dtype, bound):
    """Catches: a tensor left on the CPU, a kernel that reads other scales there."""
    layer = make_layer(method, inputs=256, outputs=128, bias=False, norm_gradient=norm).to("cuda")
    x, g = (torch.randn(64, side, device="cuda").to(dtype) for side in (256, 128))
    assert_close(gradients(layer, x, g), expected_gradients(layer, x, g, exact=norm == "exact"), bound)
