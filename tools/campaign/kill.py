"""kill -9 at random moments of training and saving: every run goes on to the numbers of one that was not."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from tests.distributed.ranks import SHARDED
from tools.campaign.processes import BOUND, KillAtWrite, RecordWrites, Run, start, start_server
from tools.campaign.report import Report
from tools.campaign.small_runs import (
    STEPS,
    Inputs,
    damaged_checkpoints,
    differences,
    newest_step,
    snapshot,
    write_inputs,
)

IN_PARALLEL = 2
"""Chains at a time."""
LONGEST_CHAIN = 4
"""Kills of one run at most."""

_ASYNC = ("--set", "training.async_checkpoints=true")
_FULL = {**SHARDED, "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


@dataclass(frozen=True)
class Launch:
    """How ranks are started; runs of one launch write the same bytes."""

    name: str
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)


LAUNCHES = (
    Launch("one rank"),
    Launch("two ranks", 2),
    Launch("two ranks, FSDP", 2, SHARDED),
    Launch("two ranks, FSDP, full state", 2, _FULL),
)
MODES = [(launch, words) for words in ((), _ASYNC) for launch in LAUNCHES]


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        left: its snapshot.
        seconds: its duration, and that of a run that resumes it at the last checkpoint but one.
        points: by rank, how often each write happens; of a run from its beginning, and of a resumed one.
    """

    left: dict[str, Any]
    seconds: tuple[float, float]
    points: tuple[list[Counter[str]], list[Counter[str]]]


def run(count: int, seed: int, folder: Path) -> Report:
    """Kill training runs `count` times in all."""
    report, inputs = Report("kill"), write_inputs(folder / "inputs")
    start_server()
    references: dict[str, Reference] = {}
    chains: list[_Chain] = []
    left = count
    while left:
        chain = _Chain(seed + len(chains), inputs, folder, references)
        chain.kills = min(left, chain.kills)
        left -= chain.kills
        chains.append(chain)
    for launch in tqdm({c.launch.name: c.launch for c in chains}.values(), "kill", unit="reference"):
        references[launch.name] = _reference(inputs, folder / launch.name, launch)
    with tqdm(total=count, unit="kill", desc="kill") as bar, ThreadPoolExecutor(IN_PARALLEL) as pool:
        for done in as_completed([pool.submit(chain.run) for chain in chains]):
            chain = done.result()
            for how in chain.done:
                report.count(chain.name, how)
            if chain.faults:
                report.fault(
                    chain.name, f"--seed {chain.seed} --count {chain.kills}: {'; '.join(chain.faults)}"
                )
            bar.update(chain.kills)
    return report


def _reference(inputs: Inputs, folder: Path, launch: Launch) -> Reference:
    def record(*more: str) -> tuple[float, list[Counter[str]]]:
        started, points = time.monotonic(), RecordWrites(folder / "points")
        ended = _start(inputs, folder, launch, more, points, None)
        assert not any(ended.wait()), ended.output
        return time.monotonic() - started, [points.read(rank) for rank in range(launch.ranks)]

    seconds, begun = record()
    left = snapshot(folder / "run")
    # From a checkpoint before the last, so that it trains and saves.
    shutil.rmtree(folder / "run" / "checkpoints" / f"step-{STEPS}")
    least, resumed = record("--resume")
    assert not (wrong := differences(snapshot(folder / "run"), left)), wrong
    return Reference(left, (seconds, least), (begun, resumed))


def _start(
    inputs: Inputs,
    folder: Path,
    launch: Launch,
    more: tuple[str, ...] = (),
    fault: KillAtWrite | RecordWrites | None = None,
    rank: int | None = 0,
) -> Run:
    words = ("train", "--config", str(inputs.config), "--set", f"output.dir={folder / 'run'}", *more)
    return start(
        words, folder, ranks=launch.ranks, environment=launch.environment, fault=fault, faulty_rank=rank
    )


def _plan(seed: int) -> list[bool]:
    """The kills of a chain: whether each comes at a write or at a random moment."""
    random = Random(f"plan {seed}")
    return [random.random() < 0.5 for _ in range(random.randint(1, LONGEST_CHAIN))]


class _Chain:
    """One run that is killed and resumed until it has been killed often enough, then to its end.

    Everything random follows from the seed, but for what the machine does meanwhile.
    """

    def __init__(self, seed: int, inputs: Inputs, folder: Path, references: dict[str, Reference]) -> None:
        self.seed, self.inputs, self.folder = seed, inputs, folder / f"chain-{seed}"
        self.random = Random(seed)
        self.launch, self.words = MODES[seed % len(MODES)]
        self.references = references
        self.plan = _plan(seed)
        self.kills = len(self.plan)
        self.turn = sum(sum(_plan(earlier)) for earlier in range(seed))
        self.done: list[str] = []
        self.faults: list[str] = []

    @property
    def name(self) -> str:
        return self.launch.name + (", asynchronous" if self.words else "")

    def run(self) -> _Chain:
        try:
            self._run()
        except Exception as error:
            self.faults.append(f"the campaign itself failed: {type(error).__name__}: {error}")
        if not self.faults:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self

    def _run(self) -> None:
        resumed = False
        for _ in range(3 * self.kills):
            if len(self.done) == self.kills or self.faults:
                break
            how = self._kill(resumed)
            resumed = how is not None
            if how is not None:
                self.done.append(how)
            elif not self.faults:
                self._check_end()
                shutil.rmtree(self.folder / "run")
        if not self.faults:
            last = _start(self.inputs, self.folder, self.launch, self._more(resumed))
            codes = last.wait_for_end()
            if any(code != 0 for code in codes):
                self._fault(f"ended with {codes}", last)
            else:
                self._check_end()

    def _more(self, resumed: bool) -> tuple[str, ...]:
        return (*self.words, "--resume") if resumed else self.words

    def _kill(self, resumed: bool) -> str | None:
        """Start the run and kill it; how, or None where it had ended before."""
        reference, random = self.references[self.launch.name], self.random
        before, ranks = newest_step(self.folder / "run"), self.launch.ranks
        everyone, launcher = random.random() < 0.5, random.random() < 0.5
        rank = random.randrange(ranks)
        if self.plan[len(self.done)]:
            turn = self.turn + sum(self.plan[: len(self.done)])
            # The main rank's writes have their turns; another rank's are few, and are among them.
            rank = rank if random.random() < 0.3 and reference.points[resumed][rank] else 0
            points = reference.points[resumed][rank]
            point = sorted(points)[turn % len(points)]
            fault = KillAtWrite(point, random.randrange(points[point]))
            how = "at a write"
            started = _start(self.inputs, self.folder, self.launch, self._more(resumed), fault, rank)
        else:
            how = "at a random moment"
            full, least = reference.seconds
            moment = random.uniform(0, full - (full - least) * before / STEPS)
            started = _start(self.inputs, self.folder, self.launch, self._more(resumed))
            timer = threading.Timer(moment, started.signal, (signal.SIGKILL, None if everyone else rank))
            timer.start()
        while not any(started.codes()) and None in started.codes():
            time.sleep(0.01)
        if how == "at a random moment":
            timer.cancel()
        if everyone:
            started.signal(signal.SIGKILL)
        elif launcher:
            started.signal(signal.SIGTERM)
        began = time.monotonic()
        codes = started.wait(BOUND)
        if orphans := started.orphans():
            self._fault(f"processes {orphans} outlived their ranks", started)
        if None in codes:
            self._fault(f"a rank did not end in {time.monotonic() - began:.0f} s, codes {codes}", started)
        for rank, code in enumerate(codes):
            allowed = (0, -signal.SIGKILL) if ranks == 1 else (0, 1, 2, -signal.SIGKILL, -signal.SIGTERM, 143)
            if code not in allowed:
                self._fault(f"rank {rank} ended with {code}", started)
        if "Traceback" in started.output:
            self._fault("a traceback", started)
        for line in damaged_checkpoints(self.folder / "run"):
            self._fault(line, started)
        if newest_step(self.folder / "run") < before:
            self._fault(f"step-{before} is gone, the newest is {newest_step(self.folder / 'run')}", started)
        return how if -signal.SIGKILL in codes else None

    def _check_end(self) -> None:
        reference = self.references[self.launch.name]
        self.faults += differences(snapshot(self.folder / "run"), reference.left)
        self.faults += [f"tmp/{path.name} is left over" for path in (self.folder / "tmp").iterdir()]
        self.faults += damaged_checkpoints(self.folder / "run")

    def _fault(self, line: str, run: Run) -> None:
        self.faults.append(f"{line} ({run.output[-1500:]!r})")
