"""fp8_linear as a torch op: values by the rule, gradients on every path, the contract, errors.

On the CPU the reference serves, and `explain` says so; the kernels are in test_kernels_fp8_linear.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.formats.fp8 import Fp8Weight
from bigops.ops import fp8_linear as function
from tests.support import paths
from tests.support.cases.compressed import DTYPES, FP8, Case, make
from tests.support.cases.linear import PLAIN
from tests.support.tolerance import snr_db

FORMS = ("fp8", "fp8_block", "w_fp8")  # one of each kind of sums
SNR_FLOOR_DB = 110  # of a double backward in float32


def travel(path: str, case: Case) -> None:
    f = case.raw if path == "raw" else case.public
    go = paths.eager if path == "raw" else paths.PATHS[path]
    with bigops.backend.record() as ran:
        grads = go(f, case.leaves(), case.grad)
    assert "reference.fp8_linear" in ran
    case.check_gradients(grads, path)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FP8)
def test_values_and_gradients(form: str, dtype: str) -> None:
    case = make(form, [3, 4], 130, 140, dtype, "gelu")
    case.check_forward(case.public(*case.inputs))
    case.check_gradients(paths.eager(case.public, case.leaves(), case.grad))


def test_a_result_half_a_step_off_is_seen() -> None:
    case = make("fp8", 9, 20, 33, "f32", "gelu")
    y = case.public(*case.inputs)
    with pytest.raises(AssertionError, match="too far"):
        case.check_forward(y * (1 + 1e-3))


@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(name: str) -> None:
    case = make("fp8_block", 5, 7, 33, "f32", name)
    case.check_forward(case.public(*case.inputs))
    case.check_gradients(paths.eager(case.public, case.leaves(), case.grad))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lead", "n", "k"),
    [([], 4, 5), ([0], 4, 5), ([2, 0, 3], 4, 5), ([2, 1, 3, 2], 4, 5), ([3], 0, 5), ([3], 4, 0)],
    ids=str,
)
def test_shapes(form: str, lead: list[int], n: int, k: int) -> None:
    case = make(form, lead, n, k, "f32", "silu")
    case.check_forward(case.public(*case.inputs))
    case.check_gradients(paths.eager(case.public, case.leaves(), case.grad))


@pytest.mark.parametrize(
    "dtype", ["f32", *(pytest.param(low, marks=pytest.mark.slow) for low in ("bf16", "f16"))]
)
@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_gradients_on_every_path(path: str, dtype: str) -> None:
    for form in FORMS:
        travel(path, make(form, 7, 20, 33, dtype, "gelu"))
    travel(path, make("fp8", 3, 4, 5, dtype, "none", bias=False, residual=False))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_a_wrong_gradient_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("fp8", 3, 4, 5, "f32", "gelu")
    off = {need: lambda g: g * 1.05 for need in ("need_x", "need_bias")}
    paths.plant(monkeypatch, case.linear_op, **off)
    with pytest.raises(AssertionError, match="gradient of"):
        travel(path, case)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", FORMS)
def test_double_backward(form: str) -> None:
    case = make(form, 4, 5, 6, "f32", "silu", residual=False)
    for f in (case.public, case.raw):
        x, bias, _ = case.leaves()
        assert x is not None
        assert bias is not None
        grad = case.grad.clone().requires_grad_()
        (gx,) = torch.autograd.grad(f(x, bias, None), x, grad, create_graph=True)
        got = torch.autograd.grad(gx.square().sum(), [grad, x, bias])
        x64, b64, g64 = (t.detach().double().requires_grad_() for t in (x, bias, grad))
        seen = x64 + (case.seen_x() - x64.detach())
        y64 = F.silu(F.linear(seen, case.dense, b64))
        (gx64,) = torch.autograd.grad(y64, x64, g64, create_graph=True)
        want = torch.autograd.grad(gx64.square().sum(), [g64, x64, b64])
        assert all(snr_db(a, b) > SNR_FLOOR_DB for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_rows_and_biases(form: str) -> None:
    case = make(form, 6, 5, 9, "f32", "relu")
    assert case.bias is not None
    rows = torch.vmap(case.public, in_dims=(0, None, 0))(*case.inputs)
    assert torch.equal(rows, case.public(*case.inputs))
    biases = torch.stack([case.bias, case.bias + 1])
    both = torch.vmap(case.public, in_dims=(None, 0, None))(case.x, biases, case.residual)
    assert torch.equal(both[1], case.public(case.x, biases[1], case.residual))


@pytest.mark.parametrize("form", FP8)
def test_opcheck(form: str) -> None:
    """But for test_schema, which multiplies what it compares: torch has no product of float8."""
    case = make(form, [2, 3], 6, 5, "f32", "relu")
    utils = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, bias, residual = case.leaves()
    ops = torch.ops.bigops
    before = [None if t is None else t.clone() for t in case.weight.tensors().values()]
    forward = (x, *case.storage, bias, residual, "relu")
    backward = (case.grad, case.x, *case.storage, case.bias, "relu", True, True)
    paths.opcheck(ops.fp8_linear, forward, test_utils=utils)
    paths.opcheck(ops.fp8_linear_backward, backward, test_utils=utils)
    for old, t in zip(before, case.weight.tensors().values(), strict=True):
        assert t is old or torch.equal(t.float(), old.float())  # type: ignore[union-attr]


def test_one_dynamic_graph_serves_many_row_counts() -> None:
    case = make("fp8_block", 4, 5, 9, "f32", "relu")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x: Tensor) -> Tensor:
        return case.public(x, case.bias, None)

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for m in (7, 2, 17, 40):
        x = torch.randn(m, 9)
        assert torch.equal(compiled(x), f(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_autocast(dtype: str) -> None:
    case = make("fp8", 4, 5, 9)
    with torch.autocast("cpu", DTYPES[dtype]):
        y = case.public(*case.inputs)
    assert y.dtype == DTYPES[dtype]
    low = [None if t is None else t.to(DTYPES[dtype]) for t in case.inputs]
    assert torch.equal(y, case.public(*low))  # type: ignore[arg-type]


def test_non_contiguous_inputs_and_nan() -> None:
    case = make("fp8", 20, 10, 64, "f32", "gelu")
    want = case.public(*case.inputs)
    case.x = case.x.t().contiguous().t()
    assert torch.equal(case.public(*case.inputs), want)
    case.x[3, 5], case.x[4, 6] = float("nan"), float("inf")
    y = case.public(*case.inputs)
    assert bool(y[3:5].isnan().all())
    assert bool(y[5:].isfinite().all())


@pytest.mark.parametrize("form", FP8)
def test_explain_says_what_runs_on_this_cpu(form: str) -> None:
    case = make(form, 4, 6, 40)
    said = bigops.explain("fp8_linear", case.x, case.weight)
    with bigops.backend.record() as ran:
        case.public(*case.inputs)
    assert ran == [said.kernel] == ["reference.fp8_linear"]
    assert "no CPU kernel for e4m3" in said.reason
    with pytest.raises(ValueError, match="x: expected shape"):
        bigops.explain("fp8_linear", case.x[:, 1:], case.weight)


def test_bad_arguments() -> None:
    weight, x = Fp8Weight.from_dense(torch.randn(5, 8)), torch.randn(4, 8)
    bad: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((x[:, 1:], weight), ValueError, r"x: expected shape \[.., 8\] for a weight of \[5, 8\]"),
        ((x.double(), weight), TypeError, "x: expected dtype float32, bfloat16, float16"),
        (
            (x[0, 0], weight),
            ValueError,
            r"x: expected shape \[.., 8\] for a weight of .*; got \[\]",
        ),
        (([1.0], weight), TypeError, "x: expected a torch.Tensor; got list"),
        ((x, weight, torch.randn(4)), ValueError, r"bias: expected shape \[5\]"),
        ((x, weight, torch.randn(5).half()), TypeError, "bias: expected dtype float32"),
        ((x, weight, None, torch.randn(4, 8)), ValueError, r"residual: expected shape \[4, 5\]"),
        ((x, weight, None, None, "swiglu"), ValueError, "activation: expected one of"),
        ((x, weight.replace(scales="none")), ValueError, "scales: expected one of tensor"),
        ((x, weight.replace(scale=weight.scale[:2])), ValueError, "scale: expected shape"),
    ]
    for args, error, message in bad:
        with pytest.raises(error, match=message):
            function(*args)
    scale = weight.scale.clone().requires_grad_()
    with pytest.raises(ValueError, match="scale: expected a tensor that needs no gradient"):
        function(x, weight.replace(scale=scale))


def test_arguments_of_a_weight_make_it_again() -> None:
    weight = Fp8Weight.from_dense(torch.randn(5, 8), "block", "none")
    again = Fp8Weight.of(8, *weight.arguments)
    assert vars(again) == vars(weight)
    assert weight.shape == (5, 8)
