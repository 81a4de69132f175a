"""`python launch/benchmark.py`: see `qdora benchmark --help`."""

import sys

from qdora.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmark", sys.argv[1:]))
