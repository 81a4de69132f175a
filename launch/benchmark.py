"""`python launch/benchmark.py`: see `qdora benchmark --help`."""

import sys

from qdora.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("benchmark", sys.argv[1:])
