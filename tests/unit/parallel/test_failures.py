"""Errors that another process has caused."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from qdora.parallel.failures import lost_process

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
