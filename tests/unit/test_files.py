"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qdora import files
from qdora.errors import InputError
from qdora.files import (
    atomic_directory,
    clear_leftovers,
    read_json,
    remove,
    write_file,
    write_json,
    write_tensors,
    write_text,
)
from qdora.output import check_writable

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_device(tmp_path):
    """A mounted device of 64 KiB."""
    folder = tmp_path / "device"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Catches: a file truncated before its new contents are there, a temporary file left behind."""
    write_text(tmp_path / "a" / "x.json", "old")

    def fail(path):
        path.write_text("half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write_file(tmp_path / "a" / "x.json", fail)
    assert tree(tmp_path) == {"a/x.json": "old"}


def test_no_space_is_the_users_error_and_names_the_file(tmp_path):
    """Catches: a traceback where the disk is full."""

    def full(path):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"x\.json: cannot be written: No space left on device"):
        write_file(tmp_path / "x.json", full)
    with (
        pytest.raises(InputError, match=r"step-1: cannot be written: No space left on device"),
        atomic_directory(tmp_path / "step-1") as folder,
    ):
        full(folder / "y")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_disguised(tmp_path):
    """Catches: a bug of ours shown as a full disk."""
    with pytest.raises(InputError, match=r"^mine$"), atomic_directory(tmp_path / "d"):
        raise InputError("mine")
    with pytest.raises(KeyError), atomic_directory(tmp_path / "d"):
        raise KeyError("ours")
    assert list(tmp_path.iterdir()) == []


def test_json_round_trip_and_refusals(tmp_path):
    """Catches: a traceback for a missing or damaged file."""
    write_json(tmp_path / "x.json", {"a": [1, None, "ü"]})
    assert read_json(tmp_path / "x.json") == {"a": [1, None, "ü"]}
    with pytest.raises(InputError, match=r"y\.json: no such file"):
        read_json(tmp_path / "y.json")
    for damaged in (b"{", b"\xff\xfe", b"", b"[" * 5000, b'{"r": 1, "r": 2}', b'{"x": {"r": 1, "r": 1}}'):
        (tmp_path / "x.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"x\.json: not valid JSON"):
            read_json(tmp_path / "x.json")


def test_a_folder_is_swapped_only_at_the_end(tmp_path):
    """Catches: the old folder removed before the new one is complete, files of both mixed."""
    target = tmp_path / "out"
    for name in ("one", "two"):
        with atomic_directory(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / name).write_text(name)
            assert not (target / "sub" / name).exists()
            assert target.exists() == (name == "two")
        assert tree(tmp_path) == {f"out/sub/{name}": name}
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:  # noqa: PT012
        (folder / "three").write_text("three")
        raise RuntimeError
    assert tree(tmp_path) == {"out/sub/two": "two"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_result_can_be_read_by_others(tmp_path):
    """Catches: the private mode of a temporary file that stays on the result."""
    write_text(tmp_path / "x", "x")
    with atomic_directory(tmp_path / "d") as folder:
        (folder / "y").write_text("y")
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert modes == {"x": 0o644, "d": 0o755, "y": 0o644}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_swap_that_fails_halfway_puts_the_old_folder_back(tmp_path, monkeypatch, error):
    """Catches: old and new both deleted where the second of the two renames fails or is interrupted."""
    target = tmp_path / "out"
    with atomic_directory(target) as folder:
        (folder / "x").write_text("old")
    rename = Path.rename

    def second_fails(path, to):
        if Path(to) == target and not path.name.endswith(".replaced"):
            raise error
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises((InputError, KeyboardInterrupt)), atomic_directory(target) as folder:
        (folder / "x").write_text("new")
    monkeypatch.setattr(Path, "rename", rename)
    kept = [p for p in tmp_path.rglob("x") if p.read_text() == "old"]
    assert kept == [target / "x"]


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_whose_rename_is_not_on_the_disk_is_taken_back(tmp_path, monkeypatch, old):
    """Catches: a command that fails at the last fsync, and refuses its own result when it is given again."""
    if old:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").write_text("old")

    def broken(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "fsync", broken)
    with (
        pytest.raises(InputError, match="out: cannot be written: Input/output error"),
        atomic_directory(tmp_path / "out") as folder,
    ):
        (folder / "x").write_text("new")
    assert tree(tmp_path) == ({"out/x": "old"} if old else {})
    assert len(list(tmp_path.iterdir())) == old


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_replaced_without_leftovers(tmp_path, kind):
    """Catches: a hidden `.replaced` file or link that stays for ever beside an export over it."""
    if kind == "file":
        (tmp_path / "out").write_text("old")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "y").write_text("theirs")
        (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    if kind == "link":
        assert (tmp_path / "elsewhere" / "y").read_text() == "theirs"


def test_a_full_device(small_device):
    """Catches: safetensors' own exception shown as a traceback; parts left on a device that is full."""
    write_text(small_device / "out" / "x", "old")
    big = {"w": torch.zeros(100_000)}
    with (
        pytest.raises(InputError, match=r"out: cannot be written: .*(space|28)"),
        atomic_directory(small_device / "out") as folder,
    ):
        save_file(big, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"text: cannot be written: No space left"):
        write_text(small_device / "text", "x" * 200_000)
    with pytest.raises(InputError, match=r"y: cannot be written: .*(space|28)"):
        write_file(small_device / "y", lambda path: save_file(big, path))
    assert tree(small_device) == {"out/x": "old"}
    assert [p.name for p in small_device.iterdir()] == ["out"]


def test_tensors_are_the_same_bytes_each_time(tmp_path):
    """Catches: two files of one state that differ, by which nobody could tell that a run was repeated."""
    tensors = {"b": torch.arange(3.0), "a": torch.arange(2)}
    metadata = {key: "é" + key for key in "zyxwvutsrq"}
    for i in range(6):
        write_tensors(tmp_path / str(i), tensors, metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(6)}) == 1
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("b"), tensors["b"])
        assert torch.equal(file.get_tensor("a"), tensors["a"])


def test_a_folder_disappears_as_one(tmp_path, monkeypatch):
    """Catches: a folder that a kill while it is removed leaves half, under a name that says it is whole; what
    is left of it in the way of the next, or for ever."""
    folder = tmp_path / "step-2"

    def killed(path, *arguments, **options):
        next(Path(path).iterdir()).unlink()
        raise KeyboardInterrupt

    def kill_remove():
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(name)
        with monkeypatch.context() as patched:
            patched.setattr(files.shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                remove(folder)

    kill_remove()
    assert not folder.exists()
    kill_remove()  # while it removes what the first left
    assert len(list(folder.iterdir())) == 3
    remove(folder)
    remove(folder)  # as a file that is not there
    assert list(tmp_path.iterdir()) == []
    kill_remove()
    clear_leftovers(tmp_path, "step-*")
    assert list(tmp_path.iterdir()) == []


HOLD = """
import sys, pathlib
from qdora.files import atomic_directory, write_file
def wait(path):
    print(path, flush=True)
    sys.stdin.read()
def write():
    with atomic_directory(pathlib.Path("out")) as folder:
        wait(folder)
write() if sys.argv[1] == "out" else write_file(pathlib.Path("x.json"), wait)
"""


@pytest.mark.parametrize("name", ["out", "x.json"])
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path, name):
    """Catches: gigabytes of a killed export that stay hidden for ever; the half-written files of another
    process, which is at work, removed under its hands; a user's hidden files removed."""
    (tmp_path / f".{name}.template").write_text("mine")
    command = [sys.executable, "-c", HOLD, name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writer = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)
    temporary = Path(writer.stdout.readline().strip()).name
    assert (tmp_path / temporary).exists()

    def write():
        if name == "out":
            with atomic_directory(tmp_path / name) as folder:
                (folder / "y").write_text("new")
        else:
            write_text(tmp_path / name, "new")

    write()
    assert {p.name for p in tmp_path.iterdir()} == {name, temporary, f".{name}.template"}
    writer.kill()
    writer.wait()
    write()
    assert {p.name for p in tmp_path.iterdir()} == {name, f".{name}.template"}


def test_an_export_killed_while_it_replaces_the_old_one_does_not_lose_it(tmp_path):
    """Catches: the old folder removed as a leftover, though the new one fails."""
    (tmp_path / ".out.tmp-abcd1234.replaced").mkdir()
    (tmp_path / ".out.tmp-abcd1234.replaced" / "x").write_text("old")
    (tmp_path / ".out.tmp-abcd1234").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "out"):
        raise RuntimeError
    assert tree(tmp_path) == {"out/x": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_removed(tmp_path, kind):
    """Catches: a traceback for a link in place of a folder, or what it points to removed with it."""
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "x"
    path.write_text("") if kind == "file" else path.symlink_to(tmp_path / "elsewhere")
    remove(path)
    assert [p.name for p in tmp_path.iterdir()] == ["elsewhere"]


def test_an_old_folder_that_cannot_be_removed_is_no_error_and_goes_later(tmp_path, monkeypatch):
    """Catches: a complete export said to have failed, because its device became read-only after it."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")

    def refuse(path, *arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        with atomic_directory(target) as folder:
            (folder / "new").write_text("new")
    assert tree(target) == {"new": "new"}
    assert len(list(tmp_path.iterdir())) == 2
    with atomic_directory(target) as folder:
        (folder / "new").write_text("newer")
    assert tree(tmp_path) == {"out/new": "newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_check_left_goes_with_the_next_write(tmp_path, monkeypatch):
    """Catches: a file of `check_writable` that stays for ever beside what was to be written."""
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda path, **options: None)
        check_writable(tmp_path / "out", "out")
    assert len(list(tmp_path.iterdir())) == 1
    write_text(tmp_path / "out", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
