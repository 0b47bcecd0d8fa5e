"""Rotary embeddings as models of transformers write them become one op, for q and for k.

``x * cos + cat(-x[..., R/2:], x[..., :R/2]) * sin`` (arXiv 2104.09864) makes five passes over
memory; where only the first R columns turn, the ``cat`` with the others behind it one more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bigops.formats.quantize import SERVED
from bigops.graph.deploy.passes.rewrite import (
    args,
    arguments,
    aten,
    call,
    is_call,
    only_user,
    replace,
    same,
    value,
)
from bigops.ops.rotary.choose import op


def run(module: fx.GraphModule) -> int:
    """Replace what turns columns half of R apart."""
    return sum(
        _rotary(node) for node in list(module.graph.nodes) if is_call(node, aten.neg.default)
    )


def _rotary(neg: fx.Node) -> int:
    turned = only_user(neg)
    x = None if turned is None else _turned(neg, turned)
    product = None if turned is None else only_user(turned)
    total = None if product is None else only_user(product)
    if x is None or turned is None or product is None or total is None:
        return 0
    sin = _factor(product, turned)
    if not is_call(total, aten.add.Tensor) or arguments(total)["alpha"] != 1:
        return 0
    cos = _factor(_other(total, product), x)
    before, tables = value(x), (value(cos), value(sin))
    if before is None or not _is_served(before, *tables):
        return 0
    last = _in_dtype_of(before, total)
    if last is None:
        return 0
    last, x = _with_the_rest(last, x)
    new = call(last, op, {"x": x, "cos": cos, "sin": sin})
    replace(last, new)
    _let_copy(new)
    return 1


def _columns(node: Any) -> tuple[fx.Node, int, int] | None:
    """What a node is a slice of by columns, from where and to where."""
    if not is_call(node, aten.slice.Tensor):
        return None
    given = arguments(node)
    source = given["self"]
    whole = value(source)
    if whole is None or given["step"] != 1 or given["dim"] not in (-1, whole.dim() - 1):
        return None
    size, bounds = whole.shape[-1], (given["start"], given["end"])
    if not isinstance(size, int) or not all(b is None or isinstance(b, int) for b in bounds):
        return None
    start, end, _ = slice(*bounds).indices(size)
    return source, start, end


def _parts(cat: Any) -> list[Any]:
    """The two nodes that a node puts beside each other, column by column."""
    out = value(cat)
    if out is None or not is_call(cat, aten.cat.default):
        return []
    given = arguments(cat)
    parts = list(given["tensors"])
    return parts if len(parts) == 2 and given["dim"] in (-1, out.dim() - 1) else []


def _turned(neg: fx.Node, cat: fx.Node) -> fx.Node | None:
    """x of ``cat(-x[..., R/2:], x[..., :R/2])``, or None."""
    if neg not in _parts(cat)[:1]:
        return None
    x, start, end = _columns(args(neg)[0]) or (None, 0, 0)
    r = value(cat).shape[-1]  # type: ignore[union-attr]
    if x is None or (start, end) != (r // 2, r) or r % 2 or x.meta["val"].shape[-1] != r:
        return None
    return x if _columns(_parts(cat)[1]) == (x, 0, r // 2) else None


def _other(node: fx.Node, one: fx.Node) -> Any:
    """Of two arguments the one that is not ``one``."""
    a, b = args(node)[:2]
    return b if a is one else a


def _factor(product: Any, x: fx.Node) -> Any:
    """What a node multiplies x by, or None."""
    if not is_call(product, aten.mul.Tensor) or x not in args(product):
        return None
    return _other(product, x)


def _is_served(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> bool:
    if cos is None or sin is None or cos.dtype != sin.dtype or x.dim() != 4:
        return False
    if x.device.type != "cpu" or x.dtype not in SERVED:
        return False
    return cos.dtype in (x.dtype, torch.float32) and _fits(cos, x) and _fits(sin, x)


def _fits(table: Tensor, x: Tensor) -> bool:
    """Whether cos or sin broadcasts over heads, and at most over the batch."""
    sizes = [*(1,) * (4 - table.dim()), *table.shape]
    if len(sizes) != 4 or table.dim() < 2 or not same(sizes[1], 1):
        # [B, T, R] would be one for each head here
        return False
    batch = same(sizes[0], 1) or same(sizes[0], x.shape[0])
    return batch and same(sizes[2], x.shape[2]) and same(sizes[3], x.shape[3])


def _in_dtype_of(x: Tensor, total: fx.Node) -> fx.Node | None:
    """The sum, or what casts it back where 16 bits times float32 gave float32, or None."""
    cast = only_user(total)
    for node in (total, cast if is_call(cast, aten.to.dtype, aten._to_copy.default) else None):
        out = value(node)
        if out is not None and out.dtype == x.dtype:
            return node
    return None


def _with_the_rest(last: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The same with the columns that do not turn, where they are put behind those that do."""
    whole, start, end = _columns(x) or (None, 0, 0)
    cat = only_user(last)
    parts = _parts(cat)
    if whole is None or cat is None or start != 0 or last not in parts[:1]:
        return last, x
    size = whole.meta["val"].shape[-1]
    return (cat, whole) if _columns(parts[1]) == (whole, end, size) else (last, x)


def _let_copy(node: fx.Node) -> None:
    """Let views of a result that lies otherwise than before be copies where they have to."""
    for user in node.users:
        if is_call(user, aten.view.default):
            user.target = aten.reshape.default
        schema = getattr(user.target, "_schema", None)
        if schema is not None and any(r.alias_info is not None for r in schema.returns):
            _let_copy(user)
