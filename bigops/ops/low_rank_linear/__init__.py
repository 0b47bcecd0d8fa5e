"""low_rank_linear: y = act(x base^T + scale (x v^T) u^T + bias) + residual, W in factors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigops.formats.dense import Factors
from bigops.formats.quantized import QuantizedWeight
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.family import LinearOp
from bigops.ops.low_rank_linear import quantized as factors
from bigops.ops.low_rank_linear.choose import backward, choose

__all__ = ["low_rank_linear", "reference"]

op = LinearOp("low_rank_linear", Factors, choose=choose, backward=backward)


@serves("low_rank_linear")
def _explain(
    x: Tensor,
    u: Any,
    v: Any,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    base: Tensor | None = None,
    scale: float = 1.0,
    device: str | None = None,
) -> Choice:
    if isinstance(u, QuantizedWeight) or isinstance(v, QuantizedWeight):
        _check_form(base, scale)
        return factors.explain(x, u, v, bias, residual, activation, device)
    return op.explain(x, Factors(u, v, base, scale), bias, residual, activation, device)


def reference(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    base: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The meaning of `low_rank_linear` in plain torch; differentiable, any device and dtype."""
    return op.reference(x, Factors(u, v, base, scale), bias, residual, activation)


def low_rank_linear(
    x: Tensor,
    u: Tensor | QuantizedWeight,
    v: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    base: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``act(x @ base.T + scale * (x @ v.T) @ u.T + bias) + residual`` in one op.

    The weight ``u @ v`` is never formed: a row costs r (K + N) multiply-adds in place of K N. With
    ``base`` it is the LoRA form (Hu et al. 2021), v its A and u its B.

    Args:
        x: ``[.., K]``; float32, bfloat16, float16 or float64, any strides.
        u: ``[N, r]``; r from 0 (the product is zero) to min(N, K). Or both factors by
            `QuantizedWeight`: two calls of `quantized_linear`, without ``base`` and ``scale``.
        v: ``[r, K]``.
        bias: ``[N]`` or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        base: a dense weight ``[N, K]`` whose product is added, or None.
        scale: factor of the low-rank product.

    Returns:
        ``[.., N]`` in x's dtype. Each product is summed in float32 for bf16 and fp16;
        ``scale * x @ v.T`` and, with ``base``, the low-rank product are rounded to x's dtype in
        between (the latter stays in float32 where a GPU takes one launch). Under `torch.autocast`
        all arguments are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, a rank above the smaller side, or shapes or devices
            that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    if isinstance(u, QuantizedWeight) or isinstance(v, QuantizedWeight):
        _check_form(base, scale)
        return factors.product(x, u, v, bias, residual, activation)  # type: ignore[arg-type]
    return op.run(x, (u, v, base, scale), 0, bias, residual, activation)


def _check_form(base: Tensor | None, scale: float) -> None:
    if base is not None or scale != 1.0:
        raise ValueError(
            "base, scale: expected None and 1 with quantised factors; got "
            f"{'None' if base is None else 'a tensor'} and {scale}"
        )
