"""What is checked before processes look for one another."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch.distributed as dist

from qdora.distributed.launch import join_processes, read_timeout
from qdora.errors import InputError

LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_meeting(monkeypatch):
    """Nothing here may wait for a process that does not exist."""

    def meet(*arguments, **options):
        raise AssertionError("went to meet the others")

    monkeypatch.setattr("qdora.distributed.launch.rendezvous", meet)


def test_a_process_alone_joins_nobody():
    """Catches: a process group, and its port, for a run of one process."""
    join_processes({}, cpu=True, sharded=False)
    join_processes({"WORLD_SIZE": "1", "RANK": "0"}, cpu=True, sharded=False)
    assert not dist.is_initialized()


def test_a_process_alone_can_be_sharded():
    """Catches: FSDP over one process that needs a launcher, or a timeout that does not arrive."""
    try:
        join_processes({"QDORA_TIMEOUT": "77"}, cpu=True, sharded=True)
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
        join_processes({}, cpu=True, sharded=True)  # the group that is there stays
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("variable", sorted(set(LAUNCHED) - {"LOCAL_WORLD_SIZE"}))
def test_half_a_launch_is_refused(variable):
    """Catches: a process that takes itself for alone, and trains the run a second time, when its launcher
    left out one variable."""
    environment = {k: v for k, v in LAUNCHED.items() if k != variable}
    with pytest.raises(InputError, match=f"^{variable} is not set"):
        join_processes(environment, cpu=True, sharded=False)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("RANK", "2", "RANK is 2 and WORLD_SIZE 2; allowed: ranks 0 to 1"),
        ("RANK", "-1", "RANK is '-1'; allowed: whole numbers"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two'; allowed: whole numbers"),
        ("QDORA_TIMEOUT", "0", "QDORA_TIMEOUT is '0'; allowed: seconds, from 1"),
        ("QDORA_TIMEOUT", "10 min", "QDORA_TIMEOUT is '10 min'"),
        ("QDORA_TIMEOUT", "inf", "QDORA_TIMEOUT is 'inf'"),
        ("QDORA_TIMEOUT", "nan", "QDORA_TIMEOUT is 'nan'"),
    ],
)
def test_impossible_numbers_are_refused(variable, value, words):
    """Catches: a wait for a rank that cannot exist; a wait without end."""
    with pytest.raises(InputError, match=words):
        join_processes({**LAUNCHED, variable: value}, cpu=True, sharded=False)


@pytest.mark.parametrize(
    ("gpus", "changed", "words"),
    [
        (1, {"LOCAL_RANK": "0"}, "2 processes .* which has 1 GPUs; allowed: .* at most 1"),
        (1, {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is ''"),
        (3, {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "1"}, "4 processes .* which has 3 GPUs"),
    ],
)
def test_more_processes_than_gpus_are_refused_on_each(monkeypatch, gpus, changed, words):
    """Catches: two processes on one GPU, or one that refuses while the other waits for it."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(InputError, match=words):
        join_processes({**LAUNCHED, **changed}, cpu=False, sharded=True)


def test_each_process_takes_the_gpu_of_its_place_on_the_node(monkeypatch):
    """Catches: the GPU of the global rank, which the second node does not have."""
    taken = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    with pytest.raises(InputError, match="went to meet the others"):
        join_processes({**LAUNCHED, "WORLD_SIZE": "4", "RANK": "3"}, cpu=False, sharded=True)
    assert taken == [1]


def test_the_timeout_is_ten_minutes_or_what_was_set():
    """Catches: torch's half hour, or a number read in another unit."""
    assert read_timeout({}) == timedelta(minutes=10)
    assert read_timeout({"QDORA_TIMEOUT": "1.5"}) == timedelta(seconds=1.5)
