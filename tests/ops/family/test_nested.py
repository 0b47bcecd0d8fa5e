"""Nested tensors: those of the jagged layout pass through by their values, others are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigops.ops.linear_cross_entropy import linear_cross_entropy
from tests.ops.family.problems import ALL, N, compiled, hold, problem

OFFSETS = torch.tensor([0, 2, 2, 5])


def jagged(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(values, offsets)


@pytest.mark.parametrize("form", ALL)
def test_values_pass_through(form: str) -> None:
    case = problem(form)
    bias = case.bias.clone().requires_grad_()
    x, residual = (t.clone().requires_grad_() for t in (case.x, case.residual))
    nested = jagged(x, OFFSETS)
    y = case.call(nested, bias, jagged(residual, nested.offsets()))
    assert y.is_nested
    assert torch.equal(y.values(), case.call(*case.inputs))
    assert torch.equal((y + y).offsets(), OFFSETS)
    found = torch.autograd.grad((y.values() * case.grad).float().sum(), (x, bias, residual))
    hold(found, case.gradients(*case.inputs))
    with torch.no_grad():
        assert torch.equal(case.call(nested, bias, None).values(), case.call(x, bias, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ALL)
def test_rows_of_the_strided_layout(form: str) -> None:
    """As `nn.TransformerEncoder` makes them of a padding mask."""
    case = problem(form)
    x = case.x.clone().requires_grad_()
    y = case.call(torch.nested.as_nested_tensor(list(x.split([2, 3]))), case.bias, None)  # type: ignore[arg-type]
    assert y.is_nested
    assert torch.equal(torch.cat(y.unbind()), case.call(x, case.bias, None))  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(sum(row.float().sum() for row in y.unbind()), x)
    (want,) = torch.autograd.grad(case.call(x, case.bias, None).float().sum(), x)  # type: ignore[arg-type]
    assert torch.equal(found, want)


@pytest.mark.parametrize("form", ["dense", "int8", "24"])
def test_compiled(form: str) -> None:
    case = problem(form)

    def f(values: Tensor) -> Tensor:
        return case.call(jagged(values, OFFSETS), case.bias, None).values()  # type: ignore[arg-type]

    assert torch.equal(compiled(f)(case.x), f(case.x))
    nested = jagged(case.x, OFFSETS)
    g = lambda x: case.call(x, case.bias, None)  # type: ignore[arg-type]  # noqa: E731
    assert torch.equal(compiled(g)(nested).values(), f(case.x))


@pytest.mark.parametrize("form", ALL)
def test_what_is_refused(form: str) -> None:
    case = problem(form)
    strided = torch.nested.as_nested_tensor(list(case.x.split([2, 3])))
    with pytest.raises(TypeError, match=r"x: expected a nested tensor of the jagged layout beside"):
        case.call(strided, case.bias, case.residual)
    uneven = torch.nested.as_nested_tensor([case.x[:2, 1:], case.x[:2]])
    with pytest.raises(ValueError, match=r"x: expected at least one row, and the second dimension"):
        case.call(uneven, case.bias, None)  # type: ignore[arg-type]
    nested = jagged(case.x, OFFSETS)
    with pytest.raises(ValueError, match="residual: expected a tensor with the offsets of x"):
        case.call(nested, case.bias, jagged(case.residual, OFFSETS.clone()))
    with pytest.raises(ValueError, match="residual: expected a tensor with the offsets of x"):
        case.call(nested, case.bias, case.residual)
    with pytest.raises(TypeError, match="residual: expected a dense tensor; got a nested one"):
        case.call(case.x, case.bias, jagged(case.residual, OFFSETS))
    with pytest.raises(ValueError, match=r"x: expected shape \[.., 36\]"):
        case.call(jagged(case.x[:, 1:], OFFSETS), case.bias, None)  # type: ignore[arg-type]
    flat = jagged(case.x[:, 0].contiguous(), OFFSETS)
    with pytest.raises(ValueError, match="x: expected the second of at least 3 dimensions"):
        case.call(flat, case.bias, None)  # type: ignore[arg-type]


def test_the_loss_refuses_by_name() -> None:
    x, weight = torch.randn(5, 8), torch.randn(N, 8)
    target = torch.zeros(5, dtype=torch.int64)
    for nested in (jagged(x, OFFSETS), torch.nested.as_nested_tensor([x[:2], x[2:]])):
        with pytest.raises(TypeError, match="x: expected a dense tensor; got a nested one"):
            linear_cross_entropy(nested, weight, target)
    with pytest.raises(TypeError, match="target: expected a dense tensor; got a nested one"):
        linear_cross_entropy(x, weight, jagged(target, OFFSETS))
