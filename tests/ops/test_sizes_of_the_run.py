"""Calls in a graph whose numbers of rows only the run knows: slices by a number, rows by a mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.config
from torch import Tensor

from bigops.ops.linear_cross_entropy import linear_cross_entropy
from tests.ops.family.problems import ALL, M, N, compiled, hold, problem
from tests.support.backends import covering

MASK = torch.arange(M) % 2 == 0


@pytest.fixture(autouse=True)
def _captured() -> Iterator[None]:
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        yield


def first(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    n = mask.sum().item()
    return [t[:n] for t in tensors]


def selected(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Each by a number of its own."""
    x, *others = tensors
    return [x[mask.nonzero()[:, 0]], *(t[mask] for t in others)]


def mixed(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    x, *others = tensors
    return [*first(mask, x), *(t[mask] for t in others)]


WAYS: dict[str, Callable[..., list[Tensor]]] = {
    way.__name__: way for way in (first, selected, mixed)
}


@pytest.mark.parametrize(("way", "form"), covering(WAYS, ALL))
def test_with_a_residual(way: str, form: str) -> None:
    case = problem(form)

    def f(mask: Tensor, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        x, residual = WAYS[way](mask, x, residual)
        return case.call(x, bias, residual).float().square().sum()

    run = compiled(f)
    for mask in (MASK, ~MASK):
        hold([run(mask, *case.inputs)], [f(mask, *case.inputs)])
    leaves, others = ([t.clone().requires_grad_() for t in case.inputs] for _ in range(2))
    hold(
        torch.autograd.grad(compiled(f)(MASK, *leaves), leaves),
        torch.autograd.grad(f(MASK, *others), others),
    )


@pytest.mark.parametrize(("way", "reduction"), covering(WAYS, ["mean", "sum", "none"]))
def test_the_loss(way: str, reduction: str) -> None:
    torch.manual_seed(0)
    weight, x, target = torch.randn(N, 16), torch.randn(M, 16), torch.randint(N, (M,))

    def f(mask: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        x, own = WAYS[way](mask, x, target)
        return linear_cross_entropy(x, weight, own, reduction=reduction).sum()

    hold([compiled(f)(MASK, x, weight)], [f(MASK, x, weight)])
    leaves, others = ([t.clone().requires_grad_() for t in (x, weight)] for _ in range(2))
    hold(
        torch.autograd.grad(compiled(f)(MASK, *leaves), leaves),
        torch.autograd.grad(f(MASK, *others), others),
    )


def uneven(mask: Tensor, x: Tensor, other: Tensor) -> list[Tensor]:
    return [x[mask], other[~mask]]


@pytest.mark.parametrize("form", ALL)
def test_sizes_that_do_not_fit_are_said_by_the_run(form: str) -> None:
    case = problem(form)

    def f(mask: Tensor, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        x, residual = uneven(mask, x, residual)
        return case.call(x, bias, residual)

    with pytest.raises((RuntimeError, ValueError), match="residual: expected"):
        compiled(f)(MASK, *case.inputs)


def test_targets_that_do_not_fit_are_said_by_the_run() -> None:
    x, weight, target = torch.randn(M, 16), torch.randn(N, 16), torch.zeros(M, dtype=torch.int64)

    def f(mask: Tensor) -> Any:
        x_own, target_own = uneven(mask, x, target)
        return linear_cross_entropy(x_own, weight, target_own)

    with pytest.raises(ValueError, match="target: expected shape"):
        compiled(f)(MASK)
