"""A section of a configuration: a strict, frozen pydantic model, and what is wrong with one in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from qdora.errors import InputError, suggest

MOST = 2**53  # up to here a float counts by ones
Count = Annotated[int, Field(ge=1, le=MOST)]


class Section(BaseModel):
    """A group of keys: unknown ones are refused, values are never coerced, nothing changes later."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
    )
    key: ClassVar[str] = ""
    """Name of the section in a run's configuration, for errors."""
    several: ClassVar[tuple[str, ...]] = ()
    """Fields of several strings, of which a Python caller may give one by itself."""

    def __init__(self, **settings: Any) -> None:
        try:
            # A key that is a word of Python's, `from`, has an underscore after it there.
            named = {name.removesuffix("_"): value for name, value in settings.items()}
            super().__init__(**{name: self._plain(name, value) for name, value in named.items()})
        except ValidationError as error:
            raise InputError(explain(type(self), error, self.key)) from None

    @classmethod
    def _plain(cls, name: str, value: Any) -> Any:
        """What a Python caller may write, as a file has it: a list, one string of several, a torch dtype."""
        if isinstance(value, str) and name in cls.several:
            return (value,)
        if isinstance(value, list):
            return tuple(value)
        return str(value).removeprefix("torch.") if type(value).__name__ == "dtype" else value

    # For calls from Python alone: within a larger section pydantic validates by itself, and knows where.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


RENAMED = {
    "model.base": "model.quantization; allowed: nf4, fp4, int8, nf3, nf2, or none for what was 'dense'",
    "adapter.method": (
        "adapter.type (lora, vera, none), adapter.dora (true, false) and model.quantization; "
        "full fine-tuning is training.mode: full"
    ),
    "arms.method": "set, the settings in which an arm differs, for example set: {adapter.dora: false}",
}
"""Keys of former versions, without the indices of lists, and what replaces them."""


def explain(kind: type[Section], error: ValidationError, key: str = "") -> str:
    """One sentence for each fault that pydantic found.

    Args:
        kind: the section that was validated.
        key: its name in a run's configuration; empty for the run's configuration itself.
    """
    prefix = f"{key}." if key else ""
    return "\n  ".join(_explain(kind, detail, prefix) for detail in error.errors())


def _explain(kind: type[Section], detail: ErrorDetails, prefix: str) -> str:
    """One sentence for one pydantic error, with the nearest key for an unknown one."""
    # `<...>` is which form of a value was meant, and no key.
    location = [str(part) for part in detail["loc"] if not str(part).startswith("<")]
    key = prefix + ".".join(location)
    if detail["type"] == "extra_forbidden":
        renamed = RENAMED.get(re.sub(r"\.\d+", "", key))
        if renamed:
            return f"key {key!r} is now {renamed}"
        section = _section_at(kind, location[:-1])
        keys = [field.alias or name for name, field in section.model_fields.items()]
        hint = suggest(location[-1], keys)
        return f"unknown key {key!r} (value {detail['input']!r}); {hint}"
    if detail["type"] == "missing":
        return f"key {key!r} is required and missing"
    if detail["type"] == "value_error":
        return f"{key + ': ' if location else ''}{detail['ctx']['error']}"
    if detail["type"] == "literal_error":
        got = str(detail["input"])
        allowed = re.findall(r"'([^']*)'|(\d+)", detail["ctx"]["expected"])
        return f"{key}: got {got!r}; {suggest(got, [a or b for a, b in allowed])}"
    return f"{key}: {detail['msg']}, got {detail['input']!r} ({type(detail['input']).__name__})"


def _section_at(kind: type[Section], location: Sequence[str]) -> type[Section]:
    for part in location:
        field = kind.model_fields.get(part)
        if field is None:
            continue
        nested = list(_sections_in(field.annotation))
        if nested:
            kind = nested[0]
    return kind


def _sections_in(annotation: object) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
