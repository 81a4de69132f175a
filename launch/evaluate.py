"""`accelerate launch launch/evaluate.py`: see `qdora evaluate --help`."""

import sys

from qdora.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", sys.argv[1:]))
