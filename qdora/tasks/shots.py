"""The examples that stand before every question of an evaluation: few-shot prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from random import Random
from typing import TYPE_CHECKING

from qdora.config import RunConfig
from qdora.data.rows import Example
from qdora.data.table import ExampleTable, first_chat
from qdora.data.tokenize import tokenize_examples
from qdora.errors import InputError
from qdora.tasks.prepare import load_test, load_training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def draw_shots(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, scored: Iterable[Example]
) -> dict[str, list[Example]]:
    """Draw `evaluation.shots` examples for each task of what is scored, the same ones for all its questions.

    They come from what the run trains on: the training set without test questions, without validation
    examples and without examples longer than `data.max_length`; from the examples of the question's own task
    where there are any.

    Args:
        scored: the examples that are scored; only their tasks matter, the test set is read for its questions.
    Returns: by task, in the order in which they stand in the prompt; empty where no shots are asked for.
    Raises:
        InputError: the training or test set cannot be loaded, or the training set has fewer examples.
        DataError: a bad row, and `data.bad_rows` is `stop`.
    """
    count = config.evaluation.shots
    if count == 0:
        return {}
    data = config.data
    clean = load_training(data, load_test(data, tokenizer).examples).train
    if first_chat(clean) is not None:
        raise InputError(
            f"evaluation.shots {count}: the training set holds chats, which cannot stand before a question "
            "as answered ones do; allowed there: 0"
        )
    tasks = dict.fromkeys(example.task for example in scored)
    of_example = clean.tasks if isinstance(clean, ExampleTable) else [e.task for e in clean]
    found = {}
    for task in tasks:
        own = [i for i, name in enumerate(of_example) if name == task]
        found[task] = _draw(clean, own or range(len(clean)), count, config, tokenizer)
    return found


def _draw(
    clean: Sequence[Example],
    pool: Sequence[int],
    count: int,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Example]:
    """Some of the examples that `pool` numbers."""
    data = config.data
    order = Random(config.evaluation.shots_seed).sample(pool, len(pool))
    drawn: list[Example] = []
    while order and len(drawn) < count:
        candidates, order = [clean[i] for i in order[:count]], order[count:]
        fitting, _ = tokenize_examples(
            candidates,
            tokenizer,
            data.prompt,
            data.max_length,
            "skip",
            parse_special_tokens=data.parse_special_tokens,
        )
        origins = {example.origin for example in fitting}
        drawn += [example for example in candidates if example.origin in origins]
    if len(drawn) < count:
        raise InputError(
            f"evaluation.shots {count}: the training set, source {data.train.source!r}, has "
            f"{len(drawn)} examples that fit into data.max_length {data.max_length}"
        )
    return drawn[:count]
