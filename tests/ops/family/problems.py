"""One call of each linear op, for what is asked of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import BitmapWeight, Format
from bigops.formats.dense import DenseWeight, Factors
from bigops.formats.sparse import SparseWeight
from bigops.ops.family import LinearOp, op_of
from bigops.ops.fp8_linear import fp8_linear
from bigops.ops.fused_linear import fused_linear
from bigops.ops.low_rank_linear import low_rank_linear
from bigops.ops.packed_linear import packed_linear
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from bigops.ops.sparse_linear.sparse24_pack import prune24
from tests.support.cases.compressed import make
from tests.support.tolerance import snr_db

FORMS = (
    "int8",
    "int8_static",
    "w4_zero",
    "w4a8",
    "fp8",
    "w_fp8_block",
    "packed",
    "sparse_int8",
    "sparse_float",
    "24",
    "24_int8",
    "bitmap",
)
TRAINED = ("sparse_float", "24")  # whose values have a gradient
M, N, K = 5, 12, 36
ALL = (*FORMS, "dense", "low_rank")


def _fused(x: Tensor, weight: DenseWeight, *rest: Any) -> Tensor:
    return fused_linear(x, weight.weight, *rest)


def _low_rank(x: Tensor, weight: Factors, *rest: Any) -> Tensor:
    u, v, base, scale = weight.arguments
    return low_rank_linear(x, u, v, *rest, base=base, scale=scale)


PUBLIC: dict[str, Callable[..., Tensor]] = {
    "fused_linear": _fused,
    "low_rank_linear": _low_rank,
    "quantized_linear": quantized_linear,
    "fp8_linear": fp8_linear,
    "packed_linear": packed_linear,
}


class Problem(NamedTuple):
    """A call and its inputs."""

    weight: Format
    x: Tensor
    bias: Tensor
    residual: Tensor
    grad: Tensor
    activation: str = "gelu"

    @property
    def op(self) -> LinearOp:
        return op_of(type(self.weight))

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.bias, self.residual

    def call(self, x: Tensor, bias: Tensor, residual: Tensor, weight: Any = None) -> Tensor:
        public = PUBLIC.get(self.op.name, sparse_linear)
        return public(x, self.weight if weight is None else weight, bias, residual, self.activation)

    def loss(self, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = self.call(x, bias, residual)
        return (y * self.grad.expand(y.shape)).float().sum()

    def of_values(self, values: Tensor) -> Tensor:
        y = self.call(*self.inputs, self.weight.replace(values=values))
        return (y * self.grad).float().sum()

    def gradients(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """By eager autograd."""
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        return torch.autograd.grad(self.loss(*leaves), leaves)

    # in float64 ----------------------------------------------------------------------------

    @property
    def dense(self) -> Tensor:
        """W."""
        return self.weight.to_dense(torch.float64).detach()

    def derivative(self, order: int) -> Tensor:
        """act', or act'', at the pre-activation that the op sees."""
        plain = self._replace(activation="none")
        z = plain.call(self.x, self.bias, torch.zeros_like(self.residual)).double()
        z = z.detach().requires_grad_()
        y = F.gelu(z) if self.activation == "gelu" else z + 0 * z**2
        for _ in range(order):
            (y,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        return y.detach()

    def tangent(self, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        """Of the result, by tangents of the inputs."""
        z = F.linear(x.double(), self.dense, bias.double())
        return self.derivative(1) * z + residual.double()

    def jacobian(self) -> Tensor:
        """Of the result by x, [M, N, M, K]."""
        rows = self.derivative(1).unsqueeze(2) * self.dense
        return torch.diag_embed(rows.movedim(0, -1), dim1=0, dim2=2)

    def hessian(self) -> Tensor:
        """Of the loss by x, [M, K, M, K]."""
        by_z = self.grad.double() * self.derivative(2)
        rows = torch.einsum("mn,nk,nl->mkl", by_z, self.dense, self.dense)
        return torch.diag_embed(rows.movedim(0, -1), dim1=0, dim2=2)


def problem(form: str, activation: str = "gelu") -> Problem:
    torch.manual_seed(0)
    case = make(form if form in FORMS[:9] else "sparse_float", M, N, K)
    assert case.bias is not None
    assert case.residual is not None
    weight, dtype = case.weight, torch.float32
    if form == "24":
        weight, dtype = prune24(torch.randn(N, K), torch.bfloat16, True), torch.bfloat16
    elif form == "24_int8":
        weight = prune24(torch.randn(N, K), torch.int8)
    elif form == "bitmap":
        assert isinstance(weight, SparseWeight)
        weight = BitmapWeight.from_sparse(weight)
    elif form == "dense":
        weight = DenseWeight(torch.randn(N, K) / 6)
    elif form == "low_rank":
        u, v, base = torch.randn(N, 3), torch.randn(3, K) / 6, torch.randn(N, K) / 6
        weight = Factors(u, v, base, 0.7)
    given = (t.to(dtype) for t in (case.x, case.bias, case.residual, case.grad))
    return Problem(weight, *given, activation)


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def hold(got: Any, want: Any) -> None:
    """Close to what eager gives, which is no zero; the kernels and their order are others."""
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert other.any()
        assert snr_db(one, other.double()) > (35 if other.dtype == torch.bfloat16 else 100)
