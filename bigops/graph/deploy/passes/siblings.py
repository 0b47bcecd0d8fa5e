"""Linear layers that read the same x, as q, k and v do, become one product."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bigops.graph.deploy.passes.rewrite import (
    VIEWS,
    arguments,
    aten,
    call,
    is_call,
    owned,
    product_of,
    store,
    store_weight,
    value,
    weight_of,
)
from bigops.ops.family import LinearOp


def run(module: fx.GraphModule) -> int:
    """Merge siblings whose results are only viewed anew; their parts are views of one result.

    A layer whose activation follows stays by itself: the activation is worth more in its epilogue.
    """
    groups: dict[Any, list[fx.Node]] = {}
    for node in module.graph.nodes:
        key = _key(module, node)
        if key is not None and all(is_call(user, *VIEWS) for user in node.users):
            groups.setdefault(key, []).append(node)
    done = 0
    for group in groups.values():
        if len(group) > 1 and _merge(module, group):
            done += 1
    return done


def _key(module: fx.GraphModule, node: fx.Node) -> Any:
    """What products have to share to be one."""
    if is_call(node, aten.linear.default):
        x, weight, bias = (arguments(node)[name] for name in ("input", "weight", "bias"))
        matrix = owned(module, weight)
        if matrix is None or (bias is not None and owned(module, bias) is None):
            return None
        return x, "linear", matrix.dtype, bias is None
    op = product_of(node)
    if op is None:
        return None
    given = arguments(node)
    stored = [given[name] for name in op.format.TENSORS]
    if any(t is not None and owned(module, t) is None for t in stored):
        return None
    if given["residual"] is not None or (
        given["bias"] is not None and owned(module, given["bias"]) is None
    ):
        return None
    # what is no tensor is the same for all; pad may differ, of whole tiles it is 0
    plain = tuple(v for k, v in given.items() if not isinstance(v, fx.Node) and k != "x")
    return given["x"], op.name, plain, tuple(t is None for t in stored)


def _merge(module: fx.GraphModule, group: list[fx.Node]) -> bool:
    first = group[0]
    op = product_of(first)
    merged = _merged(module, first, group) if op is None else _merged_of(module, op, group)
    if merged is None:
        return False
    at = 0
    for node in group:
        shape = value(node)
        assert shape is not None
        size = shape.shape[-1]
        part = call(
            node,
            aten.slice.Tensor,
            {"self": merged, "dim": -1, "start": at, "end": at + size, "step": 1},
        )
        at += size
        for view in list(node.users):  # the part is not dense: a view of it may have to copy
            view.target = aten.reshape.default
        node.replace_all_uses_with(part)
        module.graph.erase_node(node)
    return True


def _stacked(module: fx.GraphModule, parts: list[Any], before: fx.Node) -> fx.Node | None:
    """Tensors of the module one below the other, as one of its own."""
    if parts[0] is None:
        return None
    found = [t for t in (owned(module, part) for part in parts) if t is not None]
    return store(module, f"{parts[0].target}_merged", torch.cat(found), before)


def _merged(module: fx.GraphModule, first: fx.Node, group: list[fx.Node]) -> fx.Node:
    given = [arguments(node) for node in group]
    merged = {
        name: _stacked(module, [one[name] for one in given], first) for name in ("weight", "bias")
    }
    return call(first, aten.linear.default, {"input": given[0]["input"], **merged})


def _merged_of(module: fx.GraphModule, op: LinearOp, group: list[fx.Node]) -> fx.Node | None:
    first = group[0]
    given = [arguments(node) for node in group]
    parts = [weight_of(op, one, module) for one in given]
    if not op.format.can_merge(parts):
        return None
    stored = next(given[0][name].target for name in op.format.TENSORS)
    name = f"{stored.rpartition('.')[0]}_merged"
    fields = store_weight(module, op, op.format.merge(parts), name, first)
    bias = _stacked(module, [one["bias"] for one in given], first)
    return call(first, op.forward, {**given[0], **fields, "bias": bias})
