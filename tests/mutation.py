"""Put a bug into a copy of the package, and see whether a test fails there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        file: relative to the package.
        old, new: text that stands there exactly once, and what replaces it.
        test: must pass without the bug and fail with it.
        slow: the test starts processes; not part of every test run.
    """

    file: str
    old: str
    new: str
    test: str
    slow: bool = False


_SERVER = """
import json, os, sys
import bitsandbytes, hypothesis, peft, pytest, scipy.stats, torch, transformers
for line in sys.stdin:
    folder, test = json.loads(line)
    child = os.fork()
    if not child:
        code = 2
        try:
            os.chdir(folder)
            sys.path.insert(0, folder)
            os.dup2(os.open("output", os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
            import qdora
            assert qdora.__file__.startswith(folder), qdora.__file__
            code = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", test]))
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported everything but this project, and forks itself for each test."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-P", "-c", _SERVER]
    return subprocess.Popen(
        words, env=environment, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def fails(mutant: Mutant | None, test: str) -> bool:
    """Whether a test fails on a copy of the package with the bug in it; without one where None."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("qdora", "tests", "tools"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutant is not None:
            path = folder / "qdora" / mutant.file
            text = path.read_text(encoding="utf-8")
            assert text.count(mutant.old) == 1, (
                f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)}x"
            )
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps([temporary, test]), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        assert code in (0, 1), output
        return code == 1
