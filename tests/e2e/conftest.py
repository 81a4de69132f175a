"""A finished run that many tests read."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdora.cli import run_command

from .runs import tiny_tree, write_config


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_model_folder) -> Path:
    """Folder of a configuration, its data and its finished run of one step; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(folder, tiny_tree(folder, tiny_model_folder, max_steps=1))
    assert run_command("train", ["--config", config]) == 0
    return folder
