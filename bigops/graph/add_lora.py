"""add_lora_: low-rank adapters for the linear layers of a model that patterns name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bigops.graph.atomic import atomic
from bigops.graph.record import Done, Record, Skipped, class_name
from bigops.graph.sites import Sites
from bigops.nn import LAYERS
from bigops.nn.computed_weight import is_dense
from bigops.nn.layer import layer_of
from bigops.nn.linear import Linear, check_size
from bigops.nn.lora import LoRAAdapter, LoRALinear, QLoRALinear, check_adapter


@atomic
def add_lora_(
    model: nn.Module,
    rank: int,
    targets: str | Sequence[str] = "*",
    alpha: float | None = None,
    dropout: float = 0.0,
    name: str = "default",
    rank_stabilized: bool = False,
) -> Record:
    """Swap linear layers for `LoRALinear` in place and freeze every other parameter.

    On any exception, KeyboardInterrupt too, the model is as it was, what requires gradients
    included.

    Args:
        model: holds `nn.Linear`, `bigops.nn.Linear` or compressed layers (`QLoRALinear` is made
            of these); a `LoRALinear` gets one more adapter.
        rank, alpha, dropout, name, rank_stabilized: see `LoRALinear.add_adapter`.
        targets: shell patterns (``"*.q_proj"``) of the layers' paths; each has to match one.

    Returns:
        What was swapped and which matching layers were left, with the reasons.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a pattern that no linear layer matches, no layer that can be swapped (one whose
            smaller side is below ``rank`` is left, too), or an argument that does not fit a layer;
            pattern and layer are named.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    sites = Sites(model)
    new: dict[str, LoRALinear] = {}
    adapters: dict[str, tuple[LoRALinear, LoRAAdapter]] = {}
    left: list[Skipped] = []
    idle = dict.fromkeys(patterns)
    for path, module in sites.unique():
        for half in _halves(path, module):
            if any(fnmatchcase(half, pattern) for pattern in patterns):
                left.append(Skipped(half, "a part of a GatedMLP's stacked parameter"))
        adapted, linear = with_adapters(module), _linear(module)
        if linear is None:
            continue
        matching = [p for p in patterns if _matches(sites, module, p)]
        if not matching:
            continue
        for pattern in matching:
            idle.pop(pattern, None)
        try:
            most = min(linear.in_features, linear.out_features)
            wide = max(most, check_size("rank", rank))
            check_adapter(wide, wide, rank, alpha, dropout)
            if wide > most:
                why = f"rank: expected 1 to {most}, its smaller side; got {rank}"
                left.append(Skipped(path, why))
                continue
            if adapted is None:
                reason = sites.reason_to_leave(path, (nn.Linear, *LAYERS), weight_goes=False)
                if reason is not None:
                    left.append(Skipped(path, reason))
                    continue
                adapted = new[path] = _with_adapters(linear)
            adapter = adapted._new_adapter(name, rank, alpha, dropout, rank_stabilized)
            adapters[path] = adapted, adapter
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{path or 'model'}: {error}") from None
    reasons = [_why_idle(sites, pattern) for pattern in idle]
    if not adapters:
        why = "; ".join([*map(str, left), *reasons]) or "no pattern"
        raise ValueError(f"targets: expected a layer that can be swapped; got {patterns}: {why}")
    if idle:
        raise ValueError(
            f"targets: expected each pattern to match a linear layer; {'; '.join(reasons)}"
        )
    done = []
    for path, (layer, adapter) in adapters.items():
        what, why = f"{type(layer).__name__}, rank {rank}", f"adapter {name!r}"
        added = sum(p.nbytes for p in adapter.parameters())
        done.append(Done(path, what, why, layer.nbytes, layer.nbytes + added))
    record = Record("add_lora_", done, left)
    for layer, adapter in adapters.values():
        layer._take_adapter(name, adapter)
    sites.swap(new)
    _freeze(model)
    return record


def _freeze(model: nn.Module) -> None:
    """Let the factors of adapters alone require gradients."""
    layers = filter(None, map(with_adapters, model.modules()))
    ours = {id(p) for layer in layers for p in layer.adapters.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)


def with_adapters(module: nn.Module) -> LoRALinear | None:
    """``module`` where it is a layer with adapters."""
    return module if isinstance(module, LoRALinear) else None


def _linear(module: nn.Module) -> Any:
    """``module`` where it can have an adapter."""
    return with_adapters(module) or (module if isinstance(module, nn.Linear) else None)


def _with_adapters(linear: nn.Linear) -> LoRALinear:
    """A layer beside ``linear`` that has no adapter yet."""
    if is_dense(linear):
        return LoRALinear._unfrozen(Linear.from_linear(linear))
    return QLoRALinear._unfrozen(linear)


def _matches(sites: Sites, module: nn.Module, pattern: str) -> bool:
    return any(fnmatchcase(path, pattern) for path in sites.paths[id(module)])


def _halves(path: str, module: nn.Module) -> list[str]:
    """The paths that the projections of a `GatedMLP` have in its state_dict, but as no module."""
    layer = layer_of(module)
    return [f"{path}.{half}".lstrip(".") for half in (layer.stacked if layer else ())]


def _why_idle(sites: Sites, pattern: str) -> str:
    """What a pattern that no linear layer matches stands for, and what may be meant."""
    text = f"{pattern!r} matches "
    for path, module in sites.unique():
        for half in _halves(path, module):
            if fnmatchcase(half, pattern):
                down = f"{path}.down_proj".lstrip(".")
                return (
                    f"{text}{half}, a part of a GatedMLP's stacked parameter, which takes no "
                    f"adapter (target {down}, or call add_lora_ before the projections are fused)"
                )
    for path, module in sites.unique():
        if _matches(sites, module, pattern):
            return f"{text}{path or 'model'}, a {class_name(module)}"
    longer = f"*.{pattern}"
    for path, module in sites.modules.items():
        if _linear(module) is not None and fnmatchcase(path, longer):
            return f"{text}none, as whole paths are matched (did you mean {longer!r}: {path}?)"
    return f"{text}none"
