"""x that several products quantise is quantised once; behind a norm in the pass of the norm."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from bigops.graph.deploy.passes.rewrite import (
    arguments,
    call,
    is_call,
    product_of,
    replace,
    value,
    weight_of,
)
from bigops.ops.act_quant import op as act_quant
from bigops.ops.norm.schema import ACT_QUANT, NORM

SYMMETRIC = "symmetric"


class Rows(NamedTuple):
    """What stands for x in products that take rows of u8."""

    values: fx.Node
    scale: fx.Node
    zero_point: fx.Node


def run(module: fx.GraphModule) -> int:
    """Quantise x once for all products that do so themselves, where there are several, or a norm
    makes it.
    """
    done = 0
    for node in list(module.graph.nodes):
        for symmetric in (False, True):
            readers = [r for r in node.users if _takes(r, node, symmetric)]
            if is_call(node, NORM.op) and readers:
                _behind_norm(node, readers, symmetric)
            elif len(readers) > 1:
                _share(_act_quant(node, symmetric), node, readers)
            else:
                continue
            done += 1
            break
    return done


def _takes(reader: fx.Node, x: fx.Node, symmetric: bool) -> bool:
    """Whether a product quantises each row of x by itself, in this way, and could be given them."""
    op = product_of(reader)
    if op is None or op.rows is None or reader.all_input_nodes.count(x) != 1:
        return False
    given, result = arguments(reader), value(reader)
    if given["x"] is not x or result is None:
        return False
    weight = weight_of(op, given)
    # of rows, the result has the dtype of bias or residual, or float32
    floating = next((value(given[n]) for n in ("bias", "residual") if given[n] is not None), None)
    dtype = torch.float32 if floating is None else floating.dtype
    way = getattr(weight, "activations", "dynamic") == SYMMETRIC
    return weight.takes_rows and dtype == result.dtype and way == symmetric


def _act_quant(x: fx.Node, symmetric: bool) -> Rows:
    first = next(user for user in x.graph.nodes if user in x.users)
    return _parts(call(first, act_quant, {"x": x, "symmetric": symmetric}), first)


def _behind_norm(norm: fx.Node, readers: list[fx.Node], symmetric: bool) -> None:
    others = [user for user in norm.users if user not in readers]
    flags = {"symmetric": symmetric, "keep_float": bool(others), "keep_sum": False}
    both = call(norm, ACT_QUANT.op, {**arguments(norm), **flags})
    first = norm
    rows = _parts(both, first)
    _share(rows, norm, readers)
    if others:
        replace(norm, _part(both, 3, first))
    else:
        norm.graph.erase_node(norm)


def _share(rows: Rows, x: fx.Node, readers: list[fx.Node]) -> None:
    for reader in readers:
        op: Any = product_of(reader)
        given = {
            **arguments(reader),
            "x": rows.values,
            "x_scale": rows.scale,
            "x_zero_point": rows.zero_point,
        }
        replace(reader, call(reader, op.rows.forward, given, like=reader))


def _parts(both: fx.Node, before: fx.Node) -> Rows:
    return Rows(*(_part(both, at, before) for at in range(3)))


def _part(both: fx.Node, at: int, before: fx.Node) -> fx.Node:
    with before.graph.inserting_before(before):
        part = before.graph.call_function(operator.getitem, (both, at))
    part.meta["val"] = both.meta["val"][at]
    return part
