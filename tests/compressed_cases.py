"""Random cases of the linear ops with compressed weights, their float64 truth and error scales.

The truth is the product with the dequantised weight; where the op quantises its activations, the
truth takes them quantised in the same way (the quantiser is held to its own definition in
test_quantized_linear.py). `plain` is float32 torch rounded once to the dtype of x: tighter than
torch in bf16, which would round the weight too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.ops._quantize import quantize_rows
from bigops.ops.quantized_linear import quantize_weight, quantized_linear
from bigops.ops.sparse_linear import block_mask, sparse_linear, sparsify_weight
from tests.kernels_ran import ISAS
from tests.linear_cases import act, curvature, offset, slope
from tests.tolerance import check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NAMES = ("x", "bias", "residual")
FORMATS = ("int8", "sparse_int8", "sparse_float")
# avx512bf16 adds nothing for these ops: the VNNI kernels serve it
LEVELS = [level for level in ISAS if level != "avx512bf16"]


@dataclass
class Case:
    """Inputs of one call; ``weight`` is the storage, ``dense`` what it stands for in float64."""

    x: Tensor
    weight: Any
    dense: Tensor  # [N, K] float64
    quantised: bool  # the op rounds x
    bias: Tensor | None
    residual: Tensor | None
    grad: Tensor
    name: str

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.x, self.bias, self.residual

    @property
    def storage(self) -> tuple[Tensor | None, ...]:
        """The weight as the raw op takes it."""
        return tuple(self.weight)[: 4 if hasattr(self.weight, "panel_ptr") else 2]

    @property
    def op(self) -> str:
        return "sparse_linear" if hasattr(self.weight, "panel_ptr") else "quantized_linear"

    def public(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The call by the public function."""
        f: Any = sparse_linear if self.op == "sparse_linear" else quantized_linear
        y: Tensor = f(x, self.weight, bias, residual, self.name)
        return y

    def raw(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The call by `torch.ops`."""
        y: Tensor = getattr(torch.ops.bigops, self.op)(x, *self.storage, bias, residual, self.name)
        return y

    def leaves(self) -> list[Tensor | None]:
        """Fresh copies of x, bias, residual that require gradients."""
        return [None if t is None else t.detach().clone().requires_grad_() for t in self.inputs]

    def seen_x(self) -> Tensor:
        """x as the product sees it, float64."""
        if not self.quantised:
            return self.x.double()
        rows = quantize_rows(self.x.detach())
        return (rows.q.double() - rows.zero_point.double()) * rows.scale.double()

    def truth(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        """(y, gradients of x, bias, residual) by torch autograd in ``dtype``, straight through."""
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self.inputs]
        x, bias, residual = leaves
        assert x is not None
        seen = x + (self.seen_x().to(dtype) - x.detach())
        y = act(self.name, F.linear(seen, self.dense.to(dtype), bias))
        if residual is not None:
            y = y + residual
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, wanted, self.grad.to(dtype)))
        return y.detach(), [None if t is None else next(found) for t in leaves]

    def scales(self) -> tuple[Tensor, list[Tensor | None]]:
        """Error scales of y and of each gradient, float64."""
        x, weight = self.seen_x(), self.dense
        bias = None if self.bias is None else self.bias.double()
        z = F.linear(x, weight, bias)
        z_scale = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
        y_scale = slope(self.name, z) * z_scale + offset(self.name)
        if self.residual is not None:
            y_scale = y_scale + self.residual.double().abs()
        grad = self.grad.double().abs()
        gz = grad
        if self.name != "none":
            gz = grad * (slope(self.name, z) + curvature(self.name) * z_scale)
        rows = list(range(gz.dim() - 1))
        return y_scale, [
            gz @ weight.abs(),
            None if bias is None else (gz.sum(rows) if rows else gz),
            None if self.residual is None else grad,
        ]

    def check_forward(self, y: Tensor, what: str = "y") -> None:
        assert y.dtype == self.x.dtype
        plain = self.truth(torch.float32)[0].to(y.dtype)
        check(y, self.truth(torch.float64)[0], plain, self.scales()[0], what=f"{self.name} {what}")

    def check_gradients(self, grads: Sequence[Tensor | None], what: str = "") -> None:
        """Gradients of x, bias, residual, in that order; None where there is no input."""
        truth, plain = self.truth(torch.float64)[1], self.truth(torch.float32)[1]
        for name, got, ref, base, scale in zip(
            NAMES, grads, truth, plain, self.scales()[1], strict=True
        ):
            label = f"{self.name} {what} gradient of {name}"
            if ref is None:
                assert got is None, f"{label}: came for an input that is not there"
                continue
            assert got is not None, f"{label}: None"
            assert base is not None
            assert scale is not None
            check(got, ref, base.to(got.dtype), scale, what=label)


def make(
    form: str,
    lead: int | Sequence[int],
    n: int,
    k: int,
    dtype: str = "f32",
    name: str = "none",
    *,
    bias: bool = True,
    residual: bool = True,
    sparsity: float = 0.6,
) -> Case:
    """A case of a format in FORMATS; x is off centre, so that zero points are of every size."""
    shape = [lead] if isinstance(lead, int) else list(lead)
    x = torch.randn(*shape, k) + torch.randn(*shape, 1)
    w = torch.randn(n, k) / max(k, 1) ** 0.5
    weight: Any
    if form == "int8":
        weight = quantize_weight(w)
    else:
        weight = sparsify_weight(w, block_mask(w, sparsity), form == "sparse_int8")
    to = DTYPES[dtype]
    return Case(
        x.to(to),
        weight,
        weight.to_dense(torch.float64),
        form != "sparse_float",
        torch.randn(n).to(to) if bias else None,
        torch.randn(*shape, n).to(to) if residual else None,
        torch.randn(*shape, n).to(to),
        name,
    )
