"""Greedy batched generation.

Shapes: B prompts of a batch, P the longest prompt in it, T = P + generated tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qdora.errors import InputError
from qdora.evaluation import continuous
from qdora.quant.base import FrozenWeight
from qdora.training.optimizer import local_shard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class NonFiniteLogitsError(InputError):
    """The model computed NaN or infinity, of which any text and a score could be made."""


class LogitsWatch(LogitsProcessor):
    """Notes NaN and infinite logits, without waiting for the device at each token."""

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.see(scores)
        return scores

    def see(self, logits: torch.Tensor) -> None:
        """Take note of logits of any shape."""
        self._bad |= ~(logits < torch.inf).all()  # minus infinity forbids a token

    def check(self, model: PreTrainedModel) -> None:
        """Raises: NonFiniteLogitsError: there were some."""
        if not self._bad:
            return
        named = _non_finite_weight(model)
        why = f"{named} holds such values" if named else "the computation overflows, try another model.dtype"
        raise NonFiniteLogitsError(
            f"the model's logits are NaN or infinite, so there is nothing to score: {why}"
        )


def _non_finite_weight(model: PreTrainedModel) -> str | None:
    """Name of a weight that holds NaN or infinity; of a sharded one as far as a rank sees it alone."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(local_shard(parameter)).all():
            return str(name)
    for name, module in model.named_modules():
        # A quantized weight holds NaN in a scale of its scales, behind integers.
        if not isinstance(module, FrozenWeight) or any(isinstance(p, DTensor) for p in module.parameters()):
            continue
        if not all(torch.isfinite(tile).all() for _, tile in module.tiles(torch.float32)):
            return str(name)
    return None


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt.

    Attributes:
        text: decoded, without special tokens.
        tokens: generated tokens, EOS included.
        stopped: whether it ended with EOS, or at the next question, rather than at the limit.
    """

    text: str
    tokens: int
    stopped: bool


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[Mapping[int, Generation]], None] | None = None,
    synced: bool = False,
    stop: str | None = None,
) -> list[Generation]:
    """Continue every prompt greedily, until EOS or the limit.

    Prompts are taken longest first, so that the batch that needs the most memory comes first.
    The model's own generation settings (sampling, penalties, lengths) do not apply; of them only
    the EOS ids are used, next to the tokenizer's.  Modules are in eval mode meanwhile.

    Args:
        prompts: token ids, any lengths.
        pad_id: pads prompts on the left, under an attention mask of 0.
        max_new_tokens: most tokens generated after a prompt.
        batch_size: prompts generated at once.
        progress: called after each batch with its generations by index into `prompts`.
        synced: the model is sharded over ranks, and each goes on calling it until all are done.  All
            must then have equally many prompts.
        stop: text that is no part of an answer, nor what follows it.  Continuous batches end a sequence
            there; fixed ones generate on, and it is cut off.
    Returns: one generation per prompt, in the order of `prompts`.
    Raises: InputError: as `check_prompts`.
        NonFiniteLogitsError: at the end where `synced`, else after the batch.
    """
    check_prompts(model, prompts, max_new_tokens)
    eos_ids = eos_token_ids(model, tokenizer)
    done: dict[int, Generation] = {}
    watch = LogitsWatch(model.device)
    batches: Iterator[Mapping[int, list[int]]]
    with evaluation_mode(model), torch.no_grad():
        if continuous.why_not(model):
            batches = _in_batches(model, prompts, pad_id, eos_ids, max_new_tokens, batch_size, synced, watch)
        else:
            batches = continuous.Batch(
                model,
                prompts,
                pad_id=pad_id,
                eos_ids=eos_ids,
                max_new_tokens=max_new_tokens,
                slots=batch_size,
                watch=watch.see,
                synced=synced,
                ended=_ends_with(stop, tokenizer),
            ).run()
        for ended in batches:
            if not synced:
                watch.check(model)
            read = {index: read_answer(ids, eos_ids, tokenizer, stop) for index, ids in ended.items()}
            done.update(read)
            if progress is not None:
                progress(read)
    watch.check(model)
    return [done[index] for index in range(len(prompts))]


def _in_batches(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    pad_id: int,
    eos_ids: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    synced: bool,
    watch: LogitsWatch,
) -> Iterator[Mapping[int, list[int]]]:
    """By transformers' `generate`, for architectures that `continuous` does not know."""
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=list(eos_ids) or None,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with used_generation_config(model, config):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            outputs = _generate_batch(model, [prompts[i] for i in indices], pad_id, synced, watch)
            yield dict(zip(indices, outputs, strict=True))


def check_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    origins: Sequence[str] = (),
) -> None:
    """Refuse, before any work, what would fail or go wrong silently in the middle of it.

    Args:
        origins: names each prompt in errors; its index where there are none.
    Raises: InputError: a prompt has no tokens, or prompt and answer exceed the model's context.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    for index, prompt in enumerate(prompts):
        name = f"{origins[index]}: the prompt" if origins else f"prompt {index}"
        if not prompt:
            raise InputError(f"{name} has no tokens; nothing can be generated from it")
        needed = len(prompt) + max_new_tokens
        if context is not None and needed > context:
            raise InputError(
                f"{name} has {len(prompt)} tokens and up to {max_new_tokens} are generated "
                f"(evaluation.max_new_tokens): {needed} tokens, but the model's context is {context}"
            )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end an answer: the tokenizer's and those of the model's generation config."""
    of_model = getattr(model.generation_config, "eos_token_id", None)
    of_model = of_model if isinstance(of_model, (list, tuple)) else [of_model]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *of_model) if i is not None})


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode in the block; then the modes of before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def used_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """This generation config in the block; then that of before.

    Passing it to `generate` is not enough: it takes what is None there from the model's own.
    """
    own_config = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own_config


def _generate_batch(
    model: PreTrainedModel, batch: Sequence[Sequence[int]], pad_id: int, synced: bool, watch: LogitsProcessor
) -> list[list[int]]:
    """The generated ids of each row, EOS and the padding after it included."""
    pad_left = partial(pad_sequence, batch_first=True, padding_side="left")
    prompts = [torch.tensor(prompt) for prompt in batch]
    ids_BP = pad_left(prompts, padding_value=pad_id).to(model.device)
    mask_BP = pad_left([torch.ones_like(prompt) for prompt in prompts]).to(model.device)
    call = cast("Callable[..., torch.Tensor]", model.generate)
    ids_BT = call(
        input_ids=ids_BP,
        attention_mask=mask_BP,
        synced_gpus=synced,
        logits_processor=LogitsProcessorList([watch]),
    )
    rows: list[list[int]] = ids_BT[:, ids_BP.shape[1] :].tolist()
    return rows


def _ends_with(stop: str | None, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], bool]:
    """Whether generated ids have come to the text `stop`; False where there is none."""
    if stop is None:
        return lambda ids: False
    # A token is at least one byte of the text; what stands before may be joined to it.
    last = len(stop.encode()) + 4
    return lambda ids: stop in tokenizer.decode(ids[-last:], clean_up_tokenization_spaces=False)


def read_answer(
    ids: list[int], eos_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop: str | None = None
) -> Generation:
    """Generated ids, up to the first that ends an answer, or to the text `stop`."""
    end = next((position for position, token in enumerate(ids) if token in eos_ids), None)
    kept = ids if end is None else ids[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    answer = text if stop is None else text.partition(stop)[0]
    return Generation(answer, len(kept) + (end is not None), end is not None or len(answer) < len(text))
