"""Fine-tune LLaMA-family models with QDoRA: NF4 base weights and bf16 DoRA adapters that really learn.

    model, tokenizer = load_base("folder-or-hub-id")
    report = inject(model, AdapterConfig(r=16, alpha=32))

Names are imported on first use: `import qdora` alone loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdora.adapters.inject import (
        InjectionReport,
        adapters_off,
        inject,
        merge_adapters,
        merge_and_unload,
        unmerge_adapters,
    )
    from qdora.adapters.label_logits import logits_at_labels
    from qdora.adapters.layer import AdaptedLinear
    from qdora.adapters.peft_io import load_adapter, save_adapter
    from qdora.adapters.peft_model import AccelerationReport, accelerate, restore
    from qdora.config import AdapterConfig
    from qdora.errors import InputError
    from qdora.evaluation.evaluate import evaluate
    from qdora.evaluation.scores import Scores
    from qdora.export.merged import merge_and_export
    from qdora.models.load import load_base
    from qdora.tasks.scoring import score_answer

__all__ = [
    "AccelerationReport",
    "AdaptedLinear",
    "AdapterConfig",
    "InjectionReport",
    "InputError",
    "Scores",
    "accelerate",
    "adapters_off",
    "evaluate",
    "inject",
    "load_adapter",
    "load_base",
    "logits_at_labels",
    "merge_adapters",
    "merge_and_export",
    "merge_and_unload",
    "restore",
    "save_adapter",
    "score_answer",
    "unmerge_adapters",
]

_HOMES = {
    "AccelerationReport": "qdora.adapters.peft_model",
    "AdaptedLinear": "qdora.adapters.layer",
    "AdapterConfig": "qdora.config",
    "InjectionReport": "qdora.adapters.inject",
    "InputError": "qdora.errors",
    "Scores": "qdora.evaluation.scores",
    "accelerate": "qdora.adapters.peft_model",
    "adapters_off": "qdora.adapters.inject",
    "evaluate": "qdora.evaluation.evaluate",
    "inject": "qdora.adapters.inject",
    "load_adapter": "qdora.adapters.peft_io",
    "load_base": "qdora.models.load",
    "logits_at_labels": "qdora.adapters.label_logits",
    "merge_adapters": "qdora.adapters.inject",
    "merge_and_export": "qdora.export.merged",
    "merge_and_unload": "qdora.adapters.inject",
    "restore": "qdora.adapters.peft_model",
    "save_adapter": "qdora.adapters.peft_io",
    "score_answer": "qdora.tasks.scoring",
    "unmerge_adapters": "qdora.adapters.inject",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qdora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
