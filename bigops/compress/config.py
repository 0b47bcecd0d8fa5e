"""What to do with a layer, as data: `Sparse(0.8)`, `Int8()` and `Sparse(0.8) + Int8()`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Sparse:
    """Keep the largest 1x4 blocks of the weight by L2 norm and store only those.

    Args:
        sparsity: share of the blocks that goes, 0 <= sparsity < 1.
    """

    sparsity: float

    def __post_init__(self) -> None:
        value = self.sparsity
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"sparsity: expected a float; got {type(value).__name__}")
        if not 0 <= value < 1:
            raise ValueError(f"sparsity: expected 0 <= sparsity < 1; got {value}")
        object.__setattr__(self, "sparsity", float(value))

    def __add__(self, other: object) -> SparseInt8:
        if isinstance(other, Int8):
            return SparseInt8(self, other)
        raise TypeError(f"Sparse + {type(other).__name__}: only Sparse + Int8 compose")

    def __str__(self) -> str:
        return f"Sparse({self.sparsity:g})"


@dataclass(frozen=True)
class Int8:
    """Store the weight as int8 with one scale per row; activations are quantised per token."""

    def __add__(self, other: object) -> SparseInt8:
        if isinstance(other, Sparse):
            return SparseInt8(other, self)
        raise TypeError(f"Int8 + {type(other).__name__}: only Sparse + Int8 compose")

    def __str__(self) -> str:
        return "Int8()"


@dataclass(frozen=True)
class SparseInt8:
    """`Sparse(..) + Int8()`: the kept blocks are stored as int8."""

    sparse: Sparse
    int8: Int8 = Int8()

    def __add__(self, other: object) -> SparseInt8:
        raise TypeError(f"{self} + {type(other).__name__}: only Sparse + Int8 compose")

    def __str__(self) -> str:
        return f"{self.sparse} + {self.int8}"


Config: TypeAlias = Sparse | Int8 | SparseInt8
Plan: TypeAlias = Config | Mapping[str, Config]


def check_config(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a config."""
    if not isinstance(value, Sparse | Int8 | SparseInt8):
        raise TypeError(
            f"{name}: expected Sparse(..), Int8() or Sparse(..) + Int8(); got {value!r}"
        )


def to_json(plan: Plan) -> str:
    """A config, or a mapping of name patterns to configs, as JSON; `from_json` reads it back."""
    if isinstance(plan, Mapping):
        for pattern, config in plan.items():
            check_config(f"config[{pattern!r}]", config)
        # A list of pairs, since the first match wins and objects promise no order.
        return json.dumps({"patterns": [[name, _encode(c)] for name, c in plan.items()]})
    check_config("config", plan)
    return json.dumps(_encode(plan))


def from_json(text: str) -> Plan:
    """Read what `to_json` wrote.

    Raises:
        ValueError: no JSON, an unknown config, or a value out of range.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"config: expected JSON; got {text[:80]!r} ({error})") from None
    if isinstance(data, dict) and set(data) == {"patterns"}:
        pairs = data["patterns"]
        shaped = isinstance(pairs, list) and all(
            isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs
        )
        if not shaped:
            raise ValueError(f"patterns: expected a list of [pattern, config]; got {pairs!r}")
        return {name: _decode(config) for name, config in pairs}
    return _decode(data)


def _encode(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if isinstance(config, Sparse):
        data["sparse"] = {"sparsity": config.sparsity}
    elif isinstance(config, SparseInt8):
        data["sparse"] = {"sparsity": config.sparse.sparsity}
    if isinstance(config, Int8 | SparseInt8):
        data["int8"] = {}
    return data


def _decode(data: Any) -> Config:
    known = isinstance(data, dict) and data and set(data) <= {"sparse", "int8"}
    if known and "sparse" in data:
        known = isinstance(data["sparse"], dict) and set(data["sparse"]) == {"sparsity"}
    if not known or data.get("int8", {}) != {}:
        raise ValueError(
            'config: expected {"sparse": {"sparsity": s}}, {"int8": {}} or both; '
            f"got {json.dumps(data)[:80]}"
        )
    try:
        sparse = Sparse(**data["sparse"]) if "sparse" in data else None
    except TypeError as error:
        raise ValueError(f"config: {error}") from None
    if sparse is None:
        return Int8()
    return sparse + Int8() if "int8" in data else sparse
