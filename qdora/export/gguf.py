"""`--format gguf`: one file for llama.cpp, and a `Modelfile` for Ollama beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qdora.adapters.inject import refuse_overflow
from qdora.data.padding import eos_token_ids
from qdora.data.templates import PROMPTS, PromptTemplate
from qdora.errors import InputError
from qdora.export import merged
from qdora.export.job import ExportJob
from qdora.export.verify import VerificationError, bound_for, compare, logits, random_tokens, streamed
from qdora.models.formats.gguf import GGUFFile
from qdora.models.formats.gguf_write import GGUFPlan, plan_gguf
from qdora.run import prompt_name

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

BOUNDS = {"f16": 1e-3, "q8_0": 2.3e-2, "q4_0": 0.34}
"""Largest relative error of a tensor that is read back: the rounding of a float16; half a step, 1/127 or 1/8
of the largest value of a block, at its 31 others.  What that does to logits depends on the model."""


def check(job: ExportJob) -> None:
    """As `Format.check`."""
    job.check_onto()
    config = deepcopy(job.checkpoint.config)
    config.vocab_size = max(config.vocab_size, len(job.tokenizer))  # rows of new tokens come with the adapter
    _plan(job, config, job.checkpoint.generation_config())


def write(job: ExportJob, folder: Path) -> str:
    """As `Format.write`."""
    model = job.model
    refuse_overflow(model, "the model")
    plan = _plan(job, model.config, model.generation_config)
    plan.write(folder / _file_name(job), merged.tensors_as_asked(job, torch.float32))
    ends = job.tokenizer.convert_ids_to_tokens(eos_token_ids(model, job.tokenizer))
    prompt = prompt_name(job.options, job.config, has_template=bool(job.tokenizer.chat_template))
    text = modelfile(_file_name(job), job.tokenizer, ends, PROMPTS[prompt])
    (folder / "Modelfile").write_text(text, "utf-8")
    return f"{_file_name(job)} and Modelfile"


@torch.no_grad()
def verify(job: ExportJob, folder: Path) -> str:
    """As `Format.verify`: tensor by tensor, and the logits, both as this program reads the file."""
    path, bound = folder / _file_name(job), BOUNDS[job.options.type]
    model = merged.model_as_asked(job)
    try:
        written = GGUFFile.open(path, str(path))
    except InputError as cause:
        raise VerificationError(f"cannot be read back: {cause}") from cause
    expected, found = _rounded(model.config.rope_parameters), _rounded(written.config.rope_parameters)
    if found != expected:
        raise VerificationError(f"{path}: rotary embedding {found}, expected {expected}")
    worst = 0.0
    for name, tensor in merged.merged_tensors(model, torch.float32):
        if name in written.stored and tensor.any():
            error = float((written.read(name).float() - tensor).norm() / tensor.norm())
            worst = max(worst, error)
            if not error <= bound:
                raise VerificationError(f"{path}: {name}: relative error {error:.2e}, bound {bound:.0e}")
    ids_BT, device = random_tokens(model), next(model.parameters()).device
    adapted_BTV = logits(model, ids_BT)
    exported_BTV = logits(streamed(path, device, torch.float32), ids_BT, device)
    of_logits = bound_for(model, torch.float16) if job.options.type == "f16" else math.inf
    result = compare(path, exported_BTV, adapted_BTV, of_logits)
    return (
        f"verified: read back, weights differ by {worst:.1e} relative at most (bound {bound:.0e}), "
        f"logits by {result.relative_error:.1e}; the same next token at {100 * result.same_next_token:.1f}% "
        f"of {result.positions} positions"
    )


def _file_name(job: ExportJob) -> str:
    return f"model-{job.options.type}.gguf"


def _plan(job: ExportJob, config: PreTrainedConfig, generation: GenerationConfig | None) -> GGUFPlan:
    return plan_gguf(config, job.options.type, job.tokenizer, generation, job.output.absolute().name)


def _rounded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers to six digits: a file holds them as float32."""
    return {
        key: value if isinstance(value, str) else float(f"{value:.6g}") for key, value in settings.items()
    }


def modelfile(
    file_name: str, tokenizer: PreTrainedTokenizerBase, ends: Sequence[str], prompt: PromptTemplate
) -> str:
    """What Ollama makes a model of, with the prompt that was trained and greedy decoding.

    Args:
        file_name: of the GGUF file beside it.
        ends: tokens that end an answer.
        prompt: a template with text, or that of chats, which is the tokenizer's own.
    """
    stops = [*ends]
    lines = [f"FROM ./{file_name}"]
    if prompt.text is not None:
        lines += _instruction("TEMPLATE", prompt.text.rstrip(" ").replace("{question}", "{{ .Prompt }}"))
        stops += [prompt.next_question] if prompt.next_question else []
    elif (pieces := chat_pieces(tokenizer)) is not None:
        lines += _instruction("TEMPLATE", pieces.go_template())
        lines += _instruction("SYSTEM", pieces.default_system) if pieces.default_system else []
    else:
        lines += ["# No TEMPLATE: Ollama has to know the chat template that stands in the file."]
    lines += [
        "# Greedy, as the scores of `qdora evaluate` are; another temperature samples.",
        "PARAMETER temperature 0",
    ]
    for stop in stops:
        lines += _instruction("PARAMETER stop", stop)
    return "\n".join(lines) + "\n"


def _instruction(name: str, text: str) -> list[str]:
    if '"""' in text or text.endswith('"'):
        return [f"# No {name}: its text holds quotation marks that a Modelfile cannot."]
    return [f'{name} """{text}"""']


@dataclass(frozen=True)
class ChatPieces:
    """A chat template that writes each message by itself.

    Attributes:
        around: texts before and after the content of a message, by role.
        header: begins an answer.
        default_system: what the system message says where there is none; empty: nothing is written.
    """

    around: Mapping[str, tuple[str, str]]
    header: str
    default_system: str

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt for an answer to them."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        return (
            "".join(message["content"].join(self.around[message["role"]]) for message in messages)
            + self.header
        )

    def go_template(self) -> str:
        """The same in the language of Ollama's templates, which add the system message of the Modelfile."""
        branches = [
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        ]
        message = "{{ " + "{{ else ".join(branches) + "{{ end }}"
        return "{{ range .Messages }}" + message + "{{ end }}" + self.header


_MESSAGES = [
    {"role": role, "content": f"{role} says {i}"}
    for i, role in enumerate(("system", "user", "assistant", "user", "assistant", "user"))
]


def chat_pieces(tokenizer: PreTrainedTokenizerBase) -> ChatPieces | None:
    """The pieces of a tokenizer's chat template, found by rendering, without the BOS that a server adds.

    Returns: None where it has none, or writes a message in another way beside others (the system message
        inside the first question, a date).
    """
    adds_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]

    def render(first: int, last: int, header: bool = False) -> str:
        text = tokenizer.apply_chat_template(
            _MESSAGES[first : last + 1], tokenize=False, add_generation_prompt=header
        )
        return str(text).removeprefix(tokenizer.bos_token) if adds_bos else str(text)

    def pair(text: str, i: int) -> tuple[str, str]:
        before, _, after = text.partition(_MESSAGES[i]["content"])
        return before, after

    try:
        upto = [render(0, i) for i in (1, 2, 3)]
        header = render(0, 1, header=True).removeprefix(upto[0])
        user = pair(upto[2].removeprefix(upto[1]), 3)
        question = _MESSAGES[1]["content"].join(user)
        system = pair(upto[0].removesuffix(question), 0)
        around = {"system": system, "user": user, "assistant": pair(upto[1].removeprefix(upto[0]), 2)}
        unasked = render(1, 1).removesuffix(question)
        pieces = ChatPieces(around, header, unasked.removeprefix(system[0]).removesuffix(system[1]))
        agree = all(pieces.render(_MESSAGES[i:]) == render(i, 5, header=True) for i in (0, 1))
    except Exception:  # templates refuse conversations with errors of their own
        return None
    return pieces if agree and "{{" not in str(pieces) else None
