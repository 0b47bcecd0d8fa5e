"""linear_cross_entropy in forward mode, by batches of gradients, traced; and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

from bigops.ops.linear_cross_entropy import linear_cross_entropy
from tests.support.cases.cross_entropy import ALL, Case, make

M, V, K = 5, 7, 3
Inputs = tuple[Tensor, ...]


def case_of(name: str, dtype: torch.dtype = torch.float32) -> Case:
    torch.manual_seed(0)
    return make(M, V, K, dtype, **ALL[name])


def inputs_of(case: Case) -> Inputs:
    assert case.bias is not None
    return case.x, case.weight, case.bias


def compiled(f: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def dual(f: Callable[..., Tensor], inputs: Inputs, tangents: Inputs) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(*map(forward_ad.make_dual, inputs, tangents))).tangent
    assert tangent is not None, "dropped"
    return tangent


def jvp(f: Callable[..., Tensor], inputs: Inputs, tangents: Inputs) -> Tensor:
    return torch.func.jvp(f, inputs, tangents)[1]  # type: ignore[no-any-return]


def linearize(f: Callable[..., Tensor], inputs: Inputs, tangents: Inputs) -> Tensor:
    return torch.func.linearize(f, *inputs)[1](*tangents)  # type: ignore[no-any-return]


def compiled_jvp(f: Callable[..., Tensor], inputs: Inputs, tangents: Inputs) -> Tensor:
    return compiled(lambda *args: jvp(f, args[:3], args[3:]))(*inputs, *tangents)  # type: ignore[no-any-return]


WAYS = {way.__name__: way for way in (dual, jvp, linearize, compiled_jvp)}


def near(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert want.any()
    assert torch.allclose(got.double(), want.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("way", WAYS)
def test_tangents(way: str, name: str) -> None:
    """With the incoming gradient they are what float64 gradients are with the tangents."""
    case = case_of(name)
    tangents = tuple(torch.randn_like(t) for t in inputs_of(case))
    _, grads = case.plain(torch.float64)
    want = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True) if g is not None)
    fs = [case.public()] + ([case.raw()] if way in ("dual", "jvp") else [])
    for f in fs:
        got = WAYS[way](f, inputs_of(case), tangents)
        near((got.double() * case.grad).sum(), want)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "all", "all, none"])
def test_jacobians(name: str) -> None:
    case = case_of(name)
    wide = make(M, V, K, torch.float64, **ALL[name])
    wide.x, wide.weight, wide.target = case.x.double(), case.weight.double(), case.target
    wide.bias, wide.options = inputs_of(case)[2].double(), case.options

    def f(x: Tensor) -> Tensor:
        return case.public()(x, case.weight, case.bias)

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, wide.weight, wide.target, wide.bias, **wide.options)

    leaf = wide.x.clone().requires_grad_()
    y = loss(leaf)
    rows = [torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in y.flatten()]
    want = torch.stack(rows).view(*y.shape, M, K)
    for got in (
        torch.func.jacfwd(f)(case.x),
        torch.func.jacrev(f)(case.x),
        compiled(torch.func.jacfwd(f))(case.x),
        jacobian(f, case.x, strategy="forward-mode", vectorize=True),
        jacobian(f, case.x, vectorize=True),
        jacobian(f, case.x, vectorize=True, create_graph=True).detach(),
    ):
        near(got, want)


@pytest.mark.parametrize("name", ["plain", "sum", "none", "all"])
@pytest.mark.parametrize("retained", [False, True])
def test_a_batch_of_gradients(name: str, retained: bool) -> None:
    case = case_of(name)
    leaves = [t.clone().requires_grad_() for t in inputs_of(case)]
    loss = case.public()(*leaves)
    batch = torch.stack([case.grad, 2 * case.grad, -case.grad])
    rows = [torch.autograd.grad(loss, leaves, g, retain_graph=True) for g in batch]
    got = torch.autograd.grad(loss, leaves, batch, is_grads_batched=True, retain_graph=retained)
    for one, parts in zip(got, zip(*rows, strict=True), strict=True):
        near(one, torch.stack(parts))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_hessians_by_forward_mode(reduction: str) -> None:
    """Reverse mode twice is refused (test_paths.py)."""
    case = case_of("plain")

    def f(x: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, case.weight, case.target, case.bias, reduction=reduction
        ).sum()

    def plain(x: Tensor) -> Tensor:
        logits = F.linear(x, case.weight.double(), inputs_of(case)[2].double())
        return F.cross_entropy(logits, case.target, reduction=reduction).sum()

    want, func = torch.func.hessian(plain)(case.x.double()), torch.func
    for got in (
        func.hessian(f)(case.x),
        func.jacrev(func.jacfwd(f))(case.x),
        func.jacfwd(func.jacfwd(f))(case.x),
    ):
        near(got, want)


def test_forward_mode_over_an_older_graph() -> None:
    """Right where the gradients are made, refused where they would be made without the tangent."""
    for name in ("plain", "none"):
        case = case_of(name)
        x = case.x.clone().requires_grad_()
        loss = case.public()(x, case.weight, case.bias)

        def gradient(g: Tensor, loss: Tensor = loss, x: Tensor = x) -> Tensor:
            return torch.autograd.grad(loss, x, g, retain_graph=True)[0]

        given, tangent = (case.grad,), (torch.ones_like(case.grad),)
        if name == "plain":
            near(dual(gradient, given, tangent), gradient(tangent[0]))
        else:
            with pytest.raises(NotImplementedError, match="forward mode over a backward pass"):
                dual(gradient, given, tangent)


@pytest.mark.parametrize("name", ["plain", "none"])
def test_gradients_of_a_batch_are_not_differentiated_in_silence(name: str) -> None:
    case = case_of(name)
    for raw in (False, True):
        x = case.x.clone().requires_grad_()
        loss = (case.raw() if raw else case.public())(x, case.weight, case.bias)
        batch = torch.stack([case.grad, case.grad])
        (got,) = torch.autograd.grad(loss, x, batch, is_grads_batched=True, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward is not implemented"):
            (got.square().sum() + x.sum()).backward()


def test_gradients_of_a_batch_are_linear_in_it() -> None:
    case = case_of("plain")
    x = case.x.clone().requires_grad_()
    loss = case.public()(x, case.weight, case.bias)
    (one,) = torch.autograd.grad(loss, x, retain_graph=True)
    batch = torch.randn(3, requires_grad=True)
    (got,) = torch.autograd.grad(loss, x, batch, is_grads_batched=True, create_graph=True)
    weights = torch.randn_like(got)
    near(torch.autograd.grad(got, batch, weights)[0], (one * weights).sum((1, 2)))


@pytest.mark.parametrize("name", ["plain", "sum", "none", "all"])
def test_traced_transforms(name: str) -> None:
    case = case_of(name)

    def loss(*inputs: Tensor) -> Tensor:
        return (case.public()(*inputs) * case.grad).sum()

    want = case.plain(torch.float64)[1]
    grad = torch.func.grad(loss, (0, 1, 2))
    for f in (grad, compiled(grad)):
        for got, other in zip(f(*inputs_of(case)), want, strict=True):
            assert other is not None
            near(got, other)
    x, weight, bias = inputs_of(case)
    one = lambda x: torch.func.grad(loss)(x, weight, bias)  # noqa: E731
    stacked = torch.stack([x, 2 * x])
    near(compiled(torch.vmap(one))(stacked), torch.stack([one(x), one(2 * x)]))


# --- what is kept --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("learns", ["x", "weight", "bias", "all"])
def test_nothing_of_x_is_kept(learns: str, reduction: str) -> None:
    torch.manual_seed(0)
    case = make(40, V, 30, reduction=reduction)
    flags = [learns in (name, "all") for name in ("x", "weight", "bias")]
    inputs = [t.clone().requires_grad_(f) for t, f in zip(inputs_of(case), flags, strict=True)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss = case.public()(*inputs)
    own = inputs[0].untyped_storage().data_ptr()
    assert not any(t.untyped_storage().data_ptr() == own or t.numel() >= 1200 for t in kept)
    want = case.plain(torch.float64)[1]
    wanted = [t for t in inputs if t.requires_grad]
    for _ in range(2):  # a retained graph gives them twice
        found = torch.autograd.grad(loss, wanted, case.grad, retain_graph=True)
        for got, other in zip(
            found, [g for g, f in zip(want, flags, strict=True) if f], strict=True
        ):
            assert other is not None
            near(got, other)
    torch.autograd.grad(loss, wanted, case.grad)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, wanted, case.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_x_may_be_an_inference_tensor_where_it_does_not_learn(reduction: str) -> None:
    case = make(M, V, K, reduction=reduction)
    with torch.inference_mode():
        x = case.x.clone()
    _, weight, bias = (t.clone().requires_grad_() for t in inputs_of(case))
    want = case.plain(torch.float64)[1]
    loss = case.public()(x, weight, bias)
    for got, other in zip(
        torch.autograd.grad(loss, (weight, bias), case.grad), want[1:], strict=True
    ):
        assert other is not None
        near(got, other)


def test_losses_may_be_written_in_place() -> None:
    case = case_of("none")
    x = case.x.clone().requires_grad_()
    losses = case.public()(x, case.weight, case.bias)
    want = torch.autograd.grad(losses.sum(), x, retain_graph=True)[0]
    losses *= 2
    near(torch.autograd.grad(losses.sum(), x)[0], 2 * want)
