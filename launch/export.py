"""`python launch/export.py`: see `qdora export --help`."""

import sys

from qdora.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("export", sys.argv[1:]))
