"""`export`: an adapted model written for other people's tools, and read back to check it."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.export import FORMATS
from qdora.export.adapter import copy_adapter
from qdora.export.job import ExportJob, load_format
from qdora.files import atomic_directory
from qdora.models.formats.write import write_settings
from qdora.models.load import required_tokenizer, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.output import check_output, locked
from qdora.run import Target

if TYPE_CHECKING:
    from qdora.export.push import Repository


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
    from qdora.export.card import make_card, write_card  # with transformers' generation
    from qdora.export.push import open_repository

    check_output(output, arguments.overwrite)
    row = FORMATS[arguments.format]
    if not row.needs_base and output.resolve() == adapter.resolve():
        raise InputError(f"--output {output} is the adapter itself; name another folder for its copy")
    card = make_card(output.absolute().name, target, adapter, row, scored=row.scored(arguments))
    repository = None
    if arguments.push_to_hub is not None:
        repository = open_repository(arguments.push_to_hub, private=arguments.private)
        card = make_card(repository.name, target, adapter, row, scored=row.scored(arguments))
    job = _job(arguments, target, adapter, output) if row.needs_base else None
    if job is not None:
        job.prepare()
    with atomic_directory(output) as folder:
        if job is None:
            said = copy_adapter(adapter, folder)
        else:
            said = load_format(arguments.format).write(job, folder)
        kept = write_card(folder, card, beside=(output, *([] if row.needs_base else [adapter])))
    print(f"{said}: {output}")
    if kept is not None:
        print(kept)
    if job is not None and not arguments.no_verify:
        print(load_format(arguments.format).verify(job, output))
    if repository is not None:
        del job  # its memory
        _push(repository, output)


def _job(arguments: argparse.Namespace, target: Target, adapter: Path, output: Path) -> ExportJob:
    """What a format writes from; nothing is loaded, and what cannot be written is refused."""
    context = DistributedContext(device=resolve_device(arguments.device))
    settings = target.config.model
    checkpoint = open_checkpoint(settings.path, settings.revision)
    template = target.config.data.chat_template
    tokenizer = required_tokenizer(checkpoint, template, adapter=adapter, say=print)
    with TemporaryDirectory() as trial:  # what cannot be saved is known before the weights are loaded
        generation_config = checkpoint.generation_config()
        write_settings(Path(trial), checkpoint.config, torch.float16, generation_config, tokenizer)
    job = ExportJob(arguments, target.config, adapter, checkpoint, tokenizer, context, output)
    load_format(arguments.format).check(job)
    return job


def _push(repository: Repository, output: Path) -> None:
    """Upload what was written; where that fails the folder stands.

    Raises: InputError: as `Repository.push`, and how to go on.
    """
    try:
        print(f"pushed: {repository.push(output)}")
    except InputError as error:
        again = f"hf upload {repository.name} {output}"
        raise InputError(f"{error}. The folder {output} is complete; `{again}` uploads it") from error
