"""What tests of PEFT's layers share."""

from __future__ import annotations

import pytest


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The layers of an accelerated PEFT model that our product computes, in order."""
    from qdora.adapters import peft_layers

    seen: list[str] = []
    own = peft_layers._forward
    monkeypatch.setattr(
        peft_layers, "_forward", lambda layer, a, *rest: (seen.append(a.name), own(layer, a, *rest))[1]
    )
    return seen
