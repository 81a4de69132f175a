"""Scores on disk: `TASK.json` and, one line per question, `TASK.predictions.jsonl`.

Both are written under temporary names beside their place and renamed when complete; a
`TASK.json` that is there always has its predictions.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qdora.errors import InputError
from qdora.evaluation.answers import Verdict
from qdora.evaluation.scores import Prediction, ScorerResult, Scores


def write_scores(scores: Scores, directory: str | Path) -> Path:
    """Write one task's two files, over those of an earlier evaluation.

    Args:
        directory: made where it is missing.
    Returns: the path of `TASK.json`; what a file name cannot hold is percent-encoded (`org%2Fname.json`).
    Raises: InputError: the disk refuses; what was there before is then still whole.
    """
    directory = Path(directory)
    # Encoded, not replaced: no two tasks may share a file.
    stem = quote(scores.task, safe="")
    path, predictions_path = directory / f"{stem}.json", directory / f"{stem}.predictions.jsonl"
    tree = asdict(scores) | {"tokens_per_second": scores.tokens_per_second}
    lines = [json.dumps(prediction, allow_nan=False) + "\n" for prediction in tree.pop("predictions")]
    contents = {predictions_path: "".join(lines), path: json.dumps(tree, indent=2, allow_nan=False) + "\n"}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace_all(contents)
    except OSError as error:
        raise InputError(f"{path}: scores cannot be written: {error}") from error
    return path


def read_scores(path: str | Path) -> Scores:
    """Read one task's scores and predictions back.

    Args:
        path: `TASK.json`; the predictions lie beside it.
    Raises: InputError: a file is missing, is not what `write_scores` writes, or the two disagree.
    """
    path = Path(path)
    tree = _parse(path, _read_text(path))
    predictions_path = path.with_name(f"{path.stem}.predictions.jsonl")
    lines = _read_text(predictions_path).split("\n")[:-1]
    try:
        scores = _scores(tree, [_prediction(predictions_path, n, line) for n, line in enumerate(lines, 1)])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a score file of this program: {error!r}") from None
    if scores.total != len(scores.predictions):
        raise InputError(f"{path}: {scores.total} questions, but {predictions_path} has {len(lines)} lines")
    return scores


def _replace_all(contents: Mapping[Path, str]) -> None:
    """All texts to the disk first, then all into place, so that a full disk changes nothing."""
    temporary = {target: target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in contents}
    try:
        for target, text in contents.items():
            _write_synced(temporary[target], text)
        for target in contents:
            temporary[target].replace(target)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):  # the write's own error is the one to report
                path.unlink(missing_ok=True)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: scores cannot be read: {error}") from None


def _parse(path: Path, text: str, line: int | None = None) -> dict[str, Any]:
    where = path if line is None else f"{path}:{line}"
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(tree).__name__}")
    return tree


def _scores(tree: dict[str, Any], predictions: Sequence[Prediction]) -> Scores:
    fields = {key: value for key, value in tree.items() if key != "tokens_per_second"}
    fields["interval"] = tuple(tree["interval"])
    fields["per_scorer"] = {name: _result(result) for name, result in tree["per_scorer"].items()}
    return Scores(**fields, predictions=tuple(predictions))


def _result(tree: dict[str, Any]) -> ScorerResult:
    return ScorerResult(**{**tree, "interval": tuple(tree["interval"])})


def _prediction(path: Path, number: int, line: str) -> Prediction:
    tree = _parse(path, line, number)
    try:
        scorers = {name: Verdict(**verdict) for name, verdict in tree["scorers"].items()}
        return Prediction(**{**tree, "scorers": scorers})
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}:{number}: not a prediction of this program: {error!r}") from None
