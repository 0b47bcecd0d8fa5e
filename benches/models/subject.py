"""A model to be measured: positional tensors in, one tensor out, and how well it does its task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]
Call = Callable[..., Tensor]  # (*inputs) -> output; what every side is
SAMPLES = 32  # rows of calibration, at least


def batches(batch: int) -> int:
    """How many inputs of so many rows calibration takes: eight at least, or single ones differ."""
    return max(8, SAMPLES // batch)


@dataclass(frozen=True)
class Accuracy:
    """What a model is worth on real data: ``of(call)`` runs a side on it, at its shape."""

    what: str  # "top-1 %", "perplexity"
    of: Callable[[Call], float]


@dataclass(frozen=True, eq=False)  # told apart by identity: what is made of one is kept for it
class Subject:
    """One model at one shape.

    ``calibration`` are inputs like ``inputs``, none of them part of ``accuracy``. ``classes``: the
    output's last dimension is one of logits. ``decode`` marks one step of generation, where weights
    are read from memory once for a row.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    calibration: Sequence[Inputs]
    accuracy: Accuracy | None = None
    classes: bool = False
    decode: bool = False

    @property
    def shape(self) -> str:
        """The first input's, as in ``8x64``."""
        return "x".join(map(str, self.inputs[0].shape))

    @property
    def title(self) -> str:
        """What tells it from other subjects."""
        return f"{self.name} {self.shape}"


def tokens(batch: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Token numbers, int64 ``[batch, length]``, drawn evenly."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def resized(inputs: Inputs, length: int) -> Inputs:
    """One row of every input, as long as asked: what a server is given.

    Args:
        inputs: each ``[batch, tokens]``.
        length: tokens of the result; what is missing is repeated.

    Raises:
        ValueError: an input of another form: the model takes no lengths.
    """
    sizes = {tuple(x.shape) for x in inputs}
    if len(sizes) != 1 or any(x.dim() != 2 for x in inputs):
        raise ValueError(f"inputs: expected all of one shape [batch, tokens], got {sorted(sizes)}")
    rows = [x[:1] for x in inputs]
    times = -(-length // rows[0].shape[1])
    return tuple(x.repeat(1, times)[:, :length].contiguous() for x in rows)
