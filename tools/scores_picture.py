"""The picture of README.md: scores of a comparison's arms, from its report.

python -m tools.scores_picture docs/results/main-135m/report.json docs/images/main-135m.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from qdora.experiments.plots import draw_scores


def main() -> None:
    """Draw the scores of the report's first task with their 95% intervals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path, help="report.json of a comparison")
    parser.add_argument("picture", type=Path, help="the file to write")
    options = parser.parse_args()
    # An older report, as that of the README's picture is, does not name its metric.
    report = {"metric": "exact match", **json.loads(options.report.read_text(encoding="utf-8"))}
    figure = Figure(figsize=(7, 3.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw_scores(axes, report, next(iter(report["tasks"])))
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
