"""A sharded training against one process: loading, numbers, memory.  Two spawns serve all checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.distributed.ranks import ROOT, ends, fork_ranks
from tests.distributed.sharded import CASES, main
from tests.tiny import tiny_tokenizer, write_tiny_model

pytestmark = pytest.mark.distributed
COUNTS = (2, 4)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """`tied`; `awkward`: untied, biased, no side divides, rows are no whole blocks; `stored` in NF4."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny_model(folder / "tied")
    write_tiny_model(
        folder / "awkward",
        dtype=torch.float32,  # with scales that bf16 cannot hold
        tie_word_embeddings=False,
        attention_bias=True,
        hidden_size=72,
        intermediate_size=110,
    )
    write_tiny_model(folder / "wide", hidden_size=512, intermediate_size=1024, vocab_size=128)
    write_tiny_model(folder / "plain", intermediate_size=128)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    stored = AutoModelForCausalLM.from_pretrained(
        folder / "plain", quantization_config=quantization, dtype=torch.float32
    )
    stored.train().save_pretrained(folder / "stored")
    tiny_tokenizer().save_pretrained(folder / "stored")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, models) -> Path:
    out = tmp_path_factory.mktemp("one")
    main(out, models, fsdp=False)
    return out


@pytest.fixture(scope="module", params=COUNTS)
def several(request, tmp_path_factory, models) -> tuple[int, Path]:
    out = tmp_path_factory.mktemp(f"several-{request.param}")
    count, words = request.param, ["-m", "tests.distributed.sharded", str(out), str(models), "--fsdp"]
    started = fork_ranks([words] * count, [ROOT] * count, ACCELERATE_USE_CPU="true", QDORA_TIMEOUT="300")
    for code, output in ends(started, within=900):
        assert code == 0, output[-6000:]
    return request.param, out


def steps(out: Path, case: str) -> torch.Tensor:
    """(steps, 2) losses and gradient norms."""
    return torch.tensor(json.loads((out / case / "steps.json").read_text()), dtype=torch.float64)


def adapter(out: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(out / case / "adapter" / "adapter_model.safetensors")


def distance(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative, all tensors together, the one most different element of each left out.

    Adam divides a gradient by its size: an element whose gradient is rounding alone (of k_proj, where a
    softmax cancels it) moves as far as any other, to either side.  A bug moves all.
    """
    assert got.keys() == expected.keys()
    assert all(got[name].dtype == expected[name].dtype for name in got)
    square = 0.0
    for name in got:
        squares = (got[name].double() - expected[name].double()).square()
        square += float(squares.sum() - squares.max())
    return (square / sum(float(expected[n].double().square().sum()) for n in got)) ** 0.5


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_the_same_bits(one, several, case):
    """Catches: blocks quantized apart at a shard boundary, an offset of own scales, a lost statistic or bias,
    a tie broken, rows padded or dropped where they do not divide."""
    expected = load_file(one / case / "weights.safetensors")
    got = load_file(several[1] / case / "weights.safetensors")
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []
    ours, theirs = (json.loads((out / case / "rank-0.json").read_text()) for out in (several[1], one))
    for fact in ("report", "fingerprint", "initial_a"):
        assert ours[fact] == theirs[fact]


@pytest.mark.parametrize("case", CASES)
def test_the_initial_norms_are_the_same(one, several, case):
    """Catches: norms of a shard's rows alone, or of unquantized weights."""
    expected = load_file(one / case / "norms.safetensors")
    got = load_file(several[1] / case / "norms.safetensors")
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("case", [name for name in CASES if "bf16" not in name])
def test_float32_training_is_that_of_one_process(one, several, case):
    """Catches: a mean of means, gradients divided by the ranks or lost, a rank's batch left out, statistics
    that were not gathered (loss 0 or NaN), a stale norm, a clip by the norm of a shard."""
    ours, theirs = steps(several[1], case), steps(one, case)
    assert ours.shape == theirs.shape
    assert theirs[-1, 1] > 0.01
    assert ((ours - theirs).abs() / theirs).max() < 1e-5
    assert distance(adapter(several[1], case), adapter(one, case)) < 1e-5


def test_joined_on_several_ranks_equals_padded_on_one(one, several):
    """Catches: joined sequences that are divided over the ranks otherwise than whole, or whose attention
    is another under sharding."""
    ours, theirs = steps(several[1], "qdora joined"), steps(one, "qdora")
    assert ((ours - theirs).abs() / theirs)[:3].max() < 1e-6  # before rounding has grown step by step
    assert distance(adapter(several[1], "qdora joined"), adapter(one, "qdora")) < 1e-5


@pytest.mark.parametrize("case", [name for name in CASES if "bf16" in name])
def test_bf16_adapters_differ_by_their_rounding_alone(one, several, case):
    """Catches: gradients rounded to bf16 before or after their sum, masters that are bf16, scales of NF4
    blocks rounded because the adapters beside them are bf16."""
    ours, theirs = steps(several[1], case), steps(one, case)
    assert ((ours - theirs).abs() / theirs).max() < 1e-5
    got, expected = adapter(several[1], case), adapter(one, case)
    assert distance(got, expected) < 1e-3
    # A sum in another order turns a rounding here and there: one step of bf16, in few places.
    entries = sum(t.numel() for t in got.values())
    assert sum(int((got[n] != expected[n]).sum()) for n in got if "magnitude" not in n) < entries / 100


@pytest.mark.parametrize("case", CASES)
def test_every_matrix_and_statistic_is_divided(one, several, case):
    """Catches: a weight or its scales whole on every rank, a division other than that of torch.chunk."""
    count, out = several
    sizes = {name: len(t) for name, t in load_file(one / case / "weights.safetensors").items() if t.dim()}
    for rank in range(count):
        facts = json.loads((out / case / f"rank-{rank}.json").read_text())
        whole = {name for name in facts["resident"] if name not in facts["rows"]}
        assert all(name.endswith((".bias", "norm.weight")) for name in whole), whole
        for name in facts["resident"].keys() - whole:
            step = -(-sizes[name] // count)
            assert facts["rows"][name] == max(0, min(step, sizes[name] - rank * step))


@pytest.mark.parametrize("case", ["wide", "wide dense"])
def test_a_rank_holds_and_reads_its_share(one, several, case):
    """Catches: every rank reading, quantizing or keeping the whole model."""
    count, out = several
    whole = json.loads((one / case / "rank-0.json").read_text())
    for rank in range(count):
        facts = json.loads((out / case / f"rank-{rank}.json").read_text())
        assert facts["bytes_read"] < whole["bytes_read"] * (1 / count + 0.02)
        assert sum(facts["resident"].values()) < sum(whole["resident"].values()) * (1 / count + 0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_file_is_what_one_process_writes(several, case):
    """Catches: an adapter of which only one rank's rows are saved, float32 masters saved for bf16, metadata
    in an order that changes from run to run."""
    folder = several[1] / case
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (folder / "alone" / name).read_bytes()


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.generates])
def test_answers_are_those_of_one_process(one, several, case):
    """Catches: an example lost, doubled or given to another's answer; a rank that waits for one that
    is done."""
    count, out = several
    (alone, *expected), _ = json.loads((one / case / "rank-0.json").read_text())["answers"].values()
    assert alone == "False"
    assert len(expected) == 14
    assert len(set(expected[:7])) > 1 or case != "qdora awkward"
    for rank in range(count):
        answers = json.loads((out / case / f"rank-{rank}.json").read_text())["answers"]
        assert answers["gathered"] == ["False", *expected]
        assert answers["in step"] == ["True", *expected]


def test_a_disk_that_fails_halfway_ends_every_rank(several):
    """Catches: ranks that wait at the exchange of scales for one that could not read its rows."""
    count, out = several
    told = [(out / f"told-{rank}").read_text() for rank in range(count)]
    assert told[-1].startswith("CheckpointError: ")
    for words in told[:-1]:
        assert words.startswith(f"InputError: rank {count - 1}: ")
        assert words.endswith("model.safetensors: truncated")


def test_a_layer_that_the_model_does_not_have_is_refused(several):
    """Catches: a misspelt class that leaves the whole model in one group."""
    count, out = several
    for rank in range(count):
        told = (out / f"refused-{rank}").read_text()
        assert "fsdp_transformer_layer_cls_to_wrap: 'LlamaDecoderLayr'" in told
        assert "did you mean 'LlamaDecoderLayer'?" in told
