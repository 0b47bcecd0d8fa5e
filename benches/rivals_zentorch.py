"""zentorch by its own ops: float, dynamic int8, int4 groups.

Only the forms that give right results are used: its prepacked dynamic int8 was wrong by a factor
(2.13.0.2), and scales of another shape crashed it. Where an op has no activation of its own, eager
torch applies it. Weights are kept alive by `rivals.keep_for_zentorch`.
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from bigops.benches.harness import LeftOut, Side, clones, in_turn
from bigops.benches.rivals import Int4Weight, Layer, keep_for_zentorch, round_int8

# our name of an activation -> its name in zentorch_linear_unary
_POST = {
    "none": "none",
    "relu": "relu",
    "gelu": "gelu_erf",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def available() -> bool:
    """Whether zentorch is installed; it is not loaded for that."""
    return importlib.util.find_spec("zentorch") is not None


def _ops(*needed: str) -> Any:
    """Its ops, loaded.

    Raises:
        LeftOut: not installed, made for another torch, or without one of the ops needed.
    """
    if not available():
        raise LeftOut("zentorch is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("zentorch")
    except Exception as error:  # another torch: an OSError or ImportError from its library
        raise LeftOut(f"zentorch does not load: {error!s:.200}") from None
    missing = [name for name in needed if not hasattr(torch.ops.zentorch, name)]
    if missing:
        raise LeftOut(f"zentorch: no op {missing[0]}")
    return torch.ops.zentorch


def _kept(layer: Layer, weight: Tensor) -> list[Tensor]:
    own = clones(layer.case, weight.clone())
    keep_for_zentorch(layer.case, own)
    return own


def linear(layer: Layer, dtype: torch.dtype) -> Side:
    """Prepacked weights in fp32 or bf16, activation in the same call."""
    ops = _ops("zentorch_weight_prepack_for_linear", "zentorch_linear_unary")
    post = _POST.get(layer.activation)
    if post is None or layer.residual is not None:
        raise LeftOut(f"zentorch: no {layer.activation} with this residual in one call")
    plain = _kept(layer, layer.weight.to(dtype))
    packs = [ops.zentorch_weight_prepack_for_linear(weight) for weight in plain]
    keep_for_zentorch(layer.case, packs)
    take, x = in_turn(packs), layer.x.to(dtype)  # x in its dtype ahead of the clock
    bias = None if layer.bias is None else layer.bias.to(dtype)
    unit = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    cost = layer.cost(unit, float(layer.weight.numel() * x.element_size()))
    run = ops.zentorch_linear_unary

    def call() -> Tensor:
        return run(x, take(), bias, is_weight_prepacked=True, post_op=post)

    return Side("zentorch", call, cost, f"zentorch {unit}", own_pool=True)


def int8_dynamic(layer: Layer) -> Side:
    """int8 rows of W; x quantised row by row at run time, symmetric."""
    run = _ops("zentorch_dynamic_qlinear").zentorch_dynamic_qlinear
    values, scale = round_int8(layer.weight)
    take, x, bias = in_turn(_kept(layer, values)), layer.x, layer.bias
    keep_for_zentorch(layer.case, [scale])
    cost = layer.cost("int8", float(values.nbytes))
    return Side(
        "zentorch int8",
        lambda: layer.finish(run(x, take(), scale, bias)),
        cost,
        "zentorch dynamic_qlinear",
        own_pool=True,
    )


def int4(layer: Layer, weight: Int4Weight, dynamic: bool) -> Side:
    """int4 groups; x in bf16, as it is or quantised row by row at run time.

    Both ops refuse float32, so a float32 case goes through bf16, made within the call.
    """
    ops = _ops("zentorch_woq_repack_weight", "zentorch_woq_linear", "zentorch_dynamic_qlinear")
    packs = _kept(layer, ops.zentorch_woq_repack_weight(weight.values.clone()))  # [N, K / 8] int32
    scale = weight.scale.t().contiguous()  # [K / group, N]
    dtype = layer.x.dtype
    bias = None if layer.bias is None else layer.bias.bfloat16()
    if dynamic:
        take, run = in_turn(packs), ops.zentorch_dynamic_qlinear
        name, unit = "zentorch int4 int8", "int8"

        def multiply(x: Tensor) -> Tensor:
            return run(x, take(), scale, bias)

    else:
        narrow = scale.bfloat16()
        keep_for_zentorch(layer.case, [narrow])
        take, run = in_turn([pack.t() for pack in packs]), ops.zentorch_woq_linear
        name, unit = "zentorch int4 bf16", "bf16"

        def multiply(x: Tensor) -> Tensor:
            return run(x, take(), narrow, None, bias)

    keep_for_zentorch(layer.case, [scale])
    cost = layer.cost(unit, float(weight.nbytes))
    return Side(
        name,
        lambda: layer.finish(multiply(layer.x.bfloat16()).to(dtype)),
        cost,
        name,
        own_pool=True,
    )
