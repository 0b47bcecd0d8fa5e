"""``scaled_dot_product_attention`` on the CPU becomes the attention of this package."""

from __future__ import annotations

from torch import fx

from bigops.formats.base import FLOATS
from bigops.graph.deploy.passes.rewrite import (
    VIEWS,
    args,
    arguments,
    aten,
    call,
    is_call,
    replace,
    same,
    value,
)
from bigops.ops.attention.choose import op

_SDPA = aten.scaled_dot_product_attention.default
_COPIES = (aten.contiguous.default, aten.clone.default)


def run(module: fx.GraphModule) -> int:
    """Replace the calls without dropout; copies before them go, and heads that were repeated."""
    done = 0
    for node in list(module.graph.nodes):
        if not is_call(node, _SDPA):
            continue
        given = arguments(node)
        query = value(given["query"])
        if given["dropout_p"] or query is None or query.device.type != "cpu" or query.dim() != 4:
            continue
        if query.dtype not in FLOATS:
            continue
        q, k, v = (_source(given[name]) for name in ("query", "key", "value"))
        once_k, once_v = _before_repeat(k), _before_repeat(v)
        if once_k is not None and once_v is not None:
            k, v = once_k, once_v
        elif not given["enable_gqa"] and not same(k.meta["val"].shape[1], query.shape[1]):
            continue
        mask = given["attn_mask"]
        new = call(
            node,
            op,
            {
                "q": q,
                "k": k,
                "v": v,
                "mask": None if mask is None else _source(mask),
                "causal": given["is_causal"],
                "scale": given["scale"],
                "bf16": False,
            },
        )
        replace(node, new)
        done += 1
    return done


def _source(node: fx.Node) -> fx.Node:
    """What a node is a copy of, for the attention reads any strides."""
    while is_call(node, *_COPIES):
        node = args(node)[0]
    return node


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """x [B, H, S, D] of ``x[:, :, None].expand(B, H, n, S, D).reshape(B, H n, S, D)``, or None."""
    if not is_call(node, *VIEWS):
        return None
    wide = _source(args(node)[0])
    if not is_call(wide, aten.expand.default):
        return None
    inserted = _source(args(wide)[0])
    if not is_call(inserted, aten.unsqueeze.default) or args(inserted)[1] != 2:
        return None
    source, out = value(args(inserted)[0]), value(node)
    spread = value(wide)
    if source is None or out is None or spread is None:
        return None
    if source.dim() != 4 or out.dim() != 4 or spread.dim() != 5:
        return None
    kept = same(source.shape[0], out.shape[0]) and same(
        source.shape[1] * spread.shape[2], out.shape[1]
    )
    kept = kept and same(source.shape[2], out.shape[2]) and same(source.shape[3], out.shape[3])
    return _source(args(inserted)[0]) if kept else None
