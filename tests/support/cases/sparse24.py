"""Cases of `sparse_linear` with a weight compressed to 2:4, its values trained or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats.sparse24 import Sparse24Weight, sample
from bigops.ops import activation as act
from bigops.ops.sparse_linear import sparse_linear
from bigops.ops.sparse_linear.sparse24_pack import prune24
from tests.support.cases.compressed import DTYPES, Case, make

# Stored as, and x: int8 values take x of any dtype, others their own.
KINDS = [("bf16", "bf16"), ("f16", "f16"), ("s8", "f32"), ("s8", "bf16"), ("s8", "f16")]
STORED = {"bf16": torch.bfloat16, "f16": torch.float16, "s8": torch.int8}
FORM = {"bf16": "sparse_bf16", "f16": "sparse_float", "s8": "sparse_int8"}


def make24(
    stored: str, lead: int | list[int], n: int, k: int, dtype: str, name: str = "none", **more: Any
) -> tuple[Case, Sparse24Weight]:
    """A case of `sparse_linear` with a 2:4 pattern, and its weight compressed."""
    case = make(FORM[stored], lead, n, k, dtype, name, pattern="2:4", **more)
    weight = Sparse24Weight.from_sparse(case.weight, STORED[stored])
    return replace(case, dense=weight.to_dense(torch.float64)), weight


@dataclass
class Trained24(Case):
    """The values are a leaf, after x."""

    def public(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        values, bias, residual = rest
        weight = self.weight.replace(values=values)
        return sparse_linear(x, weight, bias, residual, self.name)

    def raw(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        values, bias, residual = rest
        arguments = self.weight.replace(values=values).arguments
        y: Tensor = torch.ops.bigops.sparse24_linear(x, *arguments, bias, residual, self.name)
        return y

    def at_stored(self, dense: Tensor) -> Tensor:
        return sample(dense, self.weight.meta, self.weight.values.dtype)

    def roundings(self) -> list[Tensor | float | None]:
        """Of the gradient of the pre-activation, which kernels store in 16 bits; none of z."""
        x, weight, grad = self.x.double(), self.dense, self.grad.double()
        z = F.linear(x, weight, None if self.bias is None else self.bias.double())
        gz = grad if self.name == "none" else act.epilogue_backward(self.name, grad, z)
        squares, of_values, (n, k) = gz.square(), weight, weight.shape
        if n and k:
            of_values = squares.reshape(-1, n).t() @ x.square().reshape(-1, k)
        rows = list(range(gz.dim() - 1))
        return [
            (squares @ weight.square()).sqrt(),
            self.at_stored(of_values.sqrt()),
            (squares.sum(rows) if rows else squares).sqrt(),
            0.0,
        ]


def trained24(
    lead: int | list[int],
    n: int,
    k: int,
    dtype: str,
    name: str = "none",
    *,
    transposable: bool = True,
    bias: bool = True,
    residual: bool = True,
) -> Trained24:
    """A case whose values, in the dtype of x, are a leaf."""
    shape = [lead] if isinstance(lead, int) else lead
    to = DTYPES[dtype]
    x = (torch.randn(*shape, k) + torch.randn(*shape, 1)).to(to)
    weight = prune24((torch.randn(n, k) / max(k, 1) ** 0.5).to(to), transposable=transposable)
    added = torch.randn(*shape, n).to(to) if residual else None
    offset = torch.randn(n).to(to) if bias else None
    grad = torch.randn(*shape, n).to(to)
    return Trained24(
        x, weight, weight.to_dense(torch.float64), False, offset, added, grad, name, True
    )
