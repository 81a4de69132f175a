"""Two methods compared in pairs of arms, one pair a setting, over all settings (docs/results/README.md).

python -m tools.paired_settings docs/results/ranks-135m --arm qdora- --minus qlora-

An arm of the first method is paired with that of the second whose name ends alike: qdora-r4 with qlora-r4.
Each pair has its difference; over all of them settings and questions are resampled as `compare` resamples
seeds and questions.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from tabulate import tabulate

from qdora.experiments.statistics import Difference, difference

Verdicts = list[bool]


def read_verdicts(folder: Path, scorer: str) -> dict[str, Verdicts]:
    """Whether each question was answered correctly, for each run of a comparison with one seed an arm."""
    with (folder / "answers.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["scorer"] == scorer]
    runs = [name for name in rows[0] if name.endswith("-seed0")]
    return {run.removesuffix("-seed0"): [row[run] == "1" for row in rows] for run in runs}


def line(setting: str, found: Difference) -> tuple[str, str, str]:
    """A row of the table, in points."""
    value, low, high = (f"{100 * x:+.1f}" for x in (found.value, found.low, found.high))
    return setting, f"{value} [{low}, {high}]", f"{found.p_value:.3f}"


def main() -> None:
    """Print a row for each setting and one for all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with the answers.csv of a comparison")
    parser.add_argument("--arm", required=True, help="how the names of the first method's arms begin")
    parser.add_argument("--minus", required=True, help="how those of the second method's do")
    parser.add_argument("--scorer", default="normalized")
    options = parser.parse_args()
    verdicts = read_verdicts(options.folder, options.scorer)
    arms = {name.removeprefix(options.arm): v for name, v in verdicts.items() if name.startswith(options.arm)}
    others = {setting: verdicts[options.minus + setting] for setting in arms}
    rows = [line(s, difference([{0: arms[s]}], [{0: others[s]}])) for s in arms]
    pooled = difference([dict(enumerate(arms.values()))], [dict(enumerate(others.values()))])
    rows.append(line(f"all {len(arms)}", pooled))
    print(tabulate(rows, headers=["setting", f"{options.arm} minus {options.minus}, points [95%]", "p"]))


if __name__ == "__main__":
    main()
