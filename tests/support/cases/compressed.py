"""Random cases of the linear ops with compressed weights, their float64 truth and error scales.

The truth is the product with the dequantised weight; where the op quantises its activations, the
truth takes them quantised in the same way (the quantiser is held to its own definition in
tests/ops/quantized_linear). `plain` is float32 torch rounded once to the dtype of x: tighter than
torch in bf16, which would round the weight too.

A case of sparse floating values may train them (`make(.., values=True)`): they are a leaf then,
after x, and their truth is the dense gradient of W at the stored positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import fp8
from bigops.formats.fp8 import Fp8Weight
from bigops.formats.packed import PackedWeight
from bigops.formats.patterns import Pattern
from bigops.formats.quantize import act_quant, static_qparams
from bigops.formats.quantized import QuantizedWeight
from bigops.formats.sparse import SparseWeight
from bigops.ops.family import Call, LinearOp, op_of
from bigops.ops.fp8_linear import fp8_linear
from bigops.ops.packed_linear import packed_linear
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.support.cases.linear import act, curvature, offset, slope
from tests.support.kernels_ran import served_by, threads
from tests.support.tolerance import check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# What `QuantizedWeight.from_dense` is given, by the name of the format.
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
# The same of `Fp8Weight.from_dense`.
FP8: dict[str, dict[str, Any]] = {
    "fp8": {},
    "fp8_tensor": {"scales": "tensor"},
    "fp8_block": {"scales": "block"},
    "fp8_static": {"activations": "static", "x_scale": 2.5 / 448},  # some of x lies outside
    "fp8_static_tensor": {"scales": "tensor", "activations": "static", "x_scale": 3.0 / 448},
    "w_fp8": {"activations": "none"},
    "w_fp8_tensor": {"scales": "tensor", "activations": "none"},
    "w_fp8_block": {"scales": "block", "activations": "none"},
}
# The paths are the same for all formats of an op: one of each kind of sums travels them.
FORMATS = ("int8", "w4_zero", "w4a8", "sparse_int8", "sparse_float", "sparse_bf16", "packed")
VALUES = {"s8": torch.int8, "f32": torch.float32, "bf16": torch.bfloat16}  # of sparse_linear
SPARSE = {"sparse_int8": "s8", "sparse_float": "f32", "sparse_bf16": "bf16"}
PATTERNS = ("1x1", "1x4", "4x1", "16x1", "16x16", "32x32", "2:4")
# Rows of x, and columns of a group, from which tile registers serve u8 activations.
TILE_ROWS, TILE_GROUP = 8, 64


def kernel_of(form: str, level: str, dtype: str, m: int) -> str:
    """Name of the kernel that serves a format of quantized_linear for m rows of x at a level."""
    options = QUANTISED[form]
    rounds = options.get("activations", "none" if {"bits", "group"} & set(options) else "dynamic")
    bits = options.get("bits", 8)
    if rounds != "none":
        tiles = m >= TILE_ROWS and options.get("group", TILE_GROUP) >= TILE_GROUP
        adds = ["avx512vnni", "amx"] if tiles else ["avx512vnni"]
    else:
        adds = ["avx512bf16"] if dtype == "bf16" else []
    isa = served_by(level, *adds)
    return f"cpu.{isa}.quantized_linear.{dtype}.w{bits}{'a8' if rounds != 'none' else ''}"


def backward_of(form: str, level: str, dtype: str) -> str:
    """The same for the backward op."""
    bits = QUANTISED[form].get("bits", 8)
    return f"cpu.{served_by(level)}.quantized_linear_backward.{dtype}.w{bits}"


def served(form: str) -> list[str]:
    """Dtypes of x that a format takes."""
    return ["bf16"] if form == "sparse_bf16" else list(DTYPES)


def dtype_of(form: str) -> str:
    """One of them, for tests that need no other: float32 where it is served."""
    return "bf16" if form == "sparse_bf16" else "f32"


_PUBLIC: dict[str, Any] = {
    "fp8_linear": fp8_linear,
    "packed_linear": packed_linear,
    "quantized_linear": quantized_linear,
    "sparse_linear": sparse_linear,
}


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
    trains: bool = False  # the values are a leaf

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.x, self.bias, self.residual

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the leaves, in order."""
        return ("x", "values", "bias", "residual") if self.trains else ("x", "bias", "residual")

    @property
    def sparse(self) -> bool:
        return isinstance(self.weight, SparseWeight)

    @property
    def storage(self) -> tuple[Any, ...]:
        """The weight as the raw op takes it."""
        arguments: tuple[Any, ...] = self.weight.arguments
        return arguments

    @property
    def linear_op(self) -> LinearOp:
        """What makes the op: its reference, its gradients, its raw overloads."""
        return op_of(type(self.weight))

    @property
    def call(self) -> Call:
        """The call as kernels and references take it."""
        return Call(self.x, self.weight, self.bias, self.residual, self.name)

    @property
    def op(self) -> str:
        if isinstance(self.weight, PackedWeight):
            return "packed_linear"
        if isinstance(self.weight, Fp8Weight):
            return "fp8_linear"
        return "sparse_linear" if self.sparse else "quantized_linear"

    def _stored(self, *values: Tensor | None) -> Any:
        """The weight, with other values where they are a leaf."""
        return self.weight.replace(values=values[0]) if values else self.weight

    def public(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        """The call by the public function: x, values where they are a leaf, bias, residual."""
        *values, bias, residual = rest
        y: Tensor = _PUBLIC[self.op](x, self._stored(*values), bias, residual, self.name)
        return y

    def raw(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        """The call by `torch.ops`."""
        *values, bias, residual = rest
        arguments = self._stored(*values).arguments
        y: Tensor = getattr(torch.ops.bigops, self.op)(x, *arguments, bias, residual, self.name)
        return y

    def rows(self, m: int) -> Case:
        """The same case with the first m rows of x alone."""
        residual = None if self.residual is None else self.residual[:m]
        return replace(self, x=self.x[:m], residual=residual, grad=self.grad[:m])

    def with_values(self, values: Tensor) -> Case:
        """The same case with other stored values."""
        weight = self.weight.replace(values=values)
        return replace(self, weight=weight, dense=weight.to_dense(torch.float64))

    def leaves(self) -> list[Tensor | None]:
        """Fresh copies of the inputs that require gradients."""
        given = [self.x, self.weight.values, *self.inputs[1:]] if self.trains else self.inputs
        return [None if t is None else t.detach().clone().requires_grad_() for t in given]

    def at_stored(self, dense: Tensor) -> Tensor:
        """Entries of a matrix [N, K] where the values lie, 0 where they only pad."""
        weight: SparseWeight = self.weight
        (n, k), at, columns = weight.shape, weight.positions(), weight.values.shape[2]
        out = dense.new_zeros(weight.values.shape)
        for c in range(columns):
            column = at.word * columns + c
            inside = at.stored & (column < k) & (at.row < n)
            out[..., c][inside] = dense[at.row[inside], column[inside]]
        return out

    def seen_x(self) -> Tensor:
        """x as the product sees it, float64."""
        if not self.quantised:
            return self.x.double()
        if isinstance(self.weight, Fp8Weight):
            block = self.weight.scales == "block"
            return fp8.act_quant(self.x.detach(), block, self.weight.x_scale).dense(torch.float64)
        options = ("dynamic", None)
        if self.op == "quantized_linear":
            options = (self.weight.activations, self.weight.x_qparams)
        rows = act_quant(self.x.detach(), *options)
        return (rows.q.double() - rows.zero_point.double()) * rows.scale.double()

    def truth(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        """(y, gradients of the leaves) by torch autograd in ``dtype``, straight through."""
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self.inputs]
        x, bias, residual = leaves
        assert x is not None
        seen = x + (self.seen_x().to(dtype) - x.detach())
        dense = self.dense.to(dtype).requires_grad_(self.trains)
        y = act(self.name, F.linear(seen, dense, bias))
        if residual is not None:
            y = y + residual
        if self.trains:
            leaves.insert(1, dense)
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, wanted, self.grad.to(dtype)))
        grads = [None if t is None else next(found) for t in leaves]
        if self.trains:
            assert grads[1] is not None
            grads[1] = self.at_stored(grads[1])
        return y.detach(), grads

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
        scales = [
            gz @ weight.abs(),
            None if bias is None else (gz.sum(rows) if rows else gz),
            None if self.residual is None else grad,
        ]
        if self.trains:
            n, k = weight.shape
            values = gz.reshape(-1, n).t() @ x.abs().reshape(-1, k) if n and k else weight
            scales.insert(1, self.at_stored(values))
        return y_scale, scales

    def roundings(self) -> list[Tensor | float | None]:
        """What stored intermediates carry into each gradient: nothing, where none is stored."""
        return [0.0] * len(self.names)

    def check_forward(self, y: Tensor, what: str = "y") -> None:
        assert y.dtype == self.x.dtype
        plain = self.truth(torch.float32)[0].to(y.dtype)
        check(y, self.truth(torch.float64)[0], plain, self.scales()[0], what=f"{self.name} {what}")

    def roundings_of_gz(self) -> list[Tensor | float | None]:
        """What a gz that is stored in x's dtype carries into the gradients, float64."""
        x, w = self.x.double().flatten(0, -2), self.dense
        bias = 0.0 if self.bias is None else self.bias.double()
        z = x @ w.t() + bias
        z_scale = x.abs() @ w.abs().t() + abs(bias)
        gz = grad = self.grad.double().abs().flatten(0, -2)
        if self.name != "none":
            gz = grad * (slope(self.name, z) + curvature(self.name) * z_scale)
        gz = gz**2
        carried: list[Tensor | float | None] = [
            (gz @ w**2).sqrt().view(self.x.shape),
            None if self.bias is None else gz.sum(0).sqrt(),
            None if self.residual is None else torch.zeros_like(self.grad, dtype=torch.float64),
        ]
        if self.trains:
            carried.insert(1, self.at_stored((gz.t() @ x**2).sqrt()))
        return carried

    def check_gradients(
        self, grads: Sequence[Tensor | None], what: str = "", stored: bool = False
    ) -> None:
        """Gradients of the leaves, in their order; None where there is no input.

        ``stored``: the kernel keeps gz in the dtype of x between its products, where others keep
        float32.
        """
        truth, plain = self.truth(torch.float64)[1], self.truth(torch.float32)[1]
        rounded = stored and self.x.dtype != torch.float32
        carried = self.roundings_of_gz() if rounded else self.roundings()
        for name, got, ref, base, scale, rounding in zip(
            self.names, grads, truth, plain, self.scales()[1], carried, strict=True
        ):
            label = f"{self.name} {what} gradient of {name}"
            if ref is None:
                assert got is None, f"{label}: came for an input that is not there"
                continue
            assert got is not None, f"{label}: None"
            assert base is not None
            assert scale is not None
            assert rounding is not None
            if name == "values":
                assert got.dtype == self.weight.values.dtype
                only_padding = self.at_stored(torch.ones(self.weight.shape)) == 0
                assert not got[only_padding].any(), f"{label}: not 0 where values only pad"
                if rounded and got.dtype == torch.float32:  # gz was rounded, the sum was not
                    narrow, wide = torch.finfo(self.x.dtype).eps, torch.finfo(got.dtype).eps
                    scale = scale + rounding * narrow / wide
            check(got, ref, base.to(got.dtype), scale, rounding=rounding, what=label)


def check_runs_and_threads(case: Case) -> None:
    """Forward and backward at several thread counts: the same bits twice, values by the rule."""
    for count in (1, 2, 5):
        runs = []
        with threads(count):
            for _ in range(2):
                leaves = case.leaves()
                y = case.public(*leaves)  # type: ignore[arg-type]
                wanted = [t for t in leaves if t is not None]
                runs.append([y.detach(), *torch.autograd.grad(y, wanted, case.grad)])
        for first, again in zip(*runs, strict=True):
            assert torch.equal(first, again)
        y, *grads = runs[0]
        found = iter(grads)
        case.check_forward(y, f"of {count} threads")
        case.check_gradients([None if t is None else next(found) for t in leaves])


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
    pattern: str = "1x4",
    values: bool = False,
) -> Case:
    """A case of a format in QUANTISED, FP8 or FORMATS; "packed" weights have the dtype of x.

    x is off centre, so that zero points are of every size. ``sparsity`` and ``pattern`` are for
    sparse formats (2:4 has its own sparsity); ``values``: floating values are a leaf.
    """
    shape = [lead] if isinstance(lead, int) else list(lead)
    x = torch.randn(*shape, k) + torch.randn(*shape, 1)
    w = torch.randn(n, k) / max(k, 1) ** 0.5
    weight: Any
    if form in QUANTISED:
        options = dict(QUANTISED[form])
        if options.get("activations") == "static":
            options["x_qparams"] = static_qparams(-2.0, 3.0)  # some of x lies outside
        weight = QuantizedWeight.from_dense(w, **options)
    elif form in FP8:
        weight = Fp8Weight.from_dense(w, **FP8[form])
    elif form == "packed":
        weight = PackedWeight.from_dense(w.to(DTYPES[dtype]))
    else:
        how = Pattern.parse(pattern)
        stored = VALUES[SPARSE[form]]
        weight = SparseWeight.from_mask(w, how.mask(w, sparsity), stored, (how.height, how.width))
    to = DTYPES[dtype]
    return Case(
        x.to(to),
        weight,
        weight.to_dense().double() if form == "packed" else weight.to_dense(torch.float64),
        form == "sparse_int8" or getattr(weight, "activations", "none") != "none",
        torch.randn(n).to(to) if bias else None,
        torch.randn(*shape, n).to(to) if residual else None,
        torch.randn(*shape, n).to(to),
        name,
        values,
    )
