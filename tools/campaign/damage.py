"""The stage `damage`: commands on damaged input end with exit code 2 and a sentence, or with a right result.

Each case damages one thing by a seeded random change: a configuration, an override, a data file, an
adapter, a checkpoint, a model, or the files of a run.  It is played by the real command in a process that
is watched (`sandbox`).  A right result is one that other readers confirm: the JSON, csv, pyarrow and
safetensors libraries, or the run that was never damaged.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import tempfile
import traceback
from pathlib import Path
from random import Random

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qdora.adapters.kernels import native
from qdora.cli import run_command
from tests.e2e.runs import tiny_tree, write_questions
from tests.forked import PRELOADED
from tests.tiny import tiny_tokenizer, write_tiny_gguf, write_tiny_model
from tools.campaign.inputs import KINDS, Case
from tools.campaign.report import Report
from tools.campaign.sandbox import Outcome, TooLongError, Watch, run_cases

LONGEST_SENTENCE = 4000
"""Characters of an error; a value of a megabyte is not to be repeated in it."""
_ROWS = 12


def run(count: int, seed: int, folder: Path) -> Report:
    """Play so many cases; case i is made from seed + i alone."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "QDORA_CACHE": str(folder / "cache")}
    for name in ("TMPDIR", "HF_HOME", "MPLCONFIGDIR"):
        os.environ[name] = str(folder / "cache" / name)
        Path(os.environ[name]).mkdir(parents=True)
    tempfile.tempdir = None  # asked for anew
    torch.set_num_threads(1)
    for name in PRELOADED:  # before the fork
        importlib.import_module(name)
    native.takes(
        ()
    )  # as well: a process that has not loaded the functions starts a compiler, outside its folder
    report = Report("damage")
    scene = folder / "scene"
    if os.fork() == 0:  # what this computes must not be in the processes of the cases
        code = 1
        try:
            code = _prepare(scene)
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.wait()[1]):
        raise RuntimeError("the undamaged run failed")

    def play(case_seed: int, case: Path, watch: Watch) -> Outcome:
        watch.writable += (folder / "cache",)
        return _play(case_seed, case, scene)

    run_cases(play, range(seed, seed + count), folder, report)
    return report


def _prepare(scene: Path) -> int:
    """The undamaged input: models, data, a finished run with two checkpoints."""
    write_tiny_model(scene / "model")
    write_tiny_model(scene / "sharded").joinpath("model.safetensors").unlink()
    _write_shards(scene / "model" / "model.safetensors", scene / "sharded")
    write_tiny_gguf(scene / "tiny.gguf")
    _write_quantized(write_tiny_model(scene / "blocks", intermediate_size=128), scene / "quantized")
    tree = tiny_tree(scene, scene / "model", max_steps=4, save_every=2, batch_size=2)
    for name, count, offset in (("train", _ROWS, 0), ("test", 2, 1000)):
        write_questions(scene / f"{name}.jsonl", count, offset)
    tree["evaluation"]["max_new_tokens"] = 2
    (scene / "config.yaml").write_text(yaml.safe_dump(tree))
    return run_command("train", ["--config", str(scene / "config.yaml")])


def _write_shards(weights: Path, folder: Path) -> None:
    from qdora.files import write_json, write_tensors

    tensors = load_file(weights)
    names = sorted(tensors)
    shard_of: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_tensors(folder / file, {name: tensors[name] for name in part}, {"format": "pt"})
        shard_of |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": shard_of})


def _write_quantized(source: Path, folder: Path) -> None:
    """A model as bitsandbytes and transformers store it in 4 bits."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=settings, dtype=torch.float32
    ).train()  # for evaluation bitsandbytes repacks the weights on some CPUs
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def _play(seed: int, folder: Path, scene: Path) -> Outcome:
    rng = Random(seed)
    elsewhere, canary = folder / "elsewhere", folder / "canary"
    (elsewhere / "folder").mkdir(parents=True)
    (elsewhere / "file").write_text("stays")
    (elsewhere / "folder" / "file").write_text("stays")
    kind = rng.choice(list(KINDS))
    case = KINDS[kind](rng, folder, scene)
    printed = io.StringIO()
    code: object = None
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = run_command(case.words[0], case.words[1:])
    except SystemExit as stop:  # argparse
        code = stop.code
    except TooLongError:
        return Outcome(kind, case.note, "endless", f"not over after its time: {' '.join(case.words)}")
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in at if "/qdora/" in frame.filename] or at
        text = f"{type(error).__name__}: {error}"[:300]
        return Outcome(kind, case.note, "traceback", f"{text} at {own[-1].filename}:{own[-1].lineno}")
    fault = None
    if canary.exists():
        fault = "code was run"
    elif any(path.read_text() != "stays" for path in elsewhere.rglob("file")) or not _whole(elsewhere):
        fault = "files outside were changed"
    elif code == 2:
        fault = _refusal_fault(printed.getvalue(), case)
    elif code != 0:
        fault = f"exit code {code}: {printed.getvalue()[-300:]}"
    else:
        try:
            fault = case.right(printed.getvalue())
        except Exception as error:
            fault = f"no other reader takes it: {type(error).__name__}: {error}"[:400]
    return Outcome(kind, case.note, "refused" if code == 2 else "right", fault)


def _whole(elsewhere: Path) -> bool:
    return sorted(path.name for path in elsewhere.rglob("*")) == ["file", "file", "folder"]


def _refusal_fault(printed: str, case: Case) -> str | None:
    sentence = printed[printed.rfind(f"qdora {case.words[0]}: ") :]
    if ": error: " not in sentence or "Traceback" in printed:
        return f"refused without a sentence: {printed[-300:]!r}"
    if len(sentence) > LONGEST_SENTENCE:
        return f"a sentence of {len(sentence)} characters: {sentence[:200]!r}"
    diverged = "Lower training.learning_rate" in sentence  # a run that has begun stays
    if case.output is not None and case.output.exists() and not diverged:
        return f"refused, and left {case.output.name}: {sentence[:300]}"
    return None
