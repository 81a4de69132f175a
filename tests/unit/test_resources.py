"""How many CPU threads a command takes, and what it says when other programs take its cores."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from qdora import cli
from qdora import resources as threads
from qdora.errors import InputError
from qdora.resources import SlowdownWatch, choose_threads, idle_cores

LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


@pytest.fixture
def taken(monkeypatch):
    """Four cores, three of them idle; the numbers of threads that were set."""
    numbers: list[int] = []
    for variable in (threads.VARIABLE, "LOCAL_RANK", "LOCAL_WORLD_SIZE", *LAUNCHERS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(threads, "_usable_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(threads, "idle_cores", lambda cores: 3.1)
    return numbers


def launcher(monkeypatch, environment, *words):
    class Launcher:
        def environ(self):
            return environment

        def cmdline(self):
            return words

    monkeypatch.setattr(psutil.Process, "parent", lambda self: Launcher())


def test_as_many_threads_as_idle_cores(taken, monkeypatch, capsys):
    """Catches: a thread on a core that another program uses; processes started later that take all cores."""
    choose_threads(None)
    assert taken == [3]
    assert threads.os.environ[threads.VARIABLE] == "3"
    said = capsys.readouterr().err
    assert said.startswith("computing with 3 of 4 threads, other programs use the cores")
    assert said.count("\n") == 1
    assert "--threads or OMP_NUM_THREADS" in said


@pytest.mark.parametrize(("idle", "number"), [(3.7, 4), (0.3, 1), (0.0, 1), (4.0, 4)])
def test_bounds(taken, monkeypatch, capsys, idle, number):
    """Catches: no thread at all on a busy machine; a sentence, or a core less, where all cores are idle."""
    monkeypatch.setattr(threads, "idle_cores", lambda cores: idle)
    choose_threads(None)
    assert taken == [number]
    assert (capsys.readouterr().err == "") == (number == 4)


def test_ranks_of_one_machine_divide_its_cores(taken, monkeypatch, capsys):
    """Catches: every rank with a thread on every core; a sentence of each rank."""
    monkeypatch.setattr(threads, "idle_cores", lambda cores: 2.0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in ("1", "0"):
        assert capsys.readouterr().err == ""
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.delenv(threads.VARIABLE, raising=False)
        choose_threads(None)
    assert taken == [1, 1]
    assert "computing with 1 of 2 threads" in capsys.readouterr().err
    monkeypatch.delenv(threads.VARIABLE)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(threads, "idle_cores", lambda cores: 1 / 0)  # nothing to choose, nothing to measure
    choose_threads(None)
    assert taken == [1, 1, 1]


def test_what_the_user_set_decides(taken, monkeypatch, capsys):
    """Catches: OMP_NUM_THREADS or --threads overruled by a measurement."""
    monkeypatch.setenv(threads.VARIABLE, "1")
    choose_threads(None)
    assert taken == []
    choose_threads(7)
    assert taken == [7]
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"--threads 0; allowed: 1 or more"):
        choose_threads(0)


@pytest.mark.parametrize(
    ("environment", "words", "number"),
    [
        ({}, ["accelerate", "launch", "train.py"], [3]),
        ({"OMP_NUM_THREADS": "1"}, ["accelerate", "launch", "train.py"], []),
        ({}, ["accelerate", "launch", "--num_cpu_threads_per_process", "1", "train.py"], []),
        ({}, ["accelerate", "launch", "--num-cpu-threads-per-process=1", "train.py"], []),
    ],
)
def test_a_launchers_default_is_no_choice(taken, monkeypatch, environment, words, number):
    """Catches: one thread on an idle machine because accelerate sets OMP_NUM_THREADS where the user has not;
    all cores where the user has set 1."""
    monkeypatch.setenv(threads.VARIABLE, "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launcher(monkeypatch, environment, *words)
    choose_threads(None)
    assert taken == number


def test_a_launcher_that_cannot_be_read(taken, monkeypatch):
    """Catches: a traceback where the launcher is another user's process, or has ended."""

    def refuse(process):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "environ", refuse)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for value, number in (("1", [3]), ("2", [3])):
        monkeypatch.setenv(threads.VARIABLE, value)
        choose_threads(None)
        assert taken == number


def test_only_other_programs_count_as_load(monkeypatch):
    """Catches: a command that takes its own start, or cores that it may not use, for other load."""
    clock, own = iter([10.0, 10.5]), iter([3.0, 3.4])
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(threads, "_cpu_seconds_of_launch", lambda: next(own))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval, percpu: [100.0, 90.0, 100.0, 10.0])
    assert idle_cores([0, 1, 3]) == pytest.approx(3 - (2.0 - 0.8))


def test_a_real_measurement():
    """Catches: figures in another unit, a measurement that fails on this system."""
    cores = threads._usable_cores()
    assert 0 <= idle_cores(cores) <= len(cores)


@pytest.mark.parametrize(("words", "number"), [([], 3), (["--threads", "2"], 2)])
def test_commands_that_compute_choose(taken, monkeypatch, words, number):
    """Catches: a command without the option, or one that ignores it."""
    for name in ("train", "evaluate", "compare", "benchmark", "export", "demo"):
        module = type(sys)(f"qdora.cli.{name}")
        module.add_arguments, module.prepare = lambda parser: None, lambda parsed: lambda: None
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.delenv(threads.VARIABLE, raising=False)
        assert cli.run_command(name, words) == 0
    assert taken == [number] * 6


def test_a_run_on_a_gpu_keeps_its_threads(taken, monkeypatch):
    """Catches: half a second of every GPU run, and its host threads, spent on the cores."""
    module = type(sys)("qdora.cli.train")
    module.add_arguments, module.prepare = lambda parser: None, lambda parsed: lambda: None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cli.run_command("train", []) == 0
    assert taken == []
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert cli.run_command("train", []) == 0
    assert taken == [3]


def observe(steps, count=2):
    watch = SlowdownWatch(count)
    return [watch.observe(*step) for step in steps]


QUIET, BUSY = (100, 1.0, 1.9), (100, 2.5, 2.0)


def test_slow_steps_are_explained_once():
    """Catches: a sentence at the first hiccup, one a step, or none; a hint to use fewer than one thread."""
    said = observe([QUIET, BUSY, QUIET, BUSY, BUSY, BUSY, QUIET, BUSY, BUSY])
    assert [i for i, sentence in enumerate(said) if sentence] == [4]
    assert said[4] is not None
    assert "takes 2.5 times as long as the fastest one" in said[4]
    assert "because 2 threads got 0.8 cores" in said[4]
    assert "with fewer threads (--threads or OMP_NUM_THREADS)" in said[4]
    alone = observe([(100, 1.0, 1.0), (100, 2.5, 1.2), (100, 2.5, 1.2)], count=1)[2]
    assert alone is not None
    assert "because 1 thread got 0.5 cores" in alone
    assert "--threads" not in alone


@pytest.mark.parametrize(
    "steps",
    [
        [QUIET, (100, 1.9, 1.0), (100, 1.9, 1.0)],  # not twice as long
        [QUIET, (100, 2.5, 4.5), (100, 2.5, 4.5)],  # computing all the time: slow for another reason
        [QUIET, (250, 2.5, 2.0), (250, 2.5, 2.0)],  # as fast a token
        [QUIET, (40, 1.0, 0.8), (40, 1.0, 0.8)],  # a last, small batch
        [BUSY, BUSY, BUSY],  # busy from the start: no faster step is known
    ],
)
def test_other_steps_are_not(steps):
    """Catches: a false alarm for longer or smaller batches, or steps slow for another reason."""
    assert observe(steps) == [None] * len(steps)


def test_training_says_it(tiny_model_folder, monkeypatch, capsys):
    """Catches: a watch that no step feeds, or that is fed with other clocks."""
    from tests.unit.training.trainers import make_trainer, run

    seen = []

    def note(self, tokens, seconds, cpu_seconds):
        seen.append((tokens, seconds, cpu_seconds))
        return "other programs" if len(seen) == 2 else None

    monkeypatch.setattr(SlowdownWatch, "observe", note)
    metrics = run(make_trainer(tiny_model_folder, max_steps=3))
    assert [(m.tokens, m.seconds) for m in metrics] == [step[:2] for step in seen]
    assert all(cpu > 0 for *_, cpu in seen)
    assert capsys.readouterr().err.strip().endswith("step 2: other programs")


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"a/b": ("max", 0, 0), "a": ("1000", 700, 200)}, 500),
        ({"a/b": ("900", 700, 0), "a": ("1000", 700, 200)}, 200),
        ({"a/b": ("max", 0, 0), "a": ("max", 0, 0)}, None),
        ({}, None),
    ],
)
def test_the_limit_of_a_container_counts(monkeypatch, tmp_path, files, left):
    """Catches: memory of the machine taken for memory of the container, and the process killed there."""
    for name, (most, used, inactive) in files.items():
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 3\ninactive_file {inactive}\n")
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "_OWN_CGROUP", own)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert threads.available_memory() == (left or 5000)
