"""An activation, and the sum with a residual, move into the product before them."""

from __future__ import annotations

from torch import fx

from bigops.graph.deploy.passes import activations
from bigops.graph.deploy.passes.rewrite import (
    args,
    arguments,
    aten,
    call,
    is_call,
    only_user,
    product_of,
    replace,
    same_shape,
    value,
)
from bigops.ops import activation as act


def run(module: fx.GraphModule) -> int:
    """Fold what alone reads the result of a product: ``act(x W^T + b) + residual``."""
    done = 0
    for node in list(module.graph.nodes):
        product = node if product_of(node) is not None else None
        while product is not None:
            product = _activated(product) or _added(product)
            done += product is not None
    return done


def _activated(node: fx.Node) -> fx.Node | None:
    given, user = arguments(node), only_user(node)
    if user is None or given["activation"] != act.NONE or given["residual"] is not None:
        return None
    name = activations.name_of(user)
    if name is None:
        return None
    return _instead(node, user, {**given, "activation": act.CODES[name]})


def _added(node: fx.Node) -> fx.Node | None:
    given, user = arguments(node), only_user(node)
    if user is None or given["residual"] is not None or not is_call(user, aten.add.Tensor):
        return None
    a, b = args(user)[:2]
    residual = b if a is node else a
    whole, other = value(node), value(residual)
    if whole is None or other is None or arguments(user)["alpha"] != 1:
        return None
    if other.dtype != whole.dtype or not same_shape(other, whole):
        return None
    return _instead(node, user, {**given, "residual": residual})


def _instead(node: fx.Node, user: fx.Node, given: dict[str, object]) -> fx.Node:
    """The product where its reader stood, since the residual may come after the product."""
    new = call(user, node.target, given, like=user)
    replace(user, new)
    node.graph.erase_node(node)
    return new
