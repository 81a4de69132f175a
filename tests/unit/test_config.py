"""The configuration parser: what it refuses, and what it says."""

from __future__ import annotations

import pytest
import yaml

from qdora.config import dump_config, load_config
from qdora.errors import InputError

TREE = {
    "model": {"path": "x"},
    "data": {
        "train": {"source": "synthetic", "count": 5},
        "test": {"source": "synthetic", "count": 5, "split": "test"},
    },
    "training": {"max_steps": 5},
    "output": {"dir": "r"},
}


def write(tmp_path, text=None):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(TREE) if text is None else text)
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_step=3", "unknown key 'training.max_step'.*did you mean 'max_steps'"),
        ("adapter.r=many", "adapter.r: .*integer.*'many'"),
        ("adapter.r=true", "adapter.r: .*integer"),
        ("adapter.rslora=1", "adapter.rslora: .*boolean"),
        ("adapter.r=0", "greater than or equal to 1, got 0"),
        ("adapter.dropout=1.0", "less than 1"),
        ("adapter.method=qdra", "did you mean 'qdora'"),
        ("adapter.method=lora", "does not go with model.base 'nf4'; allowed there: qdora, qlora"),
        ("adapter.targets=[]", "adapter.targets is empty"),
        ("training.epochs=1", "exactly one of training.max_steps and training.epochs"),
        ("training.gradient_accumulation=3", "does not divide"),
        ("data.train.tasks=[ARC]", "did you mean 'ARC-Easy'"),
        ("data.train.source=file", "source 'file' needs a path"),
        ("data.test.split=dev", "split 'dev'"),
        ("model.path.x=1", "it has no keys below it"),
        ("training", "expected key=value"),
        ("training.seed=[", "not valid YAML"),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(tmp_path, override, message):
    """Catches: a wrong value that is coerced, ignored, or refused without saying what would do."""
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("- a", "expected a mapping"),
        ("model: {path: x}\nmodel: {path: y}", "given twice"),
        ("model: {path: x}", "'data' is required and missing"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    """Catches: half a file read as a whole one."""
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    """Catches: a traceback for a mistyped path."""
    with pytest.raises(InputError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_exponents_without_a_point_are_numbers(tmp_path):
    """Catches: 1e-3 read as text, as YAML 1.1 has it."""
    assert load_config(write(tmp_path), ["training.learning_rate=1e-3"]).training.learning_rate == 1e-3


def test_the_dump_reads_back(tmp_path):
    """Catches: a resolved configuration that the parser itself refuses."""
    config = load_config(write(tmp_path), ["adapter.magnitude_targets=[v_proj]", "training.clip_norm=null"])
    assert load_config(write(tmp_path, dump_config(config))) == config
