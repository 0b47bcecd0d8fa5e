"""A tiny model with inputs that it takes, and its outputs: what both sources of models share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MOST_PARAMETERS = 40_000_000


class Tiny(NamedTuple):
    """A model in eval mode, and what it is called with."""

    model: nn.Module
    inputs: dict[str, Any]
    tier: str  # which rules made it small
    other: Callable[[], nn.Module]  # makes the same model with other numbers


class NotBuiltError(Exception):
    """No tiny model of a name: its text begins with one of a few causes."""


def made(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model in eval mode, always with the same numbers.

    Raises:
        NotBuiltError: it has more than `MOST_PARAMETERS`.
    """
    with torch.device("meta"):
        size = sum(p.numel() for p in make().parameters())
    if size > MOST_PARAMETERS:
        raise NotBuiltError(f"size: {size:,} parameters")
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():  # so that each layer counts: 0.02 hides them behind the residual stream
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    return model


def runs(model: nn.Module, inputs: dict[str, Any]) -> str:
    """Empty where the model takes the inputs and gives finite numbers, else the cause."""
    try:
        with torch.no_grad():
            found = outputs(model, inputs)
    except Exception as error:
        return f"inputs: {line(error)}"
    finite = found and all(bool(t.isfinite().all()) for t in found)
    return "" if finite else "output: none that is finite"


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """The floating tensors that a call gives, in order; equal seeds for what draws numbers."""
    torch.manual_seed(7)
    found = model(**inputs)
    return list(_floating(found))


def _floating(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.numel():
            yield value
    elif isinstance(value, dict):
        for key in value:
            if "past_key_values" not in key and "cache" not in key:
                yield from _floating(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _floating(item)


def line(error: BaseException) -> str:
    """An error in one line of at most 160 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
