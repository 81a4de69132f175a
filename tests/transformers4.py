"""An environment with transformers 4, built once beside the cached models, in which exports are read."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

from qdora.models.sources import model_cache

REQUIREMENT = "transformers==4.57.6"


def transformers4_python() -> str:
    """Its interpreter; torch is this environment's.  The test is skipped where it cannot be built."""
    folder = model_cache().parent / "environments" / REQUIREMENT.replace("==", "-")
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").is_file():
            _build(folder, python)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout
        # Behind its own packages on the path, so that only what it lacks comes from there.
        (Path(packages.strip()) / "torch.pth").write_text(sysconfig.get_path("purelib"))
    return str(python)


def _build(folder: Path, python: Path) -> None:
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", REQUIREMENT, "safetensors"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            pytest.skip(f"an environment with {REQUIREMENT} cannot be built: {last}")
    (folder / "ready").touch()
