"""`accelerate launch launch/compare.py`: see `qdora compare --help`."""

import sys

from qdora.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("compare", sys.argv[1:])
