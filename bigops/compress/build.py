"""One layer by one config: built beside the old one, or the reason why it had better stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from bigops.compress.config import Config, Int8
from bigops.compress.observers import Qparams
from bigops.graph.carry import extras
from bigops.graph.transposed import is_transposed, transposed
from bigops.nn.computed_weight import is_dense
from bigops.nn.layer import Layer, layer_of


class Choice(NamedTuple):
    """A config and what was found out for one layer."""

    config: Config
    x_qparams: Qparams | None = None  # of static activations
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
    if is_transposed(old):
        if not freeze:
            return Stays(
                "its weight is [in, out], and a layer that is trained would have the transpose "
                "under its key; freeze=True takes it"
            )
        old = transposed(old)
    ours = layer_of(old)
    if ours is not None:
        old = ours.unpacked()  # of a thawed packed layer, with the same Parameters
    before, config = nbytes(old) - extras(old).nbytes, choice.config
    if config.alone is None or (ours is not None and (ours.pattern or ours.rank is not None)):
        return _within(before, old, choice, freeze)
    alone = Choice(config.alone, choice.x_qparams)
    made = _within(min(before, build(old, alone).least_bytes()), old, choice, freeze)
    if isinstance(made, Built) or not freeze:
        return made
    other = _within(before, old, alone, freeze)
    if isinstance(other, Stays):
        return made
    other.remarks.append(f"in place of {config}: {made.reason}")
    return other


def _within(limit: int, old: nn.Module, choice: Choice, freeze: bool) -> Built | Stays:
    """The new layer, unless it would take more than ``limit`` bytes and is to be frozen."""
    reason = _saves_nothing(old, choice.rank or choice.config.rank)
    if reason is not None:  # before the singular values are computed
        return Stays(reason)
    remarks: list[str] = []
    new: Any = build(old, choice, remarks)
    if new.rank is not None:
        choice = choice._replace(rank=new.rank)
        reason = _saves_nothing(old, new.rank)
        if reason is not None:
            return Stays(reason)
    size, frozen = new.least_bytes(), new
    if new.freezes and (size <= limit or not freeze):
        frozen = new if freeze else copy.copy(new)
        frozen.freeze(choice.config.quantizer(frozen))
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
    config, ours = choice.config, layer_of(layer)
    beside = replace(config, embeddings=False) if isinstance(config, Int8) else config
    if ours is not None and ours.rank is not None and beside != Int8():
        raise ValueError(
            f"config: expected Int8() for a low-rank layer, whose rank stays; got {config}"
        )
    if config.factors and not is_dense(layer):
        raise ValueError(
            f"config: expected a dense layer for {config}; got a {type(layer).__name__}"
        )
    # what is made under inference_mode could not be trained later
    with torch.inference_mode(False), torch.no_grad():
        new = config.make(layer, choice.rank, [] if remarks is None else remarks)
    qparams = getattr(new, "x_qparams", None)
    if qparams is not None and choice.x_qparams is not None:
        qparams.copy_(torch.tensor(choice.x_qparams, dtype=qparams.dtype, device=qparams.device))
    return new


def nbytes(layer: nn.Module) -> int:
    """Bytes of the parameters and buffers of one layer."""
    return sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


def _saves_nothing(layer: nn.Module, rank: int | None) -> str | None:
    """Why factors of this rank would be no smaller than the layer, or None."""
    if rank is None or not is_dense(layer):
        return None
    n, k = layer.out_features, layer.in_features
    if rank * (k + n) < n * k:
        return None
    return (
        f"rank {rank} saves nothing: {rank} x ({k} + {n}) entries of the factors for {k} x {n} of "
        "the weight"
    )
