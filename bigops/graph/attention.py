"""Attention of torch's that verbs open, so that its projections are layers that are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bigops.graph.carry import lost_reason
from bigops.graph.sites import Sites
from bigops.nn.attention import MultiheadAttention, why_not


def reason_to_leave(sites: Sites, path: str) -> str | None:
    """Why the `nn.MultiheadAttention` at ``path`` stays closed, or None."""
    module = sites.modules[path]
    assert isinstance(module, nn.MultiheadAttention)
    if reason := sites.reason_to_leave(path, (nn.MultiheadAttention,), weight_goes=True):
        return reason
    inner = f"{path}.out_proj"
    owned = {path: ("in_proj_weight", "in_proj_bias"), inner: ("weight", "bias")}
    for owner, leaves in owned.items():
        for leaf in leaves:
            if users := sites.tied(owner, leaf):
                return f"the {leaf} of {owner} is shared with {', '.join(users)}"
    projection = sites.modules[inner]
    if (
        type(projection) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        or inner in sites.held
    ):
        return "its out_proj is another layer, or is held besides"
    if reason := lost_reason(projection):
        return f"its out_proj stays: {reason}"
    return why_not(module)


def open_(sites: Sites) -> dict[str, nn.Module]:
    """Put ours in the place of each attention that can be opened; those that were there, by path.

    They share the Parameters, and compute the same.
    """
    found: dict[str, nn.Module] = {
        path: module
        for path, module in sites.unique()
        if type(module) is nn.MultiheadAttention and reason_to_leave(sites, path) is None
    }
    sites.swap({path: MultiheadAttention.from_torch(m) for path, m in found.items()})  # type: ignore[arg-type]
    return found


def close(sites: Sites, opened: Mapping[str, nn.Module]) -> None:
    """Put those back around which all is dense still.

    In a graph that is compiled a compressed weight looks like any tensor: there it is ours beside
    it that keeps `nn.TransformerEncoderLayer` from its fast path.
    """
    for path, module in opened.items():
        parent: Any = sites.parent(path)
        ours: Any = parent._modules[path.rpartition(".")[2]]
        layers = [ours.in_proj, ours.out_proj]
        if isinstance(parent, nn.TransformerEncoderLayer):
            layers += [parent.linear1, parent.linear2]
        if not any(getattr(layer, "computes_weight", None) for layer in layers):
            sites.put(path, module)
