"""Devices that are full, broken, read-only or gone, clocks that jump, signals: each command ends with one
sentence, has lost nothing, and comes to the same files when it is given once more."""

from __future__ import annotations

import errno
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from tests.distributed.ranks import SHARDED
from tools.campaign.processes import (
    BURST,
    BURST_SECONDS,
    FailWrites,
    Fault,
    JumpingClock,
    KillAtWrite,
    RecordWrites,
    RemoveAtWrite,
    Run,
    SignalsAtWrite,
    start,
    start_server,
)
from tools.campaign.report import Report
from tools.campaign.small_runs import (
    Inputs,
    damaged_checkpoints,
    differences,
    newest_step,
    snapshot,
    write_inputs,
)

IN_PARALLEL = 2
"""Cases at a time."""
DAY = 24 * 3600
_STRIDE = 59
"""From one failing write to the next in the list of all, so that few cases are of all commands."""
STOPPED = 0.5
"""Seconds between SIGSTOP and SIGCONT."""


@dataclass(frozen=True)
class Command:
    """A command that writes to a folder.

    Attributes:
        words: of the command line but for the folder, which comes last.
        again: further words with which it goes on.
    """

    name: str
    words: tuple[str, ...]
    again: tuple[str, ...] = ()
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, folder: Path, *more: str, fault: Fault | None = None, rank: int = 0) -> Run:
        """Start it; it writes to `disk/run` in the folder."""
        words = [*self.words[:-1], f"{self.words[-1]}{folder / 'disk' / 'run'}", *more]
        return start(
            words, folder, ranks=self.ranks, environment=self.environment, fault=fault, faulty_rank=rank
        )


@dataclass(frozen=True)
class Reference:
    """A command that nothing happened to.

    Attributes:
        left: the snapshot of its folder.
        seconds: its duration.
        points: how often each write happens, of the main rank.
        kilobytes: on the device, with its directories.
    """

    left: dict[str, Any]
    seconds: float
    points: Counter[str]
    kilobytes: int


def commands(inputs: Inputs, trained: Path) -> list[Command]:
    """Args: trained: a finished run."""
    train = ("train", "--config", str(inputs.config), "--set", "output.dir=")
    compare = ("compare", "--config", str(inputs.compare), "--set", "output.dir=")
    return [
        Command("train", train, ("--resume",)),
        Command("evaluate", ("evaluate", "--run", str(trained), "--output", "")),
        # Where a device fails between the renames and their fsync, the whole export may stand there.
        Command("export", ("export", "--run", str(trained), "--output", ""), ("--overwrite",)),
        Command("compare", compare, ("--resume",)),
        Command("train, FSDP", train, ("--resume",), 2, SHARDED),
    ]


def run(count: int, seed: int, folder: Path) -> Report:
    """Try `count` cases."""
    report, inputs = Report("devices"), write_inputs(folder / "inputs")
    start_server()
    everything = commands(inputs, folder / "train" / "disk" / "run")
    references: dict[str, Reference] = {}
    for command in tqdm(everything, "devices", unit="reference"):
        references[command.name] = _reference(command, folder / command.name)
    cases = [_Case(seed + i, everything, folder, references) for i in range(count)]
    with tqdm(total=count, unit="case", desc="devices") as bar, ThreadPoolExecutor(IN_PARALLEL) as pool:
        for done in as_completed([pool.submit(case.run) for case in cases]):
            case = done.result()
            if case.faults:
                report.fault(case.name, f"--seed {case.seed} --count 1: {'; '.join(case.faults)}")
            else:
                report.count(case.name, case.outcome)
            bar.update()
    return report


def _reference(command: Command, folder: Path) -> Reference:
    (folder / "disk").mkdir(parents=True)
    started, points = time.monotonic(), RecordWrites(folder / "points")
    ended = command.start(folder, fault=points)
    codes, seconds = ended.wait(), time.monotonic() - started
    assert not any(codes), ended.output
    paths = list((folder / "disk").rglob("*"))
    kilobytes = sum(4 * -(-path.stat().st_size // 4096) for path in paths if path.is_file())
    return Reference(snapshot(folder / "disk" / "run"), seconds, points.read(), kilobytes)


def _choice(seed: int, references: dict[str, Reference]) -> tuple[str, str, str | None]:
    """Kind, command and write of a case: every other one is a write that fails, and each has its turn."""
    kinds, names = list(_KINDS), list(references)
    if seed % 2 == 0:
        kind = kinds[1 + seed // 2 % (len(kinds) - 1)]
        return kind, names[(seed // 2 + seed // (2 * len(kinds))) % len(names)], None
    writes = [
        (name, point)
        for name, reference in references.items()
        for point in sorted(reference.points)
        # What an arm writes is what `train` writes, on however many ranks.
        if name != "train, FSDP" and "-seedN/" not in point
    ]
    name, point = writes[seed // 2 * _STRIDE % len(writes)]
    return kinds[0], "train, FSDP" if name == "train" and seed % 3 == 0 else name, point


class _Case:
    """One command to which one thing happens, and which is then given once more.

    Everything random follows from the seed, but for what the machine does meanwhile.
    """

    def __init__(
        self, seed: int, everything: list[Command], folder: Path, references: dict[str, Reference]
    ) -> None:
        self.seed, self.folder = seed, folder / f"case-{seed}"
        self.kind, name, self.write = _choice(seed, references)
        self.command = next(command for command in everything if command.name == name)
        self.random, self.reference = Random(seed), references[name]
        self.what, self.faults = "", list[str]()
        self.outcome = ""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.command.name}"

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def run(self) -> _Case:
        self.disk.mkdir(parents=True)
        try:
            _KINDS[self.kind](self)
        except _NotPossibleError as error:
            self.outcome = f"skipped, {error}"
        except Exception as error:
            self.faults.append(f"the campaign itself failed: {type(error).__name__}: {error}")
        if self.faults:
            self.faults.append(self.what)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self

    def check_hurt(self, hurt: Run, allowed: tuple[int, ...]) -> None:
        """How a command ends that something happened to."""
        codes = hurt.wait_for_end()
        output, name = hurt.output, self.command.words[0]
        others = (1, 2) if self.command.ranks > 1 and any(codes) else ()  # which say that they lost that one
        if any(code not in (*allowed, *others) for code in codes):
            self.fault(f"exit codes {codes}, allowed are {allowed}", hurt)
        if "Traceback" in output:
            self.fault("a traceback", hurt)
        said = sum(line.startswith(f"qdora {name}: ") for line in output.splitlines())
        failed = sum(code is not None and code > 0 for code in codes)
        killed = sum(code is not None and code < 0 for code in codes)  # some after they have said so
        if not failed <= said <= failed + killed:
            self.fault(f"{said} sentences of {failed} processes that failed", hurt)
        if orphans := hurt.orphans():
            self.fault(f"processes {orphans} outlived it", hurt)
        self.outcome = "went on" if not any(codes) else "refused, and done again"

    def check_kept(self, hurt: Run) -> None:
        """What was saved is still there."""
        run = self.disk / "run"
        for line in damaged_checkpoints(run):
            self.fault(line, hurt)
        steps = (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
        if self.command.words[0] == "train" and newest_step(run) < steps - 2:
            self.fault(f"{steps} steps, and the newest checkpoint is of step {newest_step(run)}", hurt)

    def check_again(self, hurt: Run) -> None:
        """The same command once more comes to the same files, and leaves no others."""
        if any(hurt.codes()) and not self.faults:
            again = self.command.start(self.folder, *self.command.again)
            if any(again.wait()):
                self.fault(f"given again it ended with {again.codes()}", again)
        if not self.faults:
            self.faults += differences(snapshot(self.disk / "run"), self.reference.left)
            self.faults += [f"tmp/{p.name} is left over" for p in (self.folder / "tmp").glob("*")]
            hidden = [path.name for path in self.disk.iterdir() if path.name != "run"]
            self.faults += [f"{name} is left over beside the folder" for name in hidden]
            if self.kind == "failing write":  # a lock file that cannot be removed locks nothing
                self.faults = [line for line in self.faults if ".lock is left over" not in line]

    def fault(self, line: str, run: Run) -> None:
        self.faults.append(f"{line} ({run.output[-2500:]!r})")

    def moment(self) -> float:
        """Seconds after the start."""
        return self.random.uniform(0, self.reference.seconds)

    def point(self) -> tuple[str, int]:
        """A write and its occurrence."""
        point = self.write or self.random.choice(sorted(self.reference.points))
        return point, self.random.randrange(self.reference.points[point])


class _NotPossibleError(Exception):
    """Something that this machine does not allow."""


def _failing_write(case: _Case) -> None:
    code = case.random.choice((errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT))
    fault = FailWrites(*case.point(), code)
    case.what = repr(fault)
    hurt = case.command.start(case.folder, fault=fault)
    case.check_hurt(hurt, (0, 2))
    case.check_kept(hurt)
    case.check_again(hurt)


def _full_device(case: _Case) -> None:
    kilobytes = int(case.random.uniform(0.05, 1) * case.reference.kilobytes)
    case.what = f"a device of {kilobytes} KiB"
    with _mounted(case.disk, f"size={kilobytes}k") as remount:
        hurt = case.command.start(case.folder)
        case.check_hurt(hurt, (0, 2))
        case.check_kept(hurt)
        remount("size=1g")
        case.check_again(hurt)


def _read_only(case: _Case) -> None:
    moment = case.random.choice((0.0, case.moment()))
    case.what = f"read-only after {moment:.2f} s"
    with _mounted(case.disk, "size=1g") as remount:
        if not moment:
            remount("ro")
        hurt = case.command.start(case.folder)
        time.sleep(moment)
        while moment and None in hurt.codes() and not remount("ro"):
            time.sleep(0.001)  # refused while a file is open for writing
        case.check_hurt(hurt, (0, 2))
        case.check_kept(hurt)
        remount("rw")
        case.check_again(hurt)


def _removed(case: _Case) -> None:
    moment = case.moment()
    places = [case.disk / "run", case.folder / "tmp", *[case.disk / "run" / "checkpoints"]]
    place = case.random.choice(places[: 3 if case.command.words[0] == "train" else 2])
    fault = RemoveAtWrite(*case.point(), place) if case.random.random() < 0.5 else None
    case.what = repr(fault) if fault else f"{place.relative_to(case.folder)} removed after {moment:.2f} s"
    hurt = case.command.start(case.folder, fault=fault)
    if fault is None:
        time.sleep(moment)
        shutil.rmtree(place, ignore_errors=True)
    case.check_hurt(hurt, (0, 2))
    if any(hurt.codes()) or place == case.folder / "tmp":
        case.check_again(hurt)


def _jumping_clock(case: _Case) -> None:
    fault = JumpingClock(case.random.choice((-DAY, DAY)), case.random.randint(1, 20))
    case.what = repr(fault)
    hurt = case.command.start(case.folder, fault=fault)
    case.check_hurt(hurt, (0,))
    case.check_again(hurt)


def _signals(case: _Case) -> None:
    number = case.random.choice((signal.SIGTERM, signal.SIGINT))
    at_write = case.random.random() < 0.5
    fault = SignalsAtWrite(*case.point(), number) if at_write else None
    moment, rank = case.moment(), case.random.choice((None, 0, case.command.ranks - 1))
    case.what = repr(fault) if at_write else f"{number.name} to rank {rank} after {moment:.2f} s"
    hurt = case.command.start(case.folder, fault=fault)
    if not at_write:
        time.sleep(moment)
        for _ in range(BURST):
            hurt.signal(number, rank)
            time.sleep(BURST_SECONDS / BURST)
    # A process that has not begun, or has done its work, ends as the system has it.
    case.check_hurt(hurt, (0, 128 + number, -number))
    case.check_kept(hurt)
    case.check_again(hurt)


def _killed(case: _Case) -> None:
    fault = KillAtWrite(*case.point())
    case.what = repr(fault)
    hurt = case.command.start(case.folder, fault=fault)
    case.check_hurt(hurt, (-signal.SIGKILL,))
    case.check_kept(hurt)
    case.check_again(hurt)


def _stopped(case: _Case) -> None:
    moment, rank = case.moment(), case.random.randrange(case.command.ranks)
    case.what = f"rank {rank} stopped after {moment:.2f} s"
    hurt = case.command.start(case.folder)
    time.sleep(moment)
    hurt.signal(signal.SIGSTOP, rank)
    time.sleep(STOPPED)
    hurt.signal(signal.SIGCONT, rank)
    case.check_hurt(hurt, (0,))
    case.check_again(hurt)


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Callable[[str], bool]]:
    """Mount a device in memory; yields what changes its options, and says whether that was done."""

    def mount(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True, check=False)

    if shutil.which("mount") is None:
        raise _NotPossibleError("no mount command")
    done = mount("-t", "tmpfs", "-o", options, "tmpfs")
    if done.returncode:
        raise _NotPossibleError(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield lambda options: not mount("-o", f"remount,{options}").returncode
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


_KINDS: dict[str, Callable[[_Case], None]] = {
    "failing write": _failing_write,
    "full device": _full_device,
    "read-only device": _read_only,
    "removed folder": _removed,
    "jumping clock": _jumping_clock,
    "signals": _signals,
    "kill -9": _killed,
    "stopped process": _stopped,
}
