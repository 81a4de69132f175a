"""`export`: the adapter merged into 16-bit weights, and checked with plain transformers."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from qdora.adapters.inject import adapted_layers
from qdora.data.chat_templates import TEMPLATE_FILE
from qdora.data.padding import eos_token_ids
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.export.write import DTYPES, merge_and_export, merged_onto, verify_export
from qdora.models.formats.write import write_settings
from qdora.models.load import load_with_adapter, required_tokenizer, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.output import check_output, locked
from qdora.quant import Quantization
from qdora.run import Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERIFIED_POSITIONS = (4, 64)
"""Sequences and tokens on which logits are compared."""


def export(arguments: argparse.Namespace, target: Target, adapter: Path) -> None:
    """Write the merged weights and check them.

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
    settings = target.config.model
    checkpoint = open_checkpoint(settings.path, settings.revision)
    data = target.config.data
    tokenizer = required_tokenizer(checkpoint, data.chat_template, adapter=adapter, say=print)
    dtype = arguments.dtype
    with TemporaryDirectory() as trial:  # what cannot be saved is known before the weights are loaded
        generation_config = checkpoint.generation_config()
        write_settings(Path(trial), checkpoint.config, DTYPES[dtype], generation_config, tokenizer)
    context = DistributedContext(device=resolve_device("auto"))
    wanted = arguments.quantize or target.config.evaluation.quantization
    quantize = None if wanted is None else Quantization(wanted)
    model = load_with_adapter(checkpoint, settings, context, adapter, quantize)
    if model.generation_config is not None and (data.chat_template or (adapter / TEMPLATE_FILE).is_file()):
        # At the token that ends a trained turn a server must stop.
        model.generation_config.eos_token_id = eos_token_ids(model, tokenizer)
    originals = None
    if arguments.onto == "original":
        if not adapted_layers(model):
            raise InputError(
                "--onto original: full fine-tuning leaves no adapter to merge onto other weights"
            )
        if checkpoint.quantization is not None:
            raise InputError(f"{settings.path}: holds no original weights, they are stored quantized")
        originals = merged_onto(model, checkpoint.tensors(), DTYPES[dtype])
    folder = merge_and_export(
        model, tokenizer, output, dtype, tensors=originals, overwrite=arguments.overwrite
    )
    print(f"merged weights: {folder}")
    if arguments.no_verify:
        return
    if arguments.onto == "original":
        # What the export must reproduce is the adapter on the unquantized base.
        unquantized = settings.model_copy(update={"quantization": "none"})
        model = load_with_adapter(checkpoint, unquantized, context, adapter)
    print(verified(folder, model))


def verified(folder: Path, model: PreTrainedModel) -> str:
    """Check an export against the adapted model; a sentence on how well they agree.

    Raises: VerificationError: as `verify_export`.
    """
    result = verify_export(folder, model, _tokens(model))
    return (
        f"verified: plain transformers loads it; logits differ by {result.relative_error:.1e} relative "
        f"(bound {result.bound:.0e}), the same next token at {100 * result.same_next_token:.1f}% of "
        f"{result.positions} positions"
    )


def _tokens(model: PreTrainedModel) -> torch.Tensor:
    """Seeded tokens: any text would do, and a folder may come without a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, VERIFIED_POSITIONS, generator=generator)
