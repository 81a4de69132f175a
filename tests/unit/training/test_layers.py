"""Decoder layers in a training step: recomputed, offloaded, compiled, and how they attend."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor
from torch.utils._python_dispatch import TorchDispatchMode

from qdora.config import TrainingConfig
from qdora.data.batches import collate
from qdora.data.tokenize import TokenizedExample
from qdora.distributed.launch import FsdpSettings
from qdora.errors import InputError
from qdora.training import layers
from qdora.training.attention import training_attention
from qdora.training.layers import check_layer_settings, decoder_layers, prepare_layers
from qdora.training.loss import completion_loss
from tests.tiny import write_tiny_model
from tests.unit.adapters.oracle import relative

from .trainers import make_model, make_trainer, parameters, run

CPU = torch.device("cpu")
DEPTH = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("deep") / "tiny", num_hidden_layers=DEPTH)


def prepare(model, fsdp=None, **settings) -> None:
    prepare_layers(model, TrainingConfig(max_steps=1, **settings), fsdp, CPU)


def loss_and_gradients(model, batch=3, length=17) -> list[torch.Tensor]:
    model.train()
    torch.manual_seed(7)
    rows = torch.randint(3, 90, (batch, length)).tolist()
    loss = completion_loss(model, collate([TokenizedExample(row, 0, "") for row in rows], pad_id=0))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def same(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


class Calls:
    """Counts the passes through each layer's feed-forward part."""

    def __init__(self, model) -> None:
        self.counts = [0] * DEPTH
        for i, layer in enumerate(decoder_layers(model)):
            layer.mlp.register_forward_pre_hook(partial(self._count, i))

    def _count(self, i: int, *_: object) -> None:
        self.counts[i] += 1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("settings", "fsdp", "passes"),
    [
        ({}, None, [1, 1, 1, 1, 1]),
        ({"gradient_checkpointing": True}, None, [2, 2, 2, 2, 2]),
        ({"gradient_checkpointing": True, "checkpoint_every": 2}, None, [2, 1, 2, 1, 2]),
        ({"gradient_checkpointing": True, "checkpoint_every": 3}, None, [2, 1, 1, 2, 1]),
        ({}, FsdpSettings(activation_checkpointing=True), [2, 2, 2, 2, 2]),
        ({"gradient_checkpointing": True, "offload_activations": True}, None, [2, 2, 2, 2, 2]),
    ],
)
def test_the_layers_that_are_asked_for_are_computed_twice(folder, settings, fsdp, passes, dropout):
    """Catches: another layer recomputed, or with another dropout mask; a setting of the launch forgotten; an
    input that comes back from CPU memory changed."""
    model = make_model(folder, dropout=dropout)
    wanted = loss_and_gradients(model)
    prepare(model, fsdp, **settings)
    calls = Calls(model)
    assert same(loss_and_gradients(model), wanted)
    assert calls.counts == passes


def test_the_inputs_of_recomputed_layers_go_to_cpu_memory(folder, monkeypatch):
    """Catches: everything that a layer saves copied over the bus; a layer that keeps its input where it is;
    pageable memory on a GPU, through which no copy runs beside the kernels."""
    made, moved = [], []

    def recorded(**settings):
        made.append(settings)
        return torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t.shape) or t, lambda t: t)

    monkeypatch.setattr(layers, "save_on_cpu", recorded)
    model = make_model(folder)
    settings = {"gradient_checkpointing": True, "checkpoint_every": 2, "offload_activations": True}
    prepare_layers(model, TrainingConfig(max_steps=1, **settings), None, torch.device("cuda", 1))
    loss_and_gradients(model)
    assert made == [{"pin_memory": True, "device_type": "cuda"}] * 3
    assert moved == [(3, 17, 64)] * 3


def test_evaluation_computes_each_layer_as_it_is(folder, monkeypatch):
    """Catches: a cache that a recomputed layer refuses, or a layer compiled for every length of an answer."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *a, **k: compiled.append(1) or f(*a, **k))
    model = make_model(folder)
    prepare(model, gradient_checkpointing=True, compile=True)
    ids = torch.arange(4, 14)[None]
    wanted = make_model(folder).eval().generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.eval().generate(ids, max_new_tokens=5, do_sample=False), wanted)
    with torch.no_grad():
        model.train()(input_ids=ids)
    assert not compiled
    loss_and_gradients(model)
    assert len(compiled) == 2 * DEPTH


def test_a_later_call_replaces_what_an_earlier_one_set(folder):
    """Catches: layers recomputed within recomputed layers by a second trainer of one model."""
    model = make_model(folder)
    prepare(model, gradient_checkpointing=True)
    prepare(model, gradient_checkpointing=True)
    calls = Calls(model)
    loss_and_gradients(model)
    prepare(model)
    loss_and_gradients(model)
    assert calls.counts == [3] * DEPTH


def test_the_trainer_prepares_its_layers(folder):
    """Catches: settings that no run reads; a run of other numbers with them."""
    plain = make_trainer(folder, dropout=0.2, max_steps=2)
    every = make_trainer(folder, dropout=0.2, max_steps=2, gradient_checkpointing=True, checkpoint_every=2)
    calls = Calls(every.model)
    assert [m.loss for m in run(every)] == [m.loss for m in run(plain)]
    assert calls.counts == [4, 2, 4, 2, 4]
    assert same(list(parameters(every).values()), list(parameters(plain).values()))


@pytest.mark.parametrize("key", ["gradient_checkpointing", "compile"])
def test_a_decoder_of_another_make_is_refused(folder, key):
    """Catches: a setting without effect on a model whose layers are not where they are looked for."""
    model = make_model(folder)
    model.model.layers = torch.nn.ModuleDict({str(i): x for i, x in enumerate(model.model.layers)})
    with pytest.raises(InputError, match=f"training.{key}: the layers of a LlamaForCausalLM are not known"):
        prepare(model, **{key: True})
    prepare(model)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(layers, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)


def settings_for(**changes) -> TrainingConfig:
    return TrainingConfig(max_steps=1, gradient_checkpointing=True, **changes)


def test_a_cpu_is_not_offloaded(folder):
    """Catches: a run that pays for copies within one memory."""
    with pytest.raises(InputError, match=r"offload_activations moves activations to CPU memory, .* false"):
        check_layer_settings(settings_for(offload_activations=True), CPU)
    check_layer_settings(settings_for(offload_activations=True), torch.device("cuda"))
    check_layer_settings(settings_for(), CPU)


def test_what_compiling_lacks_is_named(no_compiler, monkeypatch):
    """Catches: a traceback of a code generator in the first step, after the model was loaded."""
    wanted = settings_for(compile=True)
    with pytest.raises(
        InputError, match=r"needs the C\+\+ compiler '(g\+\+|clang\+\+)' \(CXX\), which is not"
    ):
        check_layer_settings(wanted, CPU)
    monkeypatch.setenv("CXX", "icx")
    with pytest.raises(InputError, match=r"the C\+\+ compiler 'icx' \(CXX\)"):
        check_layer_settings(wanted, CPU)
    monkeypatch.setattr(layers, "not_installed", lambda name: name)
    with pytest.raises(
        InputError, match=r'code for the CUDA and needs Triton \(pip install "qdora\[gpu\]"\)'
    ):
        check_layer_settings(wanted, torch.device("cuda"))
    monkeypatch.setattr(layers, "not_installed", lambda name: None)
    with pytest.raises(InputError, match="a C compiler, gcc or clang"):
        check_layer_settings(wanted, torch.device("cuda"))
    monkeypatch.setattr(layers, "which", lambda name: name)
    check_layer_settings(wanted, torch.device("cuda"))
    monkeypatch.setattr(layers.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(InputError, match=r"Python's headers \(/nowhere/Python\.h\)"):
        check_layer_settings(wanted, CPU)


def test_torch_looks_for_the_same_compiler():
    """Catches: a check that asks for another compiler than torch's code generator calls."""
    expected = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    assert inductor.cpp.cxx[1] == expected


@pytest.fixture
def compiler(monkeypatch):
    """Graphs as they are traced and differentiated, computed by torch's operators; how many there were."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def counted(graph, example_inputs):
        graphs.append(1)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    yield graphs
    torch._dynamo.reset()


SHAPES = ((3, 17), (2, 40), (5, 9), (4, 64), (2, 5))


def compilable(folder, **settings):
    return make_model(folder, targets=("q_proj", "down_proj"), **settings)


def distance(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return relative(*(torch.cat([t.flatten() for t in tensors]) for tensors in (got, wanted)))


def test_layers_compile_once_for_all_lengths(folder, compiler):
    """Catches: a graph for each length or each layer; a graph that breaks, which raises; other numbers; the
    norm of an earlier step, since a graph sees no version of a factor."""
    model, eager = compilable(folder), compilable(folder)
    prepare(model, compile=True)
    for batch, length in SHAPES:
        got, wanted = loss_and_gradients(model, batch, length), loss_and_gradients(eager, batch, length)
        assert distance(got[:1], wanted[:1]) < 1e-6
        assert distance(got[1:], wanted[1:]) < 1e-5
        with torch.no_grad():
            for parameter in (*model.parameters(), *eager.parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.01)
    assert len(compiler) == 2  # the first layer's input has no gradient


def test_compiled_layers_can_be_recomputed(folder, compiler):
    """Catches: a layer that is compiled anew for each length, or computed without its graph, in backward."""
    model, eager = compilable(folder, dropout=0.2), compilable(folder, dropout=0.2)
    prepare(eager, compile=True)
    wanted = [loss_and_gradients(eager, *shape) for shape in SHAPES[:2]]
    plain = len(compiler)
    prepare(model, compile=True, gradient_checkpointing=True, checkpoint_every=2, offload_activations=True)
    assert same(loss_and_gradients(model, *SHAPES[0]), wanted[0])
    graphs = len(compiler)
    assert graphs - plain <= plain
    assert same(loss_and_gradients(model, *SHAPES[1]), wanted[1])
    assert len(compiler) == graphs


class Operators(TorchDispatchMode):
    """The shapes of the operands of attention, and of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.attended: list[list[torch.Size]] = []
        self.made: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.attended.append([t.shape for t in args[:3]])
        if isinstance(result, torch.Tensor):
            self.made.append(result.shape)
        return result


@pytest.mark.parametrize("attention", [training_attention, nullcontext])
def test_keys_and_values_are_not_repeated_for_their_queries(folder, attention):
    """Catches: transformers, or a mask that a batch brings, by which each key and value is copied for every
    query head of its group."""
    model = make_model(folder)
    with attention(model), Operators() as seen:
        loss_and_gradients(model, batch=3, length=17)
    assert seen.attended == [[(3, 4, 17, 16), (3, 2, 17, 16), (3, 2, 17, 16)]] * DEPTH
    assert (3, 2, 2, 17, 16) not in seen.made
