"""What a format writes: an adapted model and what it came from; and what the module of a format provides."""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from qdora.config import ModelConfig, RunConfig
from qdora.data.chat_templates import TEMPLATE_FILE
from qdora.data.padding import eos_token_ids
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError
from qdora.models.formats import Checkpoint
from qdora.models.load import load_with_adapter
from qdora.models.provenance import find_provenance
from qdora.quant import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class ExportJob:
    """An adapted model, and what it came from.

    Attributes:
        options: of the format, by name (`--r` is `r`).
        config: of the run, or made from the command line.
        adapter: folder in PEFT's format.
        checkpoint: the base.
        tokenizer: with the chat template that was trained.
        context: the device that computes.
        output: where the folder is going to be.
    """

    options: argparse.Namespace
    config: RunConfig
    adapter: Path
    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    context: DistributedContext
    output: Path
    _model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The adapted model in evaluation mode; loaded where it is asked for, until `release`."""
        if self._model is None:
            self._model = self._load()
        return self._model

    def prepare(self) -> None:
        """Load the adapted model before anything is written."""
        self._model = self._load()

    @property
    def base_name(self) -> str:
        """The base as written files name it: by the folder where it is, which what is pushed leaves out."""
        path = self.config.model.path
        return path if self.options.push_to_hub is None else find_provenance(path).name

    def release(self) -> None:
        """Free the adapted model before another one is loaded."""
        self._model = None

    def check_onto(self) -> None:
        """Raises: InputError: `--onto original` of a base that is stored quantized."""
        if self.options.onto == "original" and self.checkpoint.quantization is not None:
            raise InputError(
                f"{self.checkpoint.origin}: holds no original weights, they are stored quantized"
            )

    def load(self, adapter: Path | None, **model: object) -> PreTrainedModel:
        """The base with another adapter, or with other settings of the `model` section."""
        settings: ModelConfig = self.config.model.model_copy(update=model)
        return load_with_adapter(self.checkpoint, settings, self.context, adapter)

    def _load(self) -> PreTrainedModel:
        wanted = self.options.quantize or self.config.evaluation.quantization
        quantize = None if wanted is None else Quantization(wanted)
        model = load_with_adapter(self.checkpoint, self.config.model, self.context, self.adapter, quantize)
        chat = self.config.data.chat_template or (self.adapter / TEMPLATE_FILE).is_file()
        if model.generation_config is not None and chat:
            # At the token that ends a trained turn a server must stop.
            model.generation_config.eos_token_id = eos_token_ids(model, self.tokenizer)
        return model


class Format(Protocol):
    """What the module of a format provides."""

    def check(self, job: ExportJob) -> None:
        """Refuse, before weights are loaded, what the base or the tokenizer does not allow.

        Raises: InputError
        """

    def write(self, job: ExportJob, folder: Path) -> str:
        """Write into a folder that is renamed to its place afterwards; a sentence on what was written.

        Raises: InputError: the model cannot be written so.
        """

    def verify(self, job: ExportJob, folder: Path) -> str:
        """Read what was written, compare it with the adapted model; a sentence on how well they agree.

        The job's model may be released.

        Raises: VerificationError: they do not agree.
        """


def load_format(name: str) -> Format:
    """The module of a row of `FORMATS`."""
    return cast(Format, importlib.import_module(f"qdora.export.{name}"))
