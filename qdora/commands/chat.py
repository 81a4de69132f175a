"""`chat`: ask a run, a model or an adapter, in a terminal or a question a line."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapters.inject import adapters_off
from qdora.adapters.saved import read_saved
from qdora.config import RunConfig
from qdora.data.vocabulary import embedding_rows, fit_padding
from qdora.distributed.context import DistributedContext
from qdora.errors import InputError, suggest
from qdora.evaluation.chat import Chat, Decoding
from qdora.evaluation.weights import evaluation_weights
from qdora.models.load import adapter_rows, load_with_adapter, required_tokenizer, resolve_device
from qdora.models.sources import open_checkpoint
from qdora.quant import Quantization
from qdora.run import Target, prompt_name

COMMANDS = {
    "/reset": "forget the turns so far",
    "/system TEXT": "another system turn, and forget the turns so far; without TEXT none",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
_CACHED_TOKENS = 8192
"""Most tokens of a chat for which memory is left when weights are merged."""


def chat(arguments: argparse.Namespace, target: Target) -> int:
    """Answer until the end of the input.

    Args:
        arguments: of the command.
        target: what they name.
    Returns: 1 where a question from a file or pipe could not be answered.
    """
    context = DistributedContext(device=resolve_device("auto"))
    with target.locked():
        model, tokenizer, config = _load(arguments, target, context)
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    decoding = Decoding(
        config.evaluation.max_new_tokens, arguments.temperature, arguments.top_p or 1.0, arguments.top_k or 0
    )
    chats = {"": Chat(model, tokenizer, config.data, decoding)}
    if arguments.base:
        without = partial(adapters_off, model)
        base = Chat(model, tokenizer, config.data, decoding, weights=without)
        chats = {"adapter": chats[""], "base": base}
    session = _Session(chats, sys.stdin.isatty())
    if arguments.system is not None:
        session.set_system(arguments.system)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _CACHED_TOKENS
    tokens = min(longest, _CACHED_TOKENS)
    with evaluation_weights(model, context, config.evaluation.weights, tokens):
        if session.interactive:
            adapter = "" if target.adapter is None else f" with {target.adapter}"
            print(f"{config.model.path}{adapter}; prompt: {config.data.prompt}. /help lists the commands")
            if not chats[next(iter(chats))].has_turns:
                print("this prompt has no turns: each question stands alone, as in training")
        return session.run()


def _load(
    arguments: argparse.Namespace, target: Target, context: DistributedContext
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, RunConfig]:
    config, adapter = target.config, target.adapter
    checkpoint = open_checkpoint(config.model.path, config.model.revision)
    tokenizer = required_tokenizer(checkpoint, config.data.chat_template, adapter=adapter)
    fit_padding(tokenizer, adapter_rows(adapter, embedding_rows(checkpoint.config)))
    prompt = prompt_name(arguments, config, has_template=bool(tokenizer.chat_template))
    config = config.model_copy(update={"data": config.data.model_copy(update={"prompt": prompt})})
    saved = read_saved(adapter) if arguments.base and adapter is not None else None
    if saved is not None and (saved.is_full or saved.changes_base):
        why = "trained every weight" if saved.is_full else "changed the base's weights at its start"
        raise InputError(f"--base: {adapter} {why}, so without it the model is not the base")
    wanted = config.evaluation.quantization
    quantize = None if wanted is None or adapter is None else Quantization(wanted)
    return load_with_adapter(checkpoint, config.model, context, adapter, quantize), tokenizer, config


class _Session:
    """Questions and commands from standard input, answers to standard output.

    Args:
        chats: by the name that stands before their answers; each question goes to all of them.
        interactive: whether a person types.
    """

    def __init__(self, chats: dict[str, Chat], interactive: bool) -> None:
        self.chats, self.interactive = chats, interactive
        self._interrupts = _Interrupts()
        self._failed = False

    def run(self) -> int:
        """Until the end of the input or `/quit`; the exit code."""
        if not self.interactive:
            for line in sys.stdin:
                if not self._handle(line.rstrip("\r\n")):
                    break
            return int(self._failed)
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines, and knows those before)
        with self._interrupts.handled():
            while True:
                try:
                    line = input("> ")
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print("\n/quit or Ctrl-D leaves")
                    continue
                if not self._handle(line):
                    return 0

    def set_system(self, text: str) -> None:
        """Begin a new chat with a system turn, without one where the text is empty.

        Raises: InputError: the template has none.
        """
        for chat in self.chats.values():
            if not chat.has_turns:
                raise InputError(f"prompt {chat.data.prompt!r} has no system turn; allowed with: chat")
            before, chat.system = chat.system, text or None
            try:
                chat.reset()
                chat.prompt("?")
            except InputError:  # a template without the role
                chat.system = before
                raise

    def _handle(self, line: str) -> bool:
        """Answer a question or follow a command; whether to go on."""
        if not line.strip():
            return True
        try:
            if line.startswith("/"):
                return self._follow(line)
            self._ask(line)
        except InputError as error:
            self._failed = True
            print(f"{error}", file=sys.stderr, flush=True)
        return True

    def _follow(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        known = {shown.partition(" ")[0]: shown for shown in COMMANDS}
        if name not in known:
            hint = "a question that begins with / needs a space before it"
            raise InputError(f"{name}: no such command; {suggest(name, known)} ({hint})")
        if name == "/help":
            width = max(map(len, COMMANDS))
            print("\n".join(f"  {shown:<{width}}  {what}" for shown, what in COMMANDS.items()), flush=True)
        elif name == "/system":
            self.set_system(rest.strip())
        elif name == "/reset":
            for chat in self.chats.values():
                chat.reset()
        return name != "/quit"

    def _ask(self, question: str) -> None:
        for name, chat in self.chats.items():
            if name:
                print(f"[{name}] ", end="", flush=True)
            with self._interrupts.answering() as stopped:
                chat.ask(question, self._show, stopped)
            print(flush=True)
        print(flush=True)

    def _show(self, text: str) -> None:
        if sys.stdout.isatty():  # what a model writes must not command a terminal
            text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        print(text, end="", flush=True)


class _Interrupts:
    """Ctrl-C: ends an answer in progress, at a second time the program; at the prompt it drops the line."""

    def __init__(self) -> None:
        self._answering = self._asked = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle SIGINT in the block."""
        before = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def answering(self) -> Iterator[Callable[[], bool]]:
        """Within it Ctrl-C is noted; yields what tells whether it was."""
        self._answering, self._asked = True, False
        try:
            yield lambda: self._asked
        finally:
            self._answering = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._answering or self._asked:
            raise KeyboardInterrupt
        self._asked = True
