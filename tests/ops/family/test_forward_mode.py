"""Tangents, Jacobians and Hessians of the ops of the family by forward mode, held in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

from bigops.formats.dense import DenseWeight
from bigops.formats.quantize import static_qparams
from bigops.ops.fused_linear import fused_linear
from bigops.ops.quantized_linear import quantized_linear
from tests.ops.family.problems import ALL, Problem, compiled, hold, problem
from tests.support.backends import covering
from tests.support.cases.linear import ACTIVATIONS, GATED, act
from tests.support.tolerance import snr_db

Tangents = tuple[Tensor, ...]
TRAINED = {"dense": ("weight",), "low_rank": ("u", "v", "base"), "sparse_float": ("values",)}


def dual(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, inputs, tangents))
        tangent = forward_ad.unpack_dual(y).tangent
    assert tangent is not None, "dropped"
    return tangent


def dual_of_leaves(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return dual(f, tuple(t.clone().requires_grad_() for t in inputs), tangents).detach()


def jvp(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return torch.func.jvp(f, inputs, tangents)[1]  # type: ignore[no-any-return]


def linearize(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return torch.func.linearize(f, *inputs)[1](*tangents)  # type: ignore[no-any-return]


def vmap_of_jvp(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    x, bias, residual = inputs
    one = lambda x, r, tx, tr: jvp(f, (x, bias, r), (tx, tangents[1], tr))  # noqa: E731
    return torch.vmap(one)(x, residual, tangents[0], tangents[2])


def jvp_of_vmap(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return jvp(torch.vmap(f, (0, None, 0)), inputs, tangents)


def compiled_jvp(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return compiled(lambda *args: jvp(f, args[:3], args[3:]))(*inputs, *tangents)  # type: ignore[no-any-return]


def compiled_vmap_of_jvp(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return compiled(lambda *args: vmap_of_jvp(f, args[:3], args[3:]))(*inputs, *tangents)  # type: ignore[no-any-return]


WAYS = {
    way.__name__: way
    for way in (
        dual,
        dual_of_leaves,
        jvp,
        linearize,
        vmap_of_jvp,
        jvp_of_vmap,
        compiled_jvp,
        compiled_vmap_of_jvp,
    )
}


def tangents_of(case: Problem) -> Tangents:
    return tuple(torch.randn(t.shape).to(t.dtype) for t in case.inputs)


def near(got: Tensor, want: Tensor, form: str) -> None:
    assert got.shape == want.shape
    assert want.any()
    assert snr_db(got, want) > (35 if form == "24" else 100)


# ways that compile take a second each
PAIRS = [(way, form) for way in WAYS if not way.startswith("compiled") for form in ALL]
COMPILED = covering([way for way in WAYS if way.startswith("compiled")], ALL)


@pytest.mark.parametrize(("way", "form"), [*PAIRS, *COMPILED])
def test_tangents(way: str, form: str) -> None:
    case = problem(form)
    tangents = tangents_of(case)
    near(WAYS[way](case.call, case.inputs, tangents), case.tangent(*tangents), form)


@pytest.mark.parametrize("form", ALL)
def test_the_result_beside_its_tangent(form: str) -> None:
    case = problem(form)
    want = case.call(*case.inputs)
    hold([torch.func.jvp(case.call, case.inputs, tangents_of(case))[0]], [want])


@pytest.mark.parametrize("form", ALL)
def test_tangents_of_the_raw_ops(form: str) -> None:
    """The overload in words, as fx has it, and the one that kernels serve, as exported programs."""
    case = problem(form)
    tangents = tangents_of(case)
    op, words = case.op, (*case.weight.arguments,)
    code = op._encoded((case.x, *words, case.bias, case.residual, "gelu"))

    def by_words(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return op._words(x, *words, bias, residual, "gelu")  # type: ignore[no-any-return]

    def by_code(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return op.forward(x, *code[1:-3], bias, residual, code[-1])  # type: ignore[no-any-return]

    def kept(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return op.forward_kept(x, *code[1:-3], bias, residual, code[-1])[0]  # type: ignore[no-any-return]

    want = case.tangent(*tangents)
    for f in (by_words, by_code, *([kept] if op.kept else [])):
        for way in (dual, dual_of_leaves, jvp):
            near(way(f, case.inputs, tangents), want, form)


@given(
    lead=st.lists(st.integers(0, 4), max_size=4),
    n=st.integers(1, 5),
    k=st.integers(0, 6),
    activation=st.sampled_from(ACTIVATIONS),
    given_flags=st.lists(st.booleans(), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_tangents_of_any_call(
    lead: list[int], n: int, k: int, activation: str, given_flags: list[bool], seed: int
) -> None:
    """Any shape and activation, tangents of some of the arguments: as float64 has them."""
    torch.manual_seed(seed)
    width = 2 * n if activation in GATED else n
    shapes = [*lead, k], [width, k], [width], [*lead, n]
    x, weight, bias, residual = (torch.randn(shape) for shape in shapes)
    flags = dict(zip(("x", "weight", "bias"), given_flags, strict=True))
    inputs = {"x": x, "weight": weight, "bias": bias}
    moved = {name: torch.randn_like(t) for name, t in inputs.items() if flags[name]}

    def plain(*changed: Tensor) -> Tensor:
        at = {name: t.double() for name, t in inputs.items()}
        at.update(zip(moved, changed, strict=True))
        return act(activation, torch.nn.functional.linear(at["x"], at["weight"], at["bias"]))

    def ours(*changed: Tensor) -> Tensor:
        at = {**inputs, **dict(zip(moved, changed, strict=True))}
        return fused_linear(at["x"], at["weight"], at["bias"], residual, activation)

    if not moved:
        return
    primals, tangents = tuple(inputs[name] for name in moved), tuple(moved.values())
    wide = [tuple(t.double() for t in ts) for ts in (primals, tangents)]
    _, want = torch.func.jvp(plain, *wide)
    for way in (dual, jvp):
        got = way(ours, primals, tangents)
        assert got.shape == want.shape
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ALL)
def test_jacobians(form: str) -> None:
    """Reverse mode, too: each by a batch of gradients or of tangents."""
    case = problem(form)
    f = lambda x: case.call(x, case.bias, case.residual)  # noqa: E731
    want = case.jacobian()
    for got in (
        torch.func.jacfwd(f)(case.x),
        torch.func.jacrev(f)(case.x),
        compiled(torch.func.jacfwd(f))(case.x),
        jacobian(f, case.x, strategy="forward-mode", vectorize=True),
        jacobian(f, case.x, vectorize=True),
        jacobian(f, case.x, vectorize=True, create_graph=True).detach(),
    ):
        near(got, want, form)


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("form", ALL)
def test_a_batch_of_gradients(form: str, activation: str) -> None:
    case = problem(form, activation)
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    batch = torch.stack([case.grad, 2 * case.grad, case.grad.flip(0)])
    y = case.call(*leaves)
    got = torch.autograd.grad(y, leaves, batch, is_grads_batched=True, retain_graph=True)
    rows = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in batch]
    hold(got, [torch.stack(parts) for parts in zip(*rows, strict=True)])


@pytest.mark.parametrize("form", ALL)
def test_hessians(form: str) -> None:
    """Forward over reverse, reverse over forward, forward twice, reverse twice."""
    case = problem(form)
    f = lambda x: case.loss(x, case.bias, case.residual)  # noqa: E731
    want, func = case.hessian(), torch.func
    for got in (
        func.hessian(f)(case.x),
        func.jacrev(func.jacfwd(f))(case.x),
        func.jacfwd(func.jacfwd(f))(case.x),
        torch.autograd.functional.hessian(f, case.x),
    ):
        near(got, want, form)


@pytest.mark.parametrize("form", ALL)
def test_gradients_of_a_tangent(form: str) -> None:
    """Without torch.func: of the tangent of leaves, whose way of rounding is straight through."""
    case = problem(form)
    tangents = tangents_of(case)
    x = case.x.clone().requires_grad_()
    with forward_ad.dual_level():
        inputs = map(forward_ad.make_dual, (x, case.bias, case.residual), tangents)
        tangent = forward_ad.unpack_dual(case.call(*inputs)).tangent
        assert tangent is not None
        (got,) = torch.autograd.grad((tangent * case.grad).float().sum(), x)
    z = tangents[0].double() @ case.dense.t() + tangents[1].double()
    near(got, (case.grad.double() * case.derivative(2) * z) @ case.dense, form)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_tangent_of_a_gradient(form: str, activation: str) -> None:
    """The graph is older than the level of forward mode."""
    case = problem(form, activation)
    x = case.x.clone().requires_grad_()
    y, tangent = case.call(x, case.bias, case.residual), torch.randn_like(case.grad)

    def gradient(grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    want = (case.derivative(1) * tangent.double()) @ case.dense
    near(dual(gradient, (case.grad,), (tangent,)), want, form)
    _, pullback = torch.func.vjp(lambda x: case.call(x, case.bias, case.residual), case.x)
    near(jvp(lambda g: pullback(g)[0], (case.grad,), (tangent,)), want, form)


@pytest.mark.parametrize("form", TRAINED)
def test_tangents_of_what_is_trained(form: str) -> None:
    case = problem(form)

    def call(*trained: Tensor) -> Tensor:
        weight = case.weight.replace(**dict(zip(TRAINED[form], trained, strict=True)))
        return case.call(*case.inputs, weight)

    given: Any = tuple(getattr(case.weight, name) for name in TRAINED[form])
    tangents = tuple(torch.randn_like(t) for t in given)
    leaves = [t.clone().requires_grad_() for t in given]
    found = torch.autograd.grad(call(*leaves), leaves, case.grad)
    want = sum((g * t).double().sum() for g, t in zip(found, tangents, strict=True))
    for way in (dual, jvp, linearize, compiled_trained):
        got = way(call, given, tangents)
        assert torch.allclose((got * case.grad).double().sum(), want, rtol=1e-4)


def compiled_trained(f: Callable[..., Tensor], inputs: Tangents, tangents: Tangents) -> Tensor:
    return compiled(lambda *args: jvp(f, args[: len(inputs)], args[len(inputs) :]))(  # type: ignore[no-any-return]
        *inputs, *tangents
    )


@pytest.mark.parametrize("form", ["int8", "fp8", "w4_zero"])
def test_a_tangent_of_frozen_storage_is_refused(form: str) -> None:
    case = problem(form)
    scale: Any = case.weight.scale  # type: ignore[attr-defined]
    for way in (dual, jvp):
        with pytest.raises(ValueError, match="scale: expected a tensor that needs no gradient"):
            way(
                lambda s: case.call(*case.inputs, case.weight.replace(scale=s)),
                (scale,),
                (torch.ones_like(scale),),
            )


def test_u8_has_no_tangent() -> None:
    case, qparams = problem("int8_static"), static_qparams(-2.0, 3.0)
    for way in (dual, jvp):
        with pytest.raises(NotImplementedError, match="quantized_linear_u8: forward mode is not"):
            way(
                lambda x: quantized_linear(x, case.weight, y_qparams=qparams),  # type: ignore[arg-type]
                (case.x,),
                (case.x,),
            )


def test_no_tangent_no_change() -> None:
    """Inside a level, of inputs without a tangent."""
    case = problem("dense")
    with forward_ad.dual_level():
        y = case.call(*case.inputs)
        assert forward_ad.unpack_dual(y).tangent is None
    assert isinstance(case.weight, DenseWeight)
    assert torch.allclose(y, case.call(*case.inputs), atol=1e-5)
