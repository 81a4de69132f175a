"""How often intervals of a comparison hold the true difference, by simulation.

    OMP_NUM_THREADS=1 python -m tools.interval_coverage

Two arms answer questions of uneven difficulty; each training of the first has a deviation of its own from the
true difference of 5 points, and the difference is another one for each question.  Printed for each number of
seeds and spread between trainings: how often the 95% interval held the truth, and its mean width in points.
"""

from __future__ import annotations

import argparse

import numpy as np
from tabulate import tabulate

from qdora.experiments.statistics import difference


def coverage(seeds: int, spread: float, questions: int, runs: int) -> tuple[float, float]:
    """Fraction of intervals that hold the true difference, and their mean width in points.

    Args:
        spread: standard deviation between trainings, a fraction.
    """
    generator = np.random.default_rng(0)
    covered, width = 0, 0.0
    for _ in range(runs):
        base_Q = 0.15 + 0.6 * generator.beta(1.2, 1.2, size=questions)
        first_SQ = base_Q + 0.05 + generator.choice([-0.1, 0.1], questions)
        first_SQ = first_SQ + generator.normal(0, spread, size=(seeds, 1))
        arms = [generator.random((seeds, questions)) < score for score in (first_SQ, base_Q)]
        found = difference(*([dict(enumerate(answers_SQ.tolist()))] for answers_SQ in arms))
        covered += found.low <= 0.05 <= found.high
        width += 100 * (found.high - found.low)
    return covered / runs, width / runs


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=2000, help="comparisons of each kind")
    parser.add_argument("--questions", type=int, default=256)
    arguments = parser.parse_args()
    rows = []
    for seeds, spread in [(1, 0.0), *((s, sd) for s in (3, 5) for sd in (0.0, 0.01, 0.02, 0.04))]:
        held, width = coverage(seeds, spread, arguments.questions, arguments.runs)
        rows.append([seeds, f"{100 * spread:.0f}", f"{held:.3f}", f"{width:.1f}"])
    print(tabulate(rows, ["seeds", "spread between trainings, points", "held", "width, points"], "github"))


if __name__ == "__main__":
    main()
