"""Layer norms and RMS norms, written out or not, become one op, with the sum before them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bigops.formats.quantize import SERVED
from bigops.graph.deploy.passes.rewrite import (
    args,
    arguments,
    aten,
    call,
    is_call,
    only_user,
    replace,
    same_shape,
    value,
)
from bigops.ops import codes
from bigops.ops.norm.schema import NORM

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)


def run(module: fx.GraphModule) -> int:
    """Replace layer norms, RMS norms and what RMS norms of transformers are written as."""
    done = 0
    for node in list(module.graph.nodes):
        if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
            done += _library(node)
        elif is_call(node, aten.rsqrt.default):
            done += _written_out(node)
    return done


def _library(node: fx.Node) -> int:
    given = arguments(node)
    x = value(given["input"])
    if x is None or not _is_served(x) or len(given["normalized_shape"]) != 1:
        return 0
    weights = [value(given.get(name)) for name in ("weight", "bias")]
    if any(w is not None and w.dtype not in (x.dtype, torch.float32) for w in weights):
        return 0
    kind, eps = "layer", given["eps"]
    if is_call(node, aten.rms_norm.default):
        kind, eps = "rms", torch.finfo(x.dtype).eps if eps is None else eps
    _put(node, given["input"], given["weight"], given.get("bias"), eps, kind)
    return 1


def _written_out(rsqrt: fx.Node) -> int:
    """``w * (h * rsqrt(mean(h^2) + eps)).to(dtype)`` with h = x.to(float32)."""
    total = args(rsqrt)[0]
    if not is_call(total, aten.add.Tensor) or not isinstance(args(total)[1], float):
        return 0
    mean = args(total)[0]
    if not is_call(mean, aten.mean.dim) or args(mean)[1] != [-1] or not arguments(mean)["keepdim"]:
        return 0
    square = args(mean)[0]
    if (is_call(square, aten.pow.Tensor_Scalar) and args(square)[1] == 2) or (
        is_call(square, aten.mul.Tensor) and args(square)[0] is args(square)[1]
    ):
        wide = args(square)[0]
    else:
        return 0
    scaled = only_user(rsqrt)
    if scaled is None or not is_call(scaled, aten.mul.Tensor) or wide not in args(scaled):
        return 0
    last, narrow = scaled, only_user(scaled)
    if narrow is not None and is_call(narrow, *_CASTS):
        last, narrow = narrow, only_user(narrow)
    x = args(wide)[0] if is_call(wide, *_CASTS) else wide
    weight = None
    if narrow is not None and is_call(narrow, aten.mul.Tensor):
        other = args(narrow)[1] if args(narrow)[0] is last else args(narrow)[0]
        found = value(other)
        if found is not None and found.dim() == 1 and found.dtype == last.meta["val"].dtype:
            last, weight = narrow, other
    before, after = value(x), value(last)
    if before is None or after is None or before.dtype != after.dtype or not _is_served(before):
        return 0
    _put(last, x, weight, None, args(total)[1], "rms")
    return 1


def _is_served(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in SERVED


def _put(node: fx.Node, x: Any, weight: Any, bias: Any, eps: Any, kind: str) -> None:
    residual = None
    if is_call(x, aten.add.Tensor) and only_user(x) is node and arguments(x)["alpha"] == 1:
        a, b = (value(part) for part in args(x))
        if a is not None and b is not None and same_shape(a, b) and a.dtype == b.dtype:
            x, residual = args(x)
    given = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "eps": eps,
        "kind": codes.code_of("kind", kind),
    }
    replace(node, call(node, NORM.op, given, like=node))
