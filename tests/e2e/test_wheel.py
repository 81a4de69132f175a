"""The wheel, installed where there is no checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from qdora.config_file import load_config, shipped_names
from qdora.experiments.schema import schema_text
from tests.environments import borrow

from .runs import ROOT, write_questions

pytestmark = pytest.mark.e2e

PACKED = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "constraints.txt",
)
IN_ONE_PROCESS = """
import json, sys
from qdora.cli import run_command
for words in json.load(open(sys.argv[1])):
    print("COMMAND", *words, flush=True)
    code = run_command(words[0], words[1:])
    if code:
        sys.exit(f"{words} ended with {code}")
"""


def run(command: list[str | Path], folder: Path, code: int = 0, **variables: str) -> str:
    """Run a command in a folder, without this checkout on the path; its output."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of a source archive, and of the wheel that was built from it."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKED:
        shutil.copy(ROOT / name, source)
    for name in ("qdora", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist], source)
    return dist


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """Programs of an environment with the wheel; what it needs comes from the environment of the tests.

    It lies inside a git repository, as that of a user's project does.
    """
    project = tmp_path_factory.mktemp("project")
    if shutil.which("git"):
        run(["git", "init", "--quiet"], project)
        person = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        run(["git", *person, "commit", "--quiet", "--allow-empty", "-m", "theirs"], project)
    run([sys.executable, "-m", "venv", "--without-pip", project / "venv"], project)
    python = project / "venv" / "bin" / "python"
    [wheel] = built.glob("*.whl")
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *quiet, wheel], project)
    borrow(python)
    return python.parent


def test_both_archives_hold_every_file_of_the_package(built):
    """Catches: a data file, a template or a configuration that only a checkout has; tests, notes or a second
    copy of the configurations in the wheel."""
    [wheel], [archive] = built.glob("*.whl"), built.glob("*.tar.gz")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for top in ("qdora", "configs") for path in (ROOT / top).rglob("*") if path.is_file()]
    ours = {str(path.relative_to(ROOT)) for path in files if path.parent.name != "__pycache__"}
    assert found == {f"qdora/{name}" if name.startswith("configs/") else name for name in ours}
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    assert {*ours, *PACKED} <= names
    assert not any(name.startswith(("tests", "docs", "tools")) for name in names)


def test_the_shipped_files_are_found_by_name(installed, tmp_path):
    """Catches: `qdora:` that leads to a checkout, or to fewer files; a schema that needs one."""
    listed = run([installed / "qdora", "configs"], tmp_path)
    assert re.findall(r"(?m)^qdora:(\S+)", listed) == [*shipped_names()]
    for name in ("compare/quickstart", "qdora:accelerate/fsdp.yaml", "models/llama-3-8b"):
        path = Path(run([installed / "qdora", "configs", name], tmp_path).strip())
        assert installed.parent in path.parents
        assert path.exists()
    said = run([installed / "qdora", "train", "--config", "qdora:lama3-8b-orca-math"], tmp_path, code=2)
    assert "did you mean 'qdora:llama3-8b-orca-math'? allowed: qdora:accelerate/cpu, " in said
    assert run([installed / "qdora", "schema"], tmp_path) == schema_text("run")
    assert list(tmp_path.iterdir()) == []


def test_commands_run_in_an_empty_folder(installed, tmp_path, tiny_model_folder):
    """Catches: a command that reads a file of the checkout: its quickstart, an architecture, an overlay, the
    base beside a comparison; the commit of somebody else's repository taken for that of this package."""
    folder = tmp_path / "empty"
    folder.mkdir()
    model, data = str(tiny_model_folder), str(write_questions(tmp_path / "sums.jsonl", 40))
    tiny = {"model.path": model, "training.max_steps": 2, "training.batch_size": 4, "data.max_length": 512}
    tiny |= {"data.train.count": 32, "data.test.count": 12, "evaluation.max_new_tokens": 8}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"set": tiny}))
    comparison = {"base": "qdora:quickstart", "small": ["qdora:paper/small/common"]}
    arms = [{"name": "qdora"}, {"name": "qlora", "set": {"adapter.dora": False}}]
    comparison |= {"arms": arms, "output": {"dir": "runs/mine"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(comparison))
    shortened = [word for key, value in tiny.items() for word in ("--set", f"{key}={value}")]
    launched = ["--accelerate-config", "qdora:accelerate/fsdp", "--gpu-memory", "24GiB"]
    overlay = ["--overlay", str(tmp_path / "tiny.yaml"), "--dry-run"]
    commands = [
        ["init", "--model", model, "--data", data, "--gpu-memory", "1GiB", "--reserve", "1MiB"],
        ["estimate", "--config", "qdora:llama3-8b-orca-math", "--json", "estimate.json", *launched],
        ["compare", "--config", "qdora:compare/quickstart", *overlay],
        ["compare", "--config", str(tmp_path / "mine.yaml"), "--small", *overlay],
        ["demo", *shortened],
    ]
    (tmp_path / "commands.json").write_text(json.dumps(commands))
    python = installed / "python"
    said = run([python, "-c", IN_ONE_PROCESS, tmp_path / "commands.json"], folder)
    assert load_config(folder / "sums.yaml").model.path == model
    assert json.loads((folder / "estimate.json").read_text())["fits"]
    assert said.count("qlora") > 1
    manifest = json.loads((folder / "runs" / "quickstart" / "manifest.json").read_text())
    assert manifest["git_commit"] is None
    assert manifest["versions"]["qdora"] != "not installed"
    assert (folder / "exports" / "quickstart" / "model.safetensors").is_file()

    launch_file = run([installed / "qdora", "configs", "accelerate/cpu"], folder).strip()
    launcher = [python, "-m", "accelerate.commands.launch", "--quiet", "--config_file", launch_file]
    run([*launcher, "-m", "qdora", "train", *shortened, "--set", "output.dir=runs/launched"], folder)
    assert (folder / "runs" / "launched" / "adapter" / "adapter_model.safetensors").is_file()
