"""Gold answers, read out of a worked solution where a data set has no column for them."""

from __future__ import annotations

import re

# A minus is a sign only where nothing is subtracted from: "= -3", but not "16-3" or "x-3".
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_ORCA_NUMBER = re.compile(r"[$€£]?\d+(?:\.\d+)?(?::\d+(?:\.\d+)?)?")
_CHOICE = re.compile(r"\b(?:true|false|(?:answer|solution|ending|option)\d)\b")


def last_number(text: str) -> str | None:
    """The last number in a text, without thousands separators; None where there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None


def last_number_or_ratio(text: str) -> str | None:
    """The last number or ratio, a currency sign before it kept; None where there is none.

    Signs and thousands separators are not understood ("1,200" gives "200"); that is how the
    published Orca-Math scores were taken.

    Source: fsdp_qlora, experiments/orca_math/evaluate.ipynb.
    """
    found = _ORCA_NUMBER.findall(text)
    return found[-1] if found else None


def number_after_hashes(text: str) -> str | None:
    """What stands behind the last `####`, without thousands separators; None where nothing does.

    Source: GSM8K, arXiv:2110.14168, the repository's README.
    """
    _, hashes, tail = text.rpartition("####")
    return tail.strip().replace(",", "") or None if hashes else None


def first_choice(text: str) -> str | None:
    """The first label of a multiple-choice answer in the LLM-Adapters wording; None without one.

    Source: LLM-Adapters, arXiv:2304.01933, commonsense evaluation.
    """
    found = _CHOICE.search(text.lower())
    return found.group() if found else None
