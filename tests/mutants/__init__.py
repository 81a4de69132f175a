"""Named bugs, each put into a copy of the package, and the test that must fail then.

    python -m tests.mutants            all of them, one line each
    python -m tests.mutants NAME ...   some of them

Exits with 1 when a mutant survives: a test that passes with its bug in place tests nothing.
"""

from tests.mutants import layers, runs

MUTANTS = layers.MUTANTS | runs.MUTANTS
