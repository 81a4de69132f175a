"""The kernels of Triton, run by its interpreter on the CPU beside everything else that runs as ever."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreted() -> SimpleNamespace:
    """Second copies of the modules of kernels, whose functions are interpreted."""
    triton = pytest.importorskip("triton", reason="needs Triton, which this system has no package of")
    of_weight, of_gradients = (_interpreted(triton, name) for name in ("triton_kernels", "triton_gradients"))
    for module in (of_weight, of_gradients):
        # The one sum that the interpreter leaves to numpy; any other goes through Python, element by element.
        vars(module)["_add"] = triton.language.standard._sum_combine
    return SimpleNamespace(**{**vars(of_weight), **vars(of_gradients)})


def _interpreted(triton: Any, name: str) -> ModuleType:
    found = importlib.util.find_spec(f"qdora.adapters.kernels.{name}")
    assert found is not None
    assert found.origin is not None
    spec = importlib.util.spec_from_file_location(f"tests.interpreted_{name}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    triton.knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(module)
    finally:
        triton.knobs.runtime.interpret = False
    return module
