"""Optimiser steps at the ends of float32: gradients whose squares overflow, vanish or are mixed.

torch's own AdamW takes (1 - beta2) * g first: gradients up to 5e20 leave the second
moment finite, where g * g is inf from 1.9e19 on and freezes the parameter for good. The Triton
kernel squares a 32nd of g.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import fused_adamw
from bigops.train import SGD, AdamW
from tests.support import tolerance
from tests.support.backends import CPU, HOSTRUN, REFERENCE, TRITON, Way, covering, reachable
from tests.support.cases.optimizer import DTYPES, Problem
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import leaves, same, snapshot

pytestmark = needs_extension
LARGE = [1.0, -3e19, 1e20, -5e20, 1.8e19, 1e-3, 0.0, 2.5e20]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def gradient(values: list[float], shape: Any = (300,)) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.tensor(values).repeat(count // len(values) + 1)[:count].reshape(shape)


def torchs(make: Callable[..., Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    held = [p.detach().clone().requires_grad_() for p in params]
    optimizer = make(held)
    for p, g in zip(held, grads, strict=True):
        p.grad = g.to(p.dtype)
    optimizer.step()
    return [p.detach() for p in held]


# one step, on every kernel ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "form"),
    covering([REFERENCE, *CPU, HOSTRUN, TRITON], ["f32", "bf16", "f16", "8bit"]),
    ids=str,
)
def test_a_step_on_huge_gradients_is_torchs(way: Way, form: str) -> None:
    """The gradient is huge by itself, and of float16 by the factor that unscales it."""
    dtype = DTYPES.get(form, torch.float32)
    factor = 1e17 if form == "f16" else 1.0
    grad = (gradient(LARGE) / factor).to(dtype)
    problem = Problem(dtype, shapes=[(300,)], eight_bit=form == "8bit")
    start = problem.params[0].clone()
    scales = {"exp_avg_scales": problem.first_scales, "exp_avg_sq_scales": problem.second_scales}
    with way.serving("fused_adamw"), reachable(way, [*problem.all(), grad]):
        fused_adamw(
            problem.params,
            [grad],
            problem.first,
            problem.second,
            problem.steps,
            lr=0.1,
            weight_decay=0.0,
            grad_factor=factor,
            **(scales if form == "8bit" else {}),
        )
    make = lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)  # noqa: E731
    unscaled = grad.double() * factor
    truth = torchs(make, [start.double()], [unscaled])[0]
    plain = torchs(make, [start.float()], [unscaled])[0].to(dtype)
    tolerance.check(problem.params[0], truth, plain, truth.abs() + 0.1)
    moved = (problem.params[0].double() - start.double()).abs()
    assert bool((moved[grad != 0] > 0.05).all())
    assert all(bool(t.float().isfinite().all()) for t in problem.all())


def test_the_second_moment_ends_where_torchs_does() -> None:
    """Past 5.8e20 it is inf in torch, too; nothing is hidden there."""
    ends = {}
    for make in (AdamW, torch.optim.AdamW):
        param = torch.ones(4, requires_grad=True)
        optimizer = make([param])
        param.grad = torch.tensor([5.7e20, 5.9e20, 1e-22, 1e-30])
        optimizer.step()
        ends[make] = optimizer.state[param]["exp_avg_sq"]
    assert ends[AdamW].isinf().tolist() == [False, True, False, False]
    assert torch.equal(ends[AdamW].isinf(), ends[torch.optim.AdamW].isinf())
    assert torch.equal(ends[AdamW] == 0, ends[torch.optim.AdamW] == 0)  # both underflow


# the optimisers over many steps -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("first", [1e20, 3e19, 1e-30, 1e-22])
def test_a_parameter_goes_on_after_one_strange_gradient(name: str, first: float) -> None:
    options = {"lr": 1e-2, "weight_decay": 0.0} if name == "AdamW" else {"lr": 1e-25}
    ours = AdamW if name == "AdamW" else SGD
    theirs = getattr(torch.optim, name)

    def way(make: Callable[..., Any], dtype: torch.dtype) -> Tensor:
        param = torch.ones(5, dtype=dtype, requires_grad=True)
        optimizer = make([param], **options)
        for step in range(30):
            param.grad = torch.full_like(param, first if step == 0 else 0.5 + step)
            optimizer.step()
        return param.detach()

    truth = way(theirs, torch.float64)
    tolerance.check(way(ours, torch.float32), truth, way(theirs, torch.float32), truth.abs() + 0.3)


@pytest.mark.parametrize("form", [{}, {"eight_bit": True}], ids=str)
def test_a_block_of_8_bit_states_goes_on_after_a_huge_gradient(form: dict[str, bool]) -> None:
    param = torch.ones(4096, requires_grad=True)
    optimizer = AdamW([param], lr=1e-2, weight_decay=0.0, **form)
    for step in range(3):
        param.grad = torch.ones(4096)
        if step == 0:
            param.grad[7] = 1e20
        before = param.detach().clone()
        optimizer.step()
        assert bool(param.isfinite().all())
        assert float(param.detach()[7]) < float(before[7])
        assert bool((param.detach()[256:] < before[256:]).all())  # the other blocks
    assert all(bool(t.isfinite().all()) for t in optimizer.state[param].values())


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_masters_take_accumulated_gradients_at_the_end_of_the_range(dtype: str) -> None:
    """65504 is float16's largest number; a loss scale below 1 brings it past float32's root."""
    param = torch.ones(64, dtype=DTYPES[dtype], requires_grad=True)
    optimizer = AdamW([param], lr=1e-2, weight_decay=0.0, master_weights=True)
    param.grad = torch.full_like(param, 65504.0)
    assert optimizer.step_checked(inv_scale=2.0**50)
    state = optimizer.state[param]
    assert bool(state["exp_avg_sq"].isfinite().all())
    want = 1 - 1e-2
    tolerance.check(state["master"], torch.full((64,), want).double(), torch.full((64,), want), 1.0)


# the checked step -------------------------------------------------------------------------------


def mixed() -> list[Tensor]:
    """Parameters of all dtypes with gradients of their own dtypes, of which two are empty."""
    kinds = list(DTYPES.values())
    params = leaves(shapes=[(70, 90), (90,), (), (0,), (3, 4, 5), (2, 0, 3)])
    params = [p.detach().to(kinds[i % 4]).requires_grad_() for i, p in enumerate(params)]
    for i, p in enumerate(params):
        p.grad = gradient([0.5, -2.0, 3.0], p.shape).to(p.dtype) * (i + 1)
    return params


@pytest.mark.parametrize("make", [AdamW, SGD])
@pytest.mark.parametrize("clip_norm", [None, 0.5, 1e9])
def test_clipping_counts_gradients_of_all_dtypes_once(make: Any, clip_norm: float | None) -> None:
    params, theirs = mixed(), mixed()
    optimizer = make(params, lr=1e-2, stochastic_rounding=False)
    other = getattr(torch.optim, make.__name__)([t.detach().double() for t in theirs], lr=1e-2)
    wide = other.param_groups[0]["params"]
    for w, t in zip(wide, theirs, strict=True):
        w.grad = t.grad.double() * 0.25  # type: ignore[union-attr]
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(wide, clip_norm)
    other.step()
    assert optimizer.step_checked(inv_scale=0.25, clip_norm=clip_norm)
    for p, w in zip(params, wide, strict=True):
        tolerance.check(p, w, w.to(p.dtype), w.abs() + 1.0)


def test_only_empty_gradients_are_a_step() -> None:
    params = leaves(shapes=[(0,), (2, 0, 3)])
    for p in params:
        p.grad = torch.zeros_like(p)
    for make in (AdamW, SGD):
        assert make(params).step_checked(inv_scale=2.0, clip_norm=1e-3)


def test_gradients_that_unscale_past_float32_are_no_step() -> None:
    """Finite themselves, times inv_scale they would be inf in every kernel."""
    params = leaves()
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.full_like(p, 1e30)
    before = snapshot(params, optimizer)
    assert not optimizer.step_checked(inv_scale=2.0**60)
    assert not optimizer.step_checked(inv_scale=1e38)
    assert same(snapshot(params, optimizer), before)
    assert optimizer.step_checked(inv_scale=2.0**60, clip_norm=1.0)  # clipped they are small
    assert all(bool(p.isfinite().all()) for p in params)
    doubles = [p.detach().double().requires_grad_() for p in params]
    for p in doubles:
        p.grad = torch.full_like(p, 1e30)
    assert AdamW(doubles).step_checked(inv_scale=2.0**60)  # float64 holds them


@pytest.mark.parametrize("value", [1e39, float("inf"), float("nan"), 0.0, -1.0])
def test_factors_that_float32_cannot_hold_are_refused(value: float) -> None:
    params = leaves()
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    before = snapshot(params, optimizer)
    with pytest.raises(ValueError, match="inv_scale: expected a number above 0 that float32 holds"):
        optimizer.step_checked(inv_scale=value)
    if value not in (0.0, -1.0):
        with pytest.raises(ValueError, match="grad_factor: expected a number that float32 holds"):
            optimizer.step(grad_factor=value)
    assert same(snapshot(params, optimizer), before)
