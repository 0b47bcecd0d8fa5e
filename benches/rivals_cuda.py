"""The rivals of stock torch on a GPU: cuBLAS int8, tinygemm int4, semi-structured 2:4; and Liger.

Each maker raises `LeftOut` with the reason where its provider cannot take part; private entry
points of torch are asked for by name. A rival whose result is wrong, since a later torch changed a
layout, is left out by `harness.run_case`, which says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigops.benches.harness import LeftOut, Side, clones, in_turn, optional_side
from bigops.benches.limits import Cost
from bigops.benches.rivals import Int4Weight, Layer, round_int8

INNER_TILES = 8  # of tinygemm's layout: the widest loads


def int8_sides(layer: Layer) -> list[Side]:
    """Dense int8: activations quantised at run time (cuBLAS), or as they are."""
    sides: list[Side] = []
    optional_side(sides, int_mm, layer)
    optional_side(sides, int8_weight_only, layer)
    return sides


def int4_sides(layer: Layer, weight: Int4Weight) -> list[Side]:
    """int4 groups, activations as they are."""
    sides: list[Side] = []
    optional_side(sides, tinygemm, layer, weight)
    return sides


def sparse24_sides(layer: Layer) -> list[Side]:
    """A weight that is 2:4 sparse."""
    sides: list[Side] = []
    optional_side(sides, semi_structured, layer)
    return sides


def int_mm(layer: Layer) -> Side:
    """``torch._int_mm`` (cuBLAS) between a quantisation of rows and a scaling.

    Raises:
        LeftOut: sizes that it does not take: M above 16, K and N multiples of 8.
    """
    (m, k), n = layer.x.shape, layer.weight.shape[0]
    if m <= 16 or k % 8 or n % 8:
        raise LeftOut(f"torch _int_mm: needs M > 16 and K, N multiples of 8; got {m}, {k}, {n}")
    rounded, x, dtype = round_int8(layer.weight), layer.x, layer.x.dtype
    take, bias = in_turn(clones(layer.case, rounded.values)), layer.bias

    def linear(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        by = (x.abs().amax(1, keepdim=True).float() / 127).clamp_min(1e-12)
        q = (x.float() / by).round().clamp(-127, 127).to(torch.int8)
        y = (torch._int_mm(q, values.t()).float() * (by * scale)).to(dtype)
        return layer.finish(y if bias is None else y + bias)

    cost = layer.cost("int8", float(rounded.values.nbytes))
    return Side("torch _int_mm", lambda: linear(x, take(), rounded.scale), cost, "cublas int8")


def int8_weight_only(layer: Layer) -> Side:
    """``torch._weight_int8pack_mm`` with activations in bf16.

    Raises:
        LeftOut: this torch has no such op.
    """
    multiply = getattr(torch.ops.aten, "_weight_int8pack_mm", None)
    if multiply is None:
        raise LeftOut("torch int8pack: this torch has no such op")
    rounded, bias, dtype = round_int8(layer.weight), layer.bias, layer.x.dtype
    scale, take = rounded.scale.bfloat16(), in_turn(clones(layer.case, rounded.values))

    def call() -> Tensor:
        y = multiply(layer.x.bfloat16(), take(), scale).to(dtype)
        return layer.finish(y if bias is None else y + bias)

    cost = layer.cost("bf16", float(rounded.values.nbytes))
    return Side("torch int8pack", call, cost, "aten int8pack")


def tinygemm(layer: Layer, weight: Int4Weight) -> Side:
    """``torch._weight_int4pack_mm`` (tinygemm): int4 groups, activations in bf16.

    Raises:
        LeftOut: this torch has no such op, or sizes that it does not take.
    """
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack", None)
    multiply = getattr(torch.ops.aten, "_weight_int4pack_mm", None)
    if pack is None or multiply is None:
        raise LeftOut("torch tinygemm: this torch has no such op")
    n, k = weight.values.shape
    if weight.group not in (32, 64, 128, 256) or n % 8 or k % (16 * INNER_TILES):
        raise LeftOut(f"torch tinygemm: no groups of {weight.group} or no weight of {n} x {k}")
    unsigned = weight.values.int() + 8
    nibbles = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).to(torch.uint8)  # [N, K / 2]
    scale = weight.scale.t().bfloat16()
    # [K / group, N, 2]: the scale, and the value that the middle of the range stands for
    scales = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()
    bias, dtype, group = layer.bias, layer.x.dtype, weight.group
    try:
        take = in_turn(clones(layer.case, pack(nibbles, INNER_TILES)))
    except (RuntimeError, NotImplementedError) as failure:
        raise LeftOut(f"torch tinygemm: {str(failure).splitlines()[0]:.120}") from None

    def call() -> Tensor:
        y = multiply(layer.x.bfloat16(), take(), group, scales).to(dtype)
        return layer.finish(y if bias is None else y + bias)

    return Side("torch tinygemm", call, layer.cost("bf16", weight.nbytes), "aten int4pack")


def semi_structured(layer: Layer) -> Side:
    """``to_sparse_semi_structured``: cuSPARSELt or CUTLASS on sparse tensor cores.

    Raises:
        LeftOut: a dtype or a size that it does not take, or a GPU without such cores.
    """
    x, weight, bias = layer.x, layer.weight, layer.bias
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise LeftOut(f"torch semi-structured: bf16 and fp16 only; got {x.dtype}")
    try:
        from torch.sparse import to_sparse_semi_structured

        packed = to_sparse_semi_structured(weight)
    except (ImportError, RuntimeError, ValueError, NotImplementedError) as failure:
        why = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise LeftOut(f"torch semi-structured: {why:.120}") from None
    values = weight.numel() // 2 * weight.element_size()
    cost = layer.cost({torch.bfloat16: "bf16", torch.float16: "fp16"}[x.dtype], 9 / 8 * values)
    useful = Cost(cost.unit, cost.flops / 2, cost.nbytes)

    def call() -> Tensor:
        return layer.finish(torch.nn.functional.linear(x, packed, bias))

    return Side("torch semi-structured", call, useful, "semi-structured")


def liger(call: Callable[[Callable[..., Tensor]], Callable[[], Any]], cost: Cost) -> Side:
    """Liger's fused linear cross entropy, where it is installed.

    Raises:
        LeftOut: it is not, or does not load.
    """
    try:
        ops = importlib.import_module("liger_kernel.transformers.functional")
    except Exception as failure:  # it imports triton's private parts
        raise LeftOut(f"liger: {type(failure).__name__}: {failure!s:.80}") from None

    def loss(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        found = ops.liger_fused_linear_cross_entropy(x, weight, target, reduction=reduction)
        return found[0] if isinstance(found, tuple) else found

    return Side("liger", call(loss), cost, "triton liger")
