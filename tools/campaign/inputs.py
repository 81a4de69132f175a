"""Damaged inputs: of each kind, what is damaged, the command that meets it, and who confirms its result."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from qdora.models.load import load_base
from tests.e2e.runs import metrics
from tools.campaign.mutations import (
    WEIRD,
    bomb,
    damage_bytes,
    damage_entry,
    damage_header,
    damage_json,
    damage_tree,
    deepened,
)


@dataclass(frozen=True)
class Case:
    """A damaged input and the command that meets it.

    Attributes:
        note: what was damaged how.
        words: the command.
        right: given what was printed with exit code 0, says what is wrong with the result; None where
            nothing is.
        output: made by a command that succeeds, and by no other.
    """

    note: str
    words: Sequence[str]
    right: Callable[[str], str | None]
    output: Path | None


def _copy(scene: Path, folder: Path, *names: str) -> None:
    for name in names:
        source = scene / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copyfile(source, folder / name)


def _damage_file(rng: Random, path: Path, folder: Path) -> str:
    """Damage a file by what it is; the change's name."""
    data = path.read_bytes()
    if rng.random() < 0.08:
        return f"{path.name}: {damage_entry(rng, path, folder / 'elsewhere')}"
    name: str
    if path.suffix == ".safetensors" and rng.random() < 0.6:
        name, data = damage_header(rng, data)
    elif path.suffix == ".json" and rng.random() < 0.6:
        name, text = damage_json(rng, data.decode())
        data = text.encode("utf-8", "surrogatepass")
    elif path.suffix == ".yaml" and rng.random() < 0.6:
        name, changed = damage_tree(rng, yaml.safe_load(data))
        data = deepened(_yaml(changed)).encode("utf-8", "surrogatepass")
    else:
        name, data = damage_bytes(rng, data, folder / "canary")
    path.write_bytes(data)
    return f"{path.name}: {name}"


def _yaml(tree: Any) -> str:
    # JSON is YAML, and says what yaml.safe_dump refuses: lone surrogates, numbers beyond a float.
    return json.dumps(tree, indent=1)


def _config(rng: Random, folder: Path, scene: Path) -> Case:
    _copy(scene, folder, "config.yaml")
    path = folder / "config.yaml"
    tricks = (
        f"!!python/object/apply:builtins.open [{folder / 'canary'}, w]\n",
        "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(f"c{i}: &c{i} [*b, *b]\n" for i in range(9)),
        "model: {path: a}\nmodel: {path: b}\n",
        "&a [*a]\n",
        "? [a, b]\n: c\n",
        "- 1\n",
        "=: 1\n<<: {a: 1}\n",
        "training: {max_steps: 1:30}\n",
        "2001-12-14: 2001-12-14t21:59:43.10-05:00\n",
        "a: !!binary aGVsbG8=\nb: !!set {x, y}\n",
        bombs_of_aliases(),
    )
    if rng.random() < 0.1:
        note = f"trick {tricks.index(trick := rng.choice(tricks))}"
        path.write_text(rng.choice(("", path.read_text())) + trick)
    else:
        note = _damage_file(rng, path, folder)
    return _train_case(folder, note, path)


def bombs_of_aliases() -> str:
    """YAML whose aliases stand for 10^9 values."""
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 10))
    return f"l0: &l0 [x, x]\n{levels}"


def _override(rng: Random, folder: Path, scene: Path) -> Case:
    sections = {
        "model": ("path", "revision", "quantization", "dtype", "block_size", "double_quantization"),
        "adapter": ("type", "dora", "init", "r", "alpha", "dropout", "targets", "magnitude_targets",
                    "rank_pattern", "alpha_pattern", "rslora", "norm_gradient", "dropout_placement", "dtype"),
        "data": ("validation", "prompt", "max_length", "bad_rows", "train.path", "train.source",
                 "train.columns.answer", "train.answer_kind", "train.held_out", "train.seed", "train.limit",
                 "test.columns", "test.name"),
        "training": ("mode", "epochs", "batch_size", "gradient_accumulation", "learning_rate", "schedule",
                     "warmup_steps", "weight_decay", "beta1", "beta2", "clip_norm", "gradient_checkpointing",
                     "seed", "save_every", "keep_checkpoints", "async_checkpoints", "trackers"),
        "evaluation": ("limit", "batch_size", "max_new_tokens", "every", "quantization"),
    }  # fmt: skip
    section = rng.choice(list(sections))
    key = f"{section}.{rng.choice(sections[section])}"
    good = ("none", "nf4", "int8", "lora", "vera", "full", "pissa", "float32", "alpaca", "chat", "skip",
            "choice", "q_proj", "'*'", "[q_proj, '*.1.*']", "{'*': 3}", "1", "2", "3", "0.5", "1e-3", "true",
            "false", "null", "65")  # fmt: skip
    value = rng.choice((rng.choice(good), deepened(_yaml(rng.choice((*WEIRD, "@deep@"))))))
    word = rng.choice(
        (f"{key}={value}",) * 9 + (f"{key}", f"={value}", f"{section}={value}", f"{key}.x={value}")
    )
    note = f"--set {word[:120]!r}"
    return _train_case(folder, note, scene / "config.yaml", "--set", word)


def _train_case(folder: Path, note: str, config: Path, *more: str) -> Case:
    output = folder / "run"
    own = ("--set", "training.max_steps=1", "--set", f"output.dir={output}")
    return Case(
        note, ["train", "--config", str(config), *own, *more], lambda printed: _adapter_fault(output), output
    )


def _adapter_fault(run: Path) -> str | None:
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    absurd = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    return f"{absurd[0]} is not finite" if absurd else None


def _data(rng: Random, folder: Path, scene: Path) -> Case:
    suffix = rng.choice((".jsonl", ".jsonl", ".json", ".csv", ".parquet"))
    rows = [json.loads(line) for line in (scene / "train.jsonl").read_text().splitlines()]
    path = folder / f"mine{suffix}"
    _write_rows(path, rows)
    if suffix == ".jsonl" and rng.random() < 0.5:
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        name, lines[at] = damage_json(rng, lines[at])
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        note = f"{path.name} line {at + 1}: {name}"
    else:
        note = _damage_file(rng, path, folder)
    source = f"data.train={{source: file, path: {path}, name: mine}}"
    output = folder / "run"
    words = ["--config", str(scene / "config.yaml"), "--set", source, "--set", "training.max_steps=1",
             "--set", f"output.dir={output}"]  # fmt: skip
    return Case(note, ["train", *words], lambda printed: _data_fault(path, output), output)


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def _data_fault(path: Path, run: Path) -> str | None:
    """Whether the run counted as many rows as another reader, each with a question and an answer."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    elif path.suffix == ".csv":
        text = path.read_bytes().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    else:
        text = path.read_bytes().decode("utf-8-sig")
        try:
            tree = json.loads(text, object_pairs_hook=_unrepeated, parse_constant=_no_constant)
            rows = tree if isinstance(tree, list) else [tree]
        except json.JSONDecodeError:
            lines = [line for line in text.split("\n") if line.strip()]
            rows = [json.loads(x, object_pairs_hook=_unrepeated, parse_constant=_no_constant) for x in lines]
    used = json.loads((run / "manifest.json").read_text())["data"]["train"]
    if not all(str(row["question"]).strip() and str(row["answer"]).strip() for row in rows):
        return "a row without question or answer was used"
    return None if used == len(rows) else f"{used} examples of {len(rows)} rows"


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands there twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _adapter(rng: Random, folder: Path, scene: Path) -> Case:
    shutil.copytree(scene / "run" / "adapter", folder / "adapter")
    path = folder / "adapter" / rng.choice(("adapter_config.json", "adapter_model.safetensors"))
    note = _damage_file(rng, path, folder)
    output = folder / "merged"
    words = ["--model", str(scene / "model"), "--adapter", str(folder / "adapter"), "--output", str(output)]

    def right(printed: str) -> str | None:
        from qdora.adapters.peft_io import load_adapter, save_adapter

        model, _ = load_base(scene / "model")
        load_adapter(model, folder / "adapter")
        save_adapter(model, folder / "again")
        again, given = (
            load_file(folder / name / "adapter_model.safetensors") for name in ("again", "adapter")
        )
        # A magnitude is kept as its offset from the norm of the base, in the adapter's 16 bits.
        magnitudes = [t for n, t in given.items() if n.endswith("magnitude_vector")]
        rounding = 2**-8 * max((float(t.abs().max()) for t in magnitudes), default=0.0)
        for name, tensor in given.items():
            close = rounding if name.endswith("magnitude_vector") else 0.0
            if name not in again or not torch.allclose(again[name].float(), tensor.float(), 0, close):
                return f"{name} was not taken as it stands"
        return None

    return Case(note, ["export", *words], right, output)


def _checkpoint(rng: Random, folder: Path, scene: Path) -> Case:
    """A run is resumed from its newest checkpoint, which is step 4, or from that of step 2."""
    _copy(scene, folder, "run")
    for left in ("step-4",) if rng.random() < 0.5 else ():
        shutil.rmtree(folder / "run" / "checkpoints" / left)
    files = sorted(p for p in (folder / "run" / "checkpoints").rglob("*") if p.is_file())
    path = rng.choice(files)
    note = f"{path.parent.name}/{_damage_file(rng, path, folder)}"
    words = ["--config", str(scene / "config.yaml"), "--resume", "--set", f"output.dir={folder / 'run'}"]
    return Case(
        note, ["train", *words], lambda printed: _resumed_fault(folder / "run", scene / "run", printed), None
    )


def _resumed_fault(run: Path, reference: Path, printed: str, damaged_metrics: bool = False) -> str | None:
    if "metrics.jsonl: it lacks" not in printed:
        found, expected = (metrics(r) for r in (run, reference))
        if damaged_metrics:  # a digit for a digit shows nowhere
            found, expected = ([{"step": line["step"]} for line in lines] for lines in (found, expected))
        if found != expected:
            return "other metrics than those of the run that was never damaged"
    ours, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, reference))
    same = ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    return None if same else "another adapter than that of the run that was never damaged"


def _model(rng: Random, folder: Path, scene: Path) -> Case:
    name = rng.choice(("model", "model", "sharded", "sharded", "quantized", "tiny.gguf"))
    _copy(scene, folder, name)
    model = folder / name
    path = rng.choice(sorted(model.iterdir())) if model.is_dir() else model
    note = f"{name}/{_damage_file(rng, path, folder)}"
    if model.is_dir() and not model.is_symlink() and rng.random() < 0.2:
        (model / "modeling_own.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
        (model / "pytorch_model.bin").write_bytes(bomb(folder / "canary", zipped=True))
    output = folder / "run"
    case = _train_case(folder, note, scene / "config.yaml", "--set", f"model.path={model}")

    def right(printed: str) -> str | None:
        if name not in ("model", "sharded"):
            return _adapter_fault(output)
        ours, _ = load_base(model, quantization="none", dtype="float32")
        own = dict(ours.state_dict())
        for file in model.glob("*.safetensors"):
            for key, tensor in load_file(file).items():
                found = own.get(key, own.get(key.replace(".weight", ".base.weight")))
                if found is not None and not torch.equal(found.float(), tensor.float()):
                    return f"{key} differs from what safetensors reads"
        return _adapter_fault(output)

    return Case(case.note, case.words, right, output)


def _run_files(rng: Random, folder: Path, scene: Path) -> Case:
    """The files of a finished run, met by evaluate, export, a resumed training and one that replaces it."""
    _copy(scene, folder, "run")
    run = folder / "run"
    tree = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(tree | {"output": {"dir": str(run)}}, sort_keys=False))
    path = run / rng.choice(
        ("config.yaml", "manifest.json", "metrics.jsonl", "loss.png", "checkpoints", "adapter")
    )
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
        note = f"{path.name}: {damage_entry(rng, path, folder / 'elsewhere')}"
    else:
        note = _damage_file(rng, path, folder)
    # A run whose folder of checkpoints its owner has put elsewhere, by a link, goes on there.
    resumable = () if path.is_symlink() and path.is_dir() else ("resume",)
    command = rng.choice(("evaluate", "export", "overwrite", *resumable))
    own = ["--config", str(scene / "config.yaml"), "--set", f"output.dir={run}"]
    words = {
        "evaluate": ["evaluate", "--run", str(run), "--limit", "1", "--output", str(folder / "scores")],
        "export": ["export", "--run", str(run), "--output", str(folder / "merged")],
        "resume": ["train", *own, "--resume"],
        "overwrite": ["train", *own, "--set", "output.overwrite=true"],
    }[command]
    output = {"evaluate": folder / "scores", "export": folder / "merged"}.get(command)

    def right(printed: str) -> str | None:
        if output is not None:
            return None
        return _resumed_fault(run, scene / "run", printed, damaged_metrics=path.name == "metrics.jsonl")

    return Case(f"{command}: {note}", words, right, output)


KINDS: dict[str, Callable[[Random, Path, Path], Case]] = {
    "configuration": _config,
    "override": _override,
    "data": _data,
    "adapter": _adapter,
    "checkpoint": _checkpoint,
    "model": _model,
    "run": _run_files,
}
