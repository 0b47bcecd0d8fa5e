"""Which layers of a model can be compressed, and which of them gets which config."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from bigops.compress.config import Config, check_config
from bigops.graph.sites import Sites
from bigops.nn import LAYERS
from bigops.nn.layer import layer_of

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Layers(NamedTuple):
    """The linear layers of a model by path."""

    open: dict[str, Any]  # that can be compressed
    left: dict[str, str]  # the others, with the reason
    frozen: list[str]  # of those, what is compressed already


def find(sites: Sites) -> Layers:
    """The layers that can be compressed, and the others with the reason."""
    found = Layers({}, {}, [])
    for path, module in sites.unique():
        layer, around = layer_of(module), layer_of(sites.parent(path))
        if layer is not None:
            if layer.inside is not None:
                continue
            if layer.frozen and not layer.unpacks:
                found.frozen.append(path)
        elif not isinstance(module, nn.Linear):
            continue
        reason = layer and layer.closed_to_compress
        reason = reason or (around and around.inside) or _unfit(sites, path, module)
        if reason is None:
            found.open[path] = module
        else:
            found.left[path] = reason
    return found


def _unfit(sites: Sites, path: str, module: nn.Module) -> str | None:
    """Why a linear layer of whatever class is left, or None."""
    if reason := sites.reason_to_leave(path, (nn.Linear, *LAYERS), weight_goes=True):
        return reason
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if dtype not in _SERVED:
        return f"no compressed kernel takes {dtype}"
    if any(p.is_meta for p in module.parameters()):
        return "it is on meta, without numbers to compress"
    return None


def check_patterns(config: Config | Mapping[str, Config | None]) -> dict[str, Config | None]:
    """The patterns of a mapping, or ``*`` for one config; raise TypeError for another type."""
    if not isinstance(config, Mapping):
        check_config("config", config)
        return {"*": config}
    patterns: dict[str, Config | None] = {}
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise TypeError(f"config: expected name patterns (str) as keys; got {pattern!r}")
        if value is not None:
            check_config(f"config[{pattern!r}]", value)
        patterns[pattern] = value
    return patterns


def assign(
    layers: Layers, patterns: Mapping[str, Config | None], again: bool = False
) -> tuple[dict[str, Config], dict[str, str]]:
    """Give each layer its config: that of its exact name, else of the first pattern that matches.

    Args:
        layers: of `find`.
        patterns: names and `fnmatch` patterns; None leaves a layer.
        again: whether a pattern may match layers alone that are compressed already.

    Returns:
        The configs by path, and why each of the other open layers is left.

    Raises:
        ValueError: a pattern that no layer gets, because none matches or because exact names and
            earlier patterns take all that do.
    """
    chosen: dict[str, Config] = {}
    left: dict[str, str] = {}
    taken: dict[str, str] = {}  # which pattern each layer goes by
    for name in layers.open:
        pattern = _key_of(name, patterns, layers)
        if pattern is None:
            left[name] = "no pattern matches it"
            continue
        taken[name] = pattern
        config = patterns[pattern]
        if config is None:
            left[name] = f"config[{pattern!r}] is None"
        else:
            chosen[name] = config
    # leaving what is left anyhow is no mistake, and a second call may find its work done
    silent = {p for n in layers.left if (p := _key_of(n, patterns, layers)) and patterns[p] is None}
    if again:
        silent |= {p for n in layers.frozen if (p := _key_of(n, patterns, layers))}
    empty = [p for p in patterns if p not in taken.values() and p not in silent]
    if empty:
        raise ValueError(_nobody(layers, empty, taken))
    return chosen, left


def _key_of(name: str, keys: Iterable[str], layers: Layers) -> str | None:
    """What names a layer: its own name, else the first pattern that is no layer's name."""
    if name in keys:
        return name
    patterns = (k for k in keys if k not in layers.open and k not in layers.left)
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def _nobody(layers: Layers, empty: list[str], taken: Mapping[str, str]) -> str:
    """The error for patterns that no layer gets."""
    said = []
    for pattern in empty:
        others = {p for n, p in taken.items() if fnmatch.fnmatchcase(n, pattern)}
        if others:
            by = ", ".join(map(repr, sorted(others)))
            said.append(f"no layer is left for {pattern!r}: all that match it go by {by}")
        else:
            said.append(f"no layer to compress matches {pattern!r}")
    barred = [
        f"{name} ({reason})"
        for name, reason in layers.left.items()
        if any(name == p or fnmatch.fnmatchcase(name, p) for p in empty)
    ]
    there = ", ".join(layers.open) or "none"
    return f"config: {'; '.join(said)}; layers that can be compressed: {there}" + (
        f"; matched, but left: {'; '.join(barred)}" * bool(barred)
    )


def has_factors(layer: nn.Module, config: Config) -> bool:
    """Whether a layer is in factors, as ``config`` would have it."""
    ours = layer_of(layer)
    return config.factors and ours is not None and ours.rank is not None


def check_finite(name: str, layer: Any) -> None:
    """Raise ValueError where a weight or bias holds NaN or inf."""
    for leaf in ("weight", "u", "v", "values", "bias"):
        value = layer._parameters.get(leaf)
        if value is not None and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"{name}.{leaf}: expected finite values; got {bad} NaN or inf of {value.numel()}"
            )
