"""Checkpoints on disk: complete, verified, few, and of the same settings."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader, load

from qdora import files
from qdora.errors import CheckpointError, InputError, InterruptedRunError
from qdora.training import checkpoint_storage
from qdora.training.checkpoint import CheckpointWriter, list_checkpoints, newest_usable

from .checkpoints import POSITION, alone, read_checkpoint, write_checkpoint

SETTINGS = {"training.learning_rate": 1e-3, "adapter.targets": ("q_proj", "v_proj"), "model.revision": None}


def write_adapter(folder):
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")


def state(step):
    return {"master/x": torch.arange(64.0).view(16, 4) + step, "step/x": torch.tensor(float(step))}


LIKE = {name: torch.full_like(tensor, -1) for name, tensor in state(0).items()}


def save(directory, step, *, keep=9, adapter=write_adapter, settings=SETTINGS, **kind):
    return write_checkpoint(directory, step, state(step), settings, keep=keep, save_adapter=adapter, **kind)


def read(folder, settings=SETTINGS):
    return read_checkpoint(folder, LIKE, settings)


def newest(directory, settings=SETTINGS, warn=lambda text: None):
    return newest_usable(directory, LIKE, settings, alone(), warn)


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("in_background", [False, True])
def test_round_trip(tmp_path, in_background):
    """Catches: tensors that change on disk, settings that do not survive JSON (tuples, None), a read that
    writes into the tensors of the run, metadata that no reader finds."""
    folder = save(tmp_path, 12, in_background=in_background)
    found = read(folder)
    assert (found.step, found.world_size) == (12, 1)
    assert found.tensors.keys() == LIKE.keys()
    for name, tensor in state(12).items():
        assert found.tensors[name].shape == tensor.shape
        assert torch.equal(found.tensors[name], tensor)
    assert all((tensor == -1).all() for tensor in LIKE.values())
    metadata = json.loads((folder / "state.json").read_text())
    assert {key: metadata[key] for key in ("step", "processes", "seed", "epoch", "batch")} == {
        "step": 12,
        "processes": 1,
        **POSITION,
    }
    assert sorted(metadata["sha256"]) == ["adapter/adapter_model.safetensors", "state-0.safetensors"]


def test_only_safetensors_and_json_and_torch_reads_them(tmp_path):
    """Catches: a pickle on disk; a file that only we can read."""
    folder = save(tmp_path, 12)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    with safe_open(folder / "state-0.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["master/x", "step/x"]
    tensors = {name: tensor.clone() for name, tensor in LIKE.items()}
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert torch.equal(tensors["master/x"], state(12)["master/x"])


@pytest.mark.parametrize("in_background", [False, True])
def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch, in_background):
    """Catches: a half-written checkpoint, a temporary folder left behind, an old one removed too early, an
    error in the background that nobody hears of."""
    save(tmp_path, 1, keep=1)

    def fail(folder):
        write_adapter(folder)
        raise RuntimeError("adapter")

    for step in (2, 1):
        with pytest.raises(RuntimeError, match="adapter"):
            save(tmp_path, step, keep=1, adapter=fail, in_background=in_background)

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_storage, "write_tensors", full)
    for step in (2, 1):
        with pytest.raises(InputError, match=r"state-0\.safetensors: cannot be written: No space left"):
            save(tmp_path, step, keep=1, in_background=in_background)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
    read(tmp_path / "step-1")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Catches: a background save that blocks, that holds tensors which the next steps change, that is taken
    for written before it is, or whose error is lost when the run ends or is stopped."""
    gate, write = threading.Event(), checkpoint_storage.write_tensors

    def slow(*arguments):
        assert gate.wait(30)
        write(*arguments)

    monkeypatch.setattr(checkpoint_storage, "write_tensors", slow)
    tensors = state(1)
    with CheckpointWriter(tmp_path, SETTINGS, alone(), keep=9, in_background=True) as checkpoints:
        checkpoints.save(1, tensors, POSITION, write_adapter)
        tensors["master/x"] += 5  # the next step
        assert list_checkpoints(tmp_path) == []
        assert newest(tmp_path / "elsewhere") is None
        gate.set()
        checkpoints.save(2, tensors, POSITION, write_adapter)
        assert [p.name for p in list_checkpoints(tmp_path)][-1] == "step-1"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-2", "step-1"]
    assert torch.equal(read(tmp_path / "step-1").tensors["master/x"], state(1)["master/x"])
    assert torch.equal(read(tmp_path / "step-2").tensors["master/x"], state(6)["master/x"])

    def full(path, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_storage, "write_tensors", full)

    def stopped():
        with CheckpointWriter(tmp_path, SETTINGS, alone(), keep=9, in_background=True) as checkpoints:
            checkpoints.save(3, tensors, POSITION, write_adapter)
            raise InterruptedRunError("a checkpoint was written", 143)

    with pytest.raises(InputError, match="No space left"):
        stopped()
    assert {p.name for p in tmp_path.iterdir()} == {"step-1", "step-2"}


def test_the_newest_are_kept_by_number_not_by_name(tmp_path):
    """Catches: step-9 taken for newer than step-10, foreign folders taken for checkpoints or removed."""
    (tmp_path / "step-notes").mkdir()
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-100", "step-10"]
    assert (tmp_path / "step-notes").is_dir()


def test_a_run_that_went_back_keeps_what_it_writes(tmp_path):
    """Catches: the newest checkpoint removed as soon as it is written, because of later ones from before."""
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-15", "step-10"]


def test_an_existing_step_is_replaced(tmp_path):
    """Catches: a resumed run that cannot write a step for the second time."""
    save(tmp_path, 3, settings={"a": 1})
    save(tmp_path, 3, settings={"a": 2})
    assert read(tmp_path / "step-3", {"a": 2}).step == 3
    assert [p.name for p in tmp_path.iterdir()] == ["step-3"]


@pytest.mark.parametrize("by", ["save", "resume"])
def test_what_a_killed_process_left_is_cleared(tmp_path, by):
    """Catches: temporary folders that pile up; a checkpoint lost to a kill while it was being replaced."""
    save(tmp_path, 3)
    save(tmp_path, 5)
    (tmp_path / "step-5").rename(tmp_path / ".step-5.tmp-abcd1234.replaced")
    (tmp_path / ".step-5.tmp-abcd1234").mkdir()
    (tmp_path / ".step-5.tmp-abcd1234" / "state-0.safetensors").write_bytes(b"half")
    (tmp_path / ".step-3.tmp-abcd1234.replaced").mkdir()  # its replacement is there
    if by == "save":
        save(tmp_path, 7)
        assert {p.name for p in tmp_path.iterdir()} == {"step-3", "step-5", "step-7"}
    else:
        assert newest(tmp_path).step == 5
        assert {p.name for p in tmp_path.iterdir()} == {"step-3", "step-5"}
    assert read(tmp_path / "step-5").step == 5


@pytest.mark.parametrize("name", ["state-0.safetensors", "adapter/adapter_model.safetensors"])
def test_corrupt_and_truncated_files_are_named(tmp_path, name):
    """Catches: a flipped bit that is trained on."""
    folder = save(tmp_path, 3)
    flip(folder / name, -1)
    with pytest.raises(CheckpointError, match=f"{name}: corrupt"):
        read(folder)
    flip(folder / name, -1)
    read(folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=f"{name}: corrupt"):
        read(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        read(folder)


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 3, "step": 3, "settings": {}}',
        '{"format": 3, "step": "x", "processes": 1, "sha256": {}, "settings": {}}',
        '{"format": 3, "step": 3, "processes": 1, "sha256": 5, "settings": {}}',
    ],
)
def test_damaged_metadata_are_a_checkpoint_error(tmp_path, metadata):
    """Catches: a traceback instead of the checkpoint before."""
    folder = save(tmp_path, 3)
    (folder / "state.json").write_text(metadata)
    with pytest.raises(CheckpointError, match="step-3"):
        read(folder)


@pytest.mark.parametrize(("number", "names"), [(2, True), (4, False), ("two", False)])
def test_a_checkpoint_of_another_version(tmp_path, number, names):
    """Catches: a missing parameter named where the format is another one; another format without a way on."""
    folder = save(tmp_path, 3)
    metadata = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(metadata | {"format": number}))
    expected = rf"step-3: in format {number!r}; this version of qdora reads format 3.*: continue the run with"
    with pytest.raises(CheckpointError, match=expected) as error:
        read(folder)
    assert ("in which the parameters have other names" in str(error.value)) == names
    assert newest(tmp_path) is None


def test_another_format_is_said(tmp_path):
    """Catches: a KeyError for a checkpoint of another version."""
    folder = save(tmp_path, 3)
    (folder / "state.json").write_text('{"step": 3, "settings": {}, "sha256": {"state.safetensors": "0"}}')
    with pytest.raises(CheckpointError, match="step-3: in format 1; this version of qdora reads format 3"):
        read(folder)


def test_a_flipped_bit_in_the_step_is_found(tmp_path):
    """Catches: a run that goes on from step 2 with the state of step 3."""
    folder = save(tmp_path, 3)
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 3', '"step": 2', 1))
    with pytest.raises(CheckpointError, match="step-3"):
        read(folder)


def test_the_one_before_is_used_with_a_warning(tmp_path):
    """Catches: a resume that stops, or silently starts anew, at one bad checkpoint."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    flip(tmp_path / "step-6" / "state-0.safetensors", -1)
    (tmp_path / "step-4" / "state.json").unlink()
    warnings: list[str] = []
    found = newest(tmp_path, warn=warnings.append)
    assert found is not None
    assert found.step == 2
    assert torch.equal(found.tensors["master/x"], state(2)["master/x"])
    assert ["step-6" in w or "step-4" in w for w in warnings] == [True, True]
    assert newest(tmp_path / "none", warn=warnings.append) is None


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
        newest(tmp_path, SETTINGS | change)
    assert not isinstance(error.value, CheckpointError)
    assert "step-3" in str(error.value)


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"step/x": torch.zeros(())}, r"master/x is of shape \(16, 4\) there, missing here"),
        (LIKE | {"master/x": torch.zeros(4, 4)}, r"of shape \(16, 4\) there, of shape \(4, 4\) here"),
        (LIKE | {"master/y": torch.zeros(2)}, r"master/y is missing there, of shape \(2,\) here"),
    ],
)
def test_tensors_of_another_model_are_refused_by_name(tmp_path, like, words):
    """Catches: a checkpoint of another adapter that is loaded in part, or taken for a damaged one."""
    save(tmp_path, 3)
    with pytest.raises(InputError, match=words) as error:
        newest_usable(tmp_path, like, SETTINGS, alone(), lambda text: None)
    assert not isinstance(error.value, CheckpointError)


def test_an_old_checkpoint_disappears_as_one(tmp_path, monkeypatch):
    """Catches: an old checkpoint that a kill left without some of its files, and that is taken for one."""
    save(tmp_path, 2)
    save(tmp_path, 4)

    def killed(path, **options):
        (path / "state.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 6, keep=1)
    for checkpoint in list_checkpoints(tmp_path):
        read(checkpoint)
    save(tmp_path, 8, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-8"]


def test_too_many_checkpoints_are_removed_without_a_save(tmp_path):
    """Catches: a run killed after its last save that has nothing to save when it goes on, and so keeps more
    checkpoints than asked for."""
    for step in (2, 4, 6):
        save(tmp_path, step)
    with CheckpointWriter(tmp_path, SETTINGS, alone(), keep=2):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"step-4", "step-6"}
