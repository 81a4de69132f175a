"""`python launch/export.py`: see `qdora export --help`."""

import sys

from qdora.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit("export", sys.argv[1:])
