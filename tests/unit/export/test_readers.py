"""Who else reads what is written: transformers 5 and 4, by name of each setting and by their logits."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen2Config

from qdora.export.merged import merge_and_export
from qdora.models.formats.write import write_settings
from qdora.models.load import load_base
from tests.environments import environment_python
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.unit.adapters.oracle import relative

from .jobs import IDS, exported, logits, make_job

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
HALF = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
    "llama 3.1": LlamaConfig(**SMALL, rope_parameters={"rope_theta": 5e5, **LLAMA3}),
    "phi3": Phi3Config(**SMALL, pad_token_id=0, rope_parameters=HALF),
    "qwen2": Qwen2Config(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "gemma3": Gemma3TextConfig(**SMALL, head_dim=16),
}
VERSION4 = {
    "llama": {"rope_theta": 1e5, "rope_scaling": None},
    "llama 3.1": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "phi3": {"rope_theta": 2e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
    "qwen2": {"rope_theta": 1e6, "rope_scaling": None},
    "gemma3": {"rope_theta": 1e6, "rope_scaling": None, "rope_local_base_freq": 1e4},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_both_versions(tmp_path, name):
    """Catches: a base of the rotary embedding or a scaling that version 4 does not find, and takes from a
    default; a name of version 4 that makes version 5 read something else."""
    config = CONFIGS[name]
    write_settings(tmp_path, config, torch.float16, None, None)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in VERSION4[name]} == VERSION4[name]
    assert written["torch_dtype"] == written["dtype"] == "float16"
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters


def test_tokenizer_of_both_versions(tmp_path):
    """Catches: a class that version 4 does not know, special tokens in a form that it cannot read, what
    this program's call of the tokenizer was."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.chat_template = "{{ messages }}"
    write_settings(tmp_path, CONFIGS["llama"], torch.float16, None, tokenizer)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["<|call|>"]
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & set(written)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again("ab<|call|>").input_ids == tokenizer("ab<|call|>").input_ids


_READ = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert model.dtype == torch.float16, model.dtype
model = model.float()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("ab ba<|call|>", add_special_tokens=False).input_ids
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits
print(json.dumps({"ids": ids, "logits": logits.tolist(), "special": tokenizer.additional_special_tokens}))
"""


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 3e6}, {"rope_theta": 5e5, **LLAMA3}])
def test_version_4_computes_the_same(tmp_path, rope):
    """Catches: an export that transformers 4 and servers built on it refuse, or read as another model."""
    python = environment_python("transformers4")
    model, tokenizer = load_base(str(write_tiny_model(tmp_path / "m", rope_parameters=rope)), dtype="float32")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    model.resize_token_embeddings(len(tokenizer))
    merge_and_export(model, tokenizer, tmp_path / "out")
    words = [python, "-c", _READ, str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout)
    assert theirs["ids"] == tokenizer("ab ba<|call|>", add_special_tokens=False).input_ids
    assert theirs["special"] == ["<|call|>"]
    exported, _ = load_base(str(tmp_path / "out"), dtype="float32", quantization="none")
    with torch.no_grad():
        ours = exported(torch.tensor([theirs["ids"]])).logits
    torch.testing.assert_close(torch.tensor(theirs["logits"]), ours, rtol=1e-4, atol=1e-5)


_READ_4_BITS = """
import json, sys, peft, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map="cpu")
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = peft.PeftModel.from_pretrained(model, sys.argv[1] + "/adapter")
with torch.no_grad():
    print(json.dumps(model(torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


def test_version_4_computes_the_same_in_4_bits(tmp_path):
    """Catches: a 4-bit export that transformers 4 with PEFT refuses, or reads as another model."""
    python = environment_python("transformers4")
    job = make_job(tmp_path, write_tiny_model(tmp_path / "m", intermediate_size=128), "nf4", dtype="fp32")
    expected, folder = logits(job.model), exported(job, "nf4")
    words = [python, "-c", _READ_4_BITS, str(folder), json.dumps(IDS.tolist())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert relative(theirs, expected) < 1e-5
