"""Short loss curves of every method on a tiny LLaMA; `python -m tests.golden.curves` records them anew."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import PreTrainedModel

from qdora.config import TrainingConfig
from qdora.data.rows import Example
from qdora.data.tokenize import tokenize_examples
from qdora.models.load import load_base
from qdora.training.loop import Callbacks, Trainer
from tests.axes import METHODS, adapt
from tests.tiny import cpu_context, tiny_tokenizer, write_tiny_model

RECORD = Path(__file__).with_name("curves.json")
CURVES = tuple(METHODS)
RATES = {"vera": 5e-2, "vora": 5e-2, "magnitude": 5e-2, "full": 1e-3}
"""Learning rates other than 5e-3, by the end of a method's name."""


def examples() -> list[Example]:
    return [
        Example(
            f"{a} plus {b}?", f"{a} + {b} = {a + b}. The answer is {a + b}.", str(a + b), "sums", f"{a}+{b}"
        )
        for a in range(8)
        for b in range(4)
    ]


def rate(method: str) -> float:
    return next((value for end, value in RATES.items() if method.endswith(end)), 5e-3)


def loss_curve(method: str, folder: Path) -> list[float]:
    """Losses of 15 steps with seed 0 on the same data."""
    model: PreTrainedModel
    model, _ = load_base(str(folder), quantization=METHODS[method].quantization, dtype="float32")
    adapt(model, method, r=4, alpha=16)
    tokenized, _ = tokenize_examples(examples(), tiny_tokenizer(), "question_answer", 128, "stop")
    config = TrainingConfig(max_steps=15, batch_size=8, learning_rate=rate(method), warmup_steps=2)
    losses: list[float] = []
    callbacks = Callbacks(log=lambda m: losses.append(m.loss), save=lambda _: None, evaluate=lambda _: None)
    Trainer(model, tokenized, config, cpu_context(), pad_id=0).run(0, callbacks)
    return losses


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        tiny = write_tiny_model(Path(temporary) / "tiny")
        RECORD.write_text(json.dumps({m: loss_curve(m, tiny) for m in CURVES}, indent=1) + "\n")
