"""A finished run that many tests read, and counts of what a command did."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qdora.cli import run_command
from qdora.commands import train
from qdora.evaluation import evaluate
from qdora.training.loop import Trainer

from .runs import tiny_tree, write_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_model_folder) -> Path:
    """Folder of a configuration, its data and its finished run of one step; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, tiny_tree(folder, tiny_model_folder, max_steps=1))
    assert run_command("train", ["--config", config]) == 0
    return folder


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often a run is trained, an answer generated, a weight read."""
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counted[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(Trainer, "run")
    count(Trainer, "_step")
    count(train, "load_model")
    count(evaluate, "load_with_adapter")
    count(evaluate, "generate")
    return counted
