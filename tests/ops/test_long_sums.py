"""Sums of 65,536 terms lose no digit against torch's, on every instruction set.

A kernel that adds all terms of a long row to one float has an error that grows with their number;
those that add blocks, as torch's do, with its root. `tests.support.tolerance.check_rms` is the bar.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats.packed import PackedWeight
from bigops.ops.fused_linear import fused_linear
from bigops.ops.linear_cross_entropy import linear_cross_entropy
from bigops.ops.packed_linear import packed_linear
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.support.cases import compressed as compressed_cases
from tests.support.cases.compressed import QUANTISED, Case
from tests.support.cases.linear import act
from tests.support.kernels_ran import ISAS, crossover, expect, isa, needs_extension
from tests.support.tolerance import check_rms

pytestmark = needs_extension

LONG = 65_536
# Each kind of sums along K: whole numbers, floats, groups of both.
FORMS = [
    ("packed", "f32"),
    ("packed", "bf16"),
    ("packed", "f16"),
    ("int8_zero", "f32"),
    ("w8", "f32"),
    ("w8_zero", "bf16"),
    ("w4_row", "f32"),
    ("w4_row", "bf16"),
    ("w4_zero", "f32"),
    ("w4a8", "f32"),
    ("w4a8_static", "f32"),
    ("sparse_float", "f32"),
    ("sparse_bf16", "bf16"),
    ("sparse_int8", "f32"),
]


def sums(case: Case, level: str) -> Tensor:
    """x W^T of a case, float64; of 16-bit results what they were before they were rounded.

    The rows of x are then the same, so that a bias takes off the result as it would be stored and
    a residual the rest: what remains is the error of the sum.
    """
    bias = residual = None
    if case.x.dtype != torch.float32:
        truth = case.seen_x() @ case.dense.t()
        bias = -truth[0].to(case.x.dtype)
        residual = -(truth + bias.double()).to(case.x.dtype)
    with isa(level), expect(f".{case.op}."):
        y = case.public(case.x, bias, residual).double()
    return y if bias is None or residual is None else y - bias.double() - residual.double()


def long_case(form: str, dtype: str, m: int, n: int, sparsity: float = 0.6) -> Case:
    torch.manual_seed(m)
    case = compressed_cases.make(
        form, m, n, LONG, dtype, bias=False, residual=False, sparsity=sparsity
    )
    return replace(case, x=case.x[:1].expand(m, -1).contiguous()) if dtype != "f32" else case


def hold(case: Case, rows: Sequence[int]) -> None:
    """Rows of a case, so many at a time, on every instruction set."""
    seen = case.seen_x()
    truth = seen @ case.dense.t()
    plain = F.linear(seen.float(), case.dense.float())
    for level in ISAS:
        for size in rows:
            some = max(size, -(-512 // len(case.dense)))
            parts = [replace(case, x=x) for x in case.x[:some].split(size)]
            y = torch.cat([sums(part, level) for part in parts])
            check_rms(y, truth[:some], plain[:some], f"{level}, {size} rows")


@pytest.mark.parametrize(("form", "dtype"), FORMS)
def test_products(form: str, dtype: str) -> None:
    """One row, which has loops of its own, and blocks of rows."""
    hold(long_case(form, dtype, 16, 64), (1, 16))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16, 256])
@pytest.mark.parametrize(("form", "dtype"), [(form, "f32") for form in (*QUANTISED, "packed")])
def test_every_format(form: str, dtype: str, m: int) -> None:
    hold(long_case(form, dtype, m, 512 if m == 1 else 64), (m,))


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16, 256])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("form", ["sparse_float", "sparse_int8"])
def test_every_sparsity(form: str, sparsity: float, m: int) -> None:
    hold(long_case(form, "f32", m, 512 if m == 1 else 64, sparsity), (m,))


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("rows", [1, 16])
def test_the_dense_kernel(level: str, rows: int) -> None:
    torch.manual_seed(rows)
    x, w = torch.randn(16, LONG), torch.randn(64, LONG)
    with isa(level), crossover("fused_linear", "f32", 16, 0), expect("fused_linear.f32.dot"):
        y = torch.cat([fused_linear(part, w) for part in x.split(rows)])
    check_rms(y, x.double() @ w.double().t(), F.linear(x, w), level)


# --- gradients: sums over the rows of x and over those of W --------------------------------------


def gradients(f: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(f(*leaves), leaves, grad)


@pytest.mark.parametrize("name", ["none", "silu"])
def test_gradients_of_bias(name: str) -> None:
    torch.manual_seed(0)
    rows = 8_192
    x, w, bias = torch.randn(rows, 1), torch.randn(512, 1), torch.randn(512)
    grad = torch.randn(rows, 512)
    packed = PackedWeight.from_dense(w)

    def torchs(bias: Tensor) -> Tensor:
        return act(name, F.linear(x.to(bias.dtype), w.to(bias.dtype), bias))

    (truth,) = gradients(torchs, grad.double(), bias.double())
    (plain,) = gradients(torchs, grad, bias)
    for level in ISAS:
        with isa(level):
            (dense,) = gradients(lambda b: fused_linear(x, w, b, None, name), grad, bias)
            (panels,) = gradients(lambda b: packed_linear(x, packed, b, None, name), grad, bias)
        check_rms(dense, truth, plain, f"{level}, fused_linear")
        check_rms(panels, truth, plain, f"{level}, packed_linear")


def test_gradients_of_stored_values() -> None:
    torch.manual_seed(0)
    case = compressed_cases.make(
        "sparse_float", LONG, 32, 64, bias=False, residual=False, values=True
    )
    truth = case.at_stored(case.grad.double().t() @ case.x.double())
    plain = case.at_stored(case.grad.t() @ case.x)
    for level in ISAS:
        with isa(level):
            (values,) = gradients(
                lambda v: sparse_linear(case.x, case.weight.replace(values=v)),
                case.grad,
                case.weight.values,
            )
        check_rms(values, truth, plain, level)


@pytest.mark.parametrize(
    ("form", "op"),
    [
        ("int8", quantized_linear),
        ("w4_zero", quantized_linear),
        ("packed", packed_linear),
        ("sparse_float", sparse_linear),
        ("sparse_int8", sparse_linear),
    ],
)
def test_gradients_over_many_rows_of_w(form: str, op: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    case = compressed_cases.make(form, 8, LONG, 64, bias=False, residual=False, sparsity=0.9)
    truth = case.grad.double() @ case.dense
    plain = case.grad @ case.dense.float()
    for level in ISAS:
        with isa(level):
            (got,) = gradients(lambda x: op(x, case.weight), case.grad, case.x)
        check_rms(got, truth, plain, level)


def test_the_loss_of_many_classes() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 4), torch.randn(32_768, 4)
    target = torch.randint(len(weight), (512,))

    def loss(dtype: torch.dtype) -> Tensor:
        logits = F.linear(hidden.to(dtype), weight.to(dtype))
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)

    truth, plain = loss(torch.float64), loss(torch.float32)
    for level in ISAS:
        with isa(level):
            got = linear_cross_entropy(
                hidden, weight, target, reduction="none", label_smoothing=0.1
            )
        check_rms(got, truth, plain, level)


def test_the_bar_sees_one_accumulator() -> None:
    torch.manual_seed(0)
    terms = torch.randn(512, 16_384)
    one_by_one = torch.from_numpy(np.cumsum(terms.numpy(), axis=1)[:, -1])
    with pytest.raises(AssertionError, match="rms error"):
        check_rms(one_by_one, terms.double().sum(1), terms.sum(1))
