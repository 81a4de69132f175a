"""Merged weights for the time of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from qdora.adapters.inject import adapted_layers, adapters_off, inject
from qdora.adapters.layer import AdaptedLinear
from qdora.data.rows import Example
from qdora.distributed import fsdp
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation import weights as of_evaluation
from qdora.evaluation.evaluate import evaluate
from qdora.evaluation.weights import evaluation_weights
from qdora.models.load import load_base
from tests.axes import adapter_config
from tests.tiny import tiny_tokenizer, write_tiny_model
from tests.unit.adapters.oracle import move_off_the_identity, relative

IDS = torch.arange(4, 28).view(2, 12)
ALL_LAYERS = 14
PARAMETERS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
OUTPUT = 100 * 64


def adapted(folder: Path, dtype: str = "float32", quantization: Any = "nf4", **changes: Any) -> Any:
    model, _ = load_base(str(folder), quantization=quantization, dtype=dtype)
    inject(model, adapter_config(r=4, alpha=11.0, **changes))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    return model


def merged_layers(model: torch.nn.Module) -> int:
    return sum(isinstance(module, AdaptedLinear) and module.is_merged for module in model.modules())


def free(size: float) -> Any:
    return mock.patch.object(of_evaluation, "free_memory", return_value=size)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_memory_decides(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches: a merge that ends the process for want of memory; one that never happens, or for which the
    cache does not count; a choice without a word; copies that stay after the evaluation."""
    model, context = adapted(tiny_model_folder, targets=("q_proj",)), DistributedContext()
    expected = logits(model)
    cache = 50 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, heads, head size, bytes
    needed = (4 * (PARAMETERS + OUTPUT) + cache) / fsdp.MARGIN
    with free(needed + 1), evaluation_weights(model, context, "auto", 50) as used:
        assert (used, merged_layers(model)) == ("merged", ALL_LAYERS)
        assert relative(logits(model), expected) < 1e-5
        (copy,) = model.lm_head._widened
        assert (copy.dtype, copy.shape) == (torch.float32, model.lm_head.weight.shape)
    assert model.lm_head._widened == ()
    assert capsys.readouterr().err == ""
    with free(needed - 2), evaluation_weights(model, context, "auto", 50) as used:
        assert (used, merged_layers(model)) == ("adapted", 0)
    assert "merged copies take 0.0 GiB, 0.0 are free" in capsys.readouterr().err
    fold = mock.patch.object(AdaptedLinear, "fold")
    with free(0), fold as folds, evaluation_weights(model, context, "auto", 50):
        assert folds.call_count == ALL_LAYERS
    capsys.readouterr()
    with free(0), evaluation_weights(model, context, "merged", 50) as used:
        assert (used, merged_layers(model)) == ("merged", ALL_LAYERS)
    with free(1e12), evaluation_weights(model, context, "adapted", 50) as used:
        assert (used, merged_layers(model)) == ("adapted", 0)
    with pytest.raises(MemoryError), evaluation_weights(model, context, "merged", 50):
        raise MemoryError
    assert merged_layers(model) == 0
    assert model.lm_head._widened == ()
    assert torch.equal(logits(model), expected)


def test_one_rank_without_memory_decides_for_all(tiny_model_folder: Path) -> None:
    """Catches: ranks whose answers are rounded differently, and scored together."""
    model, context = adapted(tiny_model_folder), DistributedContext()
    with (
        mock.patch.object(context, "gather", side_effect=lambda own: [*own, False]),
        evaluation_weights(model, context, "auto", 1) as used,
    ):
        assert (used, merged_layers(model)) == ("adapted", 0)


def test_small_updates_of_a_dense_weight_stay_apart(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches: what a LoRA on 16-bit weights has learned rounded away for its evaluation."""
    context = DistributedContext()
    for quantization, expected in (("none", "adapted"), ("nf4", "merged")):
        model = adapted(tiny_model_folder, "bfloat16", quantization)
        with evaluation_weights(model, context, "auto", 1) as used:
            assert used == expected
        with evaluation_weights(model, context, "merged", 1) as used:
            assert used == "merged"
    assert capsys.readouterr().err.count("merged copies in bfloat16 could lose small updates") == 1


def test_a_base_without_adapter(tiny_model_folder: Path) -> None:
    """Catches: --base-only that dequantizes every weight for every token; an adapter that is switched off
    and merged nevertheless; a dense base copied for nothing."""
    context = DistributedContext()
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    expected = logits(model)
    with evaluation_weights(model, context, "auto", 1):
        assert merged_layers(model) == ALL_LAYERS
        assert relative(logits(model), expected) < 1e-5
    dense, _ = load_base(str(tiny_model_folder), quantization="none", dtype="bfloat16")
    with evaluation_weights(dense, context, "auto", 1) as used:
        assert (used, merged_layers(dense)) == ("merged", 0)
    inject(model, adapter_config(r=4))
    for layer in adapted_layers(model).values():
        move_off_the_identity(layer)
    with adapters_off(model), evaluation_weights(model, context, "auto", 1):
        assert relative(logits(model), expected) < 1e-5


def test_a_sharded_model_is_never_merged(tiny_model_folder: Path) -> None:
    """Catches: shards merged as if they were weights."""
    model, context = adapted(tiny_model_folder), DistributedContext()
    with mock.patch.object(of_evaluation, "sharded_modules", return_value=[model]):
        with evaluation_weights(model, context, "auto", 1) as used:
            assert (used, merged_layers(model)) == ("adapted", 0)
        refused = pytest.raises(InputError, match="no rank has the full weights of a sharded model")
        with refused, evaluation_weights(model, context, "merged", 1):
            pass


def test_the_report_says_with_which_weights(tmp_path: Path) -> None:
    """Catches: a score that nobody can repeat; answers of merged weights other than those of the adapter."""
    folder = write_tiny_model(tmp_path, initializer_range=0.3, tie_word_embeddings=False)
    model, tokenizer = adapted(folder), tiny_tokenizer()
    examples = [Example("?" * (1 + i % 5) + chr(65 + i), "x", str(i), "sums", f"q:{i}") for i in range(9)]
    found = {}
    for wanted in ("auto", "merged", "adapted"):
        (scores,) = evaluate(
            model,
            tokenizer,
            examples,
            weights=wanted,
            prompt="question_answer",
            max_new_tokens=8,
            batch_size=4,
            show_progress=False,
        )
        found[wanted] = scores
    assert [found[w].decoding["weights"] for w in found] == ["merged", "merged", "adapted"]
    assert found["auto"].predictions == found["adapted"].predictions
    assert len({prediction.output for prediction in found["auto"].predictions}) > 3
