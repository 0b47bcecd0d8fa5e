"""What to do with a layer, as data: `Sparse(0.8)`, `Int8()` and `Sparse(0.8) + Int8()`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from bigops.nn.sparse_linear import check_sparsity
from bigops.ops.sparse_linear import Pattern


@dataclass(frozen=True)
class Sparse:
    """Keep the largest blocks of the weight by L2 norm and store only those.

    Args:
        sparsity: share of the blocks that goes, 0 <= sparsity < 1; None where the pattern says it.
        pattern: "1x4" (rows x columns of a block), "1x1" for single entries, "2:4" for N:M.
        values: how the kept ones are stored, "fp32" or "bf16"; `+ Int8()` stores int8.
    """

    sparsity: float | None = None
    pattern: str = "1x4"
    values: str = "fp32"

    def __post_init__(self) -> None:
        pattern, value = Pattern.parse(self.pattern), self.sparsity
        if value is None and not pattern.m:
            raise ValueError(f"sparsity: expected a number for pattern {pattern}; got None")
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError(f"sparsity: expected a float; got {type(value).__name__}")
        object.__setattr__(self, "sparsity", float(check_sparsity(value, pattern)))
        if self.values not in ("fp32", "bf16"):
            raise ValueError(f"values: expected fp32 or bf16; got {self.values!r}")

    def __add__(self, other: object) -> SparseInt8:
        if isinstance(other, Int8):
            if self.values != "fp32":
                raise ValueError(f"{self} + Int8(): expected no values of its own; got both")
            return SparseInt8(self, other)
        raise TypeError(f"Sparse + {type(other).__name__}: only Sparse + Int8 compose")

    def __str__(self) -> str:
        more = {k: v for k, v in _more(self).items() if k != "sparsity"}
        return f"Sparse({self.sparsity:g}{''.join(f', {k}={v}' for k, v in more.items())})"


@dataclass(frozen=True)
class Int8:
    """Store the weight as int8 with one scale per row; activations are quantised per token."""

    def __add__(self, other: object) -> SparseInt8:
        if isinstance(other, Sparse):
            return other + self
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


def _more(config: Sparse) -> dict[str, Any]:
    """The fields that are not the default, the sparsity always."""
    data: dict[str, Any] = {"sparsity": config.sparsity}
    if config.pattern != "1x4":
        data["pattern"] = config.pattern
    if config.values != "fp32":
        data["values"] = config.values
    return data


def _encode(config: Config) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if isinstance(config, Sparse):
        data["sparse"] = _more(config)
    elif isinstance(config, SparseInt8):
        data["sparse"] = _more(config.sparse)
    if isinstance(config, Int8 | SparseInt8):
        data["int8"] = {}
    return data


def _decode(data: Any) -> Config:
    known = isinstance(data, dict) and data and set(data) <= {"sparse", "int8"}
    if known and "sparse" in data:
        known = isinstance(data["sparse"], dict) and "sparsity" in data["sparse"]
        known = known and set(data["sparse"]) <= {"sparsity", "pattern", "values"}
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
