"""sparse_linear against dense, dense int8 and torch's CSR: every format, forward and backward.

The weights are pruned first, and every error is against the float64 product with the pruned
weights: what pruning itself costs belongs to a receipt, not to a kernel. A limit counts the
useful work only, that of the entries kept. In the backward cases the other sides are torch's dense
products of the same dtype. On a GPU floating values are measured as a bitmap too, up to 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.benches import families, rivals, rivals_cuda, sparse24
from bigops.benches.harness import (
    DTYPES,
    OWN,
    Case,
    Side,
    copies,
    in_turn,
)
from bigops.benches.limits import Cost
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.patterns import Pattern
from bigops.formats.quantized import QuantizedWeight
from bigops.formats.sparse import SparseWeight
from bigops.ops.sparse_linear.bitmap import MAX_ROWS as BITMAP_ROWS

ROWS = (1, 4, 16, 64, 128, 256, 1024)
# (K, N) of encoders of 384 and 768: output, merged q/k/v, up and down
MODEL = ((384, 384), (384, 1152), (384, 1536), (1536, 384), (768, 768), (768, 3072), (3072, 768))
SHAPES = ((768, 3072), (1024, 1024), (4096, 4096), (4096, 11008))
PATTERNS = ("1x1", "1x4", "4x1", "16x1", "16x16", "32x32", "2:4")
VALUES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}
UNITS = {"int8": "int8", "bf16": "bf16", "fp32": "fp32"}


def _case(
    name: str,
    m: int,
    k: int,
    n: int,
    sparsity: float,
    values: str = "int8",
    pattern: str = "1x4",
    **more: Any,
) -> Case:
    params = {
        "activation": more.pop("activation", "none"),
        "sparsity": sparsity,
        "values": values,
        "pattern": pattern,
    }
    dtype = "bf16" if values == "bf16" else "fp32"
    name = f"{name}-{values}-{pattern}-{sparsity * 100:.0f}%"
    return Case("sparse_linear", name, m, k, n, dtype, params=params, **more)


def cases() -> list[Case]:
    """The demo's layers, the grid of shapes, all patterns, and the two products of backward."""
    found = [
        _case("overhead", 8, 8, 8, 0.8, activation="relu", quick=True),
        _case("mlp", 64, 784, 2048, 0.8, activation="relu", quick=True),
        _case("mlp2", 64, 2048, 1024, 0.8, activation="relu", quick=True),
        _case("mlp", 64, 784, 2048, 0.8, "fp32", activation="relu"),
    ]
    for k, n in SHAPES:
        rotate = k * n >= 1 << 24
        for m in ROWS:
            found += [_case("grid", m, k, n, s, rotate=rotate) for s in (0.8, 0.9)]
            found += [
                _case("grid", m, k, n, s, "fp32", "1x1", rotate=rotate)
                for s in (0.5, 0.6, 0.8, 0.9)
            ]
    for k, n in MODEL:
        found += [_case("model", m, k, n, s) for m in (64, 512, 1024) for s in (0.8, 0.9)]
    for m in (1, 16):
        found += [_case("decode", m, 4096, 4096, s, "bf16", "1x1", rotate=True) for s in (0.5, 0.7)]
    for m in (16, 128):
        found += [_case("gelu", m, 768, 3072, s, activation="gelu") for s in (0.8, 0.9)]
    for values in VALUES:
        for pattern in PATTERNS:
            levels = (0.5,) if ":" in pattern else (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
            found += [
                _case("pattern", m, 2048, 2048, s, values, pattern)
                for s in levels
                for m in (1, 16, 128)
            ]
    for k, n in SHAPES[:3]:
        for values in ("fp32", "bf16"):
            found += [
                _case("backward", 256, k, n, 0.8, values, pattern, direction=direction)
                for direction in ("backward-x", "backward-values")
                for pattern in (("1x1", "1x4") if values == "fp32" else ("1x4",))
            ]
    return found + sparse24.cases()


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    if case.params["pattern"] == sparse24.PATTERN:
        return sparse24.build(case, device)
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    sparsity, values = float(case.params["sparsity"]), str(case.params["values"])
    pattern = Pattern.parse(str(case.params["pattern"]))
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = torch.randn(case.n, case.k, device=device) * case.k**-0.5
    mask = pattern.mask(weight, sparsity)
    full = pattern.expand(mask, case.n, case.k)
    weight = torch.where(full, weight, 0).to(dtype)
    own = SparseWeight.from_mask(weight, mask, VALUES[values], (pattern.height, pattern.width))
    if case.direction.startswith("backward"):
        return _backward(case, x, weight, own, full)
    bias = torch.randn(case.n, device=device).to(dtype)
    size, moved = x.element_size(), x.element_size() * case.m * (case.k + case.n)
    total = 2.0 * case.m * case.k * case.n
    kept = float(full.float().mean())
    sparse = Cost(UNITS[values], total * kept, float(own.nbytes + moved))
    dense = Cost(case.dtype, total, float(size * case.n * case.k + moved))
    plain = rivals.eager(activation, False)
    reference = [plain(x.double().cpu(), weight.double().cpu(), bias.double().cpu())]
    take = in_turn(copies(case, own, own.nbytes, _copy))
    sides = [
        Side(OWN, lambda: bigops.sparse_linear(x, take(), bias, None, activation), sparse),
        rivals.eager_side(case, x, weight, (bias,), plain, dense),
        rivals.dense_compiled(case, x, weight, bias, plain, dense),
    ]
    if device != "cpu" and values != "int8" and case.m <= BITMAP_ROWS:
        sides.append(bitmap_side(case, x, own, bias, activation, sparse))
    if device == "cpu":
        if values == "int8":
            sides.append(_on_rows(x, own, bias, activation, sparse))
            sides.append(_dense_int8(case, x, weight, bias, activation, total, moved))
            sides += families.dense_int8_sides(case, x, weight, bias, activation)
        elif values == "bf16":
            sides += families.dense_bf16_sides(case, x, weight, bias, activation)
        else:
            if pattern == Pattern(1, 1):
                sides += families.sparse_fp32_sides(case, x, weight, bias, activation)
            sides += families.dense_fp32_sides(case, x, weight, bias, activation)
    else:
        layer = rivals.Layer(case, x, weight, bias, activation)
        if values == "int8":
            sides.append(_dense_int8(case, x, weight, bias, activation, total, moved))
            sides += rivals_cuda.int8_sides(layer)
        elif case.params["pattern"] == "2:4":
            sides += rivals_cuda.sparse24_sides(layer)
    return reference, sides


def bitmap_side(
    case: Case, x: Tensor, own: SparseWeight, bias: Tensor, activation: str, cost: Cost
) -> Side:
    """The same entries as a bitmap and packed values: fewer bytes, for decode steps on a GPU."""
    packed = BitmapWeight.from_sparse(own)
    take = in_turn(
        copies(case, packed, packed.nbytes, lambda w: w.replace(values=w.values.clone()))
    )
    return Side(
        f"{OWN} bitmap",
        lambda: bigops.sparse_linear(x, take(), bias, None, activation),
        replace(cost, nbytes=cost.nbytes - own.nbytes + packed.nbytes),
    )


def _on_rows(x: Tensor, own: SparseWeight, bias: Tensor, activation: str, cost: Cost) -> Side:
    """The product behind one `act_quant` that serves several."""
    rows = bigops.act_quant(x)
    moved = cost.nbytes - x.nbytes + rows.values.nbytes
    return Side(
        f"{OWN} on rows",
        lambda: bigops.sparse_linear(rows, own, bias, None, activation),
        replace(cost, nbytes=moved),
    )


def _dense_int8(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor, activation: str, flops: float, moved: int
) -> Side:
    """Our own dense int8: sparse int8 is to beat the best dense one, whoever made it."""
    own = QuantizedWeight.from_dense(weight)
    take = in_turn(copies(case, own, own.nbytes, lambda w: w.replace(values=w.values.clone())))
    return Side(
        "dense int8 of bigops",
        lambda: bigops.quantized_linear(x, take(), bias, None, activation),
        Cost("int8", flops, float(own.nbytes + moved)),
    )


def _backward(
    case: Case, x: Tensor, weight: Tensor, own: SparseWeight, full: Tensor
) -> tuple[list[Tensor], list[Side]]:
    """One product of the backward pass: gx = gz W, or gz^T x at the stored positions."""
    grad = torch.randn(case.m, case.n, device=x.device).to(x.dtype)
    want_x = case.direction == "backward-x"
    op = torch.ops.bigops.sparse_linear_backward
    fixed = (*own.arguments, None, "none", want_x, not want_x, False)

    def ours() -> Tensor:
        gx, gv, _ = op(grad, x, *fixed)
        return gx if want_x else gv

    def eager() -> Tensor:
        return grad @ weight if want_x else grad.t() @ x

    x64, g64 = x.double(), grad.double()
    truth = g64 @ own.to_dense(torch.float64) if want_x else torch.where(full, g64.t() @ x64, 0)
    total = 2.0 * case.m * case.k * case.n
    kept = float(full.float().mean())
    moved = x.element_size() * (case.m * (case.k + case.n) + case.n * case.k)
    # both kernels multiply in float32, whatever the values' dtype
    mine = Side(OWN, ours, Cost("fp32", total * kept, float(own.nbytes + moved)))
    theirs = Side("eager", eager, Cost(case.dtype, total, float(moved)), "aten mm")
    if not want_x:
        mine = replace(mine, shown=lambda v: own.replace(values=v, scale=None).to_dense())
        theirs = replace(theirs, shown=lambda g: torch.where(full, g, 0))
    return [truth.cpu()], [mine, theirs]


def _copy(weight: SparseWeight) -> SparseWeight:
    return weight.replace(values=weight.values.clone(), index=weight.index.clone())


def test_sparse_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
