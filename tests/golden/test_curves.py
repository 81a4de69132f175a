"""Loss curves against recorded ones."""

from __future__ import annotations

import json

import pytest

from .curves import CURVES, RECORD, loss_curve

TOLERANCE = 1e-3
"""Relative; what other processors' summation orders amount to after 15 steps, with room to spare."""


@pytest.mark.golden
@pytest.mark.parametrize("method", CURVES)
def test_the_curve_is_the_recorded_one(method, tiny_model_folder):
    """Catches: a change of the initial A, data order, schedule, optimizer or gradient that nobody meant."""
    recorded = json.loads(RECORD.read_text())[method]
    assert loss_curve(method, tiny_model_folder) == pytest.approx(recorded, rel=TOLERANCE)
    assert recorded[-1] < 0.92 * recorded[0]
