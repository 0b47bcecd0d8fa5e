"""Activations that a model writes out become the calls that torch has for them.

The tanh form of gelu (arXiv 1606.08415), as GPT-2 and Phi write it:
``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))``; and silu, ``x * sigmoid(x)``.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from bigops.graph.deploy.passes.rewrite import args, aten, call, is_call, only_user, replace

_CUBIC, _SCALE = 0.044715, math.sqrt(2 / math.pi)


def run(module: fx.GraphModule) -> int:
    """Replace what is written out; the numbers are those of the formula, rounded elsewhere."""
    done = 0
    for node in list(module.graph.nodes):
        if is_call(node, aten.tanh.default):
            done += _gelu(node)
        elif is_call(node, aten.sigmoid.default):
            done += _silu(node)
    return done


def _gelu(tanh: fx.Node) -> int:
    scaled = args(tanh)[0]
    total = _times(scaled, _SCALE)
    x = None if total is None else _with_cube(total)
    if x is None:
        return 0
    plus = only_user(tanh)
    if plus is None or not is_call(plus, aten.add.Tensor) or args(plus)[1] not in (1, 1.0):
        return 0
    last = only_user(plus)
    if last is None or not is_call(last, aten.mul.Tensor):
        return 0
    other = args(last)[1] if args(last)[0] is plus else args(last)[0]
    if other is x:  # x * (1 + tanh) * 0.5
        half = only_user(last)
        if half is None or _times(half, 0.5) is not last:
            return 0
        last = half
    elif _times(other, 0.5) is not x:
        return 0
    given = {"self": x, "approximate": "tanh"}
    replace(last, call(last, aten.gelu.default, given, like=last))
    return 1


def _with_cube(total: Any) -> fx.Node | None:
    """x of ``x + 0.044715 * x^3``, either way round."""
    if not is_call(total, aten.add.Tensor):
        return None
    for x, rest in (args(total)[:2], args(total)[1::-1]):
        cube = _times(rest, _CUBIC)
        if isinstance(x, fx.Node) and cube is not None and _is_cube(cube, x):
            return x
    return None


def _is_cube(node: fx.Node, x: fx.Node) -> bool:
    if is_call(node, aten.pow.Tensor_Scalar):
        return args(node)[0] is x and args(node)[1] == 3
    if not is_call(node, aten.mul.Tensor) or x not in args(node):
        return False
    square = args(node)[1] if args(node)[0] is x else args(node)[0]
    if is_call(square, aten.pow.Tensor_Scalar):
        return args(square)[0] is x and args(square)[1] == 2
    return is_call(square, aten.mul.Tensor) and args(square)[0] is args(square)[1] is x


def _times(node: Any, number: float) -> fx.Node | None:
    """The other factor of a product with ``number``, or None."""
    if not is_call(node, aten.mul.Tensor):
        return None
    for factor, other in (args(node)[:2], args(node)[1::-1]):
        if isinstance(factor, float | int) and math.isclose(factor, number, rel_tol=1e-6):
            return other if isinstance(other, fx.Node) else None
    return None


def _silu(sigmoid: fx.Node) -> int:
    x, last = args(sigmoid)[0], only_user(sigmoid)
    if last is None or not is_call(last, aten.mul.Tensor) or x not in args(last):
        return 0
    replace(last, call(last, aten.silu.default, {"self": x}, like=last))
    return 1
