"""What to do with a layer, as data: `Sparse(0.8)`, `LowRank(64)`, `Int8()`, `Int4()`, `Fp8()`.

`Sparse` and `LowRank` say which entries or factors stay; with `+ Int8()` these are stored as int8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeAlias, TypeVar

from torch import nn

from bigops.compress.criteria import magnitude
from bigops.compress.observers import MINMAX, Observer, observer_of
from bigops.compress.quantizers import round_to_nearest
from bigops.formats.fp8 import Fp8Weight
from bigops.formats.patterns import Pattern
from bigops.formats.quantized import check_form
from bigops.nn.computed_weight import is_dense
from bigops.nn.embedding import QuantEmbedding
from bigops.nn.fp8_linear import Fp8Linear
from bigops.nn.layer import Layer, layer_of
from bigops.nn.low_rank_linear import LowRankLinear
from bigops.nn.quant_linear import QuantLinear
from bigops.nn.quant_low_rank_linear import QuantLowRankLinear
from bigops.nn.sparse_linear import SparseLinear, check_sparsity
from bigops.nn.truncated_svd import truncated_svd

Quantized = TypeVar("Quantized", "Int8", "Int4")


class Config:
    """What to do with a layer: which entries stay, which codes stand for them, how they lie.

    Of one class for each storage; `make` builds the layer that has it.
    """

    key: ClassVar[str]  # in `encode`
    factors: ClassVar[bool] = False  # whether the weight becomes two factors
    criterion = staticmethod(magnitude)
    quantizer = staticmethod(round_to_nearest)

    @property
    def activations(self) -> str:
        """What the product does with x."""
        return "none"

    @property
    def observer(self) -> Observer | str:
        """Which range static activations take of the numbers that the layer is given."""
        return MINMAX

    @property
    def rank(self) -> int | None:
        """The rank of the factors, where the config names one."""
        return None

    @property
    def embeddings(self) -> bool:
        """Whether embeddings that a pattern matches get it, too."""
        return False

    @property
    def of_embedding(self) -> Int8 | Int4 | None:
        """What an embedding gets of it; None: nothing of it stores rows for a look-up."""
        return None

    @property
    def tied(self) -> Any:
        """The form of the matrix: layers with one weight and equal forms have one storage.

        None where each has its own, so that layers that share a weight stay.
        """
        return None

    @property
    def alone(self) -> Int8 | None:
        """The `Int8` that is left where pattern and factors save nothing."""
        return None

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        """The layer in recovery state beside ``old``, which is not changed.

        Args:
            old: an `nn.Linear`, or a layer that is not frozen.
            rank: of the factors, where it is known already.
            remarks: takes what is worth saying about how it was done.
        """
        raise NotImplementedError

    def encode(self) -> dict[str, Any]:
        """The config as plain data; `decode` reads it back."""
        changed = self._changed()
        if isinstance(given := changed.get("observer"), Observer):
            changed["observer"] = given.encode()
        return {self.key: changed}

    def _changed(self) -> dict[str, Any]:
        """The arguments that are not the default."""
        given = {field: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {field.name: value for field, value in given.items() if value != field.default}

    def __add__(self, other: object) -> Config:
        raise TypeError(
            f"{type(self).__name__} + {type(other).__name__}: only Sparse + Int8 and LowRank + "
            "Int8 compose"
        )

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self._changed().items())
        return f"{type(self).__name__}({given})"


@dataclass(frozen=True)
class Sparse(Config):
    """Keep the largest blocks of the weight by L2 norm and store only those.

    Args:
        sparsity: share of the blocks that goes, 0 <= sparsity < 1; None where the pattern says it.
        pattern: "1x4" (rows x columns of a block), "1x1" for single entries, "2:4" for N:M, "2:4t"
            for 2:4 along rows and columns at once, which GPUs can train sparse.
        values: how the kept ones are stored, "fp32" or "bf16"; `+ Int8()` stores int8.
    """

    sparsity: float | None = None
    pattern: str = "1x4"
    values: str = "fp32"
    key = "sparse"

    def __post_init__(self) -> None:
        pattern, value = Pattern.parse(self.pattern), self.sparsity
        if value is None and not pattern.m:
            raise ValueError(f"sparsity: expected a number for pattern {pattern}; got None")
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise TypeError(f"sparsity: expected a float; got {type(value).__name__}")
        object.__setattr__(self, "sparsity", float(check_sparsity(value, pattern)))
        if self.values not in ("fp32", "bf16"):
            raise ValueError(f"values: expected fp32 or bf16; got {self.values!r}")

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        given = (self.sparsity, self.pattern, self.values)
        return SparseLinear.from_linear(old, *given, criterion=self.criterion)

    def _changed(self) -> dict[str, Any]:
        return {"sparsity": self.sparsity, **super()._changed()}  # always said

    def __add__(self, other: object) -> Config:
        return SparseInt8(self, other) if isinstance(other, Int8) else super().__add__(other)

    def __str__(self) -> str:
        more = {k: v for k, v in self._changed().items() if k != "sparsity"}
        return f"Sparse({self.sparsity:g}{''.join(f', {k}={v}' for k, v in more.items())})"


@dataclass(frozen=True)
class LowRank(Config):
    """Keep the weight as two factors, ``u @ v`` by its largest singular values; give one of both.

    Args:
        rank: r, at least 1.
        energy: the share of the squared Frobenius norm to keep, above 0 up to 1: each layer gets
            the least rank that keeps it.
        exact: take LAPACK's SVD, half a minute for 2048 x 2048; else the Gram matrix serves where
            its result is as good (`bigops.nn.truncated_svd`).

    A layer whose factors would have no fewer entries than its weight, r (K + N) >= K N, is left.
    """

    rank: int | None = None
    energy: float | None = None
    exact: bool = False
    key = "low_rank"
    factors = True

    def __post_init__(self) -> None:
        rank, energy = self.rank, self.energy
        if not isinstance(self.exact, bool):
            raise TypeError(f"exact: expected a bool; got {type(self.exact).__name__}")
        if (rank is None) == (energy is None):
            raise ValueError(f"rank, energy: expected one of the two; got {rank} and {energy}")
        if energy is None:
            if isinstance(rank, bool) or not isinstance(rank, int):
                raise TypeError(f"rank: expected an int; got {type(rank).__name__}")
            if rank < 1:
                raise ValueError(f"rank: expected at least 1; got {rank}")
        elif isinstance(energy, bool) or not isinstance(energy, int | float):
            raise TypeError(f"energy: expected a float; got {type(energy).__name__}")
        elif not 0 < energy <= 1:
            raise ValueError(f"energy: expected above 0 and at most 1; got {energy}")
        else:
            object.__setattr__(self, "energy", float(energy))

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> LowRankLinear:
        assert is_dense(old)
        given = (self.rank, self.energy) if rank is None else (rank, None)
        svd = truncated_svd(old.weight, *given, exact=self.exact)
        if svd.fallback:
            remarks.append(f"by LAPACK's SVD: {svd.fallback}")
        return LowRankLinear.from_svd(old, svd)

    def __add__(self, other: object) -> Config:
        return LowRankInt8(self, other) if isinstance(other, Int8) else super().__add__(other)


@dataclass(frozen=True)
class Int8(Config):
    """Store the weight as int8.

    Args:
        activations: what the product does with x. "dynamic": each row becomes u8 with its own
            scale and zero point; "symmetric": with its own scale only; "static": with qparams that
            `compress_` takes from ``data``, or ``example_inputs``; "none": x stays in floating
            point.
        group: columns that share a scale, 32, 64 or 128, with "none" only; None: one a row.
        symmetric: no zero points of the weight.
        embeddings: whether it is for embeddings, too; by default for linear layers alone. Given by
            its exact name an embedding gets it in any case.
        observer: with "static" only, the range that they take: "minmax", "percentile", "mse", or
            one of `bigops.compress`, as ``Percentile(99.9)``.
    """

    activations: str = "dynamic"
    group: int | None = None
    symmetric: bool = True
    embeddings: bool = False
    observer: Observer | str = MINMAX
    key = "int8"
    of_embedding = property(lambda self: _of_embedding(self))
    tied = property(lambda self: (self.key, self.group, self.symmetric))

    def __post_init__(self) -> None:
        _check_form(self, 8)

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        ours: Any = layer_of(old)
        if ours is not None and ours.rank is not None:  # which stays
            return QuantLowRankLinear.from_low_rank(old)
        if ours is None or ours.pattern is None:
            return _quantized(self, old, 8)
        if not _beside_sparse(self):
            raise ValueError(
                f"config: expected Int8() or Int8(activations='static') for a sparse layer; got "
                f"{self}"
            )
        # the pattern there is stays
        return SparseLinear.from_linear(
            old, pattern=str(ours.pattern), mask=ours.mask, activations=self.activations
        )

    def __add__(self, other: object) -> Config:
        return other + self if isinstance(other, Sparse | LowRank) else super().__add__(other)


@dataclass(frozen=True)
class Int4(Config):
    """Store the weight in 4 bits; `W4A8` is ``Int4(group=64, activations="dynamic")``.

    Args:
        group: columns that share a scale: 32, 64 or 128; None: all of a row.
        activations: as in `Int8`.
        symmetric: no zero points; with them a group takes all 16 steps, which pays where its
            values are not centred.
        embeddings: as in `Int8`.
        observer: as in `Int8`.
    """

    group: int | None = 64
    activations: str = "none"
    symmetric: bool = True
    embeddings: bool = False
    observer: Observer | str = MINMAX
    key = "int4"
    of_embedding = property(lambda self: _of_embedding(self))
    tied = property(lambda self: (self.key, self.group, self.symmetric))

    def __post_init__(self) -> None:
        _check_form(self, 4)

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        return _quantized(self, old, 4)


@dataclass(frozen=True)
class Fp8(Config):
    """Store the weight in float8_e4m3fn.

    Args:
        scales: what of the weight shares a scale: "row", "tensor" (all of it), or "block" (128
            rows by 128 columns, arXiv:2412.19437).
        activations: what the product does with x. "dynamic": it becomes e4m3fn, each row with its
            own scale, with "block" each 128 columns of a row; "none": it stays in floating point.
    """

    scales: str = "row"
    activations: str = "dynamic"
    key = "fp8"

    def __post_init__(self) -> None:
        Fp8Weight.form(self.scales, self.activations)

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        return Fp8Linear.from_linear(old, scales=self.scales, activations=self.activations)


def _check_form(config: Int8 | Int4, bits: int) -> None:
    group = config.group
    if group is not None and (isinstance(group, bool) or not isinstance(group, int)):
        raise TypeError(f"group: expected an int or None; got {type(group).__name__}")
    for name in ("symmetric", "embeddings"):
        if not isinstance(getattr(config, name), bool):
            got = type(getattr(config, name)).__name__
            raise TypeError(f"{name}: expected a bool; got {got}")
    check_form(bits, group or 0, config.activations)
    object.__setattr__(config, "observer", observer_of(config.observer))
    if config.observer != MINMAX and config.activations != "static":
        raise ValueError(
            f"observer: expected none with activations {config.activations!r}, which find the "
            f"range of each row as they run; got {config.observer}"
        )


def _of_embedding(config: Quantized) -> Quantized:
    """A look-up has no activations to quantise."""
    return replace(config, activations="none", embeddings=False, observer=MINMAX)


def _of_layers(config: Quantized) -> Quantized:
    return replace(config, embeddings=False)


def _quantized(config: Int8 | Int4, old: nn.Module, bits: int) -> Layer:
    form: dict[str, Any] = {"bits": bits, "group": config.group, "symmetric": config.symmetric}
    if isinstance(old, nn.Embedding):
        return QuantEmbedding.from_embedding(old, **form)
    return QuantLinear.from_linear(old, **form, activations=config.activations)


W4A8 = Int4(group=64, activations="dynamic")


def _beside_sparse(int8: Int8) -> bool:
    """Whether a sparse layer can have it."""
    return int8.group is None and int8.symmetric and int8.activations in ("dynamic", "static")


@dataclass(frozen=True)
class SparseInt8(Config):
    """`Sparse(..) + Int8()`: the kept blocks are stored as int8; activations dynamic or static."""

    sparse: Sparse
    int8: Int8 = Int8()
    alone = property(lambda self: self.int8)
    embeddings = property(lambda self: self.int8.embeddings)
    of_embedding = property(lambda self: self.int8.of_embedding)
    activations = property(lambda self: self.int8.activations)
    observer = property(lambda self: self.int8.observer)
    quantizer = property(lambda self: self.int8.quantizer)

    def __post_init__(self) -> None:
        if self.sparse.values != "fp32":
            raise ValueError(
                f"values: expected none of its own for a Sparse beside Int8(); got {self.sparse}"
            )
        if not _beside_sparse(self.int8):
            raise ValueError(
                f"int8: expected Int8() or Int8(activations='static') beside Sparse; got "
                f"{self.int8}"
            )

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        return SparseLinear.from_linear(
            old,
            self.sparse.sparsity,
            self.sparse.pattern,
            activations=self.activations,
            criterion=self.sparse.criterion,
        )

    def encode(self) -> dict[str, Any]:
        return {**self.sparse.encode(), **self.int8.encode()}

    def __str__(self) -> str:
        return f"{self.sparse} + {self.int8}"


@dataclass(frozen=True)
class LowRankInt8(Config):
    """`LowRank(..) + Int8()`: both factors are stored as int8; activations dynamic."""

    low_rank: LowRank
    int8: Int8 = Int8()
    factors = True
    alone = property(lambda self: self.int8)
    embeddings = property(lambda self: self.int8.embeddings)
    of_embedding = property(lambda self: self.int8.of_embedding)
    activations = property(lambda self: self.int8.activations)
    quantizer = property(lambda self: self.int8.quantizer)
    rank = property(lambda self: self.low_rank.rank)

    def __post_init__(self) -> None:
        if _of_layers(self.int8) != Int8():
            raise ValueError(f"int8: expected Int8() beside LowRank; got {self.int8}")

    def make(self, old: nn.Module, rank: int | None, remarks: list[str]) -> Layer:
        return QuantLowRankLinear.from_low_rank(self.low_rank.make(old, rank, remarks))

    def encode(self) -> dict[str, Any]:
        return {**self.low_rank.encode(), **self.int8.encode()}

    def __str__(self) -> str:
        return f"{self.low_rank} + {self.int8}"


Configs: TypeAlias = Config | Mapping[str, Config | None]


def check_config(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a config."""
    if not isinstance(value, Config):
        raise TypeError(
            f"{name}: expected Sparse(..), LowRank(..), Int8(..), Int4(..), Fp8(..), Sparse(..) + "
            f"Int8() or LowRank(..) + Int8(); got {value!r}"
        )


def to_json(configs: Configs) -> str:
    """A config, or a mapping of names and patterns to configs or None, as JSON."""
    if isinstance(configs, Mapping):
        for pattern, config in configs.items():
            if config is not None:
                check_config(f"config[{pattern!r}]", config)
        # A list of pairs, since the first match wins and objects promise no order.
        pairs = [[name, None if c is None else c.encode()] for name, c in configs.items()]
        return json.dumps({"patterns": pairs})
    check_config("config", configs)
    return json.dumps(configs.encode())


def from_json(text: str) -> Configs:
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
        return {name: None if config is None else decode(config) for name, config in pairs}
    return decode(data)


def decode(data: Any) -> Config:
    """Read what `Config.encode` wrote; raise ValueError for what it would not write."""
    kinds: dict[str, Any] = {kind.key: kind for kind in (Sparse, LowRank, Int8, Int4, Fp8)}
    made: dict[str, Any] = {}
    shaped = isinstance(data, dict) and data and set(data) <= set(kinds)
    try:
        if shaped:
            made = {name: kinds[name](**arguments) for name, arguments in data.items()}
    except TypeError as error:  # no mapping, an unknown argument, or a value of another type
        raise ValueError(f"config: expected the arguments of a config; {error}") from None
    if set(made) in ({"sparse", "int8"}, {"low_rank", "int8"}):
        both: Config = made.pop("int8") + next(iter(made.values()))
        return both
    if len(made) != 1:
        raise ValueError(
            'config: expected {"sparse": {"sparsity": s}} or {"low_rank": {..}}, {"int8": {..}}, '
            'one of those with int8, {"int4": {..}} or {"fp8": {..}}; got '
            f"{json.dumps(data)[:80]}"
        )
    single: Config = next(iter(made.values()))
    return single
