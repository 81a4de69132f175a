"""Two gloo processes of one spawn: sums, order of gathered objects, and a stop that reaches both."""

from __future__ import annotations

import json

import pytest

from tests.distributed.ranks import ROOT, ends, fork_ranks

pytestmark = pytest.mark.distributed

CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
from qdora.errors import InterruptedRunError
from qdora.signals import end
from qdora.distributed.context import DistributedContext
from tests.unit.training.trainers import make_trainer, run

out, model = sys.argv[1:]
context = DistributedContext.from_launch()
rank = context.rank
facts = {"count": context.world_size, "main": context.is_main}
facts["gathered"] = context.gather([f"{rank}-{i}" for i in range(3 - 2 * rank)])
p, q = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
p.grad = torch.arange(6.0).view(2, 3) + 10 * rank
if rank == 1:
    q.grad = torch.arange(4.0)
facts["extras"] = context.sum_gradients([p, q], torch.tensor([1.5, float(rank)])).tolist()
facts["p"], facts["q"] = p.grad.tolist(), q.grad.tolist()
trainer = make_trainer(model, gradient_accumulation=2, max_steps=4, count=9)
saved = []
def log(metrics):
    pass
if rank == 1:  # the second process's signal must stop the first as well
    step = trainer._step
    def signalled(number, *rest):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(number, *rest)
    trainer._step = signalled
try:
    run(trainer, save=saved.append)
    facts["code"] = 0
except InterruptedRunError as stop:
    facts["code"] = stop.exit_code
facts["saved"] = saved
facts["sum"] = float(sum(p.double().sum() for p in trainer.parameters.values()))
Path(out, f"{rank}.json").write_text(json.dumps(facts))
context.end()
end(0)
"""


def test_two_processes_act_as_one(tmp_path, tiny_model_folder):
    """Catches: objects gathered out of order, a rank with an empty share that spoils a sum or waits for ever,
    a signal to one rank that leaves the other one hanging, parameters that drift apart."""
    words = ["-c", CHILD, str(tmp_path), str(tiny_model_folder)]
    for code, output in ends(fork_ranks([words] * 2, [ROOT] * 2, ACCELERATE_USE_CPU="true"), within=120):
        assert code == 0, output[-3000:]
    zero, one = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert (zero.pop("main"), one.pop("main")) == (True, False)
    assert (zero.pop("saved"), one.pop("saved")) == ([2], [2])
    assert zero == one
    assert zero["count"] == 2
    assert zero["gathered"] == ["0-0", "0-1", "0-2", "1-0"]
    assert zero["extras"] == [3.0, 1.0]
    assert zero["p"] == [[10.0, 12.0, 14.0], [16.0, 18.0, 20.0]]
    assert zero["q"] == [0.0, 1.0, 2.0, 3.0]
    assert zero["code"] == 143
