"""ΔM and ΔD of single matrices, and the line through them."""

from __future__ import annotations

import math

import pytest
import torch

from qdora.analysis.decomposition import ALL, Change, fits, weight_change


def change(i: int, delta_d: float, delta_m: float, module: str = "q_proj", step: int = 10) -> Change:
    layer = f"model.layers.{i}.self_attn.{module}"
    return Change("run", "none + lora", step, True, layer, i, module, delta_m, delta_d)


def test_a_case_by_hand():
    """Catches: columns of our (out, in) matrix taken for the paper's columns, which are our rows; a sum where
    the paper has a mean; the sign of a change of magnitude left in."""
    before_OI = torch.tensor([[3.0, 0.0, 4.0], [0.0, 5.0, 12.0]])  # norms 5 and 13
    after_OI = torch.tensor([[0.0, 0.0, 10.0], [3.0, 0.0, 0.0]])  # norms 10 and 3, cosines 0.8 and 0
    delta_m, delta_d = weight_change(before_OI, after_OI)
    assert delta_m == pytest.approx((5 + 10) / 2)
    assert delta_d == pytest.approx((0.2 + 1.0) / 2)


def test_a_turned_row_and_a_negative_one():
    """Catches: an angle for a cosine, or an absolute value around it."""
    before_OI = torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 2.0]]).double()
    turned_OI = torch.tensor([[0.5, math.sqrt(0.75), 0.0], [-1.0, -2.0, -2.0]], dtype=torch.float64)
    assert weight_change(before_OI, turned_OI) == pytest.approx((0.0, (0.5 + 2.0) / 2))


def test_rows_of_zeros():
    """Catches: NaN from an all-zero row, or a turn where nothing moved."""
    zero_OI, w_OI = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    assert weight_change(w_OI, w_OI) == (0.0, 0.0)
    assert weight_change(zero_OI, w_OI) == pytest.approx((2.5, 0.5))


def test_small_turns_are_resolved():
    """Catches: 1 - cos in float32, whose rounding is larger than the turns of a short training."""
    generator = torch.Generator().manual_seed(0)
    w_OI = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    side_OI = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    side_OI -= (side_OI * w_OI).sum(1, keepdim=True) / w_OI.square().sum(1, keepdim=True) * w_OI
    side_OI *= w_OI.norm(dim=1, keepdim=True) / side_OI.norm(dim=1, keepdim=True)
    angle = 1e-5
    _, delta_d = weight_change(w_OI, w_OI * math.cos(angle) + side_OI * math.sin(angle))
    assert delta_d == pytest.approx(1 - math.cos(angle), rel=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_slope_of_rows_that_grow_as_they_turn(sign):
    """Catches: ΔM and ΔD exchanged, which inverts the slope; a lost sign; an interval beside its line."""
    generator = torch.Generator().manual_seed(1)
    length, found = 3.0, []
    for i in range(1, 7):
        w_OI = torch.nn.functional.normalize(torch.randn(5, 8, generator=generator).double(), dim=1) * length
        side_OI = torch.randn(5, 8, generator=generator).double()
        side_OI -= (side_OI * w_OI).sum(1, keepdim=True) / length**2 * w_OI
        side_OI = torch.nn.functional.normalize(side_OI, dim=1) * length
        cosine = 1 - 0.05 * i
        turned_OI = w_OI * cosine + side_OI * math.sqrt(1 - cosine**2)
        factor = 1 + 0.1 * (i if sign > 0 else 7 - i)
        delta_m, delta_d = weight_change(w_OI, turned_OI * factor)
        found.append(change(i, delta_d, delta_m))
    line = next(fit for fit in fits(found) if (fit.module, fit.step) == ("q_proj", ALL))
    assert line.slope == pytest.approx(sign * 0.1 * length / 0.05)
    assert line.correlation == pytest.approx(sign)
    assert line.intercept == pytest.approx(0.0 if sign > 0 else 0.7 * length)
    assert line.slope_low <= line.slope <= line.slope_high


def test_intervals_by_their_formulas():
    """Catches: a normal quantile for Student's t, a standard error for an interval, another confidence."""
    x, y = [0.1, 0.2, 0.3, 0.5, 0.9], [1.0, 0.7, 1.6, 1.2, 2.3]
    line = fits([change(i, *point) for i, point in enumerate(zip(x, y, strict=True))])[0]
    n, mean_x, mean_y = len(x), sum(x) / 5, sum(y) / 5
    sxx = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sxx
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    half = 3.182446305284263 * math.sqrt(rest / (n - 2) / sxx)  # t of 3 degrees of freedom
    assert (line.slope_low, line.slope_high) == pytest.approx((slope - half, slope + half))
    r = slope * math.sqrt(sxx / sum((b - mean_y) ** 2 for b in y))
    wide = 1.959963984540054 / math.sqrt(n - 3)
    expected = [math.tanh(math.atanh(r) + side * wide) for side in (-1, 1)]
    assert [line.correlation_low, line.correlation_high] == pytest.approx(expected)


def test_lines_by_module_and_step():
    """Catches: steps or modules that are not pooled, or pooled where they must be apart; a crash on points
    that have no line."""
    found = [
        change(i, 0.1 * i + step, 0.2 * i, module, step)
        for step in (1, 2)
        for i in range(4)
        for module in "qv"
    ]
    lines = {(fit.module, fit.step): fit for fit in fits(found)}
    assert {key: fit.points for key, fit in lines.items()} == {
        **{(ALL, step): points for step, points in ((ALL, 16), ("1", 8), ("2", 8))},
        **{(m, step): points for m in "qv" for step, points in ((ALL, 8), ("1", 4), ("2", 4))},
    }
    assert lines["q", "1"].slope == pytest.approx(2)
    assert lines["q", ALL].slope < 1
    few, level = [change(i, i, i) for i in range(3)], [change(i, 0.5, i) for i in range(9)]
    assert [fit.slope for fit in (*fits(few), *fits(level))] == [None] * 4
