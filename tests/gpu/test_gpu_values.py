"""Every op on its device against float64, forward and gradients, at large and ragged shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import fused_grad_norm, fused_linear, fused_sgd, low_rank_linear
from bigops.ops.fused_adamw import reference_norm, reference_sgd
from tests.gpu.conftest import Place
from tests.ops.sparse_linear.test_triton import trained
from tests.support import backends, hostrun
from tests.support.cases import cross_entropy as cross_entropy_cases
from tests.support.cases import linear as linear_cases
from tests.support.cases import low_rank as low_rank_cases
from tests.support.cases.compressed import make as make_compressed
from tests.support.cases.optimizer import Problem
from tests.support.kernels_ran import expect
from tests.support.tolerance import check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def gradients(y: Tensor, leaves: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of the leaves on the CPU, None where there is no leaf."""
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, grad))
    return [None if t is None else next(found).cpu() for t in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "gelu", "swiglu"])
def test_fused_linear(name: str, dtype: str, place: Place) -> None:
    shapes = [(513, 1000, 2003), (16, 4096, 4096)] if place.real else [(35, 20, 33)]
    for m, n, k in shapes:
        case = linear_cases.make(m, n, k, DTYPES[dtype], name)
        leaves = place.put(case.leaves())
        with expect(f"triton.fused_linear.{dtype}", f"triton.fused_linear_backward.{dtype}"):
            y = fused_linear(*leaves, name)
            grads = gradients(y, leaves, place.put(case.grad))
        case.check_forward(y.cpu())
        case.check_gradients(grads)


def test_fused_linear_held_on_the_device(place: Place) -> None:
    """A product too large to hold against float64 on the CPU: all of it on the device."""
    size = place.size(4096, 40)
    case = linear_cases.make(size, size, size, torch.bfloat16, "silu")
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(case)}
    case = linear_cases.Case(**{name: place.put(value) for name, value in fields.items()})
    with expect("triton.fused_linear.bf16"):
        y = fused_linear(*case.inputs, case.name)
    case.check_forward(y)
    broken = y.clone()
    broken[size - 1, size // 2] += 1.0
    with pytest.raises(AssertionError, match="too far"):
        case.check_forward(broken)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "base"), [(16, False), (60, False), (16, True)])
def test_low_rank_linear(rank: int, base: bool, dtype: str, place: Place) -> None:
    m, n, k = (513, 1000, 2003) if place.real else (35, 70, 65)
    case = low_rank_cases.make(m, n, k, rank, DTYPES[dtype], "silu", base=base, scale=0.5)
    leaves = place.put(case.leaves())
    x, u, v, bias, residual, dense = leaves
    with expect(f"triton.low_rank_linear.{dtype}", f"triton.low_rank_linear_backward.{dtype}"):
        y = low_rank_linear(x, u, v, bias, residual, "silu", base=dense, scale=0.5)
        grads = gradients(y, leaves, place.put(case.grad))
    case.check_forward(y.cpu())
    case.check_gradients(grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["int8", "int8_zero", "w4a8", "w8_zero", "w4"])
def test_quantized_linear(form: str, dtype: str, place: Place) -> None:
    m, n, k = (300, 1000, 4096) if place.real else (35, 20, 134)
    case = make_compressed(form, m, n, k, dtype, "gelu")
    weight, inputs = place.put(case.weight), place.put(list(case.inputs))
    with expect(f"triton.quantized_linear.{dtype}"):
        y = dataclasses.replace(case, weight=weight).public(*inputs)
    case.check_forward(y.cpu())


@pytest.mark.parametrize("pattern", ["16x16", "32x32", "16x1"])
@pytest.mark.parametrize(("form", "dtype"), [("sparse_bf16", "bf16"), ("sparse_float", "f32")])
def test_sparse_linear(form: str, dtype: str, pattern: str, place: Place) -> None:
    m, n, k = (300, 1000, 2003) if place.real else (35, 48, 70)
    case = trained(form, m, n, k, dtype, "gelu", pattern=pattern)
    moved = dataclasses.replace(case, weight=place.put(case.weight))
    x, values, bias, residual = place.put(case.leaves())
    op = torch.ops.bigops
    fixed = moved.weight.replace(values=values.detach()).arguments
    with expect(f"triton.sparse_linear.{dtype}", f"triton.sparse_linear_backward.{dtype}"):
        with torch.no_grad():
            y = op.sparse_linear(x, *fixed, bias, residual, case.name)
        needs = (True, True, True)
        grads = op.sparse_linear_backward(
            place.put(case.grad), x.detach(), *fixed, bias.detach(), case.name, *needs
        )
    case.check_forward(y.cpu())
    case.check_gradients([*(g.cpu() for g in grads), case.grad], stored=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_linear_cross_entropy(name: str, dtype: str, place: Place) -> None:
    m, v, k = (513, 32003, 256) if place.real else (5, 33, 9)
    case = cross_entropy_cases.make(m, v, k, DTYPES[dtype], **cross_entropy_cases.ALL[name])
    options = {key: place.put(value) for key, value in case.options.items()}
    moved = cross_entropy_cases.Case(
        *place.put([case.x, case.weight, case.bias, case.target]), options
    )
    leaves = moved.leaves()
    with expect(f"triton.linear_cross_entropy.{dtype}"):
        loss = moved.public()(*leaves)
        grads = gradients(loss, leaves, place.put(case.grad))
    case.check_loss(loss.cpu())
    case.check_gradients(grads)


def _shapes(place: Place) -> list[tuple[int, ...]]:
    return [(1,), (0,), (), (257,), (4099, 1021)] if place.real else [(1,), (0,), (), (257,)]


def _moved(problem: Problem, place: Place) -> Problem:
    for name in ("params", "first", "second", "first_scales", "second_scales", "steps"):
        setattr(problem, name, place.put(getattr(problem, name)))
    return problem


def _same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if mine.dtype == torch.uint8:
            assert torch.equal(mine.cpu(), other)
        else:
            check(mine.cpu(), other.double(), other, other.double().abs() + 1e-2)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_fused_adamw(eight_bit: bool, place: Place) -> None:
    made = (Problem(*DTYPES.values(), shapes=_shapes(place), eight_bit=eight_bit) for _ in "ab")
    ours, theirs = _moved(next(made), place), next(made)
    draw = theirs.grads
    for step in range(2):
        grads = place.put(draw(step))
        ours.grads = lambda _, grads=grads: grads  # type: ignore[method-assign, misc]
        with (
            expect(place.chosen("fused_adamw", ours.params, eight_bit=eight_bit)),
            place.reachable([*ours.all(), *grads]),
        ):
            ours.adamw(step)
        theirs.adamw_reference(step)
    _same(ours.all(), theirs.all())


def test_fused_sgd(place: Place) -> None:
    made = (Problem(*DTYPES.values(), shapes=_shapes(place)) for _ in "ab")
    ours, theirs = _moved(next(made), place), next(made)
    grads = theirs.grads(0)
    there = place.put(grads)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}
    with expect("triton.fused_sgd"), place.reachable([*ours.all(), *there]):
        fused_sgd(ours.params, there, ours.first, **options, nesterov=False, first_step=False)
    for p, g, m in zip(theirs.params, grads, theirs.first, strict=True):
        reference_sgd(p, g, m, None, None, 0.1, 0.9, 0.2, 0.1, False, False, 1.0)
    _same(ours.all(), theirs.all())


def test_fused_grad_norm(place: Place) -> None:
    grads = [torch.randn(shape) for shape in _shapes(place)]
    there = place.put(grads)
    with expect(place.chosen("fused_grad_norm", there)), place.reachable(there):
        norm = fused_grad_norm(there).cpu()
    truth = reference_norm(grads)
    check(norm, truth, truth, truth)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["interpreter"], indirect=True)
def test_where_the_cuda_kernels_are_built_they_are_expected(place: Place) -> None:
    """The steps above as on a GPU where bigops/_cuda was built; these kernels run on the CPU."""
    if hostrun.lacks():
        pytest.skip(hostrun.lacks())
    assert place.chosen("fused_grad_norm", [torch.ones(3)]).startswith("triton.")
    with backends.built("fused_adamw"):
        assert place.chosen("fused_grad_norm", [torch.ones(3)]).startswith("cuda.")
        for eight_bit in (False, True):
            test_fused_adamw(eight_bit, place)
        test_fused_grad_norm(place)
        test_fused_sgd(place)
