"""`accelerate launch launch/evaluate.py`: see `qdora evaluate --help`."""

import sys

from qdora.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("evaluate", sys.argv[1:])
