"""`compare`: arms trained under identical conditions, scored by the same code, in one report."""

from __future__ import annotations

import argparse
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from qdora.commands.train import train
from qdora.config import ArmConfig, CompareConfig, RunConfig
from qdora.config_file import check_config, dump_config, load_config, read_yaml, set_key
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.evaluation.evaluate import evaluate_adapter
from qdora.evaluation.scores import Scores, read_scores
from qdora.experiments.report import ArmRun, markdown, write_report
from qdora.files import write_text
from qdora.run import RunDirectory
from qdora.training.metrics import read_metrics

CONFIG_COPY = "compare.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--config", required=True, help="YAML file of the comparison")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--resume", action="store_true", help="continue a comparison in its output.dir")


def run(arguments: argparse.Namespace) -> None:
    """Entry of the command."""
    config = load_config(arguments.config, arguments.set, CompareConfig)
    folder = Path(config.output.dir)
    tree = read_yaml(Path(arguments.config).parent / config.base)
    planned = [
        (arm, seed, arm_config(tree, config, arm, seed)) for seed in config.seeds for arm in config.arms
    ]
    used = (folder / CONFIG_COPY).exists() or any(RunDirectory(c.output.dir).holds_run() for *_, c in planned)
    if used and not (arguments.resume or config.output.overwrite):
        raise InputError(
            f"output.dir {folder} already holds a comparison; continue it with --resume, replace it with "
            f"--set output.overwrite=true, or choose another output.dir"
        )
    context = DistributedContext.from_launch()
    base_scores = _base_scores(planned[0][2], folder / "base", context, resume=arguments.resume)
    runs = [_train_and_score(arm, seed, one, context, resume=arguments.resume) for arm, seed, one in planned]
    if context.is_main:
        write_text(folder / CONFIG_COPY, dump_config(config))
        print(markdown(write_report(folder, runs, base_scores)))
        print(f"report: {folder / 'report.json'}, {folder / 'report.md'}, {folder / 'comparison.png'}")


def arm_config(tree: dict[str, Any], config: CompareConfig, arm: ArmConfig, seed: int) -> RunConfig:
    """The run of one arm: the shared configuration, the seed, and the one axis that differs.

    Raises: InputError: the shared configuration or an override is wrong.
    """
    own = deepcopy(tree)
    for key, value in config.set.items():
        set_key(own, key, value)
    set_key(own, "adapter.method", arm.method)
    set_key(own, "training.seed", seed)
    set_key(own, "output.dir", str(Path(config.output.dir) / f"{arm.name}-seed{seed}"))
    set_key(own, "output.overwrite", config.output.overwrite)
    return check_config(own, RunConfig, f"{config.base} with arm {arm.name!r}")


def _train_and_score(
    arm: ArmConfig, seed: int, config: RunConfig, context: DistributedContext, *, resume: bool
) -> ArmRun:
    directory = RunDirectory(config.output.dir)
    if context.is_main:
        print(f"\n== {arm.name}, seed {seed}: {directory.path}", file=sys.stderr)
    train(config, resume="auto" if resume else None, context=context)
    scores = evaluate_adapter(config, directory.finished_adapter(), context, folder=directory.evaluation)
    return ArmRun(
        arm=arm.name,
        method=arm.method,
        seed=seed,
        directory=directory.path,
        manifest=directory.manifest(),
        steps=read_metrics(directory.metrics_file),
        scores=scores,
    )


def _base_scores(
    config: RunConfig, folder: Path, context: DistributedContext, *, resume: bool
) -> list[Scores]:
    reports = sorted(folder.glob("*.json"))
    if resume and reports:
        return [read_scores(path) for path in reports]
    return evaluate_adapter(config, None, context, folder=folder)
