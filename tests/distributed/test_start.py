"""Real processes that meet, agree, fail together, or do not find one another."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import tiny_tree, write_config
from tests.forked import Forked

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]

# A command of a module that does not exist on disk: all that runs around it is the real thing.
COMMAND = """
import sys, types
from qdora import cli
module = types.ModuleType("qdora.cli.probe")
module.prepare, module.add_arguments = lambda parsed: lambda: run(parsed), lambda parser: None
sys.modules[module.__name__] = module
cli.COMMANDS["probe"] = "a probe"
cli.run_and_exit("probe", [])
"""

MEET = """
from qdora.distributed.context import DistributedContext
def run(parsed):
    DistributedContext.from_launch()
"""

CHILD = """
import atexit, json, os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from qdora.distributed.context import DistributedContext

def caught(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return [type(error).__name__, str(error)]

def read(context, failing):
    with context.raise_on_all_ranks():
        if context.rank == failing:
            raise OSError("cannot read model-2.safetensors")

def run(parsed):
    context = DistributedContext.from_launch()
    rank, mesh = context.rank, context.mesh
    facts = {"rank": rank, "count": context.world_size, "main": context.is_main}
    facts["device"] = context.device.type
    facts["mesh"] = [mesh.size(), mesh.get_local_rank(), mesh.device_type]
    facts["reshard"] = context.fsdp.reshard_after_forward
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    facts["timeout"] = backend.options._timeout.total_seconds()
    small = torch.tensor([2.0**-40, 1.0], dtype=torch.float64) if rank else torch.ones(2, dtype=torch.float64)
    facts["sum"] = context.sum(small).tolist()
    facts["agreed"] = caught(context.refuse_disagreement, {"the data": "a"})
    facts["differ"] = caught(context.refuse_disagreement, {"the data": "ab"[rank], "torch": "2.13"})
    facts["failed"] = [caught(read, context, failing) for failing in (1, 0, None)]
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(facts))
    context.barrier()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which comes a moment after the loss
    if rank == 1:
        os._exit(9)
    atexit.register(print, "torch's threads may abort an ordinary exit")
    context.sum(small)
"""


def environment(**changed: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **changed}


def start(*words: str, **changed: str) -> subprocess.Popen[str] | Forked:
    """A Python process; one that is a launcher is started as users start it."""
    if words[0] != "-m":
        return Forked(words, cwd=ROOT, env=environment(**changed))
    return subprocess.Popen(
        [sys.executable, *words],
        env=environment(**changed),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )


def test_two_launched_processes_agree_fail_together_and_notice_a_death(tmp_path):
    """Catches: a shipped launch file that starts no two sharded processes; sums in float32; a timeout that is
    torch's; a disagreement or a bad disk that one rank alone sees; a survivor that hangs, ends with a
    traceback, or is aborted by torch's threads on its way out."""
    (tmp_path / "child.py").write_text(CHILD + COMMAND)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp_cpu.yaml"]
    started = time.monotonic()
    child = start(*launcher, str(tmp_path / "child.py"), str(tmp_path), QDORA_TIMEOUT="77")
    output, _ = child.communicate(timeout=120)
    assert time.monotonic() - started < 60, "the death was not seen at once"
    assert child.returncode != 0
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, facts in enumerate(ranks):
        assert (facts["rank"], facts["count"], facts["main"]) == (rank, 2, rank == 0)
        assert (facts["device"], facts["mesh"]) == ("cpu", [2, rank, "cpu"])
        assert facts["reshard"] is True
        assert facts["timeout"] == 77
        assert facts["sum"] == [1 + 2**-40, 2.0]
        assert facts["agreed"] is None
        kind, words = facts["differ"]
        assert kind == "InputError"
        assert "the data: rank 0 has a, rank 1 has b." in words
        assert "torch" not in words
    own = ["OSError", "cannot read model-2.safetensors"]
    told = [["InputError", f"rank {rank}: OSError: cannot read model-2.safetensors"] for rank in range(2)]
    assert ranks[0]["failed"] == [told[1], own, None]
    assert ranks[1]["failed"] == [own, told[0], None]
    errors = re.findall(r"(?m)^qdora probe: error: (.*)$", output)
    assert len(errors) == 1, output
    assert errors[0].startswith("another process of this run has ended or does not answer")
    assert "Connection" in errors[0]
    assert "ordinary exit" not in output


def test_threads_that_the_user_set_are_told_from_a_launchers(tmp_path):
    """Catches: the number that accelerate or torchrun sets by itself taken for the user's, or the reverse."""
    script = tmp_path / "child.py"
    script.write_text("from qdora.resources import set_by_user; print('user:', set_by_user())")
    accelerate = ["-m", "accelerate.commands.launch"]
    sharded = ["--config_file", "configs/accelerate/fsdp_cpu.yaml"]
    cases = [
        ([*accelerate, "--cpu"], {}, ["False"]),
        ([*accelerate, "--cpu"], {"OMP_NUM_THREADS": "1"}, ["True"]),
        ([*accelerate, *sharded], {}, ["False", "False"]),
        (["-m", "torch.distributed.run", "--nproc-per-node", "2"], {}, ["False", "False"]),
    ]
    unset = {key: value for key, value in environment().items() if key != "OMP_NUM_THREADS"}
    children = [
        subprocess.Popen(
            [sys.executable, *launcher, str(script)],
            env=unset | own,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for launcher, own, _ in cases
    ]
    for child, (*_, expected) in zip(children, cases, strict=True):
        assert re.findall(r"user: (\w+)", child.communicate(timeout=120)[0]) == expected


def test_processes_that_do_not_find_one_another_end_in_time(tmp_path, tiny_model_folder):
    """Catches: half an hour's wait for a rank that was never started, or one without end for something else
    that listens on the port; a traceback in place of the port and the address."""
    config = write_config(tmp_path, tiny_tree(tmp_path, tiny_model_folder))
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "QDORA_TIMEOUT": "3"}
    common |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    train, meet = ["launch/train.py", "--config", config], ["-c", MEET + COMMAND]

    def rank(number: str, port: int, command: list[str]) -> subprocess.Popen[str] | Forked:
        return start(*command, **common, RANK=number, LOCAL_RANK=number, MASTER_PORT=str(port))

    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("0.0.0.0", 0))
        taken.listen()  # and never answers
        free.bind(("127.0.0.1", 0))
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        started = time.monotonic()
        children = [rank("0", port, train), rank("1", port, meet), rank("0", other, meet)]
        try:
            outputs = [child.communicate(timeout=90)[0] for child in children]
        finally:
            for child in children:
                child.kill()
    assert time.monotonic() - started < 60
    assert [child.returncode for child in children] == [2, 2, 2], outputs
    sentences = [output.splitlines()[-1] for output in outputs]
    assert f"qdora train: error: port {port} of this machine is in use" in sentences[0]
    for sentence, address in zip(sentences[1:], (port, other), strict=True):
        assert sentence.startswith("qdora probe: error: the 2 processes of this run did not all meet")
        assert f"127.0.0.1:{address} within 3 s" in sentence
    assert "1/2 clients joined" in sentences[2]
    assert not any("Traceback" in output for output in outputs)
    assert not (tmp_path / "run").exists()
