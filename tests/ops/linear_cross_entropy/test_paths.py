"""Gradients of linear_cross_entropy along every path against float64, and the contract of an op."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import backend
from bigops.ops.linear_cross_entropy import chunked, linear_cross_entropy
from tests.support import paths
from tests.support.backends import covering
from tests.support.cases.cross_entropy import ALL, SOFT, Case, Leaves, make
from tests.support.kernels_ran import expect, needs_extension

module = importlib.import_module("bigops.ops.linear_cross_entropy")  # the name is the function's
ops = torch.ops.bigops
pytestmark = needs_extension
PATHS = ["raw", "raw_with_grad", *paths.PATHS]


def grad_of_vmap(case: Case) -> Leaves:
    """torch.func.grad over torch.vmap of single tokens, summed by the incoming gradient."""
    options = {**case.options, "reduction": "sum"}

    def one(x: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_cross_entropy(x, weight, target, bias, **options)

    def total(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        losses = torch.vmap(one, (0, 0, None, None))(x, case.target, weight, bias)
        if case.options.get("reduction", "mean") == "mean" and case.soft:
            losses = losses / len(losses)
        elif case.options.get("reduction", "mean") == "mean":
            losses = losses / (case.target != options.get("ignore_index", -100)).sum()
        return (losses * case.grad).sum()

    tensors = [t.detach() for t in case.leaves() if t is not None]
    grads = list(torch.func.grad(total, tuple(range(len(tensors))))(*tensors))
    return grads if case.bias is not None else [*grads, None]


def with_grad(case: Case) -> Callable[..., Tensor]:
    def f(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        args = (x, weight, case.target, bias, *case.raw_options())
        return ops.linear_cross_entropy_with_grad(*args, True, True, True, False)[0]  # type: ignore[no-any-return]

    return f


def travel(path: str, case: Case) -> None:
    """One path, one case: gradients by the rule, made by our kernel where it takes the target."""
    with backend.record() if case.soft else expect("linear_cross_entropy"):
        if path == "grad_of_vmap":
            grads = grad_of_vmap(case)
        elif path in ("raw", "raw_with_grad"):
            f = case.raw() if path == "raw" else with_grad(case)
            grads = paths.eager(f, case.leaves(), case.grad)
        else:
            grads = paths.PATHS[path](case.public(), case.leaves(), case.grad)
    case.check_gradients(grads, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["plain", "sum", "none", "smoothed", "all", "all, none", *SOFT])
def test_float64_gradients(path: str, name: str) -> None:
    options = dict({**ALL, **SOFT}[name])
    if path == "raw_with_grad" and options.get("reduction") == "none":
        options["reduction"] = "sum"
    if path == "grad_of_vmap":
        options.pop("class_weight", None)  # its mean weighs tokens: `total` above divides by count
    travel(path, make(5, 7, 3, torch.float64, **options))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_every_dtype(path: str, dtype: torch.dtype) -> None:
    if path == "grad_of_vmap" and dtype != torch.float32:
        pytest.skip("the gradient of a weight that vmap shares is summed by torch, in 16 bits")
    travel(path, make(9, 33, 20, dtype, label_smoothing=0.1))


@pytest.mark.parametrize("path", PATHS)
def test_gradients_without_bias(path: str) -> None:
    if path == "raw_with_grad":
        case = make(5, 7, 3, torch.float64, bias=False)
        args = (case.target, None, *case.raw_options(), True, True, False, False)
        f = lambda x, w, b: ops.linear_cross_entropy_with_grad(x, w, *args)[0]  # noqa: E731
        case.check_gradients(paths.eager(f, case.leaves(), case.grad))
    else:
        travel(path, make(5, 7, 3, torch.float64, bias=False))


@pytest.mark.parametrize("name", ["all", "all, none"])
def test_gradcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "SMALL", 0)
    case = make(5, 4, 3, torch.float64, **ALL[name])
    with expect("cpu.portable.linear_cross_entropy.f64.gradient"):
        for f in (case.public(), case.raw()):
            assert torch.autograd.gradcheck(f, case.leaves())


@pytest.mark.parametrize("name", ["all", pytest.param("none", marks=pytest.mark.slow)])
def test_inductor_computes_the_same(name: str) -> None:
    case = make(9, 33, 20, torch.float32, **ALL[name])
    with expect("linear_cross_entropy"):
        grads = paths.inductor(case.public(), case.leaves(), case.grad)
    case.check_gradients(grads, "inductor")


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["x", "weight", "bias"])
@pytest.mark.parametrize("path", ["raw", "eager", "compiled"])
def test_an_input_without_gradient(path: str, frozen: int) -> None:
    for reduction in ("mean", "none"):
        case = make(5, 7, 3, torch.float64, reduction=reduction)
        leaves = case.leaves()
        leaves[frozen].requires_grad_(False)  # type: ignore[union-attr]
        f = case.raw() if path == "raw" else case.public()
        if path == "compiled":
            torch._dynamo.reset()
            f = torch.compile(f, fullgraph=True, backend="aot_eager")
        wanted = [t for i, t in enumerate(leaves) if i != frozen]
        got: Leaves = list(torch.autograd.grad(f(*leaves), wanted, case.grad))  # type: ignore[arg-type]
        got.insert(frozen, case.plain(torch.float64)[1][frozen])
        case.check_gradients(got, path)


# planted faults ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_gradient_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true_run = chunked.run

    def off(*args: Any) -> Any:
        losses, grads = true_run(*args)
        return losses, tuple(None if g is None else g * 1.01 for g in grads)

    monkeypatch.setattr(chunked, "run", off)
    with pytest.raises(AssertionError, match="gradient of"):
        travel(path, make(5, 7, 3, torch.float64))
    torch._dynamo.reset()


# contract of a torch op --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "none"])
def test_double_backward_raises(name: str) -> None:
    case = make(5, 7, 3, torch.float64, **ALL[name])
    fs = [case.public(), case.raw()] + ([with_grad(case)] if name == "plain" else [])
    for f in fs:
        x, weight, bias = case.leaves()
        (gx,) = torch.autograd.grad(f(x, weight, bias), x, case.grad, create_graph=True)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="double backward is not implemented"):
            gx.square().sum().backward()

    def norm(x: Tensor) -> Tensor:
        return torch.func.grad(lambda t: case.public()(t, case.weight, case.bias).sum())(x).sum()

    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        torch.func.grad(norm)(case.x)


@pytest.mark.parametrize(
    ("name", "lead"), covering(["sum", "all, none"], [[4], [2, 3], [0]]), ids=str
)
def test_opcheck(name: str, lead: list[int]) -> None:
    case = make(lead, 6, 5, torch.float32, ignored=0, **ALL[name])
    x, weight, bias = case.leaves()
    args = (x, weight, case.target, bias, *case.raw_options())
    paths.opcheck(ops.linear_cross_entropy, args)
    plain_args = (case.x, case.weight, case.target, case.bias, *case.raw_options())
    for needs in ((True, True, True), (False, True, False)):
        paths.opcheck(ops.linear_cross_entropy_backward, (case.grad, *plain_args, *needs))
        if name == "sum":
            for stats in (False, True):
                paths.opcheck(ops.linear_cross_entropy_with_grad, (*plain_args, *needs, stats))
    if name == "sum":
        paths.opcheck(ops.linear_cross_entropy_with_grad, (*args, True, True, True, True))


def test_opcheck_of_the_pass() -> None:
    target = torch.tensor([1, 0, 5, -100])
    for gradient, predict in ((True, False), (False, True)):
        args = (torch.randn(4, 6), target, torch.randn(6), torch.rand(6), torch.rand(4))
        torch.library.opcheck(
            ops.linear_cross_entropy_chunk.default,
            (*args, 2.5, -100, 0.1, 0.01, 3.0, gradient, predict),
        )


def test_one_dynamic_graph_serves_all_token_counts() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    weight = torch.randn(6, 5, requires_grad=True)

    def f(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target)

    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)

    def call(m: int) -> None:
        x, target = torch.randn(m, 5), torch.randint(0, 6, (m,))
        want = torch.autograd.grad(f(x, weight, target), weight)[0]
        assert torch.equal(torch.autograd.grad(compiled(x, weight, target), weight)[0], want)

    call(2)
    graphs = counter.frame_count  # dynamo takes a second look at the first call
    for m in (3, 17, 64):
        call(m)
    assert counter.frame_count == graphs
    call(1)
    call(0)
    assert counter.frame_count <= graphs + 2


def test_export_with_a_dynamic_batch() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return linear_cross_entropy(x, weight, target, softcap=5.0)

    weight, batch = torch.randn(6, 5), torch.export.Dim("batch", min=2, max=1024)
    example = (torch.randn(4, 5), weight, torch.randint(0, 6, (4,)))
    program = torch.export.export(Model(), example, dynamic_shapes=({0: batch}, None, {0: batch}))
    x, target = torch.randn(9, 5), torch.randint(0, 6, (9,))
    want = linear_cross_entropy(x, weight, target, softcap=5.0)
    assert torch.equal(program.module()(x, weight, target), want)


def test_a_target_out_of_range_is_said_on_every_path() -> None:
    case = make(4, 6, 5)
    case.target[2] = 6
    torch._dynamo.reset()
    compiled = torch.compile(case.public(), fullgraph=True, backend="aot_eager")
    for f in (case.public(), case.raw(), with_grad(case), compiled):
        with pytest.raises(ValueError, match="target: expected classes 0 to 5.*got 6"):
            f(*case.leaves())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "dims", [(0, 0, None), (0, None, None), (None, 0, None), (0, 0, 0)], ids=str
)
@pytest.mark.parametrize("which", ["public", "raw"])
def test_vmap(which: str, dims: tuple[int | None, ...], reduction: str) -> None:
    cases = [
        make(6, 7, 5, torch.float64, reduction=reduction, label_smoothing=0.1) for _ in range(3)
    ]
    for case in cases[1:]:
        case.bias = cases[0].bias
        for dim, name in zip(dims, ("x", "target", "weight"), strict=True):
            if dim is None:
                setattr(case, name, getattr(cases[0], name))

    def f(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        first = cases[0]
        if which == "raw":
            return ops.linear_cross_entropy(x, weight, target, first.bias, *first.raw_options())  # type: ignore[no-any-return]
        return linear_cross_entropy(x, weight, target, first.bias, **first.options)

    inputs = [
        getattr(cases[0], name)
        if dim is None
        else torch.stack([getattr(case, name) for case in cases])
        for dim, name in zip(dims, ("x", "target", "weight"), strict=True)
    ]
    with expect("linear_cross_entropy"):
        got = torch.vmap(f, in_dims=dims)(*inputs)
    for case, loss in zip(cases, got, strict=True):
        case.check_loss(loss, "vmap")


def test_per_sample_gradients() -> None:
    case = make(4, 6, 5, torch.float64, reduction="sum")

    def loss(weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, target, case.bias, reduction="sum")

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0))(case.weight, case.x, case.target)
    case.grad = torch.ones_like(case.grad)
    truth = case.plain(torch.float64)[1]
    case.check_gradients([truth[0], per_sample.sum(0), truth[2]], "vmap of grad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_autocast_casts_to_its_own_dtype(dtype: torch.dtype, compile_it: bool) -> None:
    case = make(9, 33, 5)
    leaves, f = case.leaves(), case.public()
    if compile_it:
        torch._dynamo.reset()
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=dtype):
        loss = f(*leaves)
    assert loss.dtype == torch.float32
    low = Case(*(t.to(dtype) for t in (case.x, case.weight, case.bias)), case.target)  # type: ignore
    low.grad = case.grad
    low.check_loss(loss)
    grads = torch.autograd.grad(loss, leaves, case.grad)  # type: ignore[arg-type]
    assert all(g.dtype == torch.float32 for g in grads)
    low.check_gradients([g.to(dtype) for g in grads], "autocast")


def test_autocast_leaves_float64_alone() -> None:
    case = make(2, 3, 4, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.public()(*case.leaves()).dtype == torch.float64


def test_gradients_that_were_not_made_are_refused() -> None:
    case = make(4, 6, 5)
    x, weight, bias = case.leaves()
    args = (x, weight, case.target, bias, *case.raw_options())
    outs = ops.linear_cross_entropy_with_grad(*args, True, True, True, False)
    assert not any(t.requires_grad for t in outs[1:])
    loss = ops.linear_cross_entropy_with_grad(*args, True, False, True, False)[0]
    with pytest.raises(RuntimeError, match="a gradient is asked for that need_x"):
        loss.backward()


def test_meta_and_fake_tensors_take_the_same_way() -> None:
    case = make(4, 6, 5)
    x, weight, bias = (t.to("meta").requires_grad_() for t in (case.x, case.weight, case.bias))  # type: ignore[union-attr]
    for reduction in ("mean", "none"):
        loss = linear_cross_entropy(x, weight, case.target.to("meta"), bias, reduction=reduction)
        assert loss.shape == (torch.Size([4]) if reduction == "none" else torch.Size([]))
        grads = torch.autograd.grad(loss.sum(), (x, weight, bias))
        assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]
    mode = torch._subclasses.FakeTensorMode()
    leaves = [mode.from_tensor(t).requires_grad_() for t in (case.x, case.weight, case.bias)]  # type: ignore[arg-type]
    target = mode.from_tensor(case.target)
    with mode:
        loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2])
        assert torch.autograd.grad(loss, leaves)[1].shape == case.weight.shape
