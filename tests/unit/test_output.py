"""Folders that commands write: checked before the work, locked until its end."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qdora import output
from qdora.errors import InputError
from qdora.output import check_file, check_writable, locked

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys, time
from pathlib import Path
from qdora.output import locked
with locked(Path(sys.argv[1]), "the run", shared=sys.argv[2] == "shared"):
    child = os.fork() if sys.argv[3] == "child" else 1
    if child:
        print("held", child, flush=True)
    time.sleep(60)
"""


def hold(file: Path, shared: str = "exclusive", child: str = "alone") -> tuple[subprocess.Popen[str], int]:
    """Another process that holds the lock, and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), shared, child], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    word, number = process.stdout.readline().split()
    assert word == "held"
    return process, int(number)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    """Catches: two runs in one folder, a lock kept by the orphan of a killed run, files left by a refusal."""
    file = tmp_path / "runs" / "new" / ".lock"
    process, child = hold(file, child="child")
    try:
        before = sorted(tmp_path.rglob("*"))
        for shared in (False, True):
            with (
                pytest.raises(
                    InputError, match=f"the run is in use by process {process.pid} on {platform.node()};"
                ),
                locked(file, "the run", shared=shared),
            ):
                pass
        assert sorted(tmp_path.rglob("*")) == before
        process.kill()
        process.wait()
        os.kill(child, 0)
        with locked(file, "the run"):
            assert file.read_text() == f"process {os.getpid()} on {platform.node()}"
        assert list((tmp_path / "runs" / "new").iterdir()) == []
    finally:
        process.kill()
        os.kill(child, 9)


def test_readers_share_and_keep_a_writer_out(tmp_path):
    """Catches: two evaluations of one run that exclude each other, a run trained anew under an evaluation."""
    file = tmp_path / ".lock"
    process, _ = hold(file, "shared")
    try:
        with locked(file, "the run", shared=True):
            pass
        assert file.exists()
        with pytest.raises(InputError, match="in use by process"), locked(file, "the run"):
            pass
    finally:
        process.kill()
        process.wait()
    with locked(file, "the run"), pytest.raises(InputError, match="this process itself"), locked(file, "it"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_a_lock_go_with_it_where_nothing_came_into_them(tmp_path):
    """Catches: a run folder that stays after bad input, a user's folder that is removed with the lock."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError), locked(tmp_path / "mine" / "a" / "b" / ".lock", "it"):
        raise KeyError
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]
    with locked(tmp_path / "mine" / "a" / "b" / ".lock", "it"):
        (tmp_path / "mine" / "a" / "metrics").write_text("")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "metrics", "mine"]
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty" / ".lock", "it"):
        pass
    assert (tmp_path / "empty").is_dir()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_holder_that_ends_in_between(tmp_path, monkeypatch, what):
    """Catches: a lock on a file that has no name any more, which the next process would not see."""
    file, races = tmp_path / "run" / ".lock", iter([True])
    at = (fcntl, "lockf") if what == "file" else (os, "open")
    real = getattr(*at)

    def race(*arguments):
        if next(races, False):
            file.unlink(missing_ok=True)
            if what == "folder":
                file.parent.rmdir()
        return real(*arguments)

    monkeypatch.setattr(*at, race)
    with locked(file, "the run"):
        assert file.exists()
    assert not file.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys, number):
    """Catches: a run that cannot be started on such a disk, or one that believes itself alone there."""

    def lockf(handle, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(output.fcntl, "lockf", lockf)
    with locked(tmp_path / ".lock", "output.dir runs/a"):
        pass
    assert "output.dir runs/a: this file system has no locks" in capsys.readouterr().err


UNWRITABLE = {
    "below a file": ("file/run", "{root}/file is a file"),
    "further below a file": ("file/a/run", "{root}/file is a file"),
    "a null character": ("a\0b", "embedded null byte"),
    "a long name": ("n" * 300, "File name too long"),
    "a dangling link": ("link/run", "{root}/link is a symbolic link to nothing"),
    "no disk": ("/proc/self/run", "No such file or directory"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_cannot_be_written_is_said_with_the_reason(tmp_path, case):
    """Catches: NotADirectoryError, ValueError or FileExistsError after an hour, or parents left behind."""
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    name, reason = UNWRITABLE[case]
    path, before = tmp_path / "new" / ".." / name, sorted(tmp_path.iterdir())
    for check in (
        lambda: locked(path / ".lock", "output.dir x").__enter__(),
        lambda: check_writable(path, "output.dir x"),
        lambda: check_file(str(path), "--json"),
    ):
        with pytest.raises(InputError) as error:
            check()
        assert "cannot be written: " + reason.format(root=tmp_path / "new" / "..") in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_is_no_file(tmp_path):
    """Catches: `--json figures/` found out after the measurement."""
    with pytest.raises(InputError, match=r"--json .* cannot be written: it is a folder"):
        check_file(str(tmp_path), "--json")
    assert check_file(None, "--json") is None
    assert check_file(str(tmp_path / "a" / "f.json"), "--json") == tmp_path / "a" / "f.json"
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_file_system(tmp_path):
    """Catches: a run that finds out after training, a run on a read-only disk that cannot be evaluated."""
    disk = tmp_path / "disk"
    (disk / "run").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        for path in (disk, disk / "run"):
            with (
                pytest.raises(InputError, match="cannot be written: Read-only"),
                locked(path / ".lock", "it"),
            ):
                pass
        with pytest.raises(InputError, match="cannot be written: Read-only"):
            check_writable(disk / "out", "it")
        with locked(disk / ".lock", "it", shared=True):
            pass
    finally:
        subprocess.run(["umount", str(disk)], check=True)
