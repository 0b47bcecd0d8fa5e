"""Both factors of a low-rank weight in int8, each stored as a weight of `quantized_linear`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops.formats.quantized import QuantizedWeight, quantize_weight

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
    check_ranks(left, right)
    assert left.row_sum is not None
    assert right.row_sum is not None
    return QuantizedFactors(
        left.values, left.scale, left.row_sum, right.values, right.scale, right.row_sum,
        left.n, right.k, left.k,
    )  # fmt: skip


def check_ranks(u: QuantizedWeight, v: QuantizedWeight) -> None:
    """Raise TypeError or ValueError unless two stored factors belong together."""
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
