"""What `export` writes: one file per format, and their registry.

A row names a format's options; the module of the same name, imported where it is used, does the work
(`qdora.export.job.Format`).  Importing this brings no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from qdora.config import QuantizationName
from qdora.errors import InputError, require

TRANSFORMERS_USAGE = """\
from transformers import pipeline

generate = pipeline("text-generation", "{name}")  # OWNER/NAME on the hub, or the folder of this card
print(generate("...", max_new_tokens=64, do_sample=False)[0]["generated_text"])"""

PEFT_USAGE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}"){trained_on}
model = PeftModel.from_pretrained(base, "{name}")  # OWNER/NAME on the hub, or the folder of this card"""

NF4_USAGE = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", device_map="auto")
# OWNER/NAME on the hub, or the folder of this card. One that was quantized again has no adapter beside it.
model = PeftModel.from_pretrained(model, "{name}", subfolder="adapter")"""

GGUF_USAGE = """\
from llama_cpp import Llama

model = Llama.from_pretrained("{name}", filename="*.gguf")  # OWNER/NAME on the hub; Llama(FILE) of a folder
print(model("...", max_tokens=64, temperature=0)["choices"][0]["text"])"""

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "--dtype": {
        "choices": ("bf16", "fp16", "fp32"),
        "help": "of the written weights that are not quantized",
    },
    "--onto": {
        "choices": ("nf4", "original"),
        "help": "what to merge onto, or what a server holds: the dequantized weights that the adapter was "
        "trained on, whatever their format, or the original ones",
    },
    "--type": {
        "choices": ("f16", "q8_0", "q4_0"),
        "help": "encoding of the matrices",
    },
    "--quantize": {
        "choices": sorted(get_args(QuantizationName)),
        "help": "full fine-tuning: quantize what was trained to this format, and write what it says",
    },
    "--requantize": {
        "action": "store_true",
        "help": "merge and quantize again: one 4-bit checkpoint without an adapter, with the error of that",
    },
    "--r": {"type": int, "metavar": "N", "help": "rank"},
    "--score": {
        "action": "store_true",
        "help": "exact match on the run's test set before and after, two evaluations",
    },
}
"""Options of all formats, as argparse takes them; several formats may share one."""


@dataclass(frozen=True)
class FormatRow:
    """A format as the command line sees it.

    Attributes:
        summary: what is written, in a few words.
        options: those that it takes, of `OPTIONS`, with their defaults.
        check: refuses values that no model makes right; raises InputError.
        needs_base: whether the base is opened; else the adapter is copied.
        scored: whether, with these options, what is written computes the same as the model that was scored;
            else its card lists the run's scores as another model's.
        library, relation, tags: of its card, in the hub's words.
        usage: Python of its card, with `{name}`, `{base}`, `{quantization}` and `{trained_on}`.
    """

    summary: str
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[argparse.Namespace], None] = lambda arguments: None
    needs_base: bool = True
    scored: Callable[[argparse.Namespace], bool] = lambda arguments: False
    library: str = "transformers"
    relation: str = "finetune"
    tags: tuple[str, ...] = ()
    usage: str = TRANSFORMERS_USAGE


def _check_lora(arguments: argparse.Namespace) -> None:
    if arguments.r is None or arguments.r < 1:
        raise InputError(f"--format lora needs --r N, its rank, from 1 on; got {arguments.r}")
    if arguments.score and arguments.model and not arguments.run:
        raise InputError("--score takes a run's test set; name the run with --run")


FORMATS: Mapping[str, FormatRow] = {
    "merged": FormatRow(
        "the adapter merged into 16-bit weights",
        {"--dtype": "fp16", "--onto": "nf4", "--quantize": None},
        scored=lambda arguments: arguments.onto == "nf4" and arguments.quantize is None,
    ),
    "adapter": FormatRow(
        "the adapter alone, in PEFT's format",
        needs_base=False,
        scored=lambda arguments: True,
        library="peft",
        relation="adapter",
        usage=PEFT_USAGE,
    ),
    "nf4": FormatRow(
        "the 4-bit weights that were trained on, and a plain LoRA: a checkpoint of bitsandbytes",
        {"--dtype": "fp16", "--requantize": False},
        scored=lambda arguments: not arguments.requantize,
        usage=NF4_USAGE,
    ),
    "lora": FormatRow(
        "a plain LoRA for servers that refuse DoRA, by SVD of the change of each weight",
        {"--r": None, "--onto": "nf4", "--score": False},
        _check_lora,
        library="peft",
        relation="adapter",
        usage=PEFT_USAGE,
    ),
    "gguf": FormatRow(
        "the merged weights as one file for llama.cpp and Ollama",
        {"--type": "f16", "--onto": "nf4", "--quantize": None},
        lambda arguments: require("gguf", "--format gguf"),
        scored=lambda arguments: (arguments.type, arguments.onto, arguments.quantize) == ("f16", "nf4", None),
        library="gguf",
        usage=GGUF_USAGE,
    ),
}
DEFAULT = "merged"


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """The choice of a format, and the options of all formats; `check_format` follows."""
    parser.add_argument(
        "--format",
        default=DEFAULT,
        choices=list(FORMATS),
        help="; ".join(f"{name}: {row.summary}" for name, row in FORMATS.items()),
    )
    for option, settings in OPTIONS.items():
        of = [name for name, row in FORMATS.items() if option in row.options]
        parser.add_argument(
            option, default=None, **{**settings, "help": f"{settings['help']} ({', '.join(of)})"}
        )


def check_format(arguments: argparse.Namespace) -> None:
    """Give the options of the chosen format their defaults.

    Raises: InputError: an option of another format was given, or as the format's own check.
    """
    row = FORMATS[arguments.format]
    for option in OPTIONS:
        name = option.removeprefix("--").replace("-", "_")
        if option in row.options:
            if getattr(arguments, name) is None:
                setattr(arguments, name, row.options[option])
        elif getattr(arguments, name) is not None:
            others = ", ".join(other for other, has in FORMATS.items() if option in has.options)
            raise InputError(
                f"{option} is an option of --format {others}; --format {arguments.format} takes "
                f"{', '.join(row.options) or 'none of its own'}"
            )
    row.check(arguments)
