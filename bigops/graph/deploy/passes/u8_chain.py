"""Between layers whose qparams are known ahead, x goes as u8.

A layer with static activations rounds its x to u8 by its own qparams. Where all that reads the
result of a product are such layers, with the same qparams, the product stores u8 itself: a quarter
of the bytes between them, and no pass to round.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bigops.graph.deploy.passes.rewrite import arguments, call, owned, product_of, replace, value
from bigops.ops.family import LinearOp, linear_ops


def run(module: fx.GraphModule) -> int:
    """Store the results of products as u8 where the graph shows that each reader takes them so."""
    done = 0
    for node in reversed(list(module.graph.nodes)):  # a reader is a writer, too, and goes before
        if _writer(node) is None:
            continue
        qparams = _common(module, [_qparams(user, node) for user in node.users])
        if qparams is None:
            continue
        made = _as_u8(node, qparams)
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
        for reader in list(made.users):
            _as_reader(reader)
        done += 1
    return done


def _form(node: fx.Node) -> LinearOp | None:
    """The op that a node calls, in either form, where it has one of u8."""
    op = product_of(node)
    if op is None and node.op == "call_function":
        op = next((o for o in linear_ops() if o.u8 and o.u8.forward is node.target), None)
    return op if op is not None and op.u8 is not None else None


def _writer(node: fx.Node) -> LinearOp | None:
    """The op of a product whose result may become u8."""
    op = _form(node)
    if op is None or not node.users or arguments(node).get("y_qparams") is not None:
        return None
    result = value(node)
    return op if result is not None and result.dtype == torch.float32 else None


def _qparams(reader: fx.Node, x: fx.Node) -> fx.Node | None:
    """By which qparams a node rounds x, or None where it reads x in another way."""
    if _form(reader) is None or reader.all_input_nodes.count(x) != 1:
        return None
    given = arguments(reader)
    found = given.get("x_qparams")
    return found if given["x"] is x and isinstance(found, fx.Node) else None


def _common(module: fx.GraphModule, found: list[fx.Node | None]) -> fx.Node | None:
    """The one node of all, or one of several with the same numbers."""
    first = found[0]
    if first is None:
        return None
    numbers = owned(module, first)
    for other in found[1:]:
        if other is first:
            continue
        theirs = None if other is None else owned(module, other)
        if numbers is None or theirs is None or not torch.equal(numbers, theirs):
            return None
    return first


def _as_u8(node: fx.Node, y_qparams: fx.Node | None) -> fx.Node:
    op = _form(node)
    assert op is not None
    assert op.u8 is not None
    given: dict[str, Any] = {"x_qparams": None, "y_qparams": None, **arguments(node)}
    if y_qparams is not None:
        given["y_qparams"] = y_qparams
        first = next(n for n in node.graph.nodes if n in (node, y_qparams))
        if first is node:  # it belongs to a layer behind
            node.prepend(y_qparams)
    return call(node, op.u8.forward, given)


def _as_reader(reader: fx.Node) -> None:
    """A reader of u8, which is a call of the form of u8."""
    if product_of(reader) is not None:
        replace(reader, _as_u8(reader, None))
