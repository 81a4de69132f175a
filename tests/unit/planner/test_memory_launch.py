"""Where an estimate takes the architecture and the processes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.config import ModelConfig
from qdora.distributed.launch import FsdpSettings, read_launch_file
from qdora.errors import InputError
from qdora.planner.architecture import find_architecture, shipped_architectures
from qdora.quant import Quantization

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}
"""Parameters of the checkpoints on the hub."""


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_shipped_architectures_have_the_published_parameters(name, count):
    """Catches: a side, a number of layers or of key heads that is not the model's."""
    config = AutoConfig.from_pretrained(CONFIGS / "models" / name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_shipped_architecture_is_tested():
    """Catches: a folder of configs/models that no test looks into, or one that holds weights."""
    folders = {path.name for path in (CONFIGS / "models").iterdir()}
    assert folders == set(PUBLISHED)
    files = [path for path in (CONFIGS / "models").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {"config.json"}


def test_a_hub_id_is_found_among_the_shipped_ones(tmp_path, monkeypatch):
    """Catches: an estimate that needs the hub, and its licence, for a model whose architecture ships, or one
    that finds it from a checkout alone."""
    monkeypatch.chdir(tmp_path)
    assert shipped_architectures()["meta-llama/Meta-Llama-3-8B"] == "qdora:models/llama-3-8b"
    assert set(shipped_architectures().values()) == {f"qdora:models/{name}" for name in PUBLISHED}
    by_name = find_architecture(ModelConfig(path="any"), "qdora:models/llama-3-8b", "cuda")
    assert (by_name.depth, by_name.config.num_key_value_heads) == (32, 8)
    with pytest.raises(
        InputError, match=r"nothing of that name ships; did you mean 'qdora:models/llama-3-8b'"
    ):
        find_architecture(ModelConfig(path="any"), "qdora:models/lama-3-8b", "cuda")
    found = find_architecture(ModelConfig(path="meta-llama/Llama-2-70b-hf"), None, "cuda")
    assert (found.depth, found.config.hidden_size, found.stored) == (80, 8192, torch.float16)


def test_an_unknown_model_is_an_error_that_names_a_way_out(monkeypatch):
    """Catches: a traceback of the network, or a guess, where there is no configuration to be had."""
    monkeypatch.setattr("qdora.planner.architecture.hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(
        InputError, match=r"model 'some/model': .*division by zero.*--architecture.*qdora:models/llama-2"
    ):
        find_architecture(ModelConfig(path="some/model"), None, "cuda")
    with pytest.raises(InputError, match=r"not a model folder: it has no config\.json"):
        find_architecture(ModelConfig(path="x"), str(CONFIGS), "cuda")


def test_dtypes_and_quantization_are_those_of_the_run(tmp_path, monkeypatch):
    """Catches: an estimate in float32 because there is no GPU here, a base that stays 16-bit or does not."""
    monkeypatch.setattr("qdora.models.load.has_native_bfloat16", lambda device: False)
    folder = str(CONFIGS / "models" / "llama-3-8b")

    def of(device="cuda", **settings):
        return find_architecture(ModelConfig(path="x", **settings), folder, device)

    assert of().compute == torch.bfloat16
    assert of(device="cpu").compute == torch.float32
    assert of(dtype="float32").compute == torch.float32
    assert of(device="cpu", dtype="bfloat16").compute == torch.bfloat16
    assert of(block_size=128, double_quantization=False).quantization == Quantization("nf4", 128, False)
    assert of(quantization="none").quantization.name == "none"
    stored = json.loads((Path(folder) / "config.json").read_text())
    stored["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    found = find_architecture(ModelConfig(path=str(tmp_path)), None, "cuda")
    assert found.quantization == Quantization("nf4", 64, False)
    assert found.build(1).model.layers[0].mlp.up_proj.base.nested_absmax is None


@pytest.mark.parametrize(
    ("name", "world_size", "fsdp", "device"),
    [
        ("one_gpu", 1, None, "cuda"),
        ("multi_gpu", 2, None, "cuda"),
        ("cpu", 1, None, "cpu"),
        ("fsdp", 2, FsdpSettings(), "cuda"),
        ("fsdp_cpu", 2, FsdpSettings(), "cpu"),
        ("fsdp_nodes_static", 16, FsdpSettings(), "cuda"),
        ("fsdp_offload", 2, FsdpSettings(offload=True, activation_checkpointing=True), "cuda"),
    ],
)
def test_launch_files_mean_what_training_makes_of_them(name, world_size, fsdp, device):
    """Catches: a launch file whose sharding, offload or device the estimate does not see."""
    file = read_launch_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert (file.world_size, file.fsdp, file.device) == (world_size, fsdp, device)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fsdp_version: 2", "fsdp_version: 1", r"fsdp_version .*allowed: set `fsdp_version: 2`"),
        ("fsdp_version: 2", "", r"fsdp_version"),
        ("TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", r"fsdp_auto_wrap_policy .*SIZE_BASED_WRAP"),
        ("distributed_type: FSDP", "distributed_type: DEEPSPEED", r"distributed_type is 'DEEPSPEED'"),
        ("distributed_type: FSDP", "distributed_type: FSPD", r"cannot be used"),
        ("num_machines", "num_mashines", r"cannot be used: .*num_mashines"),
    ],
)
def test_a_launch_that_training_refuses_is_not_estimated(tmp_path, old, new, message):
    """Catches: figures for a launch that will never start, a traceback for one that is mistyped."""
    text = (CONFIGS / "accelerate" / "fsdp.yaml").read_text()
    path = tmp_path / "launch.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_launch_file(str(path))


def test_a_launch_file_must_be_there(tmp_path):
    """Catches: a traceback for a path that is mistyped."""
    with pytest.raises(InputError, match=r"--accelerate-config .*none.yaml"):
        read_launch_file(str(tmp_path / "none.yaml"))
