"""Run directories with an adapter off the identity, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdora.adapters.inject import adapted_layers, inject
from qdora.adapters.peft_io import save_adapter
from qdora.config import RunConfig
from qdora.config_file import check_config, dump_config
from qdora.models.load import load_base
from tests.e2e.runs import tiny_tree
from tests.unit.adapters.oracle import move_off_the_identity


def write_run(folder: Path, model: Path, *, dora: bool = True, seed: int = 0, **settings: Any) -> RunConfig:
    """Write what a finished run leaves that is needed to use it.

    Args:
        settings: of the base model.
    """
    folder.mkdir(parents=True)
    tree = tiny_tree(folder, model)
    tree["model"] |= settings
    tree["adapter"] = {"r": 4, "alpha": 11.0, "dora": dora, "targets": ["q_proj", "up_proj", "down_proj"]}
    tree["output"]["dir"] = str(folder)
    config = check_config(tree, RunConfig, "test")
    base, _ = load_base(str(model), quantization=config.model.quantization, dtype="float32")
    inject(base, config.adapter)
    for number, layer in enumerate(adapted_layers(base).values()):
        move_off_the_identity(layer, 100 * seed + number)
    save_adapter(base, folder / "adapter")
    (folder / "config.yaml").write_text(dump_config(config))
    return config
