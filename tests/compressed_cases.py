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

from bigops.ops._quantize import quantize_rows, static_grid
from bigops.ops.quantized_linear import quantize_weight, quantized_linear
from bigops.ops.sparse_linear import block_mask, sparse_linear, sparsify_weight
from tests.kernels_ran import ISAS
from tests.linear_cases import act, curvature, offset, slope
from tests.tolerance import check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NAMES = ("x", "bias", "residual")
# What quantize_weight is given, by the name of the format.
QUANTISED: dict[str, dict[str, Any]] = {
    "int8": {},
    "int8_zero": {"symmetric": False},
    "int8_symmetric": {"activations": "symmetric"},
    "int8_static": {"symmetric": False, "activations": "static"},
    "w8": {"activations": "none"},
    "w8_group": {"group": 32},
    "w8_zero": {"group": 128, "symmetric": False},
    "w4": {"bits": 4, "group": 64},
    "w4_zero": {"bits": 4, "group": 32, "symmetric": False},
    "w4_row": {"bits": 4},
    "w4a8": {"bits": 4, "group": 64, "activations": "dynamic"},
    "w4a8_zero": {"bits": 4, "group": 128, "symmetric": False, "activations": "symmetric"},
    "w4a8_static": {"bits": 4, "group": 32, "activations": "static"},
}
# The roads are the same for all formats of an op: one of each kind of sums travels them.
FORMATS = ("int8", "w4_zero", "w4a8", "sparse_int8", "sparse_float")
# avx512bf16 adds nothing for sparse_linear: the VNNI kernels serve it
LEVELS = [level for level in ISAS if level != "avx512bf16"]


def kernel_of(form: str, level: str, dtype: str) -> str:
    """Name of the kernel that serves a format of quantized_linear at a level."""
    options = QUANTISED[form]
    rounds = options.get("activations", "none" if {"bits", "group"} & set(options) else "dynamic")
    pairs = rounds == "none" and dtype == "bf16" and level == "avx512bf16"
    # Each product is served by the highest level that adds something to it.
    top = "avx512vnni" if rounds != "none" else "avx512bf16" if pairs else "avx512"
    order = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16"]
    isa = order[min(order.index(level), order.index(top))]
    bits = options.get("bits", 8)
    return f"cpu.{isa}.quantized_linear.{dtype}.w{bits}{'a8' if rounds != 'none' else ''}"


def backward_of(form: str, level: str, dtype: str) -> str:
    """The same for the backward op."""
    isa = level if level in ("portable", "avx2") else "avx512"
    bits = QUANTISED[form].get("bits", 8)
    return f"cpu.{isa}.quantized_linear_backward.{dtype}.w{bits}"


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
    def storage(self) -> tuple[Any, ...]:
        """The weight as the raw op takes it."""
        if self.op == "sparse_linear":
            return tuple(self.weight)[:4]
        arguments: tuple[Any, ...] = self.weight.arguments
        return arguments

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
        options = ("dynamic", None)
        if self.op == "quantized_linear":
            options = (self.weight.activations, self.weight.x_grid)
        rows = quantize_rows(self.x.detach(), *options)
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
    """A case of a format in QUANTISED or FORMATS.

    x is off centre, so that zero points are of every size.
    """
    shape = [lead] if isinstance(lead, int) else list(lead)
    x = torch.randn(*shape, k) + torch.randn(*shape, 1)
    w = torch.randn(n, k) / max(k, 1) ** 0.5
    weight: Any
    if form in QUANTISED:
        options = dict(QUANTISED[form])
        if options.get("activations") == "static":
            options["x_grid"] = static_grid(-2.0, 3.0)  # some of x lies outside
        weight = quantize_weight(w, **options)
    else:
        weight = sparsify_weight(w, block_mask(w, sparsity), form == "sparse_int8")
    to = DTYPES[dtype]
    return Case(
        x.to(to),
        weight,
        weight.to_dense(torch.float64),
        form == "sparse_int8" or getattr(weight, "activations", "none") != "none",
        torch.randn(n).to(to) if bias else None,
        torch.randn(*shape, n).to(to) if residual else None,
        torch.randn(*shape, n).to(to),
        name,
    )
