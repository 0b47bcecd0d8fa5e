"""What a call keeps for its backward pass, and what may be done with its result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bigops.ops.fused_linear import fused_linear
from bigops.ops.low_rank_linear import low_rank_linear
from tests.ops.family.problems import ALL, Problem, hold, problem

LEARNS = {"x": (1, 0, 0), "bias": (0, 1, 0), "residual": (0, 0, 1), "x and bias": (1, 1, 0)}


def leaves_of(case: Problem, learns: str) -> list[Tensor]:
    flags = map(bool, LEARNS[learns])
    return [t.clone().requires_grad_(f) for t, f in zip(case.inputs, flags, strict=True)]


def kept_of(call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The result of a call, and what it saved."""
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return call(), kept


def shares(t: Tensor, x: Tensor) -> bool:
    return t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() or t.shape == x.shape


def by_public(case: Problem, *inputs: Tensor) -> Tensor:
    return case.call(*inputs)


def by_raw(case: Problem, *inputs: Tensor) -> Tensor:
    x, bias, residual = inputs
    return case.op._words(x, *case.weight.arguments, bias, residual, case.activation)  # type: ignore[no-any-return]


WAYS = {"public": by_public, "raw": by_raw}


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("way", WAYS)
def test_a_frozen_weight_without_activation_keeps_nothing_of_x(way: str, form: str) -> None:
    case = problem(form, "none")
    for learns in LEARNS:
        leaves = leaves_of(case, learns)
        y, kept = kept_of(lambda leaves=leaves: WAYS[way](case, *leaves))  # type: ignore[misc]
        assert not any(shares(t, leaves[0]) for t in kept), learns
        wanted = [t for t in leaves if t.requires_grad]
        every = [t.clone().requires_grad_() for t in case.inputs]
        found = torch.autograd.grad(case.call(*every), every, case.grad)
        named = zip(found, LEARNS[learns], strict=True)
        hold(torch.autograd.grad(y, wanted, case.grad), [g for g, asked in named if asked])


@pytest.mark.parametrize("form", ALL)
def test_where_the_residual_alone_learns_nothing_is_kept(form: str) -> None:
    case = problem(form)
    _, kept = kept_of(lambda: case.call(*leaves_of(case, "residual")))
    assert not kept


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("form", ALL)
def test_x_may_be_an_inference_tensor_where_it_does_not_learn(form: str, activation: str) -> None:
    case = problem(form, activation)
    with torch.inference_mode():
        x = case.x.clone()
    for learns in ("bias", "residual"):
        _, *rest = leaves_of(case, learns)
        (leaf,) = (t for t in rest if t.requires_grad)
        (got,) = torch.autograd.grad(case.call(x, *rest), leaf, case.grad)
        every = [t.clone().requires_grad_() for t in case.inputs]
        found = torch.autograd.grad(case.call(*every), every, case.grad)
        hold([got], [found[1 if learns == "bias" else 2]])


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("learns", LEARNS)
@pytest.mark.parametrize("form", ALL)
def test_gradients_are_differentiable_again(form: str, learns: str, activation: str) -> None:
    """By the incoming gradient always, by the inputs behind an activation."""
    case = problem(form, activation)
    leaves = leaves_of(case, learns)
    wanted = [t for t in leaves if t.requires_grad]
    grad = case.grad.clone().requires_grad_()
    weights = [torch.randn_like(t) for t in wanted]
    first = torch.autograd.grad(case.call(*leaves), wanted, grad, create_graph=True)
    total = sum((g * w).float().sum() for g, w in zip(first, weights, strict=True))
    assert isinstance(total, Tensor)
    slope, dense = case.derivative(1), case.dense
    named = dict(zip([i for i, asked in enumerate(LEARNS[learns]) if asked], weights, strict=True))
    z = torch.zeros(case.grad.shape, dtype=torch.float64)
    if 0 in named:
        z = z + named[0].double() @ dense.t()
    if 1 in named:
        z = z + named[1].double()
    by_grad = slope * z + (named[2].double() if 2 in named else 0)
    second = [t for t in wanted if t is not leaves[2]] if activation == "gelu" else []
    got = torch.autograd.grad(total, [grad, *second])
    by_z = case.grad.double() * case.derivative(2) * z
    want = [by_grad, *(by_z @ dense if t is leaves[0] else by_z.sum(0) for t in second)]
    hold(got, [w.to(case.grad.dtype) for w in want])


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("shape", [[7], [3, 5], [2, 196], [2, 3, 5]])
def test_a_result_in_training_may_be_written_in_place(form: str, shape: list[int]) -> None:
    case = problem(form, "none")
    k, n = case.x.shape[-1], case.residual.shape[-1]
    x = torch.randn(*shape, k).to(case.x.dtype).requires_grad_()
    y = case.call(x, case.bias, None)  # type: ignore[arg-type]
    want = y.detach() + 1
    y += 1
    y[..., 0].mul_(2)
    want[..., 0] *= 2
    assert torch.equal(y, want)
    grad = torch.randn(*shape, n).to(y.dtype)
    (got,) = torch.autograd.grad(y, x, grad)
    factors = torch.ones(n, dtype=torch.float64)
    factors[0] = 2
    hold([got], [((grad * factors) @ case.dense).to(got.dtype)])


def test_a_large_result_in_training_may_be_written_in_place() -> None:
    """Where another library's product serves."""
    x, w = torch.randn(4, 196, 256, requires_grad=True), torch.randn(256, 256, requires_grad=True)
    u, v = torch.randn(256, 16, requires_grad=True), torch.randn(16, 256, requires_grad=True)
    raw, frozen = torch.ops.bigops.fused_linear, w.detach()
    for y in (
        fused_linear(x, w),
        fused_linear(x, frozen),
        low_rank_linear(x, u, v),
        raw(x, w, None, None, "none"),
        raw(x, frozen, None, None, "none"),
    ):
        assert not y._is_view()
        y += 1
        y.sum().backward()


@pytest.mark.parametrize("form", ALL)
def test_channels_last_gives_the_strides_of_a_linear_layer(form: str) -> None:
    case = problem(form)
    k = case.x.shape[-1]
    plain = torch.randn(2, 3, 4, k).to(case.x.dtype)
    for x in (
        plain.to(memory_format=torch.channels_last),
        plain.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1),
    ):
        want = torch.nn.functional.linear(x, case.dense.to(x.dtype))
        got = case.call(x, case.bias, None)  # type: ignore[arg-type]
        assert got.stride() == want.stride()
        assert torch.equal(got, case.call(plain, case.bias, None))  # type: ignore[arg-type]
