"""`low_rank_linear` on two int8 factors.

No op of its own: two calls of `quantized_linear`, whose storage, kernels and gradients these are.
What lies between the two products stays in x's dtype; each row of it is rounded to u8 as one of x
is.
"""

from __future__ import annotations

from torch import Tensor

from bigops.formats.low_rank import check_ranks
from bigops.formats.quantized import QuantizedWeight
from bigops.ops import explain as explaining
from bigops.ops.choice import Choice
from bigops.ops.quantized_linear import quantized_linear


def product(
    x: Tensor,
    u: QuantizedWeight,
    v: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act((x @ v.T) @ u.T + bias) + residual`` on two stored factors."""
    check_ranks(u, v)
    return quantized_linear(quantized_linear(x, v), u, bias, residual, activation)


def explain(
    x: Tensor,
    u: QuantizedWeight,
    v: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    device: str | None,
) -> Choice:
    """Which kernels serve the two products."""
    check_ranks(u, v)
    inner = explaining.explain("quantized_linear", x, v, device=device)
    h = x.new_empty((*x.shape[:-1], v.n))
    outer = explaining.explain("quantized_linear", h, u, bias, residual, activation, device)
    both = outer.kernel if inner.kernel == outer.kernel else f"{inner.kernel}, {outer.kernel}"
    reason = f"x v^T, then u, both by quantized_linear: {outer.reason}"
    return Choice.of("low_rank_linear", both, reason, outer.config)
