"""The model card beside an adapter or an export: from what it was made, how, and how well it does.

A card ends in a digest of its own text, so that one that a person edited is known, and kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from qdora.adapters.base import describe
from qdora.adapters.saved import CONFIG_FILE, OWN_TYPE, WEIGHTS_FILE
from qdora.config import DatasetConfig, EvaluationConfig, RunConfig
from qdora.data.chat_templates import TEMPLATE_FILE
from qdora.data.templates import PROMPTS
from qdora.errors import InputError
from qdora.export import FORMATS, FormatRow
from qdora.export.figures import Result, dataset_id, eval_result, read_results
from qdora.files import read_json, write_text
from qdora.models.provenance import CARD_FILE, UNKNOWN, Provenance, find_provenance
from qdora.run import RunDirectory, Target, package_versions
from qdora.tasks import find_task

_MARK = "<!-- Written by qdora. It replaces this card as long as nobody edits it. sha256 {digest} -->\n"
_FOUND = re.compile(r"<!-- Written by qdora\..* sha256 ([0-9a-f]{64}) -->\n\Z")
_FOLDERS = re.compile(r"(?<![\w.:/])~?/(?:[^/\s'\"=,]+/)+")
"""The folders of an absolute path, which say nothing to others and much about a machine."""
_SETTINGS = {
    "model": ("quantization", "block_size", "double_quantization"),
    "adapter": ("type", "dora", "r", "alpha", "dropout", "init", "rslora", "targets", "magnitude_targets"),
    "training": (
        *("mode", "learning_rate", "schedule", "warmup_steps", "warmup_ratio", "batch_size", "epochs"),
        *("optimizer", "weight_decay", "clip_norm", "master_weights"),
    ),
    "data": ("prompt", "loss_on", "max_length", "packing"),
    # What decides scores, where it is not the default.
    "evaluation": ("method", "shots", "shots_seed", "max_new_tokens", "weights", "quantization"),
}
_PEFT_SETTINGS = ("peft_type", "adapter_type", "use_dora", "r", "lora_alpha", "lora_dropout", "use_rslora")


def write_card(folder: Path, text: str, *, beside: Sequence[Path] = ()) -> str | None:
    """Write a card into a folder, unless a person edited the one that is there.

    Args:
        beside: further folders whose card, where it was edited, is taken instead.
    Returns: a sentence on an edited card that was kept; None where the new one was written.
    """
    for place in (folder, *beside):
        edited = edited_card(place)
        if edited is not None:
            write_text(folder / CARD_FILE, edited)
            return f"{place / CARD_FILE}: it was edited, and is kept as it is; delete it to have a new one"
    write_text(folder / CARD_FILE, text)
    return None


def edited_card(folder: Path) -> str | None:
    """The card in a folder, where a person or another program wrote in it; None where it is ours, or missing.

    Raises: InputError: it cannot be read.
    """
    try:
        text = (folder / CARD_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / CARD_FILE}: cannot be read: {error}") from None
    return None if is_unchanged(text) else text


def is_unchanged(text: str) -> bool:
    """Whether a card is as this program wrote it."""
    found = _FOUND.search(text)
    return found is not None and _digest(text[: found.start()]) == found[1]


def make_card(title: str, target: Target, adapter: Path, row: FormatRow, *, scored: bool) -> str:
    """The text of a card.

    Args:
        title: name of the model.
        target: the base, and the run where there is one.
        adapter: the adapter that is described, in PEFT's format.
        row: of what stands beside the card.
        scored: whether the scores of the run are those of these weights; else they are only listed.
    Raises: InputError: a report or the manifest of the run, or the adapter's settings, cannot be read.
    """
    base = find_provenance(target.config.model.path, target.config.model.revision)
    run = _run_of(target, adapter)
    # Where it is missing, what reads the adapter says so in its own words.
    settings = read_json(adapter / CONFIG_FILE) if (adapter / CONFIG_FILE).is_file() else {}
    facts: dict[str, Any] = {
        "title": title,
        "sentence": f"Fine-tuned from {base.hub_id or base.name}: {row.summary}.",
        "base": _linked(base),
        "licence": _licence(base),
        "usage": _usage(row, target.config, base, settings, title, known=run is not None),
        "trained": run is not None,
    }
    results: list[Result] = []
    own = None
    if run is None:
        facts |= {"settings": _peft_settings(settings), "versions": _versions(package_versions())}
    else:
        directory, reports, base_reports = run
        own = directory.config()
        same_base = own.model == target.config.model
        results, left_out = read_results(own, reports, base_reports, adapter)
        saved_template = (adapter / TEMPLATE_FILE).is_file()
        facts |= _facts_of_run(own, directory.manifest(), saved_template)
        facts |= {"results": results, "left_out": left_out}
        after = own.evaluation.quantization  # of what was trained; an export has it too
        scored = scored and same_base and not (after and row is FORMATS["adapter"])
        method = describe(own.model.quantization, own.adapter, own.training.mode)
        how = f" and then quantized to {after}" if after else ""
        these = "" if scored else " These weights differ from it, and were not scored."
        facts["about_scores"] = (
            f"Measured on {method}, the model as it was trained{how}, before any export.{these}"
        )
    data = ModelCardData(
        base_model=base.hub_id,
        base_model_relation=row.relation if base.hub_id else None,
        datasets=None if own is None else _hub_datasets(own) or None,
        eval_results=[eval_result(result) for result in results] if scored and results else None,
        model_name=title,
        library_name=_library(row, settings),
        license=base.licence,
        license_name=base.licence_name,
        license_link=base.licence_link,
        pipeline_tag="text-generation",
        tags=_tags(settings, row, ours=run is not None),
    )
    if not data.eval_results:
        data.pop("model_name")
    loader = PackageLoader("qdora.export")
    made = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    facts = {"prompt": None, "chat": False} | facts
    text = f"---\n{data.to_yaml()}\n---\n{made.get_template('card.md.j2').render(facts)}\n"
    ModelCard(text)  # what the library cannot read back is a fault of this program
    return text + _MARK.format(digest=_digest(text))


def write_run_cards(directory: RunDirectory) -> list[str]:
    """Write the cards beside a run's adapters, the last one and the best, where they are.

    Returns: a sentence on each card that was edited, and kept.
    Raises: InputError: as `make_card`; a card cannot be written.
    """
    said = []
    for adapter in (directory.adapter, directory.best_adapter):
        if (adapter / WEIGHTS_FILE).is_file():
            target = Target(directory.config(), adapter, directory)
            title = directory.path.resolve().name
            said.append(
                write_card(adapter, make_card(title, target, adapter, FORMATS["adapter"], scored=True))
            )
    return [sentence for sentence in said if sentence is not None]


def renew_run_cards(directory: RunDirectory) -> list[str]:
    """`write_run_cards` after a scoring, whose reports are written whatever becomes of the cards.

    Returns: also a sentence on a card that could not be written.
    """
    try:
        return write_run_cards(directory)
    except InputError as error:
        return [f"no model card: {error}"]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _run_of(target: Target, adapter: Path) -> tuple[RunDirectory, Path, Path] | None:
    """The run whose own adapter this is, with the folders of its reports."""
    run, path = target.directory, adapter.resolve()
    if run is None or not run.manifest_file.is_file():
        return None
    if path == run.adapter.resolve():
        return run, run.evaluation, run.base_evaluation
    return (run, run.best_evaluation, run.base_evaluation) if path == run.best_adapter.resolve() else None


def _linked(base: Provenance) -> str:
    if base.hub_id is None:
        return f"{base.name}, which is not known to be on the hub"
    original = "" if base.hub_id == base.name else f", here from `{base.name}`"
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}){original}"


def _licence(base: Provenance) -> str:
    if base.source is None:
        return f"not known: `{UNKNOWN}` is to be replaced by what the base's authors say"
    named = base.licence_name or base.licence
    linked = f"[{named}]({base.licence_link})" if base.licence_link else named
    return f"{linked}, as {base.source} states"


def _facts_of_run(config: RunConfig, manifest: Mapping[str, Any], saved_template: bool) -> dict[str, Any]:
    """What configuration and manifest of a run say.

    Args:
        saved_template: a chat template lies beside the adapter: of a run over chats, whatever its
            `data.prompt` is, or with the tokenizer of new tokens.
    """
    template = PROMPTS[config.data.prompt]
    chat = template.text is None or (saved_template and config.adapter.trainable_tokens is None)
    data = [_source(config.data.train, manifest.get("data", {}))]
    if start := manifest.get("adapter_from"):
        name = "/".join(Path(str(start.get("path"))).parts[-2:])
        data.append(f"It went on from another adapter, `{name}`, whose training is not described here.")
    machine = manifest.get("machine", {})
    gpus = machine.get("gpus") or [machine.get("processor", "an unknown processor")]
    seeds = {"training": config.training.seed, "data": config.data.train.seed} | manifest.get("seeds", {})
    return {
        "method": describe(config.model.quantization, config.adapter, config.training.mode),
        "settings": [*_settings(config), *_counts(manifest)],
        "data": data,
        "prompt": None if saved_template else template.text,
        "chat": chat,
        "command": _public(manifest.get("command", "not recorded")),
        "manifest": {key: manifest.get(key) for key in ("started", "git_commit", "trained_in")},
        "machine": f"{', '.join(gpus)}, {manifest.get('processes', 1)} process(es)",
        "seeds": ", ".join(f"{name} {seed}" for name, seed in seeds.items()),
        "versions": _versions(manifest.get("versions", {})),
    }


def _settings(config: RunConfig) -> Iterable[tuple[str, str]]:
    tree = config.model_dump(mode="json")
    usual = EvaluationConfig().model_dump(mode="json")
    tree["evaluation"] = {k: v for k, v in tree["evaluation"].items() if v != usual[k]}
    full = config.training.mode == "full"
    for section, keys in _SETTINGS.items():
        for key in keys:
            value = tree[section].get(key)
            if value not in (None, [], {}) and not (full and section == "adapter"):
                yield f"`{section}.{key}`", f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return (
        ", ".join(value)
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _counts(manifest: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key in ("steps", "trainable_parameters", "compute_dtype"):
        if (value := manifest.get(key)) is not None:
            shown = f"{value:,}" if isinstance(value, int) else str(value).removeprefix("torch.")
            yield key.replace("_", " "), shown


def _peft_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    known = [(f"`{key}`", f"`{settings[key]}`") for key in _PEFT_SETTINGS if settings.get(key) is not None]
    targets = settings.get("target_modules") or []
    names = (
        [targets] if isinstance(targets, str) else sorted({str(name).rpartition(".")[2] for name in targets})
    )
    return [*known, ("`target_modules`", f"`{', '.join(names)}`")]


def _source(train: DatasetConfig, counts: Mapping[str, Any]) -> str:
    """One line on the training set."""
    task = find_task(train)
    hub = dataset_id(train)
    name = f"[{hub}](https://huggingface.co/datasets/{hub})" if hub else train.name or task.name
    if not hub and train.source == "file" and not train.name:
        name = Path(str(train.path)).name
    parts = [name, *([] if train.source == "file" else [f"{task.provenance}; licence: {task.licence}"])]
    if train.tasks:
        parts.append(f"tasks {', '.join(train.tasks)}")
    number = counts.get("train")
    parts.append("streamed" if number is None else f"{number:,} examples")
    if leaked := counts.get("leaked_questions_removed"):
        parts.append(f"{leaked:,} questions of the test set were removed")
    return "; ".join(parts)


def _hub_datasets(config: RunConfig) -> list[str]:
    found = dataset_id(config.data.train)
    return [found] if found else []


def _usage(
    row: FormatRow,
    config: RunConfig,
    base: Provenance,
    settings: Mapping[str, Any],
    title: str,
    *,
    known: bool,
) -> str:
    own = row.library == "peft" and settings.get("peft_type") == OWN_TYPE
    usage = OWN_USAGE if own else row.usage
    quantization = config.model.quantization
    return usage.format(
        name=title,
        base=base.hub_id or base.name,
        quantization=quantization,
        trained_on=f"  # trained on {quantization} weights" if known and quantization != "none" else "",
    )


OWN_USAGE = """\
import qdora  # PEFT has no adapter of this kind

model, tokenizer = qdora.load_base("{base}", quantization="{quantization}")
qdora.load_adapter(model, "{name}")  # the folder of this card"""


def _library(row: FormatRow, settings: Mapping[str, Any]) -> str:
    return "qdora" if row.library == "peft" and settings.get("peft_type") == OWN_TYPE else row.library


def _tags(settings: Mapping[str, Any], row: FormatRow, *, ours: bool) -> list[str]:
    kind = str(settings.get("adapter_type") or settings.get("peft_type", "")).lower()
    dora = settings.get("use_dora") or settings.get("dora")
    own = ["qdora"] if ours or settings.get("peft_type") == OWN_TYPE else []
    return [*own, *([kind] if kind else []), *(["dora"] if dora else []), *row.tags]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def _public(command: str) -> str:
    """A command line without the folders of the machine."""
    return _FOLDERS.sub("", command)
