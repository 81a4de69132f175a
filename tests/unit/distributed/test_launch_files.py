"""Every launch configuration that ships and every documented command, through accelerate's own code."""

from __future__ import annotations

import argparse
import re
import warnings
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import launch as accelerate_launch

from qdora.distributed.launch import FsdpSettings, read_fsdp_settings

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
PAGE = ROOT / "docs" / "distributed.md"
# What a file is for, by its name; the settings are those that a run gets.
EXPECTED = {
    "cpu": None,
    "one_gpu": None,
    "multi_gpu": None,
    "fsdp": FsdpSettings(),
    "fsdp_cpu": FsdpSettings(),
    "fsdp_nodes_c10d": FsdpSettings(),
    "fsdp_nodes_static": FsdpSettings(),
    "fsdp_offload": FsdpSettings(offload=True, activation_checkpointing=True),
}


def commands(text: str) -> list[str]:
    """The `accelerate launch` commands in it, one a line."""
    return re.findall(r"(?m)^[^`\n]*?accelerate launch (--.*? launch/.*)$", text)


COMMANDS = sorted({c for path in [*FILES, PAGE] for c in commands(path.read_text())})


def launched(words: list[str], monkeypatch) -> tuple[argparse.Namespace, dict[str, str]]:
    """What accelerate makes of a command: its arguments, and the environment of the processes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(accelerate_launch, "is_port_in_use", lambda port: False)
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert defaults is not None
    if arguments.use_fsdp or arguments.multi_gpu:
        return arguments, accelerate_launch.prepare_multi_gpu_env(arguments)
    return arguments, accelerate_launch.prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_file_gives_the_settings_it_is_for(path, monkeypatch):
    """Catches: a shipped file that accelerate or we refuse, a misspelt key that leaves a default in force."""
    _, environment = launched(["--config_file", str(path), "launch/train.py"], monkeypatch)
    assert read_fsdp_settings(environment) == EXPECTED[path.stem]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_launches_what_its_file_says(command, monkeypatch):
    """Catches: a command with an option that accelerate does not know, several nodes that each start alone,
    c10d asked for and static begun (accelerate does not read the backend from its file)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arguments, environment = launched(command.split(), monkeypatch)
    name = Path(arguments.config_file).stem
    assert read_fsdp_settings(environment) == EXPECTED[name]
    assert arguments.training_script.startswith("launch/")
    assert arguments.rdzv_backend == ("c10d" if "c10d" in name else "static")
    if "nodes" in name:
        assert (arguments.nnodes, arguments.rdzv_endpoint) == ("2", "10.0.0.1:29500")
        assert int(arguments.nproc_per_node) * 2 == arguments.num_processes


def test_every_fsdp_file_shows_its_command():
    """Catches: a file whose command nobody tests; a pattern above that finds nothing."""
    shown = {path.stem for path in FILES if any(path.name in c for c in commands(path.read_text()))}
    assert shown == {name for name in EXPECTED if name.startswith("fsdp")}
    assert commands(PAGE.read_text())
