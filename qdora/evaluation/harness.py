"""Scores by lm-evaluation-harness, of a model as it is in memory, and their files.

The harness' own tasks, prompts, metrics and standard errors; ours are the model, the processes and the files.

Source: EleutherAI/lm-evaluation-harness, `simple_evaluate` and `HFLM` of lm_eval 0.4.13.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from pydantic import TypeAdapter, ValidationError

from qdora.config import RunConfig
from qdora.data.vocabulary import embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError, nearest
from qdora.evaluation.generation import LogitsWatch
from qdora.evaluation.scores import locked_reports, wilson_interval, write_pair
from qdora.evaluation.weights import evaluation_weights
from qdora.files import read_json
from qdora.models.load import adapter_rows, load_with_adapter, required_tokenizer
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLDER = "lm-eval"
"""Below a folder of reports."""
_NORMAL_95 = 1.959964
_LONGEST = 2048
"""Tokens of a prompt for which the key-value cache has room when weights are merged."""


@dataclass(frozen=True)
class HarnessMetric:
    """One metric of a task.

    Attributes:
        metric, filter: the harness' names: `acc` and `none`, `exact_match` and `strict-match`.
        value: in the metric's own unit; a fraction where it is a mean of right and wrong.
        stderr: as the harness estimates it; None where it has no estimate.
        interval: 95%: Wilson's where each answer is right or wrong, else value ± 1.96 stderr.
        higher_is_better: None where the harness does not say.
    """

    metric: str
    filter: str
    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class HarnessScores:
    """A task, or a group of tasks, as the harness scored it.

    Attributes:
        task: the harness' name.
        metrics: in its order.
        total: documents that were scored; `available` those of the task. Of a group, those of its tasks.
        shots: examples before each document; None where they differ within a group.
        task_version: of the harness' task.
        dataset, dataset_config, split: where the documents are from; None for a group.
        decoding: `method` (`lm_eval` with its version), `batch_size`, `processes`, `weights`.
        seconds: wall-clock time of all tasks that were asked for together.
        harness: `results` and `config` of the task as the harness returned them.
    """

    task: str
    metrics: tuple[HarnessMetric, ...]
    total: int
    available: int
    shots: int | None
    task_version: float | str | None
    dataset: str | None
    dataset_config: str | None
    split: str | None
    decoding: dict[str, Any]
    seconds: float
    harness: dict[str, Any]


def evaluate_harness(
    config: RunConfig,
    adapter: Path | None,
    context: DistributedContext,
    tasks: Sequence[str],
    *,
    tasks_folder: Path | None = None,
    folder: Path | None = None,
) -> list[HarnessScores]:
    """Load a run's base and adapter, score tasks of the harness, write the reports; a collective.

    Args:
        adapter: folder in PEFT's format; None scores the base alone.
        tasks: names of the harness' tasks, groups or tags, patterns, or YAML files.
        tasks_folder: with YAML files of further tasks.
        folder: of reports; they go to `lm-eval/` in it.
    Raises: InputError: the harness does not know a task, or cannot load its data; anything of the model that
            cannot be loaded; a sharded launch; logits that are not finite.
        ImportError: the harness is not installed.
    """
    below = None if folder is None else folder / FOLDER
    with context.on_main_rank(lambda: nullcontext() if below is None else locked_reports(below, None)):
        with context.raise_on_all_ranks():
            if context.fsdp is not None:
                raise InputError(
                    "--lm-eval: ranks of a sharded model must compute equally many batches, and the harness' "
                    "do not; start it without FSDP"
                )
            loaded = load_tasks(tasks, tasks_folder)
            checkpoint = open_checkpoint(config.model.path, config.model.revision)
            tokenizer = required_tokenizer(checkpoint, config.data.chat_template, adapter=adapter)
            padding = fit_padding(tokenizer, adapter_rows(adapter, embedding_rows(checkpoint.config)))
        if padding is not None:
            context.say(padding)
        quantization = config.evaluation.quantization
        quantize = Quantization(quantization) if quantization and adapter else None
        model = load_with_adapter(checkpoint, config.model, context, adapter, quantize)
        scores = score_loaded(model, tokenizer, loaded, config, context, below)
        context.barrier()
    return scores


def load_tasks(names: Sequence[str], folder: Path | None = None) -> list[Any]:
    """The harness' tasks and groups, their documents loaded.

    Where a folder has all of them the thousands of the harness' own files are not read.

    Raises: InputError: no such folder; a name that is unknown; a task whose data or code cannot be loaded, or
            that executes what the model writes, or shows it images.
    """
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise InputError(f"--lm-eval-tasks {folder}: no such folder")
    with _quiet():
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and any(not _found(manager, name) for name in names):
            manager = TaskManager(include_path=folder)
        found: dict[str, Any] = {}
        for name in names:
            for matched in _matched(manager, name):
                found |= _load(manager, matched)
    of_groups = [task for item in found.values() if hasattr(item, "get_all_tasks") for task in _names(item)]
    for task in of_groups:
        if of_groups.count(task) > 1:
            raise InputError(f"--lm-eval: task {task!r} is in several of the groups; name one of them")
    # The scores of a group hold those of its tasks.
    return [item for name, item in found.items() if name not in of_groups]


def _names(group: Any) -> list[str]:
    """Of a group's tasks, and of the groups in it."""
    return [task.task_name for task in group.get_all_tasks()] + [g.name for g in group.get_all_groups()]


def _found(manager: Any, name: str) -> list[str]:
    is_file = name.endswith((".yaml", ".yml")) and Path(name).is_file()
    return [name] if is_file else list(manager.match_tasks([name]))


def _matched(manager: Any, name: str) -> list[str]:
    matched = _found(manager, name)
    if not matched:
        near = nearest(name, manager.all_tasks)
        hint = f"did you mean {near!r}? " if near else ""
        raise InputError(
            f"--lm-eval: lm-evaluation-harness has no task {name!r}; {hint}`lm-eval ls tasks` lists its "
            f"{len(manager.all_tasks):,}, --lm-eval-tasks DIR adds others"
        )
    return matched


def _load(manager: Any, name: str) -> dict[str, Any]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # tasks are code, and their data come through network libraries
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(
            f"--lm-eval {name}: the task cannot be loaded: {type(error).__name__}: {(lines or [''])[0]}"
        ) from error
    for task in loaded["tasks"].values():
        for attribute, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "images")):
            if getattr(task, attribute, False):
                raise InputError(f"--lm-eval {task.task_name}: {what}, which is not supported")
    return {name: loaded["groups"][name]} if name in loaded.get("groups", {}) else dict(loaded["tasks"])


def score_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    config: RunConfig,
    context: DistributedContext,
    folder: Path | None,
) -> list[HarnessScores]:
    """Score a model on tasks of `load_tasks`; a collective. The main rank writes the reports.

    Returns: the same scores on all ranks, in the order of the tasks, those of a group after it.
    Raises: InputError: logits that are not finite.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    settings = config.evaluation
    started = time.perf_counter()
    watch = LogitsWatch(context.device)
    hook = model.register_forward_hook(lambda module, given, output: watch.see(output.logits))
    used = evaluation_weights(model, context, settings.weights, settings.batch_size * _LONGEST)
    try:
        with _quiet(), used as weights:
            results = simple_evaluate(
                model=_on_ranks(model, tokenizer, settings.batch_size, context),
                tasks=list(tasks),
                num_fewshot=settings.shots or None,
                batch_size=settings.batch_size,
                limit=settings.limit,
                task_manager=TaskManager(include_defaults=False),  # else it reads all task files again
            )
    finally:
        hook.remove()
    scores: list[HarnessScores] = []
    with context.raise_on_all_ranks():
        watch.check(model)
        if results is not None:  # the main rank has them
            decoding = {
                "method": f"lm_eval {importlib.metadata.version('lm_eval')}",
                "batch_size": settings.batch_size,
                "processes": context.world_size,
                "weights": weights,
            }
            seconds = time.perf_counter() - started
            scores = [_scores(name, results, decoding, seconds) for name in results["results"]]
            if folder is not None:
                for score in scores:
                    write_harness_scores(score, results.get("samples", {}).get(score.task, []), folder)
    return context.gather(scores)


def _on_ranks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, context: DistributedContext
) -> Any:
    """The harness' model around one in memory, which knows the ranks of the launch."""
    from lm_eval.models.huggingface import HFLM

    class RankedHFLM(HFLM):  # type: ignore[misc]
        """HFLM takes a model in memory for that of a single process."""

        def __init__(self) -> None:
            super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            self._rank, self._world_size = context.rank, context.world_size

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            return torch.tensor(context.gather([tensor.tolist()]), device=tensor.device)

        def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
            gathered = context.gather([obj])
            return gathered if context.rank == dst else None

        def barrier(self) -> None:
            context.barrier()

    return RankedHFLM()


def _scores(name: str, results: Mapping[str, Any], decoding: dict[str, Any], seconds: float) -> HarnessScores:
    """One entry of the harness' results."""
    values, config = results["results"][name], results.get("configs", {}).get(name, {})
    samples = results.get("samples", {}).get(name, [])
    metrics = []
    for key, value in values.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stated = values.get(f"{metric}_stderr,{filter_}")
        stderr = float(stated) if isinstance(stated, int | float) and math.isfinite(stated) else None
        single = _plain([s[metric] for s in samples if s.get("filter") == filter_ and metric in s])
        better = results.get("higher_is_better", {}).get(name, {}).get(metric)
        interval = _interval(float(value), stderr, single)
        metrics.append(HarnessMetric(metric, filter_, float(value), stderr, interval, better))
    counts = [results["n-samples"][each] for each in _leaves(name, results)]
    version = results.get("versions", {}).get(name)
    split = config.get("test_split") or config.get("validation_split") or config.get("training_split")
    return HarnessScores(
        task=name,
        metrics=tuple(metrics),
        total=sum(count["effective"] for count in counts),
        available=sum(count["original"] for count in counts),
        shots=results.get("n-shot", {}).get(name),
        task_version=version if isinstance(version, int | float | str) else None,
        dataset=config.get("dataset_path"),
        dataset_config=config.get("dataset_name"),
        split=split,
        decoding=decoding,
        seconds=seconds,
        harness=_plain({"results": values, "config": config}),
    )


def _leaves(name: str, results: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, or the task itself."""
    if name in results["n-samples"]:
        return [name]
    children = results.get("group_subtasks", {}).get(name, [])
    return [leaf for child in children for leaf in _leaves(child, results)]


def _interval(value: float, stderr: float | None, single: Sequence[Any]) -> tuple[float, float] | None:
    if single and all(each in (0, 1) for each in single) and math.isclose(sum(single), value * len(single)):
        return wilson_interval(int(sum(single)), len(single))
    return None if stderr is None else (value - _NORMAL_95 * stderr, value + _NORMAL_95 * stderr)


def _plain(value: Any) -> Any:
    """What JSON holds of it; functions and numbers of numpy as the harness writes them."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(value, default=handle_non_serializable))


def write_harness_scores(scores: HarnessScores, samples: Sequence[Any], folder: Path) -> Path:
    """Write one task's scores, and beside them what the harness logged of each document.

    Returns: the path of `TASK.json`.
    Raises: InputError: as `write_scores`.
    """
    lines = [json.dumps(_plain(sample)) + "\n" for sample in samples]
    return write_pair(folder, quote(scores.task, safe=""), asdict(scores), "samples", lines)


def read_harness_scores(path: Path) -> HarnessScores:
    """Read one task's scores back.

    Raises: InputError: the file is missing, or is not what `write_harness_scores` writes.
    """
    try:
        return TypeAdapter(HarnessScores).validate_python(read_json(path))
    except ValidationError as error:
        problem = error.errors()[0]
        at = ".".join(map(str, problem["loc"]))
        raise InputError(f"{path}: not a score file of this program: {at}: {problem['msg']}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' remarks on how it is called."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
