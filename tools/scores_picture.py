"""The picture of README.md: scores of a comparison's arms, from its report.

python -m tools.scores_picture docs/results/main-135m/report.json docs/images/main-135m.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from qdora.experiments.plots import draw_scores


def main(report_file: Path, picture: Path) -> None:
    """Draw the scores of the report's first task with their 95% intervals."""
    report = json.loads(report_file.read_text(encoding="utf-8"))
    figure = Figure(figsize=(7, 3.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw_scores(axes, report, next(iter(report["tasks"])))
    axes.grid(axis="x", alpha=0.2)
    axes.set_axisbelow(True)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
