"""`load_base`: what is quantized, what stays, and what is refused."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, Qwen3MoeConfig

from qdora.adapters.fingerprint import base_fingerprint
from qdora.adapters.layer import AdaptedLinear
from qdora.errors import CheckpointError, InputError
from qdora.models.build import build_architecture
from qdora.models.load import load_base
from qdora.quant import Quantization
from qdora.quant.nf4 import NF4Weight
from tests.tiny import write_tiny_model

IDS = torch.arange(4, 28).view(2, 12)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def transformers_in_4_bits(folder, quant_type="nf4"):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float32
    )
    # In evaluation mode some CPUs repack the weights, with 16-bit scales.
    return model.train()


def test_dense_equals_transformers(tiny_model_folder):
    """Catches: a weight put in the wrong place, tied wrongly, or rounded."""
    ours, tokenizer = load_base(str(tiny_model_folder), quantization="none", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))
    assert tokenizer is not None


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory) -> Path:
    """A model whose rows are whole blocks: elsewhere bitsandbytes itself errs on CPUs with AVX512."""
    return write_tiny_model(tmp_path_factory.mktemp("blocks") / "model", intermediate_size=128)


def test_nf4_equals_transformers_with_bitsandbytes(whole_blocks):
    """Catches: another choice of layers, block size or statistics than QLoRA's."""
    ours, _ = load_base(str(whole_blocks), dtype="float32")
    theirs = transformers_in_4_bits(whole_blocks)
    assert relative(logits(ours), logits(theirs)) < 1e-5


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_folder_quantized_by_bitsandbytes_loads_as_it_is(whole_blocks, tmp_path, quant_type):
    """Catches: packed bytes quantized again, statistics mixed up between layers, FP4 taken for NF4."""
    theirs = transformers_in_4_bits(whole_blocks, quant_type)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    stored = load_file(next(tmp_path.glob("*.safetensors")))
    ours, _ = load_base(str(tmp_path), quantization=quant_type, dtype="float32")
    layer = ours.get_submodule("model.layers.1.mlp.up_proj")
    assert layer.base.quantization == quant_type
    assert torch.equal(
        layer.base.packed.view(-1), stored["model.layers.1.mlp.up_proj.weight"].view(torch.uint8).view(-1)
    )
    assert relative(logits(ours), expected) < 1e-5
    with pytest.raises(InputError, match="already quantized"):
        load_base(str(tmp_path), quantization="none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_type": "fp4"}, "only NF4 weights are supported, got 'fp4'"),
        ({"shape": [64, 65]}, r"shape \(64, 65\), the model's configuration says \(64, 64\)"),
        ({"blocksize": 128}, "absmax is torch.uint8 of shape"),
        (None, "Expecting property name"),
    ],
)
def test_a_stored_layers_statistics_are_checked(whole_blocks, tmp_path, change, words):
    """Catches: FP4 codes read with the NF4 table, statistics of another shape or block size believed."""
    transformers_in_4_bits(whole_blocks).save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(path)
    name = "model.layers.1.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist()))
    text = "{" if change is None else json.dumps(state | change)
    tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"q_proj.weight: unusable quantization statistics: .*{words}"):
        load_base(str(tmp_path))
    del tensors["model.layers.1.self_attn.q_proj.weight.absmax"]
    tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight\.absmax is missing"):
        load_base(str(tmp_path))


BITSANDBYTES = {"quant_method": "bitsandbytes"}


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (
            BITSANDBYTES | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"},
            "bitsandbytes to 4 bits of type 'nf3'",
        ),
        (
            BITSANDBYTES | {"load_in_8bit": True, "load_in_4bit": False},
            r"bitsandbytes to 8 bits \(LLM.int8\)",
        ),
        ({"load_in_8bit": True}, r"bitsandbytes to 8 bits \(LLM.int8\)"),
        (BITSANDBYTES, "bitsandbytes in a way that its settings do not tell"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ, 4 bits"),
        ({"quant_method": "awq", "w_bit": 4}, "AWQ, 4 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"8-bit floats \(fp8\)"),
        ({"quant_method": "compressed-tensors"}, r"llm-compressor \(compressed-tensors\)"),
        ({"quant_method": "mxfp4"}, r"MXFP4 \(4-bit floats\)"),
        ({"quant_method": "hqq"}, "'hqq'"),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_other_quantizations_are_refused_by_what_they_are(tmp_path, stated, words, quantization):
    """Catches: codes of other formats read as if they were NF4; 'quantized as bitsandbytes; allowed:
    bitsandbytes' for a checkpoint in its 8 bits; a refusal that does not say what to do."""
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stated}))
    with pytest.raises(
        InputError, match=f"weights quantized by {words} cannot be read; allowed: .* nf4 and fp4, or"
    ):
        load_base(str(folder), quantization=quantization)


def test_an_8_bit_checkpoint_of_bitsandbytes_is_refused_by_name(tiny_model_folder, tmp_path):
    """Catches: a real one whose settings say it otherwise than those above."""
    quantized = AutoModelForCausalLM.from_pretrained(
        tiny_model_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    quantized.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"bitsandbytes to 8 bits \(LLM.int8\) cannot be read"):
        load_base(str(tmp_path))


MOE_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
MIXTURES = {
    "mixtral": MixtralConfig(**MOE_SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**MOE_SIZES, num_experts=4, moe_intermediate_size=16),
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_is_refused_by_name(tmp_path, family):
    """Catches: '26 tensors have no place', which reads as a broken file."""
    AutoModelForCausalLM.from_config(MIXTURES[family]).save_pretrained(tmp_path)
    words = r"ForCausalLM: a mixture of experts is not supported: .* 3-D parameters.*mlp\.experts"
    with pytest.raises(InputError, match=words):
        load_base(str(tmp_path))
    with pytest.raises(InputError, match=words):
        build_architecture(MIXTURES[family], torch.bfloat16, Quantization("nf4"), torch.bfloat16)


def test_only_the_decoders_linear_layers_are_quantized(tiny_model_folder):
    """Catches: a quantized output layer or embedding; 16-bit tensors widened for good."""
    model, _ = load_base(str(tiny_model_folder), dtype="float32")
    kinds = {
        name: type(module.base) for name, module in model.named_modules() if isinstance(module, AdaptedLinear)
    }
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert len(kinds) == 14
    assert set(kinds.values()) == {NF4Weight}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight is model.lm_head.weight
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compute_dtype(tiny_model_folder, dtype):
    """Catches: a 16-bit embedding that makes the whole float32 model compute in 16 bits."""
    model, _ = load_base(str(tiny_model_folder), dtype=dtype)
    assert model(input_ids=IDS).logits.dtype == getattr(torch, dtype)


def test_python_callers_write_what_a_person_would(tiny_model_folder):
    """Catches: a torch dtype, a device object or a Path that ends in a KeyError."""
    model, _ = load_base(tiny_model_folder, dtype=torch.float32, device=torch.device("cpu"))
    assert model(input_ids=IDS).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": torch.int8}, "model.dtype: got 'int8'; allowed: auto, bfloat16, float16, float32"),
        ({"quantization": "nf5"}, "model.quantization: got 'nf5'; did you mean 'nf4'"),
        ({"block_size": 100}, "model.block_size: got '100'"),
        ({"device": "gpu"}, "device 'gpu': no such device; allowed: auto, cpu, cuda"),
        ({"device": 1.5}, "device 1.5: no such device"),
    ],
)
def test_bad_values_from_python_are_named(tiny_model_folder, settings, message):
    """Catches: a raw error of pydantic or torch in a user's notebook."""
    with pytest.raises(InputError, match=message):
        load_base(tiny_model_folder, **settings)


def test_untied_output_layer_is_its_own(tmp_path):
    """Catches: an output layer tied to the embedding although the model says it is not."""
    folder = write_tiny_model(tmp_path / "untied", tie_word_embeddings=False)
    ours, _ = load_base(str(folder), quantization="none", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))


def test_biases_are_kept(tmp_path):
    """Catches: attention biases lost with the layer that held them."""
    folder = write_tiny_model(tmp_path / "biased", attention_bias=True)
    path = folder / "model.safetensors"
    tensors = {k: torch.randn_like(t) if k.endswith("bias") else t for k, t in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    ours, _ = load_base(str(folder), quantization="none", dtype="float32")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), "have no place in a LlamaForCausalLM"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\)"),
    ],
)
def test_checkpoint_must_fit_its_configuration(tmp_path, edit, message):
    """Catches: a layer left at random values, or a tensor dropped without a word."""
    folder = write_tiny_model(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_base(str(folder))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000; its 20 tensors allow 1 to 20"),
        ({"hidden_size": 2**40}, "hidden_size 1099511627776; its 20 tensors allow 1 to 100"),
        ({"vocab_size": -100}, "vocab_size -100"),
        ({"head_dim": 2**40}, "head_dim 1099511627776"),
        ({"intermediate_size": -1}, "no model can be built of its configuration: RuntimeError"),
        ({"attention_dropout": 1e308}, "says attention_dropout 1e\\+308; allowed: from 0 to below 1"),
        ({"attention_dropout": float("nan")}, "says attention_dropout nan"),
    ],
)
def test_impossible_sizes_are_refused_before_such_a_model_is_built(
    tiny_model_folder, tmp_path, sizes, message
):
    """Catches: hours and all memory spent on a billion layers that one wrong number asks for; a traceback."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "m"))
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | sizes))
    with pytest.raises(CheckpointError, match=message):
        load_base(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_base_weight_that_is_no_number_is_named(tiny_model_folder, tmp_path, name, value):
    """Catches: a flipped bit of a download that shows as a loss of NaN, and blames the learning rate."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"tensor {name} holds (NaN|infinite values)"):
        load_base(folder)


def test_a_name_that_no_file_can_have_is_no_model():
    """Catches: `File name too long`, or an unknown user's `~`, as a traceback."""
    with pytest.raises(InputError, match="no such file or folder"):
        load_base("x/" * 3 + "y" * 5000)
    with pytest.raises(InputError, match="home directory"):
        load_base("~nobody-of-this-name/model")


def test_fingerprint_tells_bases_apart(tiny_model_folder, tmp_path):
    """Catches: a fingerprint of names and shapes only, the same for every fine-tune of a model."""
    one, _ = load_base(str(tiny_model_folder))
    same, _ = load_base(str(tiny_model_folder), quantization="none")
    other, _ = load_base(str(write_tiny_model(tmp_path / "other", seed=5)))
    assert base_fingerprint(one) == base_fingerprint(same) != base_fingerprint(other)


def test_peak_memory_is_the_4_bit_model_and_about_one_tensor(tmp_path):
    """Catches: the 16-bit model held in memory while it is quantized."""
    folder = write_tiny_model(
        tmp_path / "large", hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, vocab_size=99
    )
    stored = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    load_base(str(write_tiny_model(tmp_path / "warm-up")))
    gc.collect()
    before = psutil.Process().memory_info().rss
    with PeakMemory() as peak:
        model, _ = load_base(str(folder))
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    largest = 4096 * 1024 * 4
    assert stored > 3.4 * held
    # bitsandbytes' quantizer works on float32 copies of the one tensor in flight.
    assert peak.bytes - before < held + 4 * largest


class PeakMemory:
    """Peak resident memory of this process while entered."""

    def __enter__(self):
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self):
        while not self._done.is_set():
            self.bytes = max(self.bytes, psutil.Process().memory_info().rss)
            time.sleep(0.002)

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()


@pytest.mark.gpu
def test_on_cuda(tiny_model_folder: Path):
    """Catches: a tensor left on the CPU, or bfloat16 not chosen where it is native."""
    model, _ = load_base(str(tiny_model_folder), device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert model(input_ids=IDS.cuda()).logits.dtype == torch.bfloat16
