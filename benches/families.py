"""The rivals of one number format, all of them: "the best dense int8" is the best of a list here.

Each function takes a layer, ``y = act(x W^T + bias) + residual`` on the CPU, and gives the sides
that can take part in the case; the reason of every absence is said once on stderr. x is [M, K],
weight [N, K], bias [N] or None, residual [M, N] or None. They build models and packs, so a bench
calls them once per case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.benches import (
    rivals,
    rivals_deepsparse,
    rivals_onnx,
    rivals_openvino,
    rivals_zentorch,
)
from bigops.benches.harness import Case, Side, optional_side
from bigops.benches.limits import Cost
from bigops.benches.rivals import Int4Weight, Layer


def dense_fp32_sides(
    case: Case,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> list[Side]:
    """Everyone who multiplies in float32: oneDNN prepacked, zentorch, OpenVINO, onnxruntime."""
    layer = Layer(case, x, weight, bias, activation, residual)
    sides: list[Side] = []
    _stock(sides, layer, torch.float32)
    optional_side(sides, rivals_openvino.fp32, layer)
    optional_side(sides, rivals_onnx.fp32, layer)
    return sides


def dense_bf16_sides(
    case: Case,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> list[Side]:
    """Everyone who multiplies in bf16: oneDNN prepacked, zentorch, OpenVINO.

    A float32 case counts too: x is rounded to bf16 ahead of the clock where a provider wants it.
    """
    layer = Layer(case, x, weight, bias, activation, residual)
    sides: list[Side] = []
    _stock(sides, layer, torch.bfloat16)
    optional_side(sides, rivals_openvino.bf16, layer)
    return sides


def dense_int8_sides(
    case: Case,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> list[Side]:
    """int8 weights of a dense layer: activations in int8 (dynamic, static) or weight-only."""
    layer = Layer(case, x, weight, bias, activation, residual)
    sides: list[Side] = []
    if residual is None:
        wide = Layer(case, x.float(), weight.float(), None, activation)
        cost = wide.cost("int8", float(weight.numel()))
        offset = None if bias is None else bias.float()
        for engine in rivals.INT8_ENGINES:
            args = (case, engine, wide.x, wide.weight, offset, activation, cost)
            optional_side(sides, rivals.dynamic_int8, *args)
    optional_side(sides, rivals.int8_weight_only, layer)
    optional_side(sides, rivals_zentorch.int8_dynamic, layer)
    for group in (0, 128):
        optional_side(sides, rivals_openvino.int8_dynamic, layer, group)
    optional_side(sides, rivals_openvino.int8_bf16, layer)
    optional_side(sides, rivals_openvino.int8_static, layer)
    optional_side(sides, rivals_onnx.int8_dynamic, layer)
    optional_side(sides, rivals_onnx.int8_static, layer)
    return sides


def int4_sides(
    case: Case,
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
) -> list[Side]:
    """int4 groups (`rivals.round_int4`), activations as they are or quantised at run time.

    All get the same integers: hold them against the float64 product with ``weight.to_dense()``.
    """
    layer = Layer(case, x, weight.to_dense(), bias, activation, residual)
    sides: list[Side] = []
    optional_side(sides, rivals.int4_weight_only, layer, weight)
    for dynamic in (False, True):
        optional_side(sides, rivals_zentorch.int4, layer, weight, dynamic)
    hints = (
        (rivals_openvino.FP32, weight.group),  # the fastest below about 128 rows
        (rivals_openvino.FP32, 0),
        (rivals_openvino.BF16, 0),
    )
    for hint, group in hints:
        optional_side(sides, rivals_openvino.int4, layer, weight, hint, group)
    for level in (0, 4):
        optional_side(sides, rivals_onnx.int4, layer, weight, level)
    return sides


def sparse_fp32_sides(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> list[Side]:
    """Everyone who multiplies by a pruned weight in float32: torch's CSR (MKL), DeepSparse."""
    layer = Layer(case, x, weight, bias, activation)
    kept = int(weight.count_nonzero())
    dense = layer.cost("fp32", 8.0 * kept)  # value and column, 4 bytes each
    useful = Cost("fp32", dense.flops * kept / weight.numel(), dense.nbytes)
    sides: list[Side] = []
    optional_side(sides, rivals.csr, case, x, weight, bias, activation, useful)
    optional_side(sides, rivals_deepsparse.deepsparse, layer)
    return sides


def _stock(sides: list[Side], layer: Layer, dtype: torch.dtype) -> None:
    """oneDNN and zentorch in one dtype; zentorch through torch.compile where no op serves."""
    case, activation = layer.case, layer.activation
    x, weight = layer.x.to(dtype), layer.weight.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    unit = "fp32" if dtype == torch.float32 else "bf16"
    cost = layer.cost(unit, float(weight.nbytes))
    if layer.residual is None:
        optional_side(sides, rivals.onednn_prepacked, case, x, weight, bias, activation, cost)
    if layer.residual is None and activation not in rivals.GATED:
        optional_side(sides, rivals_zentorch.linear, layer, dtype)
        return
    residual = None if layer.residual is None else layer.residual.to(dtype)
    rest = (bias,) if residual is None else (bias, residual)
    plain = rivals.eager(activation, residual is not None)
    optional_side(sides, rivals.plugin_side, "zentorch", plain, case, x, weight, rest, cost)
