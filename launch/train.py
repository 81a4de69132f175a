"""`accelerate launch launch/train.py`: see `qdora train --help`."""

import sys

from qdora.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("train", sys.argv[1:])
