"""Errors that another process has caused."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from qdora import signals
from qdora.distributed.context import lost_process

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:45"


@pytest.mark.parametrize(
    "error",
    [RuntimeError(CLOSED), dist.DistBackendError("NCCL timeout\nstack"), dist.DistNetworkError("reset")],
)
def test_a_lost_process_is_told_with_what_was_seen(error):
    """Catches: a backend whose errors end in a traceback; a stack printed after the first line."""
    words = lost_process(error)
    assert words is not None
    assert words.endswith(str(error).splitlines()[0])
    later = ValueError("while saving")
    later.__cause__ = error
    assert lost_process(later) == words


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError(CLOSED), KeyError("a")])
def test_our_own_bugs_stay_bugs(error):
    """Catches: a bug of ours reported as a lost process, without its traceback."""
    assert lost_process(error) is None


@pytest.mark.parametrize("code", [0, 2])
def test_one_of_several_processes_ends_at_once(monkeypatch, code):
    """Catches: a refusal or a finished run whose exit code becomes that of an abort in a thread of torch."""
    left: list[int] = []
    monkeypatch.setattr(signals, "leave", left.append)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as alone:
        signals.end(code)
    assert alone.value.code == code
    assert left == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):  # what `leave` does not return from goes on here
        signals.end(code)
    assert left == [code]
