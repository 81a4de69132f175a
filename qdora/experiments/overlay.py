"""Overlays: files of settings on top of a comparison, for example a small model and few steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field

from qdora.config import Section
from qdora.config_file import apply_overrides, check_config, find_shipped, load_config, read_yaml
from qdora.errors import InputError, suggest
from qdora.experiments.arms import CompareConfig, covers


class OverlayConfig(Section):
    """Settings on top of a comparison's own; what they do not name stays as it is."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Settings by dotted key on top of the comparison's `set`. An arm's own `set` comes after. A section as a
    value replaces the keys in it."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings on top of those of the arms whose names a glob matches. One that matches none is an error."""


def load_comparison(
    path: str | Path, overrides: Sequence[str], overlays: Sequence[str], *, small: bool
) -> CompareConfig:
    """A comparison with its overlays, and `--set` on top of both.

    With overlays it is written to a directory of its own, `output.dir`, a hyphen and what they are called,
    and has no published numbers, which are not of these settings.

    Args:
        path: YAML file of the comparison, or `qdora:NAME`.
        overrides: `key=value`, keys of the comparison.
        overlays: files or `qdora:NAME`, relative to the working directory; a later one comes on top.
        small: first those that the comparison names in `small`, relative to its file.
    Raises: InputError: a file is missing or wrong; `small`, and the comparison names none; a pattern of
        arms matches none.
    """
    if not overlays and not small:
        return load_config(path, overrides, CompareConfig)
    config = check_config(read_yaml(path), CompareConfig, str(path))
    if small and not config.small:
        raise InputError(f"--small: {path} names no overlays under the key 'small'; give one with --overlay")
    chosen: list[str | Path] = []
    if small:
        chosen += [find_shipped(name, beside=find_shipped(path)) for name in config.small]
    for overlay in [*chosen, *overlays]:
        config = overlaid(config, load_config(overlay, [], OverlayConfig), str(overlay))
    tree = config.model_dump(mode="json")
    names = [*(["small"] if small else []), *(Path(overlay).stem for overlay in overlays)]
    tree["output"]["dir"] = "-".join([config.output.dir, *names])
    for key in ("published", "published_source"):  # of the settings that an overlay replaces
        del tree[key]
    apply_overrides(tree, overrides)
    return check_config(tree, CompareConfig, str(path))


def base_sections(config: CompareConfig, path: str | Path) -> dict[str, Any]:
    """The run configuration that all arms share, before it is checked.

    Args:
        path: the comparison's YAML file, or `qdora:NAME`.
    Raises: InputError: there is no such base.
    """
    if isinstance(config.base, str):
        return read_yaml(find_shipped(config.base, beside=find_shipped(path)))
    return config.base


def overlaid(config: CompareConfig, overlay: OverlayConfig, origin: str) -> CompareConfig:
    """A comparison with the settings of one overlay.

    Args:
        origin: of the overlay, named in errors.
    Raises: InputError: a pattern matches no arm; an arm may not set a key.
    """
    names = [arm.name for arm in config.arms]
    for pattern in overlay.arms:
        if not _matching(names, pattern):
            raise InputError(f"{origin}: arms: {pattern!r} matches none; {suggest(pattern, names)}")
    tree = config.model_dump(mode="json")
    tree["set"] = _on_top(config.set, overlay.set)
    for arm in tree["arms"]:
        for pattern, settings in overlay.arms.items():
            if _matching([arm["name"]], pattern):
                arm["set"] = _on_top(arm["set"], settings)
                if arm["may_differ"] is not None:
                    arm["may_differ"] = [*dict.fromkeys([*arm["may_differ"], *settings])]
    return check_config(tree, CompareConfig, origin)


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if fnmatchcase(name, pattern)]


def _on_top(settings: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted key, with others on top: a section replaces the keys in it that were set before."""
    return {key: value for key, value in settings.items() if not covers(others, key)} | dict(others)
