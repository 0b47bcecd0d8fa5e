"""``aten.linear`` becomes a product of ours: packed, or with what follows in its epilogue."""

from __future__ import annotations

from typing import Any

from torch import fx

from bigops.backend import machine
from bigops.formats.packed import SERVED, PackedWeight
from bigops.graph.deploy.passes import activations
from bigops.graph.deploy.passes.rewrite import (
    arguments,
    aten,
    call,
    is_call,
    only_user,
    owned,
    replace,
    store_weight,
    value,
)
from bigops.graph.pack import costs_more
from bigops.ops.family import LinearOp
from bigops.ops.fused_linear import op as fused
from bigops.ops.packed_linear import op as packed


def pack(module: fx.GraphModule) -> int:
    """Give linear layers whose weight the module owns to the packed product, where panels pay."""
    linears = [node for node in module.graph.nodes if is_call(node, aten.linear.default)]
    return sum(_pack(module, node) for node in linears if _served(node))


def fuse(module: fx.GraphModule) -> int:
    """Give linear layers to the fused product, where it takes what follows into its epilogue."""
    linears = [node for node in module.graph.nodes if is_call(node, aten.linear.default)]
    return sum(_fuse(node) for node in linears if _served(node))


def _served(node: fx.Node) -> bool:
    given = arguments(node)
    x, weight = value(given["input"]), value(given["weight"])
    if x is None or weight is None or x.device.type != "cpu" or weight.dim() != 2:
        return False
    return x.dtype in SERVED and weight.dtype == x.dtype and machine.extension is not None


def _pack(module: fx.GraphModule, node: fx.Node) -> int:
    given = arguments(node)
    weight = owned(module, given["weight"])
    if weight is None or costs_more(weight, weight.shape[0]):
        return 0
    if any(not is_call(user, aten.linear.default) for user in given["weight"].users):
        return 0  # an embedding reads it, too: panels would be a second copy
    stored = PackedWeight.from_dense(weight)
    _put(node, packed, store_weight(module, packed, stored, given["weight"].target, node))
    return 1


def _fuse(node: fx.Node) -> int:
    user = only_user(node)
    if user is None or (activations.name_of(user) is None and not is_call(user, aten.add.Tensor)):
        return 0
    _put(node, fused, {"weight": arguments(node)["weight"]})
    return 1


def _put(node: fx.Node, op: LinearOp, fields: dict[str, Any]) -> None:
    given = arguments(node)
    rest = {"x": given["input"], "bias": given["bias"], "residual": None, "activation": 0}
    replace(node, call(node, op.forward, {**fields, **rest}, like=node))
