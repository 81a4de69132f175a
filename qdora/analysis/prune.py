"""Exact match of runs whose merged weights are pruned by magnitude, against the fraction that is pruned.

Pruning is unstructured and layer by layer: of each linear layer of the decoder the same fraction of entries
is zeroed, the smallest of the matrix, whatever their rows.  Nothing is trained afterwards.

Shape legend: I in_features, O out_features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tabulate import tabulate
from torch import nn

from qdora.adapters.full import compute_dtype_of
from qdora.adapters.inject import decoder_linears
from qdora.adapters.layer import AdaptedLinear
from qdora.config import RunConfig
from qdora.distributed.context import DistributedContext
from qdora.evaluation.evaluate import load_for_evaluation
from qdora.evaluation.scores import Scores, paired_difference
from qdora.files import write_csv, write_file, write_json
from qdora.resources import release_freed_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_COLORS = ("#1f6fb4", "#d1622b", "#2a8a4a", "#8456a8", "#b03060", "#1aa0a8")


@dataclass(frozen=True)
class PrunedScore:
    """The scores of one run at one sparsity.

    Attributes:
        run: its name.
        sparsity: fraction of each layer's weights that was asked for, at least 0, below 1.
        pruned, weights: entries zeroed, and all, of the layers that are pruned.
        scores: by task.
    """

    run: str
    sparsity: float
    pruned: int
    weights: int
    scores: Sequence[Scores]

    @property
    def exact_match(self) -> float:
        """Fraction of correct answers, between 0 and 1; of several tasks their unweighted mean."""
        return sum(score.score for score in self.scores) / len(self.scores)

    @property
    def questions(self) -> list[tuple[str, str]]:
        """Task and prompt of each answer."""
        return [(score.task, p.prompt) for score in self.scores for p in score.predictions]

    @property
    def correct(self) -> list[bool]:
        """Whether each answer is correct."""
        return [p.correct for score in self.scores for p in score.predictions]


def score_pruned(
    name: str,
    config: RunConfig,
    adapter: Path | None,
    sparsities: Sequence[float],
    context: DistributedContext,
) -> Iterator[PrunedScore]:
    """Merge a run's adapter, and score it by the run's evaluation at each sparsity, ascending.

    In memory is one dense model, which is pruned further and further: the smallest entries of a pruned matrix
    are those that it has lost already.

    Args:
        name: of the run.
        adapter: folder in PEFT's format; None for the base alone.
        sparsities: each at least 0 and below 1.
    Raises: InputError: as `evaluate_adapter`.
    """
    model, score_model = load_for_evaluation(config, adapter, context)
    matrices = merge_into_linears(model)
    release_freed_memory()
    weights = sum(w_OI.numel() for w_OI in matrices)
    for i, sparsity in enumerate(sorted(sparsities), 1):
        context.say(f"{name}: sparsity {sparsity:g} ({i} of {len(sparsities)})")
        pruned = sum(prune_smallest_(w_OI, sparsity) for w_OI in matrices)
        yield PrunedScore(name, sparsity, pruned, weights, score_model())


@torch.no_grad()
def merge_into_linears(model: PreTrainedModel) -> list[torch.Tensor]:
    """Replace every adapted layer by a plain one with the merged weight in the compute dtype, in place.

    An evaluation with merged weights computes the same, bit for bit.

    Args:
        model: of `load_model`, not sharded.
    Returns: (O, I) the weights of the decoder's layers; the output layer's is not among them.
    """
    dtype, inner = compute_dtype_of(model), set(decoder_linears(model))
    names = [name for name, module in model.named_modules() if isinstance(module, AdaptedLinear)]
    matrices = []
    for name in names:  # by name: a list of the layers would keep all of them in memory
        layer = model.get_submodule(name)
        assert isinstance(layer, AdaptedLinear)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(layer.merged(dtype), requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        model.set_submodule(name, linear)
        if name in inner:
            matrices.append(linear.weight.data)
    return matrices


def prune_smallest_(w_OI: torch.Tensor, sparsity: float) -> int:
    """Zero the entries of least magnitude of a matrix, in place; of equal ones those that come first.

    Args:
        w_OI: (O, I), contiguous.
        sparsity: fraction of its entries, at least 0, below 1.
    Returns: how many: round(sparsity * O * I).
    """
    count = round(sparsity * w_OI.numel())
    if count == 0:
        return 0
    w = w_OI.view(-1)
    magnitudes = w.abs().float()
    threshold = magnitudes.kthvalue(count).values
    smaller = magnitudes < threshold
    missing = count - int(smaller.sum())
    w.masked_fill_(smaller, 0)
    w[(magnitudes == threshold).nonzero()[:missing, 0]] = 0
    return count


def results(found: Sequence[PrunedScore]) -> list[dict[str, Any]]:
    """A row of numbers for each run, sparsity and task.

    Keys: run, sparsity, pruned, weights, task, correct, total, exact_match, stderr, interval_low and
    interval_high (95%, Wilson); difference, difference_stderr, p_value (exact McNemar) to the first run at
    this sparsity, over all tasks together, None of the first run and where the questions are not the same.
    """
    first = {entry.sparsity: entry for entry in found if entry.run == found[0].run}
    rows = []
    for entry in found:
        reference, difference = first.get(entry.sparsity, entry), None
        if reference.run != entry.run and reference.questions == entry.questions:
            difference = paired_difference(entry.correct, reference.correct)
        for score in entry.scores:
            row: dict[str, Any] = {"run": entry.run, "sparsity": entry.sparsity}
            row |= {"pruned": entry.pruned, "weights": entry.weights, "task": score.task}
            row |= {"correct": score.correct, "total": score.total, "exact_match": score.score}
            row |= {"stderr": score.stderr, "interval_low": score.interval[0]}
            row |= {"interval_high": score.interval[1]}
            row["difference"] = None if difference is None else difference.difference
            row["difference_stderr"] = None if difference is None else difference.stderr
            row["p_value"] = None if difference is None else difference.p_value
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `results` as text, scores and differences in percent."""
    lines = []
    for row in rows:
        line = [f"{row['sparsity']:g}", row["run"], row["task"]]
        line += [f"{100 * row['exact_match']:.1f} ± {100 * row['stderr']:.1f}"]
        line += [f"{row['correct']}/{row['total']}"]
        if row["difference"] is not None:
            difference = f"{100 * row['difference']:+.1f} ± {100 * row['difference_stderr']:.1f}"
            line += [difference, f"{row['p_value']:.3f}"]
        lines.append(line)
    lines.sort(key=lambda line: float(line[0]))
    headers = ["sparsity", "run", "task", "exact match, %", "correct"]
    if any(row["difference"] is not None for row in rows):
        headers += [f"minus {rows[0]['run']}, points", "p (exact McNemar)"]
    return tabulate(lines, headers=headers, disable_numparse=True)


def write_results(folder: Path, found: Sequence[PrunedScore], settings: dict[str, Any]) -> None:
    """Write scores.csv (a row a run, sparsity and task), scores.png and figures.json.

    Args:
        settings: how it was measured, for the JSON file.
    """
    rows = results(found)
    write_csv(folder / "scores.csv", rows)
    write_json(folder / "figures.json", {**settings, "scores": rows})
    plot(found, folder / "scores.png")


def plot(found: Sequence[PrunedScore], path: Path) -> None:
    """Exact match over sparsity, a line a run, with the 95% interval of a score of one task.

    Args:
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=130, layout="tight")
    axes = figure.subplots()
    for i, run in enumerate(dict.fromkeys(entry.run for entry in found)):
        own, color = [entry for entry in found if entry.run == run], _COLORS[i % len(_COLORS)]
        x = [100 * entry.sparsity for entry in own]
        axes.plot(x, [100 * entry.exact_match for entry in own], "o-", color=color, label=run)
        if all(len(entry.scores) == 1 for entry in own):
            low, high = zip(*(entry.scores[0].interval for entry in own), strict=True)
            axes.fill_between(
                x, [100 * v for v in low], [100 * v for v in high], color=color, alpha=0.15, linewidth=0
            )
    axes.set_xlabel("weights pruned in each layer (%)")
    axes.set_ylabel("exact match (%)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    write_file(path, lambda temporary: figure.savefig(temporary, format="png"))
