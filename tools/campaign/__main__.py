"""`python -m tools.campaign STAGE [--count N] [--seed S] [--json FILE]`; exit code 1 with faults."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from qdora.files import write_json

STAGES = {
    # stage: cases of a full campaign
    "kill": 200,
    "devices": 300,
    "damage": 10_000,
    "architectures": 200,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.campaign", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--count", type=int, help="cases to try (default: those of a full campaign)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; case i has seed + i")
    parser.add_argument("--json", type=Path, help="write the report here too")
    arguments = parser.parse_args()
    stage = importlib.import_module(f"tools.campaign.{arguments.stage}")
    with tempfile.TemporaryDirectory(prefix="qdora-campaign-") as folder:
        count = STAGES[arguments.stage] if arguments.count is None else arguments.count
        report = stage.run(count, arguments.seed, Path(folder))
    print(report)
    if arguments.json:
        write_json(arguments.json, report.as_dict())
    return bool(report.faults)


if __name__ == "__main__":
    sys.exit(main())
