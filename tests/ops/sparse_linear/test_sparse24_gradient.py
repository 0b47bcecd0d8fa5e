"""Training of weights compressed to 2:4: the whole backward, by the kernels of csrc/cuda on the CPU
(csrc/hostrun) and by the references, on every path.

What is the kernel's own is in test_cuda_sparse24_gradient.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.ops.sparse_linear import sparse24 as op
from bigops.ops.sparse_linear import sparse_linear
from bigops.ops.sparse_linear.sparse24_pack import prune24
from tests.support import hostrun, paths
from tests.support.backends import serve_by
from tests.support.cases.linear import PLAIN
from tests.support.cases.sparse24 import Trained24, trained24
from tests.support.kernels_ran import expect
from tests.support.tolerance import check

pytestmark = [
    hostrun.needs(),
    # numpy's, of Triton's interpreter, on NaN and inf
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    hostrun.load_op("sparse24_linear")
    hostrun.load_op("sparse24_pack")
    return hostrun.load_op("sparse24_gradient")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


# the op ------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward as on a GPU that the kernels serve."""
    pytest.importorskip("triton")
    from tests.support import triton_interpreter

    triton_interpreter.install()
    serve_by(monkeypatch, op.op, op.product, op.gradients)


def run(case: Trained24) -> list[Tensor | None]:
    """Gradients by the kernels: all products on tensor cores."""
    of = case.x.dtype
    short = {torch.bfloat16: "bf16", torch.float16: "f16"}[of]
    with expect(
        f"cuda.sparse24_linear.{short}.{short}",
        f"cuda.sparse24_linear_grad_x.{short}.{short}",
        f"cuda.sparse24_transpose.{short}",
        f"cuda.sparse24_gradient.{short}",
    ):
        grads = paths.eager(case.public, case.leaves(), case.grad)
    case.check_gradients(grads, "by kernels")
    return grads


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(name: str) -> None:
    run(trained24(9, 20, 72, "f16" if name in ("none", "gelu") else "bf16", name))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    "shape",
    [(1, 4, 4), (40, 132, 68), ([2, 3], 16, 136), ([], 8, 12), (3, 0, 8), (3, 8, 0), (0, 8, 8)],
    ids=str,
)
def test_shapes_of_the_op(shape: tuple[Any, int, int]) -> None:
    lead, n, k = shape
    run(trained24(lead, n, k, "bf16", "silu"))
    run(trained24(lead, n, k, "bf16", bias=False, residual=False))


@pytest.mark.usefixtures("on_gpu")
def test_without_a_transposable_weight_torch_makes_the_gradient_of_x() -> None:
    """And says so; the gradient of the values stays on the kernel. Any N and K."""
    case = trained24(9, 21, 70, "bf16", "gelu", transposable=False)
    with backend.record() as names:
        grads = paths.eager(case.public, case.leaves(), case.grad)
    assert names == [
        "cuda.sparse24_linear.bf16.bf16",
        "reference.sparse24_linear_grad_x",
        "cuda.sparse24_gradient.bf16",
    ]
    case.check_gradients(grads)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...]) -> None:
    case = trained24(9, 20, 72, "bf16", "gelu")
    leaves = [
        None if t is None else t.detach().requires_grad_(i in wanted)
        for i, t in enumerate(case.leaves())
    ]
    with backend.record() as names:
        found = torch.autograd.grad(
            case.public(*leaves),  # type: ignore[arg-type]
            [leaves[i] for i in wanted],  # type: ignore[misc]
            case.grad,
        )
    assert any("grad_x" in name for name in names) == (0 in wanted)
    assert any("sparse24_gradient" in name for name in names) == (1 in wanted)
    grads = [None if t is None else t.to(case.x.dtype) for t in case.truth(torch.float64)[1]]
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    case.check_gradients(grads)


@pytest.mark.usefixtures("on_gpu")
def test_without_triton_plain_torch_makes_the_gradient_before_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "has_triton", lambda: False)
    for name in ("none", "gelu"):
        run(trained24(9, 20, 72, "bf16", name))


@pytest.mark.usefixtures("on_gpu")
def test_training_keeps_the_pattern_of_both() -> None:
    """The loss falls; gradients after the steps are of the new values, W^T included."""
    torch.manual_seed(1)
    case = trained24(20, 20, 72, "f16", residual=False)
    target = torch.randn(20, 72).half()
    values = case.weight.values.clone().requires_grad_()
    optimizer = torch.optim.SGD([values], lr=0.02, momentum=0.9)
    want, losses = case.x @ target.t() / 8, []
    for _ in range(8):
        optimizer.zero_grad()
        with expect("cuda.sparse24_gradient"):
            y = sparse_linear(case.x, case.weight.replace(values=values))
            loss = (y - want).float().square().mean()
            loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses
    weight = case.weight.replace(values=values.detach())
    before = case.weight.to_dense() != 0
    assert not (weight.to_dense() != 0)[~before].any()
    run(
        Trained24(
            case.x,
            weight,
            weight.to_dense(torch.float64),
            False,
            case.bias,
            None,
            case.grad,
            "none",
            True,
        )
    )


# the references, on the CPU ----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_gradients_on_every_path(path: str) -> None:
    case = trained24(5, 12, 36, "bf16", "gelu", transposable=path != "after_step")
    f = case.raw if path == "raw" else case.public
    travel = paths.eager if path == "raw" else paths.PATHS[path]
    with backend.record() as names:
        grads = travel(f, case.leaves(), case.grad)
    assert any(name.startswith("reference.sparse24_linear") for name in names)
    case.check_gradients(grads, path)
    case.check_forward(f(*case.leaves()))  # type: ignore[arg-type]


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_a_wrong_gradient_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: gradients of the values, and no others, 5 % off."""
    case = trained24(5, 12, 36, "bf16", "gelu")
    paths.plant(monkeypatch, op.op, need_values=lambda g: g * 1.05)
    travel = paths.eager if path == "raw" else paths.PATHS[path]
    with pytest.raises(AssertionError, match="gradient of values"):
        case.check_gradients(
            travel(case.raw if path == "raw" else case.public, case.leaves(), case.grad)
        )
    torch._dynamo.reset()


def test_double_backward_is_that_of_the_reference() -> None:
    """Through create_graph and through the raw backward op, against autograd of the reference."""
    case = trained24(4, 8, 12, "f16", "silu", residual=False)
    x, values, bias, _ = case.leaves()
    grad = case.grad.clone().requires_grad_()
    weight, wanted = case.weight.replace(values=values), [grad, x, values, bias]

    def second(first: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total = sum(g.float().square().sum() for g in first)
        return torch.autograd.grad(total, wanted)  # type: ignore[arg-type]

    def first(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, [x, values, bias], grad, create_graph=True)  # type: ignore

    want = second(first(op.op.reference(x, weight, bias, None, "silu")))  # type: ignore
    assert x is not None
    raw = torch.ops.bigops.sparse24_linear_backward(
        grad, x, *weight.arguments, bias, "silu", True, True, True
    )
    for got in (second(first(case.public(x, values, bias, None))), second(raw)):
        for a, b in zip(got, want, strict=True):
            noise = (a.double() - b.double()).square().sum().clamp_min(1e-300)
            assert 10 * torch.log10(b.double().square().sum() / noise) > 50  # dB, of float16


def test_opcheck() -> None:
    for transposable in (False, True):
        case = trained24(5, 12, 36, "bf16", "gelu", transposable=transposable)
        x, values, bias, residual = case.leaves()
        given = (x, *case.weight.replace(values=values).arguments, bias, residual, "gelu")
        paths.opcheck(torch.ops.bigops.sparse24_linear, given)
        for wanted in ((True, True, True), (False, True, False)):
            paths.opcheck(
                torch.ops.bigops.sparse24_linear_backward,
                (case.grad, case.x, *case.weight.arguments, case.bias, "gelu", *wanted),
            )


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where bigops/_cuda was built."""
    monkeypatch.setattr(machine, "cuda_archs", ("80", "89", "90a"))
    machine.cuda_runs_on.cache_clear()
    yield
    machine.cuda_runs_on.cache_clear()


@pytest.mark.usefixtures("built")
def test_explain_says_who_makes_the_gradients() -> None:
    x = torch.randn(5, 36).bfloat16()
    w = torch.randn(12, 36).bfloat16()
    said = bigops.explain("sparse_linear", x, prune24(w, transposable=True), device="sm_80")
    assert said.kernel == "cuda.sparse24_linear.bf16.bf16"
    assert "the gradient of x on them too" in said.reason
    said = bigops.explain("sparse_linear", x, prune24(w), device="sm_80")
    assert (
        "that of x comes from torch's product, since the weight is not transposable" in said.reason
    )
    said = bigops.explain("sparse_linear", x, prune24(w, torch.int8), device="sm_89")
    assert "gradients come from torch's product" in said.reason
    said = bigops.explain("sparse_linear", x, prune24(w, transposable=True), device="sm_90")
    assert said.kernel == "reference.sparse24_linear"
    assert "no default before hardware was measured" in said.reason


def test_int8_values_have_no_gradient() -> None:
    weight = prune24(torch.randn(8, 64), torch.int8)
    x = torch.randn(3, 64, requires_grad=True)
    (gx,) = torch.autograd.grad(sparse_linear(x, weight).sum(), x)
    check(
        gx,
        weight.to_dense(torch.float64).sum(0).expand(3, 64),
        weight.to_dense().sum(0).expand(3, 64),
        weight.to_dense(torch.float64).abs().sum(0),
    )
    with pytest.raises(TypeError, match="values: expected a floating-point dtype .*; got int8"):
        torch.ops.bigops.sparse24_linear_backward(
            torch.randn(3, 8), x, *weight.arguments, None, "none", False, True, False
        )
