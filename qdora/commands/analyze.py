"""`analyze`: a function for each analysis, which loads what it is about, prints and writes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from qdora.config import QuantizationName
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.load import resolve_device
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.run import Target


def quantization(
    arguments: argparse.Namespace,
    targets: Sequence[Target],
    names: Sequence[str],
    formats: Sequence[QuantizationName],
    output: Path | None,
) -> None:
    """Print and write the errors of the base and of each merged run.

    Args:
        arguments: of the subcommand, checked.
        targets: on one base; the first one's test set is measured on.
        names: of them.
        output: folder to write to; None only prints.
    """
    from qdora.analysis import quantization as analysis

    config = targets[0].config
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    if checkpoint.quantization is not None and arguments.onto == "original":
        raise InputError(
            f"{config.model.path}: holds no original weights, they are stored quantized; use --onto nf4"
        )
    dense = {} if checkpoint.quantization is not None else {"quantization": "none"}
    subjects = [analysis.Subject(analysis.BASE, config.model.model_copy(update=dense), None)]
    for target, name in zip(targets, names, strict=True):
        if target.adapter is not None:
            settings = target.config.model
            if arguments.onto == "original":
                settings = settings.model_copy(update=dense)
            subjects.append(analysis.Subject(name, settings, target.adapter))
    examples = analysis.calibration_examples(config, checkpoint, arguments.examples)
    tokens = sum(len(example.input_ids) for example in examples)
    print(f"{config.model.path}: {len(examples)} examples, {tokens} tokens")
    block_size, double = config.model.block_size, config.model.double_quantization
    rounded = [Quantization(name, block_size, double) for name in formats]
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(target.locked())
        found = analysis.measure(
            subjects, checkpoint, examples, rounded, DistributedContext(device=resolve_device("auto"))
        )
    print(analysis.table(analysis.medians(found)))
    if output is None:
        return
    settings_of = {
        "examples": len(examples),
        "tokens": tokens,
        "block_size": block_size,
        "double_quantization": double,
        "onto": arguments.onto,
        "models": [analysis.describe_subject(subject) for subject in subjects],
    }
    analysis.write_results(output, found, settings_of)
    print(f"tables and figures: {output}")


def prune(
    targets: Sequence[Target], names: Sequence[str], sparsities: Sequence[float], output: Path | None
) -> None:
    """Print and write each run's exact match at each sparsity.

    Args:
        targets: runs.
        names: of them.
        output: folder to write to; None only prints.
    """
    from qdora.analysis import prune as analysis

    context = DistributedContext(device=resolve_device("auto"))
    found = []
    for target, name in zip(targets, names, strict=True):
        with target.locked():
            found += list(analysis.score_pruned(name, target.config, target.adapter, sparsities, context))
    print(analysis.table(analysis.results(found)))
    if output is None:
        return
    runs = [
        {"name": name, "adapter": t.adapter and str(t.adapter), "model": t.config.model.path}
        for name, t in zip(names, targets, strict=True)
    ]
    analysis.write_results(output, found, {"pruning": "magnitude, per layer, unstructured", "runs": runs})
    print(f"table and figure: {output}")
