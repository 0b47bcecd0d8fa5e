"""What the arguments of a module in a saved file may be, before anything is made of them.

Constructors check little: ``nn.ReLU(inplace="no")`` is a module, and fails in its first call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bigops.ops import activation as act


class Field(NamedTuple):
    """The values that an argument may have, in words and as a test."""

    words: str
    takes: Callable[[Any], bool]
    needed: bool = True


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def one_of(*values: Any) -> Field:
    """Just these; 1 is not True."""
    return Field(
        "one of " + ", ".join(map(repr, values)),
        lambda got: any(type(got) is type(v) and got == v for v in values),
    )


def optional(field: Field) -> Field:
    """None, too."""
    return Field(f"{field.words} or None", lambda got: got is None or field.takes(got))


def left_out(field: Field) -> Field:
    """One that older files do not have, or that is written only where it says something."""
    return field._replace(needed=False)


SIZE = Field("a whole number from 0", lambda got: _is_int(got) and got >= 0)
INT = Field("a whole number", _is_int)
NUMBER = Field("a number", _is_number)
FLAG = one_of(True, False)
TEXT = Field("a string", lambda got: isinstance(got, str))
TABLE = Field(
    "a table by name", lambda got: isinstance(got, dict) and all(isinstance(n, str) for n in got)
)
SIZES = Field(
    "a list of whole numbers from 0",
    lambda got: isinstance(got, list) and all(map(SIZE.takes, got)),
)
PLAIN = one_of(*act.ACTIVATIONS)
GATED = one_of(*act.GATED)

LINEAR = {"in_features": SIZE, "out_features": SIZE, "bias": FLAG}
ACTIVATED = {**LINEAR, "activation": PLAIN}
COMPRESSED = {
    **ACTIVATED,
    "frozen": FLAG,
    "dtype": left_out(one_of("bfloat16", "float16", "float64")),
    "y_grid": left_out(FLAG),
}
GATED_MLP = {
    "in_features": SIZE,
    "hidden_features": SIZE,
    "out_features": SIZE,
    "activation": GATED,
    "bias": FLAG,
}


def misfit(fields: Mapping[str, Field], arguments: Mapping[str, Any]) -> str | None:
    """What is wrong with the arguments, or None."""
    unknown = [name for name in arguments if name not in fields]
    if unknown:
        return f"expected the arguments {', '.join(fields) or 'none'}; got {unknown[0]!r}"
    for name, field in fields.items():
        if name not in arguments:
            if field.needed:
                return f"{name}: expected {field.words}; it is missing"
        elif not field.takes(arguments[name]):
            return f"{name}: expected {field.words}; got {str(arguments[name])[:80]!r}"
    return None
