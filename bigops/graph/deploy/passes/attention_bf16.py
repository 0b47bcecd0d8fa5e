"""Attention between products of u8 multiplies in bfloat16, where the CPU is faster so.

q, k and v of products that round their x to u8 have lost more by that (a 512th of a row's range)
than bfloat16 takes (a 512th of each number).
"""

from __future__ import annotations

from torch import fx

from bigops.graph.deploy.passes.rewrite import (
    VIEWS,
    args,
    arguments,
    aten,
    call,
    is_call,
    product_of,
    replace,
    weight_of,
)
from bigops.ops.attention.choose import op as attention
from bigops.ops.rotary.choose import op as rotary

_PASSED_ON = (
    *VIEWS,
    aten.transpose.int,
    aten.permute.default,
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    rotary,
)


def run(module: fx.GraphModule) -> int:
    """Let attention use bfloat16 where all that it reads comes from such products."""
    done = 0
    for node in list(module.graph.nodes):
        if not is_call(node, attention):
            continue
        given = arguments(node)
        if not given["bf16"] and all(_is_from_u8(given[name]) for name in "qkv"):
            replace(node, call(node, attention, given | {"bf16": True}, like=node))
            done += 1
    return done


def _is_from_u8(node: fx.Node) -> bool:
    while is_call(node, *_PASSED_ON):
        node = args(node)[0]
    op = product_of(node)
    if op is None:
        return False
    given = arguments(node)
    return weight_of(op, given).takes_rows or given.get("x_qparams") is not None
