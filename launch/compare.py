"""`accelerate launch launch/compare.py`: see `qdora compare --help`."""

import sys

from qdora.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare", sys.argv[1:]))
