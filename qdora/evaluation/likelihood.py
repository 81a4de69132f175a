"""The options of a choice, ranked by their likelihood as lm-evaluation-harness ranks them.

`likelihood` is its `acc`: the option whose tokens have the largest sum of log-probabilities behind the
prompt.  `likelihood_per_character` is its `acc_norm`: that sum divided by the characters of the option's
text.  Of equals the first option counts.

The prompt of a question is computed once for all of its options, and what all prompts of a task begin
with (few-shot examples, a template's instruction) once for all questions.

Shapes: B questions of a batch, N options of theirs, C tokens that all prompts begin with, R tokens of a
prompt behind those, Q tokens of an option before its last, T of prompt and option, M scored tokens, I hidden
size, V vocabulary.

Source: EleutherAI/lm-evaluation-harness, lm_eval/api/task.py `ConfigurableTask.process_results`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from qdora.data.rows import Example
from qdora.data.templates import Shot
from qdora.data.tokenize import continued_ids
from qdora.distributed.fsdp import as_forward, gathered
from qdora.errors import InputError
from qdora.evaluation.continuous import common_prefix, why_not
from qdora.evaluation.generation import LogitsWatch, evaluation_mode
from qdora.evaluation.scores import RankedOption
from qdora.tasks.base import Option, Task
from qdora.tasks.scoring import Verdict
from qdora.training.loss import CHUNK_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """A choice as token ids.

    Attributes:
        options: what can be chosen; at least two.
        prompt: ids before every option.
        continuations: ids of each option's text.
    """

    options: Sequence[Option]
    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def tokens(self) -> int:
        """Of the prompt with its longest option."""
        return len(self.prompt) + max(map(len, self.continuations))


def read_questions(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    prompt: str,
    *,
    parse_special_tokens: bool = False,
    shots: Sequence[Shot] = (),
) -> list[Question]:
    """The examples of a choice task with their options.

    Args:
        prompt: name of the template; further arguments as for `prompt_ids`.
    Raises: InputError: options cannot be found, or there are fewer than two; as `continued_ids`.
    """
    options = [task.options(example) for example in examples]
    for example, of_example in zip(examples, options, strict=True):
        if len(of_example) < 2:
            raise InputError(f"{example.origin}: a choice needs at least two options, it has {of_example}")
    ids = continued_ids(
        tokenizer,
        prompt,
        [example.asked for example in examples],
        [[option.text for option in of_example] for of_example in options],
        parse_special_tokens=parse_special_tokens,
        shots=shots,
    )
    return [Question(of, *pair) for of, pair in zip(options, ids, strict=True)]


def check_lengths(model: PreTrainedModel, questions: Sequence[Question], origins: Sequence[str]) -> None:
    """Refuse a question that is longer than the model's context.

    Raises: InputError: the question is named.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    for question, origin in zip(questions, origins, strict=True):
        if context is not None and question.tokens > context:
            longest = question.tokens - len(question.prompt)
            raise InputError(
                f"{origin}: the prompt has {len(question.prompt)} tokens and its longest option {longest}: "
                f"{question.tokens} tokens, but the model's context is {context}"
            )


def rank(question: Question, sums: Sequence[float], gold: str) -> dict[str, Verdict]:
    """The verdicts of the two scorers.

    Args:
        sums: log-probability of each option in nats, of `score_options`.
    """
    per_character = [total / len(option.text) for total, option in zip(sums, question.options, strict=True)]
    verdicts = {}
    for name, values in (("likelihood", sums), ("likelihood_per_character", per_character)):
        chosen = question.options[values.index(max(values))].answer
        verdicts[name] = Verdict(chosen, gold, chosen == gold)
    return verdicts


def ranked_options(question: Question, sums: Sequence[float]) -> tuple[RankedOption, ...]:
    """The options with their log-probabilities, as a report has them."""
    return tuple(RankedOption(*option, total) for option, total in zip(question.options, sums, strict=True))


def score_options(
    model: PreTrainedModel,
    questions: Sequence[Question],
    chosen: Sequence[int],
    *,
    pad_id: int,
    batch_size: int,
    progress: Callable[[Mapping[int, list[float]]], None] | None = None,
) -> list[list[float]]:
    """Log-probabilities of the options of some questions behind their prompts; a collective if sharded.

    Longest first, so that the batch that needs the most memory comes first.  Modules are in eval mode
    meanwhile.

    Args:
        questions: of the task.  Ranks of a sharded model must pass the same ones, so that all compute
            equally many batches.
        chosen: indices of those that this rank scores; equally many on all ranks.
        pad_id: any token that the model has.
        batch_size: options computed at once.
        progress: called after each batch with its results by index into `chosen`.
    Returns: for each chosen question the sum of the log-probabilities of each option's tokens, in nats.
    Raises: NonFiniteLogitsError: after the batch; of a sharded model at the end.
    """
    per_batch = max(1, batch_size // max(len(question.options) for question in questions))
    several_tokens = any(len(ids) > 1 for question in questions for ids in question.continuations)
    order = sorted(range(len(chosen)), key=lambda i: questions[chosen[i]].tokens, reverse=True)
    watch = LogitsWatch(model.device)
    done: dict[int, list[float]] = {}
    with evaluation_mode(model), torch.no_grad():
        prefix = None
        if _keeps_keys(model):
            shared = common_prefix([question.prompt for question in questions])
            prefix = as_forward(model, _compute_prefix)(questions[0].prompt[:shared])
        for start in range(0, len(order), per_batch):
            indices = order[start : start + per_batch]
            batch = [questions[chosen[i]] for i in indices]
            if prefix is None:
                sums = as_forward(model, _score_whole)(batch, pad_id, watch)
            else:
                sums = as_forward(model, _score_behind_prompts)(batch, pad_id, watch, prefix, several_tokens)
            if not isinstance(model, FSDPModule):
                watch.check(model)
            found = dict(zip(indices, sums, strict=True))
            done.update(found)
            if progress is not None:
                progress(found)
    watch.check(model)
    return [done[i] for i in range(len(chosen))]


def _keeps_keys(model: PreTrainedModel) -> bool:
    """Whether keys of a prompt serve several options: of all tokens, unchanged by what follows."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return why_not(model) is None and not any(isinstance(each, DynamicSlidingWindowLayer) for each in layers)


def _compute_prefix(model: PreTrainedModel, ids: Sequence[int]) -> DynamicCache:
    """Keys and values of a sequence, (1, heads, C, head size) a layer; of none, an empty cache."""
    cache = DynamicCache(config=model.config.get_text_config())
    if ids:
        ids_1C = torch.tensor([list(ids)], device=model.device)
        model.get_decoder()(input_ids=ids_1C, past_key_values=cache, use_cache=True)
    return cache


def _score_behind_prompts(
    model: PreTrainedModel,
    batch: Sequence[Question],
    pad_id: int,
    watch: LogitsWatch,
    prefix: DynamicCache,
    several_tokens: bool,
) -> list[list[float]]:
    """Sums for each question's options, with the keys of its prompt computed once.

    Both the prompts and the options are padded on the right; a mask hides the padding between them.

    Args:
        prefix: keys of what all prompts begin with.
        several_tokens: whether an option of any batch, of any rank, has more than one token.
    """
    decoder, device = model.get_decoder(), model.device
    length = prefix.get_seq_length()
    rests = [question.prompt[length:] for question in batch]
    cache = deepcopy(prefix)
    cache.batch_repeat_interleave(len(batch))
    ids_BR = _padded(rests, pad_id, device)
    positions_1R = length + torch.arange(ids_BR.shape[1], device=device)[None]
    hidden_BRI = decoder(
        input_ids=ids_BR, position_ids=positions_1R, past_key_values=cache, use_cache=True
    ).last_hidden_state
    lengths_B = torch.tensor([len(rest) for rest in rests], device=device)
    hidden_XI = hidden_BRI[torch.arange(len(batch), device=device), lengths_B - 1]
    rows = [row for row, question in enumerate(batch) for _ in question.continuations]
    options = [ids for question in batch for ids in question.continuations]
    columns = max(1, max(map(len, options)) - 1)
    if several_tokens:
        rows_N = torch.tensor(rows, device=device)
        lengths_N1 = lengths_B[rows_N][:, None]
        cache.batch_select_indices(rows_N)
        ids_NQ = _padded([[*ids[:-1]] or [pad_id] for ids in options], pad_id, device)
        visible_NR = torch.arange(ids_BR.shape[1], device=device) < lengths_N1
        before, behind = (visible_NR.new_ones(len(rows), width) for width in (length, columns))
        hidden_NQI = decoder(
            input_ids=ids_NQ,
            attention_mask=torch.cat([before, visible_NR, behind], 1).long(),
            position_ids=length + lengths_N1 + torch.arange(columns, device=device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden_XI = torch.cat([hidden_XI, hidden_NQI.flatten(0, 1)])
    sources = [
        [row, *(len(batch) + n * columns + column for column in range(len(ids) - 1))]
        for n, (row, ids) in enumerate(zip(rows, options, strict=True))
    ]
    return _sums(model, batch, hidden_XI, sources, watch)


def _score_whole(
    model: PreTrainedModel, batch: Sequence[Question], pad_id: int, watch: LogitsWatch
) -> list[list[float]]:
    """Sums for each question's options, each computed with its prompt, for architectures of any kind."""
    pairs = [(question.prompt, ids) for question in batch for ids in question.continuations]
    # Padded on the right no token attends to padding, so that no mask is needed.
    ids_NT = _padded([[*prompt, *ids[:-1]] for prompt, ids in pairs], pad_id, model.device)
    hidden_NTI = model.get_decoder()(input_ids=ids_NT, use_cache=False).last_hidden_state
    sources = []
    for row, (prompt, ids) in enumerate(pairs):
        first = row * ids_NT.shape[1] + len(prompt) - 1
        sources.append(list(range(first, first + len(ids))))
    return _sums(model, batch, hidden_NTI.flatten(0, 1), sources, watch)


def _padded(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows], device=device)


def _sums(
    model: PreTrainedModel,
    batch: Sequence[Question],
    hidden_XI: torch.Tensor,
    sources: Sequence[Sequence[int]],
    watch: LogitsWatch,
) -> list[list[float]]:
    """Sum the log-probabilities of each option's tokens.

    Args:
        hidden_XI: what the decoder computed.
        sources: for each option the rows of it after which its tokens stand.
    """
    options = [ids for question in batch for ids in question.continuations]
    device = hidden_XI.device
    chosen_M = torch.tensor([row for rows in sources for row in rows], device=device)
    tokens_M = torch.tensor([token for ids in options for token in ids], device=device)
    owners_M = torch.tensor([n for n, ids in enumerate(options) for _ in ids], device=device)
    log_p_M = _log_probabilities(model, hidden_XI[chosen_M], tokens_M)
    watch.see(log_p_M)
    sums_N = torch.zeros(len(options), dtype=torch.float64, device=device)
    sums = iter(sums_N.index_add_(0, owners_M, log_p_M.double()).tolist())
    return [[next(sums) for _ in question.continuations] for question in batch]


def _log_probabilities(
    model: PreTrainedModel, hidden_MI: torch.Tensor, tokens_M: torch.Tensor
) -> torch.Tensor:
    """(M,) float32 log-probabilities of tokens, with the logits of a chunk of positions at a time."""
    head = model.get_output_embeddings()
    step = max(1, CHUNK_BYTES // (4 * head.out_features))
    parts = []
    with gathered(head) as logits_of:
        for hidden, tokens in zip(hidden_MI.split(step), tokens_M.split(step), strict=True):
            logits = _as_the_model_has_them(logits_of(hidden).float(), model.config.get_text_config())
            parts.append(-F.cross_entropy(logits, tokens, reduction="none"))
    return torch.cat(parts)


def _as_the_model_has_them(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What some architectures do to logits behind the output layer."""
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits
