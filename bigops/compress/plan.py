"""What `compress_` decided for each layer as plain data, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from bigops.compress.build import Choice
from bigops.compress.config import decode
from bigops.formats import quantize

VERSION = 1
_KEY = "bigops_plan"


class Decided(NamedTuple):
    """A plan that was read."""

    layers: dict[str, Choice | None]  # None: left
    freeze: bool


def is_plan(config: Any) -> bool:
    """Whether this is a plan, and no mapping of patterns."""
    return isinstance(config, Mapping) and _KEY in config


def write(layers: Mapping[str, Choice | None], freeze: bool) -> dict[str, Any]:
    """A plan as plain data, ready for JSON; order means nothing."""
    return {
        _KEY: VERSION,
        "freeze": freeze,
        "layers": {n: None if choice is None else _entry(choice) for n, choice in layers.items()},
    }


def _entry(choice: Choice) -> dict[str, Any]:
    entry: dict[str, Any] = {"config": choice.config.encode()}
    if choice.x_qparams is not None:
        entry["x_qparams"] = list(choice.x_qparams)
    if choice.rank is not None:
        entry["rank"] = choice.rank
    return entry


def read(plan: Mapping[str, Any]) -> Decided:
    """What `write` wrote.

    Raises:
        ValueError: another version, or entries that do not belong.
    """
    if plan[_KEY] != VERSION:
        raise ValueError(f"plan: expected version {VERSION}; got {plan[_KEY]!r}")
    layers, freeze = plan.get("layers"), plan.get("freeze")
    if not isinstance(layers, Mapping) or not isinstance(freeze, bool):
        raise ValueError(f"plan: expected 'layers' and 'freeze'; got {sorted(plan)}")
    return Decided({n: None if e is None else _choice(n, e) for n, e in layers.items()}, freeze)


def _choice(name: str, entry: Any) -> Choice:
    known = {"config", "x_qparams", "rank"}
    if isinstance(entry, Mapping) and "x_grid" in entry:  # as older plans say
        entry = {"x_qparams" if key == "x_grid" else key: entry[key] for key in entry}
    if not isinstance(entry, Mapping) or "config" not in entry or not set(entry) <= known:
        raise ValueError(f"plan: expected config, x_qparams and rank for {name}; got {entry!r}")
    qparams, rank = entry.get("x_qparams"), entry.get("rank")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise ValueError(f"plan: expected a rank of at least 0 for {name}; got {rank!r}")
    if qparams is not None:
        try:
            scale, zero = map(float, qparams)
            quantize.check_qparams(
                "x_qparams", torch.tensor([scale, zero], dtype=torch.float32, device="cpu")
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"plan: expected a scale and a zero point for {name}; {error}"
            ) from None
        qparams = (scale, zero)
    return Choice(decode(entry["config"]), qparams, rank)
