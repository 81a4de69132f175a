"""Configurations and manifests of runs that were never trained."""

from __future__ import annotations

from typing import Any

from qdora.config import RunConfig
from qdora.config_file import check_config, set_key


def run_tree() -> dict[str, Any]:
    data = {"source": "synthetic", "count": 40}
    return {
        "model": {"path": "some/model"},
        "data": {"train": data, "test": {**data, "split": "test"}},
        "training": {"max_steps": 20},
        "output": {"dir": "runs/a"},
    }


def run_config(settings: dict[str, Any], seed: int = 0) -> RunConfig:
    tree = run_tree()
    for key, value in {**settings, "training.seed": seed}.items():
        set_key(tree, key, value)
    return check_config(tree, RunConfig, "test")


def manifest_of(changes: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The manifest of a run, with some dotted fields changed."""
    manifest = {
        "base": {"fingerprint": "b", "parameters": 1234567},
        "data": {
            "fingerprints": {"train": "d", "test": "t", "validation": "v"},
            "train": 40,
            "test": 8,
            "validation": 4,
            "leaked_questions_removed": 2,
            "leaked_validation_questions_removed": 1,
        },
        "batch_order": f"o{seed}",
        "steps": 20,
        "seeds": {"training": seed, "data": 42},
        "initial_a": f"a{seed}",
        "compute_dtype": "torch.float32",
        "processes": 1,
        "versions": {"torch": "2"},
        "git_commit": None,
        "machine": {},
        "trainable_parameters": 4321,
    }
    for key, value in changes.items():
        set_key(manifest, key, value)
    return manifest
