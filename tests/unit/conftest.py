"""A small real tokenizer, and files to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qdora.data.rows import Example
from qdora.data.templates import PROMPTS

SENTENCES = [
    "Anna has 12 apples and gives 5 to Ben. How many apples does Anna have left?",
    "12 - 5 = 7. The answer is 7.",
    *(template.text for template in PROMPTS.values() if template.text),
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """Builds a byte-level BPE tokenizer with the given special tokens."""

    def make(
        *, extra: tuple[str, ...] = (), closes_with_eos: bool = False, **roles: Any
    ) -> PreTrainedTokenizerFast:
        roles = {"bos_token": "<s>", "eos_token": "</s>", **roles}
        specials = list(dict.fromkeys(["<s>", "</s>", *(r for r in roles.values() if r), *extra]))
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(SENTENCES, trainer)
        ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        single = "<s> $A </s>" if closes_with_eos else "<s> $A"
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)

    return make


@pytest.fixture
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """BOS added by default, a pad token of its own, a chat template."""
    made = make_tokenizer(pad_token="<pad>")
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes objects, or raw lines, as JSON Lines."""

    def write(lines: list[dict[str, Any] | str], name: str = "data.jsonl") -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[..., Path]:
    """Writes a JSON array, one key a line, as the published files have it."""

    def write(rows: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=4), encoding="utf-8")
        return path

    return write


@pytest.fixture
def example() -> Callable[..., Example]:
    """An example of which only the interesting parts are given."""

    def make(question: str = "What is 3 + 4?", completion: str = "3 + 4 = 7.", **rest: str) -> Example:
        parts = {"answer": "7", "task": "test", "origin": "file:1", **rest}
        return Example(question, completion, **parts)

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data next to the project's folder, see its README; skipped where it is missing."""
    folder = (Path(__file__).parents[2] / "../shared/data").resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the development data at {folder}, which is not there")
    return folder
