"""The generator as a source."""

from __future__ import annotations

from qdora.config import DatasetConfig
from qdora.data.example import Dataset, fingerprint
from qdora.data.synthetic import generate


def load_synthetic(config: DatasetConfig) -> Dataset:
    """Generated problems; nothing is read, so nothing is skipped.

    Raises: InputError: more problems are asked for than the generator has.
    """
    assert config.count is not None  # DatasetConfig checks it
    examples = generate(config.split, config.count, config.seed)[: config.limit]
    return Dataset(examples, [], fingerprint(examples))
