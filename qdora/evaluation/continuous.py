"""Continuous batching: a finished sequence leaves the batch, and a waiting prompt takes its place.

Sequences end in the same column, as with left padding.  A prompt of L tokens that enters when t columns have
passed stands in the columns t - L to t - 1, so that distances between columns are distances between tokens,
whatever mask a model makes of them, and every step computes one token of each sequence.

Shapes: S slots, N sequences in the batch, Q tokens of each that a pass computes, K columns that it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

MODEL_TYPES = (
    "cohere",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)
"""Architectures whose answers a test holds against those of transformers' `generate`."""

STATIC_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings in which a sequence's do not depend on the others in the batch."""

SPARE_COLUMNS = 64
"""Columns of the cache beyond the longest sequence: the batch moves to the left once in so many steps."""

SHORTEST_PREFIX = 16
"""Tokens that prompts share from which on a pass of their own pays."""

REFILL = 8
"""Prompts enter when one in so many slots is free: a pass over few costs nearly as much as one over many."""

STEPS_BETWEEN_LOOKS = 8
"""Steps on a GPU after which the host looks which sequences have ended; until then it need not wait."""


def why_not(model: PreTrainedModel) -> str | None:
    """Why a model's sequences cannot be batched continuously; None where they can."""
    config = model.config.get_text_config()
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} is not among the architectures that are known to allow it"
    rope = _rope_types(config) - set(STATIC_ROPES)
    if rope:
        return f"rotary embeddings of type {min(rope)} depend on the longest sequence of a batch"
    return None


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Those of all layers: a model has one set of parameters, or one a kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(each.get("rope_type", "default")) for each in nested or [parameters]}


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, the last of each left out; 0 where a pass does not pay."""
    if len(prompts) < 2:
        return 0
    low, high = min(map(tuple, prompts)), max(map(tuple, prompts))  # what these two share, all share
    most = min(len(prompt) for prompt in prompts) - 1
    shared = next((i for i in range(most) if low[i] != high[i]), most)
    return shared if shared >= SHORTEST_PREFIX else 0


@dataclass
class _Window:
    """The part of the cache that a pass sees.

    Attributes:
        first, stop: rows.
        start: first column.
        write: column of the first of its tokens; it sees the columns up to its last.
    """

    first: int
    stop: int
    start: int
    write: int


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (S, heads, columns, head size), allocated at the first pass."""

    is_croppable = False

    def __init__(self, shape: tuple[int, int], window: _Window, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.window, self.is_sliding = shape, window, is_sliding

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As of the base class."""
        slots, columns = self.shape
        # Zeros: what a mask hides is multiplied by 0, and must be a number.
        self.keys = key_states.new_zeros(slots, key_states.shape[1], columns, key_states.shape[3])
        self.values = value_states.new_zeros(slots, value_states.shape[1], columns, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new columns of the window's rows; views of all that the window sees."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        window = self.window
        rows, end = slice(window.first, window.stop), window.write + key_states.shape[2]
        self.keys[rows, :, window.write : end] = key_states
        self.values[rows, :, window.write : end] = value_states
        return self.keys[rows, :, window.start : end], self.values[rows, :, window.start : end]

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values, where there are any yet."""
        return [tensor for tensor in (self.keys, self.values) if tensor is not None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As of the base class."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns before those that a pass computes."""
        return self.window.write - self.window.start

    def get_max_length(self) -> int:
        """As of the base class."""
        return self.shape[1]


class _SlotCache(Cache):
    """Keys and values of a batch whose rows and columns come and go.

    All layers keep all columns, those of sliding attention too: their mask hides what is too far.
    """

    def __init__(self, config: PreTrainedConfig, slots: int, columns: int) -> None:
        self.window = _Window(0, 0, 0, 0)
        sliding = [
            isinstance(layer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=[_SlotLayer((slots, columns), self.window, each) for each in sliding])
        self.columns = columns

    def see(self, first: int, stop: int, start: int, write: int) -> None:
        """Choose what the next pass sees; as `_Window`."""
        window = self.window
        window.first, window.stop, window.start, window.write = first, stop, start, write

    def tensors(self) -> Iterator[torch.Tensor]:
        """Keys and values of all layers."""
        for layer in self.layers:
            assert isinstance(layer, _SlotLayer)
            yield from layer.tensors()

    def move_row(self, source: int, target: int, columns: slice) -> None:
        """Copy a sequence to another row."""
        for tensor in self.tensors():
            tensor[target, :, columns] = tensor[source, :, columns]

    def move_left(self, rows: int, columns: slice) -> None:
        """Move columns to the first ones, in the first rows."""
        for tensor in self.tensors():
            tensor[:rows, :, : columns.stop - columns.start] = tensor[:rows, :, columns].clone()

    def copies(self, row: int, columns: slice) -> list[torch.Tensor]:
        """(heads, columns, head size) of a row, by layer."""
        return [tensor[row, :, columns].clone() for tensor in self.tensors()]

    def fill(self, prefixes: Sequence[torch.Tensor], first: int, starts: Sequence[int]) -> None:
        """Write a prefix, of `copies`, into the rows from `first` on, each from its own column on."""
        device, length = prefixes[0].device, prefixes[0].shape[1]
        rows_N1 = torch.arange(first, first + len(starts), device=device)[:, None]
        columns_NP = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        for tensor, prefix in zip(self.tensors(), prefixes, strict=True):
            tensor[rows_N1, :, columns_NP] = prefix.transpose(0, 1)


@dataclass
class _Sequence:
    """A sequence in the batch: its prompt's index, and what was generated."""

    index: int
    start: int
    ids: list[int] = field(default_factory=list)
    ended: bool = False


class Batch:
    """Greedy generation in a batch of changing sequences.

    Args:
        model: in evaluation mode; `why_not` is None.
        watch: sees the logits of every step.
        ended: whether generated ids end an answer that no EOS ends.
        synced: the model is sharded over ranks: see `_pass`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        *,
        pad_id: int,
        eos_ids: Sequence[int],
        max_new_tokens: int,
        slots: int,
        watch: Callable[[torch.Tensor], None],
        synced: bool,
        ended: Callable[[list[int]], bool] = lambda ids: False,
    ) -> None:
        self.ended = ended
        self.model, self.prompts, self.pad_id, self.synced, self.watch = model, prompts, pad_id, synced, watch
        self.eos_ids, self.max_new_tokens = frozenset(eos_ids), max_new_tokens
        self.slots = max(1, min(slots, len(prompts)))
        # Longest first: the batch that needs the most memory comes first, and a prompt that enters later is
        # no longer than those before it.
        self.waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        self.width = max(map(len, prompts), default=0) + max_new_tokens
        spare = SPARE_COLUMNS if len(prompts) > self.slots else 0
        config = model.config.get_text_config()
        self.cache = _SlotCache(config, self.slots, self.width + spare)
        # Others want transformers to make the masks: for sliding attention, or to add instead of to choose.
        self.own_masks = config._attn_implementation == "sdpa" and not any(self.cache.is_sliding)
        self.batch: list[_Sequence] = []
        self.column = 0  # that of the next token of every sequence
        self.last_N = torch.empty(0, dtype=torch.long, device=model.device)
        self.starts_N = self.last_N
        self.prefix: list[torch.Tensor] = []
        self.steps_between_looks = 1 if model.device.type == "cpu" else STEPS_BETWEEN_LOOKS

    def run(self) -> Iterator[dict[int, list[int]]]:
        """Generate; yields token ids, the EOS included, by index, of the sequences that have ended."""
        shared = common_prefix(self.prompts)
        if shared:
            self._compute_prefix(self.prompts[0][:shared])
        while self.waiting or self.batch:
            free = self.slots - len(self.batch)
            if self.waiting and free >= max(1, self.slots // REFILL):
                self._enter(free)
            else:
                self._step()
            ended = self._leave()
            if ended:
                yield ended
        while self._others_go_on():
            self._pass(torch.full((1, 1), self.pad_id, device=self.model.device), {})

    def _compute_prefix(self, ids: Sequence[int]) -> None:
        self.cache.see(0, 1, 0, 0)
        self._call([list(ids)], torch.zeros(1, dtype=torch.long, device=self.model.device))
        self.prefix = self.cache.copies(0, slice(0, len(ids)))

    def _enter(self, free: int) -> None:
        """Compute the longest waiting prompts, beside the sequences that are there."""
        chosen = [self.waiting.pop() for _ in range(min(free, len(self.waiting)))]
        prompts = [self.prompts[index] for index in chosen]
        longest = len(prompts[0])
        if not self.batch:
            self.column = longest
        assert self.column >= longest
        first, starts = len(self.batch), [self.column - len(prompt) for prompt in prompts]
        computed = longest
        if self.prefix:
            length = self.prefix[0].shape[1]
            # A shorter prompt has some tokens of the prefix computed again, rather than padding.
            computed = longest - length
            self.cache.fill(self.prefix, first, starts)
        ids = [[self.pad_id] * (computed - len(p)) + list(p[-computed:]) for p in prompts]
        starts_N = torch.tensor(starts, device=self.model.device)
        self.cache.see(first, first + len(chosen), min(starts), self.column - computed)
        last_N = self._call(ids, starts_N)
        self.batch += [_Sequence(index, start) for index, start in zip(chosen, starts, strict=True)]
        self.last_N, self.starts_N = torch.cat([self.last_N, last_N]), torch.cat([self.starts_N, starts_N])
        self._note([last_N], first)

    def _step(self) -> None:
        """Compute tokens of all sequences, as many as no sequence's limit forbids, and as it pays to."""
        left = self.max_new_tokens - max(len(sequence.ids) for sequence in self.batch)
        steps: list[torch.Tensor] = []
        for _ in range(min(left, self.steps_between_looks)):
            if self.column == self.cache.columns:
                self._move_left()
            rows, start = len(self.batch), min(sequence.start for sequence in self.batch)
            self.cache.see(0, rows, start, self.column)
            self.column += 1
            self.last_N = self._call(self.last_N[:, None], self.starts_N)
            steps.append(self.last_N)
        self._note(steps, 0)

    def _note(self, steps: Sequence[torch.Tensor], first: int) -> None:
        """Take over generated tokens, (N,) each step, of the sequences from `first` on; waits for them."""
        for sequence, ids in zip(self.batch[first:], torch.stack(list(steps), 1).tolist(), strict=True):
            for token in ids:
                sequence.ids.append(token)
                sequence.ended = token in self.eos_ids or self.ended(sequence.ids)
                if sequence.ended:
                    break

    def _leave(self) -> dict[int, list[int]]:
        """Take what has ended out of the batch; the last rows take the empty places."""
        ended: dict[int, list[int]] = {}
        rows = list(range(len(self.batch)))
        for row in reversed(range(len(self.batch))):
            sequence = self.batch[row]
            if len(sequence.ids) < self.max_new_tokens and not sequence.ended:
                continue
            ended[sequence.index] = sequence.ids
            last = self.batch.pop()
            source = rows.pop()
            if row < len(self.batch):
                self.batch[row], rows[row] = last, source
                self.cache.move_row(len(self.batch), row, slice(last.start, self.column))
        if ended:
            chosen = torch.tensor(rows, dtype=torch.long, device=self.last_N.device)
            self.last_N, self.starts_N = self.last_N[chosen], self.starts_N[chosen]
        return dict(reversed(ended.items()))

    def _move_left(self) -> None:
        """Make room for further columns."""
        start = min(sequence.start for sequence in self.batch)
        self.cache.move_left(len(self.batch), slice(start, self.column))
        self.column -= start
        self.starts_N = self.starts_N - start
        for sequence in self.batch:
            sequence.start -= start

    def _call(self, ids: torch.Tensor | list[list[int]], starts_N: torch.Tensor) -> torch.Tensor:
        """One pass over the window's rows; (N,) the token that follows each.

        Args:
            ids: (N, Q), padded on the left.
            starts_N: columns of the first tokens.
        """
        ids_NQ = torch.as_tensor(ids, device=self.model.device)
        window = self.cache.window
        columns_K = torch.arange(window.start, window.write + ids_NQ.shape[1], device=ids_NQ.device)
        columns_Q = columns_K[window.write - window.start :]
        mask = columns_K >= starts_N[:, None]
        if self.own_masks:  # transformers' would wait for the device, to find out whether there is padding
            causal_QK = columns_K <= columns_Q[:, None]
            itself_QK = columns_K == columns_Q[:, None]  # a row of padding alone has no softmax
            mask = ((mask[:, None] & causal_QK) | itself_QK)[:, None]
        more = {
            "attention_mask": mask,
            "position_ids": (columns_Q - starts_N[:, None]).clamp_min(0),
            "past_key_values": self.cache,
        }
        logits_NV = self._pass(ids_NQ, more)
        self.watch(logits_NV)
        return logits_NV.argmax(-1)

    def _pass(self, ids_NQ: torch.Tensor, more: dict[str, Any]) -> torch.Tensor:
        """(N, V) float32 logits after the last tokens.

        All ranks of a sharded model make equally many: before each they ask whether one has any left.
        """
        if more:
            self._others_go_on(self_too=True)
        use_cache = bool(more)
        logits = self.model(input_ids=ids_NQ, use_cache=use_cache, logits_to_keep=1, **more).logits
        last_NV: torch.Tensor = logits[:, -1].float()
        return last_NV

    def _others_go_on(self, self_too: bool = False) -> bool:
        """Whether a rank makes a further pass; a collective where the model is sharded."""
        if not self.synced:
            return False
        going = torch.tensor(int(self_too), device=self.model.device)
        dist.all_reduce(going)
        return self_too or bool(going)
