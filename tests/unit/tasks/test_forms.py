"""Forms of answers as users and models write them, each with what the two readers make of it alone."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sympy
from math_verify import parse

from qdora.tasks.answers import stated_number
from qdora.tasks.numbers import Number, find_numbers
from qdora.tasks.scoring import score_normalized


class Form(NamedTuple):
    """A line of forms.txt, which explains its columns."""

    text: str
    value: str
    numbers: str
    math_verify: str
    why: str


def read_forms() -> tuple[list[Form], set[str]]:
    """The forms, and the reasons that the head of the file explains."""
    lines = Path(__file__).with_name("forms.txt").read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    rows = [(line + " ").split(" | ") for line in lines[len(head) :]]
    forms = [Form(*(part.strip(" ") for part in row)) for row in rows]
    characters = re.compile(r"<U\+([0-9A-F]{4})>")
    forms = [form._replace(text=characters.sub(lambda c: chr(int(c[1], 16)), form.text)) for form in forms]
    return forms, {line[2] for line in head if re.match(r"# \S  ", line)}


FORMS, REASONS = read_forms()


def shown(number: Number | None) -> str:
    if number is None:
        return "-"
    irrational = number.places is not None and number.places >= 40
    return f"{float(number.value[0]):.6f}" if irrational else ":".join(map(str, number.value))


def read_by_math_verify(form: str) -> str:
    delimited = re.search(r"\$|\\[(\[]|\\boxed", form)
    found: Any = parse(form if delimited else f"${form}$", fallback_mode="no_fallback", parsing_timeout=None)
    value = found[0] if found else None
    if isinstance(value, sympy.Eq):
        value = value.rhs
    value = value.doit() if isinstance(value, sympy.Expr) else None
    if value is None or not value.is_number or not value.is_finite:
        return "-"
    if value.is_Float:
        return str(Fraction(str(value)))
    return str(value) if value.is_Rational else f"{float(value):.6f}"


def test_there_are_forms_enough() -> None:
    """Catches: lines of the table that are not read."""
    assert len({form.text for form in FORMS}) == len(FORMS) >= 300


@pytest.mark.parametrize("form", FORMS, ids=[form.text for form in FORMS])
def test_a_form_has_its_value(form: Form) -> None:
    """Catches: a sign, a result, a group of digits or a root lost; a part of an expression taken for it."""
    stated = stated_number(f"The answer is {form.text}.")
    assert shown(stated) == form.value
    gold = stated.bare if stated else ""
    assert score_normalized(f"The answer is {form.text}.", gold).correct is (stated is not None)
    assert score_normalized(f"The answer is {gold}.", gold).correct is (stated is not None)
    # Of several numbers an output states the first, and a text without a mark the last.
    if not set(form.why) & set("DV"):
        assert score_normalized(f"The answer is {form.text}.", form.text).correct is (stated is not None)


@pytest.mark.parametrize("form", FORMS, ids=[form.text for form in FORMS])
def test_where_the_readers_differ_is_explained(form: Form) -> None:
    """Catches: a reader that changed, so that the wrong one is asked; a difference without reason."""
    first = next(iter(find_numbers(form.text)), None)
    assert shown(first) == form.numbers
    if form.math_verify != "?":
        assert read_by_math_verify(form.text) == form.math_verify
    assert set(form.why) <= REASONS
    assert bool(set(form.why) & set("ON")) is (form.numbers != form.value)
    assert bool(set(form.why) - set("ON")) is (form.math_verify != form.value)
