"""fused_linear: y = act(x W^T + bias) + residual, dense weight, gradients of every order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bigops.formats import checks
from bigops.formats.dense import DenseWeight
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.family import LinearOp
from bigops.ops.fused_linear.choose import backward, choose

__all__ = ["fused_linear", "reference"]

op = LinearOp("fused_linear", DenseWeight, choose=choose, backward=backward)


@serves("fused_linear")
def _explain(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Choice:
    checks.tensors(weight=weight)
    return op.explain(x, DenseWeight(weight), *args, **kwargs)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `fused_linear` in plain torch; differentiable, any device and dtype."""
    return op.reference(x, DenseWeight(weight), bias, residual, activation)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ weight.T + bias) + residual`` in one op, with gradients of every order.

    Args:
        x: ``[.., K]``; float32, bfloat16, float16 or float64, any strides.
        weight: ``[N, K]``, or ``[2N, K]`` for a gated pair (rows ``0:N`` gate, then up).
        bias: ``[N]`` (``[2N]`` for a gated pair), or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid, tanh, or a gated
            pair ``act(gate) * up``: swiglu, geglu, geglu_tanh, reglu (arXiv 2002.05202).

    Returns:
        ``[.., N]`` in x's dtype; sums and epilogue are held in float32 for bf16 and fp16. Under
        `torch.autocast` all arguments are cast to the autocast dtype first.

    Raises:
        ValueError: unknown activation, or shapes or devices that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    return op.run(x, (weight,), 0, bias, residual, activation)
