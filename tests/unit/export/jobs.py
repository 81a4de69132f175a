"""Export jobs of tiny adapted models, as the command makes them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from qdora.adapters.inject import adapted_layers, inject
from qdora.config import RunConfig
from qdora.config_file import check_config
from qdora.distributed.context import DistributedContext
from qdora.export import FORMATS, OPTIONS
from qdora.export.job import ExportJob, load_format
from qdora.models.load import load_base
from qdora.models.sources import open_checkpoint
from tests.axes import METHODS, adapter_config
from tests.e2e.runs import tiny_tree
from tests.unit.adapters.oracle import move_off_the_identity

IDS = torch.arange(4, 28).view(2, 12)


def make_job(
    tmp_path: Path, model_folder: Path | str, form: str, *, method: str = "qdora", **options: Any
) -> ExportJob:
    """A job whose adapted model is loaded, computes in float32 and is off the identity.

    Args:
        options: of the format, and `quantization` and settings of the adapter.
    """
    pushed = options.pop("push_to_hub", None)
    defaults = {name.removeprefix("--").replace("-", "_"): None for name in OPTIONS}
    defaults |= {name.removeprefix("--"): value for name, value in FORMATS[form].options.items()}
    chosen = {name: options.pop(name) for name in list(options) if name in defaults}
    tmp_path.mkdir(exist_ok=True)
    quantization = options.pop("quantization", METHODS[method].quantization)
    model, tokenizer = load_base(str(model_folder), quantization=quantization, dtype="float32")
    inject(model, adapter_config(method=method, **({"r": 4, "alpha": 12} | options)))
    for seed, layer in enumerate(adapted_layers(model).values()):
        move_off_the_identity(layer, seed)
    tree = tiny_tree(tmp_path, model_folder)
    tree["model"]["quantization"] = quantization
    config = check_config(tree, RunConfig, "test")
    checkpoint = open_checkpoint(str(model_folder))
    context = DistributedContext(device=torch.device("cpu"))
    names = argparse.Namespace(run=None, model=None, set=[], push_to_hub=pushed, **(defaults | chosen))
    return ExportJob(
        names, config, tmp_path / "none", checkpoint, tokenizer, context, tmp_path / "out", model
    )


def exported(job: ExportJob, form: str) -> Path:
    """Where the format was written, after its checks."""
    chosen = load_format(form)
    chosen.check(job)
    job.output.mkdir()
    chosen.write(job, job.output)
    return job.output


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()
