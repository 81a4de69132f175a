"""`accelerate launch launch/train.py`: see `qdora train --help`."""

import sys

from qdora.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
