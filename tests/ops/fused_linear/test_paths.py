"""Gradients of fused_linear along every path against float64, and the contract of a torch op."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from bigops.ops.fused_linear import fused_linear
from tests.support import paths
from tests.support.backends import covering
from tests.support.cases.linear import ACTIVATIONS, Case, make
from tests.support.kernels_ran import expect, needs_extension

module = importlib.import_module("bigops.ops.fused_linear")  # the name is the function's, too
raw = torch.ops.bigops.fused_linear
pytestmark = needs_extension


def public(name: str) -> paths.Op:
    def f(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return fused_linear(x, weight, bias, residual, name)

    return f


def raw_call(name: str) -> paths.Op:
    def f(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return raw(x, weight, bias, residual, name)

    return f


def travel(path: str, case: Case) -> None:
    """One path, one case: gradients by the rule, and a kernel of ours in the forward at least."""
    f = raw_call(case.name) if path == "raw" else public(case.name)
    go = paths.eager if path == "raw" else paths.PATHS[path]
    with expect("fused_linear"):
        grads = go(f, case.leaves(), case.grad)
    case.check_gradients(grads, path)


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64_gradients(path: str, name: str) -> None:
    travel(path, make(3, 4, 5, torch.float64, name))


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_every_dtype(path: str, dtype: torch.dtype) -> None:
    for name in ("none", "gelu", "swiglu"):
        travel(path, make(7, 20, 33, dtype, name))


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_gradients_without_bias_and_residual(path: str) -> None:
    travel(path, make(3, 4, 5, torch.float64, "silu", bias=False, residual=False))


def test_inductor_computes_the_same() -> None:
    case = make(5, 12, 9, torch.float32, "geglu")
    with expect("fused_linear_with_parts", "fused_linear_backward"):
        grads = paths.inductor(public("geglu"), case.leaves(), case.grad)
    case.check_gradients(grads, "inductor")


@pytest.mark.parametrize("frozen", [0, 1, 2, 3], ids=["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("path", ["raw", "eager", "compiled"])
def test_an_input_without_gradient(path: str, frozen: int) -> None:
    case = make(3, 4, 5, torch.float64, "tanh")
    leaves = case.leaves()
    leaves[frozen].requires_grad_(False)  # type: ignore[union-attr]
    f = raw_call("tanh") if path == "raw" else public("tanh")
    if path == "compiled":
        torch._dynamo.reset()
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    wanted = [t for i, t in enumerate(leaves) if i != frozen]
    got = list(torch.autograd.grad(f(*leaves), wanted, case.grad))
    truth = case.plain(torch.float64)[1]
    got.insert(frozen, truth[frozen])
    case.check_gradients(got, path)


# planted faults: a wrong gradient on each path must be seen ---------------------------------


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_a_wrong_gradient_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dict.fromkeys(module.op.gradients.needs, lambda g: g * 1.01)
    paths.plant(monkeypatch, module.op, **wrong)
    with pytest.raises(AssertionError, match="gradient of"):
        travel(path, make(3, 4, 5, torch.float64, "gelu"))
    torch._dynamo.reset()


def test_a_stale_weight_is_seen() -> None:
    """A layer that remembers its weight from before the optimiser step fails the path."""
    kept: list[Tensor] = []

    def stale(x: Tensor, weight: Tensor, *rest: Tensor | None) -> Tensor:
        if not kept:
            kept.append(weight.detach().clone())
        return fused_linear(x, weight + (kept[0] - weight).detach(), *rest, activation="gelu")

    case = make(3, 4, 5, torch.float64, "gelu")
    with pytest.raises(AssertionError, match="gradient of"):
        case.check_gradients(paths.after_step(stale, case.leaves(), case.grad))


# contract of a torch op --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "gelu", "swiglu"])
def test_double_backward(name: str) -> None:
    case = make(2, 3, 4, torch.float64, name)
    for f in (public(name), raw_call(name)):
        assert torch.autograd.gradgradcheck(f, case.leaves())
    x, weight, _, _ = case.leaves()
    assert x is not None
    assert weight is not None
    preact = torch.randn(2, 6 if name == "swiglu" else 3, dtype=torch.float64, requires_grad=True)
    grad = case.grad.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda g, x, w, z: torch.ops.bigops.fused_linear_backward(
            g, x, w, None if name == "none" else z, name, True, True, True
        ),
        (grad, x, weight, preact),
    )


@pytest.mark.parametrize(
    ("name", "lead"), covering(["none", "relu", "geglu"], [[4], [2, 3], [0]]), ids=str
)
def test_opcheck(name: str, lead: list[int]) -> None:
    case = make(lead, 6, 5, torch.float32, name)
    ops = torch.ops.bigops
    paths.opcheck(ops.fused_linear, (*case.leaves(), name))
    # its z has no gradient, which "test_aot_dispatch" asks for
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    paths.opcheck(ops.fused_linear_with_parts, (*case.leaves(), name), test_utils=checks)
    y, preact = ops.fused_linear_with_parts(*case.inputs, name)
    assert y.shape == case.grad.shape
    for needs in ((True, True, True), (False, True, False)):
        args = (case.grad, case.x, case.weight, None if name == "none" else preact, name, *needs)
        paths.opcheck(ops.fused_linear_backward, args)


def test_one_dynamic_graph_serves_all_row_counts() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(public("gelu"), fullgraph=True, backend=counter, dynamic=True)
    case = make(1, 6, 5, torch.float32, "gelu", residual=False)

    def call(m: int) -> None:
        x = torch.randn(m, 5)
        want = fused_linear(x, case.weight, case.bias, None, "gelu")
        assert torch.equal(compiled(x, case.weight, case.bias, None), want)

    for m in (2, 3, 17, 64):
        call(m)
    assert counter.frame_count == 1
    call(1)
    call(0)
    assert counter.frame_count <= 3


def test_export_with_a_dynamic_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return fused_linear(x, weight, activation="swiglu")

    weight = torch.randn(6, 5)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(
        Model(), (torch.randn(4, 5), weight), dynamic_shapes=({0: batch}, None)
    )
    x = torch.randn(9, 5)
    assert torch.equal(program.module()(x, weight), fused_linear(x, weight, activation="swiglu"))


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 0)], ids=str)
@pytest.mark.parametrize("name", ["relu", "reglu"])
def test_vmap_over_any_argument(dims: tuple[int | None, int | None], name: str) -> None:
    cases = [make(4, 3, 5, torch.float32, name, residual=False) for _ in range(3)]
    first = cases[0]
    for case in cases[1:]:
        case.bias = first.bias
        if dims[0] is None:
            case.x = first.x
        if dims[1] is None:
            case.weight = first.weight
    x = first.x if dims[0] is None else torch.stack([c.x for c in cases], dims[0])
    weight = first.weight if dims[1] is None else torch.stack([c.weight for c in cases])
    got = torch.vmap(lambda x, w: fused_linear(x, w, first.bias, None, name), in_dims=dims)(
        x, weight
    )
    for case, y in zip(cases, got, strict=True):
        case.check_forward(y, "vmap")


def test_per_sample_gradients() -> None:
    case = make(4, 6, 5, torch.float64, "gelu", residual=False)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return fused_linear(x, weight, case.bias, None, "gelu").sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(case.weight, case.x)
    case.grad = torch.ones_like(case.grad)
    truth, plain = case.plain(torch.float64)[1], case.leaves()
    plain[0], plain[1], plain[2] = truth[0], per_sample.sum(0), truth[2]
    case.check_gradients(plain, "vmap of grad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_to_its_own_dtype(dtype: torch.dtype, compile_it: bool) -> None:
    case = make(4, 6, 5, torch.float32, "gelu")
    leaves = case.leaves()
    f = public("gelu")
    if compile_it:
        torch._dynamo.reset()
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        y = f(*leaves)
    assert y.dtype == dtype
    low = Case(*(t.to(dtype) for t in case.inputs), case.grad.to(dtype), "gelu")  # type: ignore
    low.check_forward(y)
    grads = torch.autograd.grad(y, leaves, case.grad.to(dtype))  # type: ignore[arg-type]
    assert all(g.dtype == torch.float32 for g in grads)
    low.check_gradients([g.to(dtype) for g in grads], "autocast")


def test_autocast_leaves_float64_alone() -> None:
    case = make(2, 3, 4, torch.float64, "gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused_linear(*case.inputs, "gelu").dtype == torch.float64


def test_raw_op_under_autocast_is_not_recast_to_one_fixed_dtype() -> None:
    case = make(2, 3, 4, torch.float16, "gelu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert raw(*case.inputs, "gelu").dtype == torch.float16
