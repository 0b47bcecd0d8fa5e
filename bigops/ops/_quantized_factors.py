"""Both factors of a low-rank weight in int8, and `low_rank_linear` on them.

No op of its own: two calls of `quantized_linear`, whose storage, kernels and gradients these are.
What lies between the two products stays in x's dtype; each row of it is rounded to u8 as one of x
is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops import backend
from bigops.ops._quantized_weight import QuantizedWeight, quantize_weight
from bigops.ops.quantized_linear import quantized_linear

FORM = (8, 0, "dynamic")  # bits, group, activations of both factors


class QuantizedFactors(NamedTuple):
    """A weight [N, K] as ``u @ v``, each factor a `QuantizedWeight` of int8 rows, x dynamic."""

    u_values: Tensor  # of u [N, r]
    u_scale: Tensor
    u_row_sum: Tensor
    v_values: Tensor  # of v [r, K]
    v_scale: Tensor
    v_row_sum: Tensor
    n: int
    k: int
    rank: int

    @property
    def u(self) -> QuantizedWeight:
        """The factor [N, r]."""
        return QuantizedWeight(
            self.u_values, self.u_scale, None, self.u_row_sum, None, self.n, self.rank, *FORM
        )

    @property
    def v(self) -> QuantizedWeight:
        """The factor [r, K]."""
        return QuantizedWeight(
            self.v_values, self.v_scale, None, self.v_row_sum, None, self.rank, self.k, *FORM
        )

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the product."""
        return torch.Size([self.n, self.k])

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.u.nbytes + self.v.nbytes

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that the factors stand for, rounded once."""
        return (self.u.to_dense(torch.float64) @ self.v.to_dense(torch.float64)).to(dtype)

    def validate(self) -> None:
        """Raise ValueError or TypeError unless both factors are whole."""
        for name, factor in (("u", self.u), ("v", self.v)):
            try:
                factor.validate()
            except (TypeError, ValueError) as error:  # it starts with the tensor's name
                raise type(error)(f"{name}_{error}") from None


def quantize_factors(u: Tensor, v: Tensor) -> QuantizedFactors:
    """Round the factors u [N, r] and v [r, K] to int8, each row with its own scale.

    Raises:
        ValueError: NaN or inf, no matrices, or factors that do not belong together.
        TypeError: no floating tensors.
    """
    made = []
    for name, factor in (("u", u), ("v", v)):
        try:
            made.append(quantize_weight(factor))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}{str(error).removeprefix('w')}") from None
    left, right = made
    _check_ranks(left, right)
    assert left.row_sum is not None
    assert right.row_sum is not None
    return QuantizedFactors(
        left.values, left.scale, left.row_sum, right.values, right.scale, right.row_sum,
        left.n, right.k, left.k,
    )  # fmt: skip


def product(
    x: Tensor,
    u: QuantizedWeight,
    v: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """``act((x @ v.T) @ u.T + bias) + residual`` on two stored factors."""
    _check_ranks(u, v)
    return quantized_linear(quantized_linear(x, v), u, bias, residual, activation)


def explain(
    x: Tensor,
    u: QuantizedWeight,
    v: QuantizedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    device: str | None,
) -> backend.Explanation:
    """Which kernels serve the two products."""
    _check_ranks(u, v)
    inner = backend.explain("quantized_linear", x, v, device=device)
    h = x.new_empty((*x.shape[:-1], v.n))
    outer = backend.explain("quantized_linear", h, u, bias, residual, activation, device)
    both = outer.kernel if inner.kernel == outer.kernel else f"{inner.kernel}, {outer.kernel}"
    reason = f"x v^T, then u, both by quantized_linear: {outer.reason}"
    return backend.Explanation("low_rank_linear", both, reason, outer.config)


def _check_ranks(u: QuantizedWeight, v: QuantizedWeight) -> None:
    for name, factor in (("u", u), ("v", v)):
        if not isinstance(factor, QuantizedWeight):
            raise TypeError(
                f"{name}: expected a QuantizedWeight, as the other factor is; got "
                f"{type(factor).__name__}"
            )
    if u.k != v.n:
        raise ValueError(f"v: expected {u.k} rows for u of {[u.n, u.k]}; got {[v.n, v.k]}")
    if u.k > min(u.n, v.k):
        raise ValueError(
            f"u, v: expected a rank of at most {min(u.n, v.k)}, the smaller side of "
            f"[{u.n}, {v.k}]; got {u.k}"
        )
