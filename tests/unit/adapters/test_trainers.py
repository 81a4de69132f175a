"""Trainers of transformers and TRL, as their users call them, on PEFT's models and on ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import qdora
from qdora.adapters import peft_layers
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [f"What is {i} + {i}? It is {2 * i}." for i in range(8)]
COMMON = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}


def make_trainer(kind: str, model: nn.Module, folder: Path, **changes) -> Trainer:
    settings = COMMON | changes
    if kind == "transformers":
        rows = [{"input_ids": TOKENIZER(text)["input_ids"]} for text in TEXTS]
        collate = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
        return Trainer(model, TrainingArguments(folder, **settings), collate, rows)
    if kind == "sft":
        data = Dataset.from_list([{"text": text} for text in TEXTS])
        return SFTTrainer(
            model, SFTConfig(folder, **settings), train_dataset=data, processing_class=TOKENIZER
        )
    rows = [{"prompt": text[:15], "chosen": text[15:], "rejected": text[:9]} for text in TEXTS]
    data = Dataset.from_list(rows)
    return DPOTrainer(
        model, args=DPOConfig(folder, **settings), train_dataset=data, processing_class=TOKENIZER
    )


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def peft_model(folder: Path) -> PeftModel:
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "v_proj", "down_proj"]
    config = LoraConfig(
        r=4, lora_alpha=10, lora_dropout=0.1, use_dora=True, target_modules=targets, task_type="CAUSAL_LM"
    )
    return get_peft_model(base, config)


@pytest.mark.parametrize("logits", ["all", "labelled"])
@pytest.mark.parametrize("kind", ["transformers", "sft", "dpo"])
def test_accelerated_models_train_as_peft_s_do(kind, logits, tiny_model_folder, tmp_path, monkeypatch):
    """Catches: other losses, a norm that the trainer's optimizer leaves stale, an adapter that it adds;
    labelled logits where a trainer needs all."""
    seen = set()
    own = peft_layers._forward
    monkeypatch.setattr(
        peft_layers,
        "_forward",
        lambda layer, a, adapter, x: (seen.add(adapter), own(layer, a, adapter, x))[1],
    )
    found = {}
    for accelerate in (False, True):
        model = peft_model(tiny_model_folder)
        if accelerate:
            assert len(qdora.accelerate(model, logits=logits).accelerated) == 6
        found[accelerate] = losses(make_trainer(kind, model, tmp_path / str(accelerate)))
    assert found[True] == pytest.approx(found[False], rel=2e-5)
    assert len(set(found[True])) == 3
    assert seen == ({"default", "ref"} if kind == "dpo" else {"default"})
    saved = {p.name for p in (tmp_path / "True" / "checkpoint-2").iterdir()}
    assert saved == {p.name for p in (tmp_path / "False" / "checkpoint-2").iterdir()}
    PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_folder), tmp_path / "True" / "checkpoint-2"
    )


def our_model(folder: Path) -> nn.Module:
    model, _ = qdora.load_base(str(folder), dtype="float32", device="cpu")
    qdora.inject(model, qdora.AdapterConfig(r=4, alpha=10, targets=["q_proj", "v_proj", "down_proj"]), seed=3)
    return model


@pytest.mark.parametrize("kind", ["transformers", "sft"])
def test_our_models_train_and_resume_in_their_trainers(kind, tiny_model_folder, tmp_path):
    """Catches: optimizers that refuse 16-bit adapters; checkpoints with the base; a start from scratch."""
    model = our_model(tiny_model_folder)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    whole = losses(make_trainer(kind, model, tmp_path / "run", max_steps=4))
    assert whole[-1] < whole[0]
    checkpoint = tmp_path / "run" / "checkpoint-2"
    largest = max(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    assert largest < 40_000  # 15 thousand trained numbers of 2 bytes, of a model with 70 thousand
    other, _ = qdora.load_base(str(tiny_model_folder), dtype="float32", device="cpu")
    assert len(qdora.load_adapter(other, checkpoint).update_layers) == 6
    again = make_trainer(kind, our_model(tiny_model_folder), tmp_path / "again", max_steps=4)
    again.train(resume_from_checkpoint=str(checkpoint))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed[2:] == pytest.approx(whole[2:], rel=1e-6)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_torch_s_optimizers_take_16_bit_adapters(options, tiny_model_folder):
    """Catches: a step refused for a float32 gradient; gradients that are summed in 16 bits afterwards."""
    model = our_model(tiny_model_folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, **options)
    ids = torch.arange(4, 28).view(2, 12)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        assert {p.grad.dtype for p in trained} == {torch.float32}
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        assert {p.grad.dtype for p in trained} == {torch.float32}
        optimizer.zero_grad()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
