"""Checkpoints on disk: whole, verified, few, and of the same settings."""

from __future__ import annotations

import pytest
import torch

from qdora.errors import CheckpointError, InputError
from qdora.training.checkpoint import list_checkpoints, load_checkpoint, newest_usable, save_checkpoint

SETTINGS = {"training.learning_rate": 1e-3, "adapter.targets": ("q_proj", "v_proj"), "model.revision": None}


def write_adapter(folder):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def save(directory, step, *, keep=9, adapter=write_adapter, settings=SETTINGS):
    tensors = {"parameter/x": torch.arange(64.0) + step, "step/x": torch.tensor(float(step))}
    return save_checkpoint(directory, step, tensors, settings, keep=keep, save_adapter=adapter)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def test_round_trip(tmp_path):
    """Catches: tensors that change on disk, settings that do not survive JSON (tuples, None)."""
    folder = save(tmp_path, 12)
    step, tensors = load_checkpoint(folder, SETTINGS)
    assert step == 12
    assert torch.equal(tensors["parameter/x"], torch.arange(64.0) + 12)
    assert tensors["step/x"].shape == ()


def test_a_failed_save_leaves_what_was_there(tmp_path):
    """Catches: a half-written checkpoint, a temporary folder left behind, an old one removed too early."""
    save(tmp_path, 1, keep=1)

    def fail(folder):
        write_adapter(folder)
        raise RuntimeError("adapter")

    with pytest.raises(RuntimeError, match="adapter"):
        save(tmp_path, 2, keep=1, adapter=fail)
    with pytest.raises(RuntimeError, match="adapter"):
        save(tmp_path, 1, keep=1, adapter=fail)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    load_checkpoint(tmp_path / "step-1", SETTINGS)


def test_the_newest_are_kept_by_number_not_by_name(tmp_path):
    """Catches: step-9 taken for newer than step-10, foreign folders taken for checkpoints or removed."""
    (tmp_path / "step-notes").mkdir()
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-100", "step-10"]
    assert (tmp_path / "step-notes").is_dir()


def test_an_existing_step_is_replaced(tmp_path):
    """Catches: a resumed run that cannot write a step for the second time."""
    save(tmp_path, 3, settings={"a": 1})
    save(tmp_path, 3, settings={"a": 2})
    assert load_checkpoint(tmp_path / "step-3", {"a": 2})[0] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


@pytest.mark.parametrize("name", ["state.safetensors", "adapter/adapter_model.safetensors"])
def test_corrupt_and_truncated_files_are_named(tmp_path, name):
    """Catches: a flipped bit that is trained on."""
    folder = save(tmp_path, 3)
    flip(folder / name, -1)
    with pytest.raises(CheckpointError, match=f"{name}: corrupt"):
        load_checkpoint(folder, SETTINGS)
    flip(folder / name, -1)
    load_checkpoint(folder, SETTINGS)
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"{name}: corrupt"):
        load_checkpoint(folder, SETTINGS)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(folder, SETTINGS)


@pytest.mark.parametrize(
    "facts",
    ["", "{", "[]", "{}", '{"step": 3, "settings": {}}', '{"step": "x", "sha256": {}, "settings": {}}'],
)
def test_damaged_facts_are_a_checkpoint_error(tmp_path, facts):
    """Catches: a traceback instead of the checkpoint before."""
    folder = save(tmp_path, 3)
    (folder / "state.json").write_text(facts)
    with pytest.raises(CheckpointError, match="step-3"):
        load_checkpoint(folder, SETTINGS)


def test_a_flipped_bit_in_the_step_is_found(tmp_path):
    """Catches: a run that goes on from step 2 with the state of step 3."""
    folder = save(tmp_path, 3)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 3', '"step": 2', 1))
    with pytest.raises(CheckpointError, match="step-3"):
        load_checkpoint(folder, SETTINGS)


def test_the_one_before_is_used_with_a_warning(tmp_path):
    """Catches: a resume that stops, or silently starts anew, at one bad checkpoint."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    flip(tmp_path / "step-6" / "state.safetensors", -1)
    (tmp_path / "step-4" / "state.json").unlink()
    warnings: list[str] = []
    found = newest_usable(tmp_path, SETTINGS, warnings.append)
    assert found is not None
    assert found[0] == 2
    assert ["step-6" in w or "step-4" in w for w in warnings] == [True, True]
    assert newest_usable(tmp_path / "none", SETTINGS, warnings.append) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training.learning_rate": 2e-3}, r"training\.learning_rate = 0\.001, this run has 0\.002"),
        (
            {"adapter.targets": ("q_proj",)},
            r"adapter\.targets = \['q_proj', 'v_proj'\], this run has \['q_proj'\]",
        ),
        ({"model.revision": "main"}, r"model\.revision = None, this run has 'main'"),
        ({"new": 1}, r"new = None, this run has 1"),
    ],
)
def test_other_settings_are_refused_by_key_and_values(tmp_path, change, words):
    """Catches: a run continued as another one; a fallback to an older checkpoint because of it."""
    save(tmp_path, 3)
    with pytest.raises(InputError, match=words) as error:
        newest_usable(tmp_path, SETTINGS | change, lambda text: None)
    assert not isinstance(error.value, CheckpointError)
    assert "step-3" in str(error.value)
