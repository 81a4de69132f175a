"""`export`: an adapted model written for other people's tools, and read back to check it."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qdora.distributed.context import DistributedContext
from qdora.export.job import ExportJob, load_format
from qdora.files import atomic_directory
from qdora.models.formats.write import write_settings
from qdora.models.load import required_tokenizer, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.output import check_output, locked
from qdora.run import Target


def export(arguments: argparse.Namespace, target: Target, adapter: Path) -> None:
    """Write a format and check what was written.

    Args:
        arguments: of the command.
        target: what they name.
        adapter: its adapter.
    """
    output = Path(arguments.output)
    lock = output.absolute().with_name(f".{output.absolute().name}.lock")
    with target.locked(), locked(lock, f"--output {output}"):
        _export(arguments, target, adapter, output)


def _export(arguments: argparse.Namespace, target: Target, adapter: Path, output: Path) -> None:
    check_output(output, arguments.overwrite)
    context = DistributedContext(device=resolve_device(arguments.device))
    settings = target.config.model
    checkpoint = open_checkpoint(settings.path, settings.revision)
    template = target.config.data.chat_template
    tokenizer = required_tokenizer(checkpoint, template, adapter=adapter, say=print)
    with TemporaryDirectory() as trial:  # what cannot be saved is known before the weights are loaded
        generation_config = checkpoint.generation_config()
        write_settings(Path(trial), checkpoint.config, torch.float16, generation_config, tokenizer)
    chosen = load_format(arguments.format)
    job = ExportJob(arguments, target.config, adapter, checkpoint, tokenizer, context, output)
    chosen.check(job)
    job.prepare()
    with atomic_directory(output) as folder:
        said = chosen.write(job, folder)
    print(f"{said}: {output}")
    if not arguments.no_verify:
        print(chosen.verify(job, output))
