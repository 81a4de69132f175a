"""The sbatch file that ships, with processes of this machine as nodes: scripts play Slurm's part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdora.cli import run_command
from qdora.training.checkpoint import list_checkpoints

from .runs import ROOT, environment, finish, metrics, tiny_tree, write_config

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
BATCH = ROOT / "configs" / "slurm" / "train.sbatch"
STEPS = 60

# What Slurm's commands do here: `srun` starts a task on each node, `scancel --signal` signals the tasks, and
# not the batch shell, `scontrol` names the nodes and puts the job back into the queue. That would end ranks
# that still run, so here it is refused then.
SLURM = {
    "srun": """
        [[ $1 == --cpus-per-task=* ]] && shift
        for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & echo $! >> "$STATE/tasks"; done
        code=0; for task in $(cat "$STATE/tasks"); do wait "$task" || code=$?; done; exit $code
    """,
    "scancel": """
        [[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] || exit 1
        kill -TERM $(cat "$STATE/tasks")
    """,
    "scontrol": """
        case "$1 $2" in
            "show hostnames") echo localhost ;;
            "requeue $SLURM_JOB_ID")
                for task in $(cat "$STATE/tasks"); do ! kill -0 "$task" 2>/dev/null || exit 1; done
                touch "$STATE/requeued"
                ;;
            *) exit 1 ;;
        esac
    """,
}


class Slurm:
    """Starts a batch script as Slurm would, with two nodes.

    Attributes:
        state: folder that the commands share.
    """

    def __init__(self, folder: Path) -> None:
        self.state, commands = folder / "state", folder / "bin"
        self.state.mkdir()
        commands.mkdir()
        for name, body in SLURM.items():
            (commands / name).write_text(f"#!/bin/bash\n{body}")
            (commands / name).chmod(0o755)
        (commands / "torchrun").write_text(
            f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
        )
        (commands / "torchrun").chmod(0o755)
        self._environment = environment() | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "STATE": str(self.state),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start the job; a requeued one by the same words."""
        (self.state / "tasks").write_text("")
        (self.state / "requeued").unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", str(BATCH), *words],
            env=self._environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    @property
    def requeued(self) -> bool:
        """Whether the job that has ended is in the queue again."""
        return (self.state / "requeued").exists()


def test_bash_reads_the_file() -> None:
    """Catches: a syntax error that shows when the job has waited a day for its nodes."""
    subprocess.run(["bash", "-n", str(BATCH)], check=True)


def test_a_job_that_reaches_its_time_limit_goes_on_by_itself(tmp_path: Path, tiny_model_folder: Path) -> None:
    """Catches: ranks that are killed with the warning, a job that is not put back, or put back when it is
    done, a second start that begins anew, steps lost or made twice."""
    configs = {}
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
        tree = tiny_tree(tmp_path / name, tiny_model_folder, max_steps=STEPS, save_every=50)
        tree["adapter"] |= {"dropout": 0.0, "dtype": "float32"}  # which do not depend on the number of ranks
        configs[name] = write_config(tmp_path / name, tree)
    assert run_command("train", ["--config", configs["straight"]]) == 0

    run, slurm = tmp_path / "stopped" / "run", Slurm(tmp_path)
    job = slurm.start("--config", configs["stopped"])
    deadline, lines = time.monotonic() + 600, run / "metrics.jsonl"
    while not (lines.exists() and len(lines.read_text().splitlines()) >= 5):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=600)
    assert job.returncode != 0
    assert slurm.requeued, output
    (newest, *_) = list_checkpoints(run / "checkpoints")
    stopped = int(newest.name.removeprefix("step-"))
    assert 5 <= stopped < STEPS, output

    output = finish(slurm.start("--config", configs["stopped"]), timeout=600)
    assert f"resuming after step {stopped}" in output
    assert not slurm.requeued
    ours, theirs = metrics(run), metrics(tmp_path / "straight" / "run")
    assert [m["step"] for m in ours] == list(range(1, STEPS + 1))
    assert [m["loss"] for m in ours] == pytest.approx([m["loss"] for m in theirs], rel=1e-4)
