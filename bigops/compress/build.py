"""One layer by one config: built beside the old one, or the reason why it had better stay."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from bigops.compress.calibrate import Grid
from bigops.compress.config import (
    BESIDE_SPARSE,
    Config,
    Fp8,
    Int4,
    Int8,
    LowRank,
    LowRankInt8,
    Sparse,
    SparseInt8,
)
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.fp8_linear import Fp8Linear
from bigops.nn.low_rank_linear import LowRankLinear
from bigops.nn.packed_linear import PackedBase
from bigops.nn.quant_linear import QuantLinear
from bigops.nn.quant_low_rank_linear import QuantLowRankLinear
from bigops.nn.sparse_linear import SparseLinear
from bigops.nn.truncated_svd import truncated_svd

Layer = CompressedLinear | LowRankLinear
_ONE_WEIGHT = (nn.Linear, QuantLinear, Fp8Linear)  # with neither a pattern nor factors


class Choice(NamedTuple):
    """A config and what was found out for one layer."""

    config: Config
    x_grid: Grid | None = None  # of static activations
    rank: int | None = None  # of LowRank(energy=..)


class Built(NamedTuple):
    """A new layer beside the old one."""

    layer: Layer
    frozen: Layer  # `layer` as it will be once frozen
    choice: Choice  # what was built: of a config that fell back, the other one
    remarks: list[str]


class Stays(NamedTuple):
    """The old layer stays."""

    reason: str


def prepare(old: nn.Module, choice: Choice, freeze: bool) -> Built | Stays:
    """The layer that is to take the place of ``old``, which is not changed.

    A frozen layer never takes more bytes than ``old`` does. Where `Sparse` or `LowRank` beside
    `Int8` saves nothing over that `Int8` alone, the layer becomes `Int8` alone, and a remark says
    so. One that is to be trained first has no size yet: a remark says what it will take.
    """
    if isinstance(old, PackedBase):
        old = old.unpacked()  # thawed, it is that layer, with the same Parameters
    before, config = nbytes(old), choice.config
    if not (isinstance(config, SparseInt8 | LowRankInt8) and isinstance(old, _ONE_WEIGHT)):
        return _within(before, old, choice, freeze)
    alone = Choice(config.int8, choice.x_grid)
    made = _within(min(before, _least_bytes(build(old, alone))), old, choice, freeze)
    if isinstance(made, Built) or not freeze:
        return made
    other = _within(before, old, alone, freeze)
    if isinstance(other, Stays):
        return made
    other.remarks.append(f"in place of {config}: {made.reason}")
    return other


def _within(limit: int, old: nn.Module, choice: Choice, freeze: bool) -> Built | Stays:
    """The new layer, unless it would take more than ``limit`` bytes and is to be frozen."""
    reason = _saves_nothing(old, choice.rank or _rank_of(choice.config))
    if reason is not None:  # before the singular values are computed
        return Stays(reason)
    remarks: list[str] = []
    new = build(old, choice, remarks)
    if isinstance(new, LowRankLinear | QuantLowRankLinear):
        choice = choice._replace(rank=new.rank)
        reason = _saves_nothing(old, new.rank)
        if reason is not None:
            return Stays(reason)
    size, frozen = _least_bytes(new), new
    if isinstance(new, CompressedLinear) and (size <= limit or not freeze):
        frozen = (new if freeze else copy.copy(new)).freeze()
        size = nbytes(frozen)
    if size > limit:
        grows = f"it would take {size:,} bytes where {limit:,} will do"
        if freeze:
            return Stays(grows)
        remarks.append(f"once frozen {grows}")
    return Built(new, frozen, choice, remarks)


def build(layer: nn.Module, choice: Choice, remarks: list[str] | None = None) -> Layer:
    """A compressed layer in recovery state beside ``layer``, which is not changed.

    Args:
        remarks: takes what is worth saying about how it was done.
    """
    config = choice.config
    if isinstance(layer, LowRankLinear | QuantLowRankLinear):
        if config != Int8():
            raise ValueError(
                f"config: expected Int8() for a low-rank layer, whose rank stays; got {config}"
            )
        return QuantLowRankLinear.from_low_rank(layer)
    if isinstance(config, LowRank | LowRankInt8):
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"config: expected a dense layer for {config}; got a {type(layer).__name__}"
            )
        factors = _factors(layer, choice, [] if remarks is None else remarks)
        return factors if isinstance(config, LowRank) else QuantLowRankLinear.from_low_rank(factors)
    new: CompressedLinear
    if isinstance(config, Int8) and isinstance(layer, SparseLinear):
        if config not in BESIDE_SPARSE:
            raise ValueError(
                f"config: expected Int8() or Int8(activations='static') for a sparse layer; got "
                f"{config}"
            )
        # the pattern there is stays
        new = SparseLinear.from_linear(
            layer, pattern=str(layer.pattern), mask=layer.mask, activations=config.activations
        )
    elif isinstance(config, Fp8):
        new = Fp8Linear.from_linear(layer, scales=config.scales, activations=config.activations)
    elif isinstance(config, Int8 | Int4):
        new = QuantLinear.from_linear(
            layer,
            bits=8 if isinstance(config, Int8) else 4,
            group=config.group,
            symmetric=config.symmetric,
            activations=config.activations,
        )
    elif isinstance(config, Sparse):
        new = SparseLinear.from_linear(layer, config.sparsity, config.pattern, config.values)
    else:
        new = SparseLinear.from_linear(
            layer,
            config.sparse.sparsity,
            config.sparse.pattern,
            activations=config.int8.activations,
        )
    if new.x_grid is not None and choice.x_grid is not None:
        new.x_grid.copy_(torch.tensor(choice.x_grid, device=new.x_grid.device))
    return new


def _factors(layer: nn.Linear, choice: Choice, remarks: list[str]) -> LowRankLinear:
    config = choice.config
    assert isinstance(config, LowRank | LowRankInt8)
    form = config if isinstance(config, LowRank) else config.low_rank
    given = (form.rank, form.energy) if choice.rank is None else (choice.rank, None)
    # Factors made under inference_mode could not be trained later.
    with torch.inference_mode(False), torch.no_grad():
        svd = truncated_svd(layer.weight, *given, exact=form.exact)
        if svd.fallback:
            remarks.append(f"by LAPACK's SVD: {svd.fallback}")
        return LowRankLinear.from_svd(layer, svd)


def nbytes(layer: nn.Module) -> int:
    """Bytes of the parameters and buffers of one layer."""
    return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


def _least_bytes(new: Layer) -> int:
    """Bytes of a layer once frozen by arithmetic alone; of a sparse one all but its values."""
    if isinstance(new, LowRankLinear):
        return nbytes(new)
    empty = type(new).from_arguments({**new.arguments(), "frozen": True})  # type: ignore[attr-defined]
    bias = 0 if new.bias is None else new.bias.nbytes
    return bias + sum(t.nbytes for t in empty.buffers())


def _rank_of(config: Config) -> int | None:
    """The rank that a config names."""
    if isinstance(config, LowRankInt8):
        config = config.low_rank
    return config.rank if isinstance(config, LowRank) else None


def _saves_nothing(layer: nn.Module, rank: int | None) -> str | None:
    """Why factors of this rank would be no smaller than the layer, or None."""
    if rank is None or not isinstance(layer, nn.Linear):
        return None
    n, k = layer.out_features, layer.in_features
    if rank * (k + n) < n * k:
        return None
    return (
        f"rank {rank} saves nothing: {rank} x ({k} + {n}) entries of the factors for {k} x {n} of "
        "the weight"
    )
