"""Make trainable what a run trains: every parameter, a fresh adapter, or a saved one to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from qdora.adapters.base import DTYPES
from qdora.adapters.full import train_everything
from qdora.adapters.inject import (
    InjectionReport,
    adaptable_layers,
    count_parameters,
    inject,
    layer_config,
)
from qdora.adapters.patterns import match_layers
from qdora.adapters.peft_io import check_shapes, saved_config, saved_seed
from qdora.adapters.saved import SavedAdapter, read_saved
from qdora.adapters.tokens import token_rows, train_tokens
from qdora.config import AdapterConfig
from qdora.errors import InputError


def with_tokens(
    model: nn.Module, report: InjectionReport, config: AdapterConfig, ids: Sequence[int]
) -> InjectionReport:
    """Train the rows of tokens too, on a model that is loaded, or for its shapes on the meta device.

    Args:
        report: of the injection.
        ids: of `config.trainable_tokens`; empty where there are none.
    Returns: the report with them.
    Raises: InputError: as `train_tokens`; the adapter that the run goes on from has rows of other tokens.
    """
    own = list(token_rows(model).values())
    if own and {*own[0].ids} != {*ids}:
        raise InputError(
            f"adapter.trainable_tokens {list(config.trainable_tokens or ())} are the ids {sorted(ids)}, and "
            f"the adapter of adapter.from {config.from_} has rows of the ids {sorted(own[0].ids)}; name the "
            f"same tokens"
        )
    if not ids:
        return report
    if not own:
        train_tokens(model, ids, DTYPES[config.dtype])
    added = sum(rows.offset_KI.numel() for rows in token_rows(model).values())
    return replace(report, trainable=report.trainable + added, total=count_parameters(model))


@dataclass(frozen=True)
class Adapted:
    """What `adapt` did.

    Attributes:
        report: of the injection.
        config: the settings in force; those of the adapter that is gone on from, where there is one.
        start: that adapter; its values are yet to be assigned.
    """

    report: InjectionReport
    config: AdapterConfig
    start: SavedAdapter | None = None


def adapt(model: nn.Module, adapter: AdapterConfig, mode: str, *, seed: int = 0) -> Adapted:
    """Make trainable what a run trains, in place: every parameter in `training.mode` full, else an adapter.

    Args:
        seed: of a fresh adapter's random values.
    Raises: InputError: as `train_everything`, `inject`, or `continued`.
    """
    if mode == "full":
        return Adapted(train_everything(model), adapter)
    if adapter.from_ is None:
        return Adapted(inject(model, adapter, seed=seed), adapter)
    saved = read_saved(Path(adapter.from_))
    if saved.is_full:
        raise InputError(
            f"adapter.from {adapter.from_}: a fully trained model, not an adapter; export it, and name the "
            f"exported folder as model.path"
        )
    config = continued(model, adapter, saved)
    # A start that is made of the weight was made: the file has what came out, and what was subtracted.
    start = config.model_copy(update={"init": saved_config(model, saved).init})
    return Adapted(inject(model, start, seed=saved_seed(saved)), config, saved)


def continued(model: nn.Module, config: AdapterConfig, saved: SavedAdapter) -> AdapterConfig:
    """The settings of a run that goes on from an adapter.

    What says which numbers the file holds (type, magnitude, layers, rank and scale of each, start) is the
    adapter's; a configuration that sets one of these must come to the same.  Dropout and dtype are
    the configuration's where it sets them, else the adapter's; all else is the configuration's.

    Args:
        model: without an adapter.
        config: `model_fields_set` says what was set.
    Raises: InputError: the configuration contradicts the adapter, naming both; as `saved_config`.
    """
    own = saved_config(model, saved)
    check_shapes(model, saved, own)
    given = config.model_fields_set
    for key in ("type", "dora"):
        if key in given and getattr(config, key) != getattr(own, key):
            _refuse(key, config, getattr(own, key))
    if "init" in given and config.init != saved.init:
        _refuse("init", config, saved.init)
    layers = list(adaptable_layers(model))
    updates = list(own.targets) if own.type != "none" else []
    magnitudes = list(own.magnitude_targets or ())
    if own.type != "none" and "targets" in given:
        _compare_layers("targets", config, match_layers(layers, config.targets, "adapter.targets"), updates)
    alone = own.type == "none" and "targets" in given  # they are the magnitude's then
    if own.dora and (alone or "magnitude_targets" in given):
        patterns = config.magnitude_targets or (config.targets if "targets" in given else own.targets)
        key = "magnitude_targets" if config.magnitude_targets else "targets"
        _compare_layers(key, config, match_layers(layers, patterns, f"adapter.{key}"), magnitudes)
    taken = {
        "type": own.type,
        "dora": own.dora,
        "init": saved.init,
        "r": own.r,
        "alpha": own.alpha,
        "rslora": own.rslora,
        "rank_pattern": own.rank_pattern,
        "alpha_pattern": own.alpha_pattern,
        "dropout": own.dropout,
        "dtype": own.dtype,
        "targets": _shortest(layers, list(own.targets)),
        "magnitude_targets": None if magnitudes in ([], updates) else _shortest(layers, magnitudes),
    }
    kept = {key: getattr(config, key) for key in given if key not in ("from_", "init")}
    merged = AdapterConfig(**{"from": config.from_, **taken, **kept})
    _compare_numbers(merged, own, updates)
    return merged


def _compare_layers(key: str, config: AdapterConfig, named: list[str], has: list[str]) -> None:
    for name in sorted({*named} ^ {*has}):
        what = "has none there" if name in named else "has one there"
        raise InputError(
            f"adapter.{key} {'names' if name in named else 'leaves out'} {name}, and the adapter of "
            f"adapter.from {config.from_} {what}; leave adapter.{key} out"
        )


def _compare_numbers(merged: AdapterConfig, own: AdapterConfig, updates: list[str]) -> None:
    """Rank and scale of every layer, whatever settings they come from."""
    for name in updates:
        ours, theirs = layer_config(merged, name), layer_config(own, name)
        if ours.r != theirs.r:
            _refuse("r" if merged.r == ours.r else "rank_pattern", merged, theirs.r, name)
        if own.type != "vera" and abs(ours.scale - theirs.scale) > 1e-6 * theirs.scale:
            came = f"adapter.alpha {ours.alpha:g}{' with rslora' if ours.rslora else ''}"
            raise InputError(
                f"{came} scales the update of {name} by {ours.scale:g}, and the adapter of adapter.from "
                f"{merged.from_} is scaled by {theirs.scale:g} there; leave adapter.alpha, alpha_pattern and "
                f"rslora out, or set them so that they come to that"
            )


def _refuse(key: str, config: AdapterConfig, has: Any, where: str = "") -> NoReturn:
    raise InputError(
        f"adapter.{key} is {getattr(config, key)!r}, and the adapter of adapter.from {config.from_} has "
        f"{has!r}{f' at {where}' if where else ''}; leave adapter.{key} out, or set it to that"
    )


def _shortest(layers: list[str], names: list[str]) -> tuple[str, ...]:
    """The last components of the names where they mean these layers and no others, else the names."""
    ends = tuple(dict.fromkeys(name.rpartition(".")[2] for name in layers if name in {*names}))
    return ends if match_layers(layers, ends, "") == [n for n in layers if n in {*names}] else tuple(names)
