"""fused_adamw, fused_sgd, fused_grad_norm: values on every instruction set, layouts, determinism.

Paths and errors are in test_paths.py, 8-bit codes and random bits in test_states.py, the optimisers
on top in tests/optim/test_optimizers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import fused_adamw, fused_grad_norm, fused_sgd
from bigops.ops.fused_adamw import reference_norm, reference_sgd
from tests.support import tolerance
from tests.support.backends import CPU, HOSTRUN, REFERENCE, TRITON, Way, covering, reachable
from tests.support.cases.optimizer import ADAMW, DTYPES, SHAPES, Problem, level_of
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, threads

FORMS = ("nearest", "stochastic", "8bit")
pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests this small only wait for each other's threads; the tests of threads set their own."""
    with threads(1):
        yield


def trajectory(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], dtype: torch.dtype, steps: int
) -> list[Tensor]:
    """What torch's optimiser makes of the problem's parameters and gradients."""
    problem = Problem(dtype)
    leaves = [p.double() if dtype == torch.float64 else p for p in problem.params]
    leaves = [p.clone().requires_grad_() for p in leaves]
    optimizer = make(leaves)
    for step in range(steps):
        for leaf, grad in zip(leaves, problem.grads(step), strict=True):
            leaf.grad = grad.to(leaf.dtype)
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


def trajectory64(make: Callable[[list[Tensor]], Any], dtype: torch.dtype, steps: int) -> Any:
    """The same in float64 from the same, already rounded numbers."""
    problem = Problem(dtype)
    leaves = [p.double().requires_grad_() for p in problem.params]
    optimizer = make(leaves)
    for step in range(steps):
        for leaf, grad in zip(leaves, problem.grads(step), strict=True):
            leaf.grad = grad.double()
        optimizer.step()
    return [leaf.detach() for leaf in leaves]


def hold(out: list[Tensor], ref64: list[Tensor], plain: list[Tensor], moved: float) -> None:
    """The one rule for parameters; ``moved`` bounds the way that they went."""
    for o, r, p in zip(out, ref64, plain, strict=True):
        tolerance.check(o, r, p, r.abs() + moved)


# values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("maximize", [False, True])
def test_adamw_follows_torch_over_many_steps(dtype: str, level: str, maximize: bool) -> None:
    steps = 60

    def make(leaves: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(leaves, lr=1e-2, maximize=maximize, fused=True, **ADAMW)

    problem = Problem(DTYPES[dtype])
    with isa(level), expect(f"cpu.{level_of(level, dtype)}.fused_adamw.{dtype}.fused"):
        for step in range(steps):
            problem.adamw(step, maximize=maximize)
    plain = trajectory(make, DTYPES[dtype], steps)
    ref64 = trajectory64(make, DTYPES[dtype], steps)
    hold(problem.params, ref64, plain, steps * 1e-2)
    assert [float(s) for s in problem.steps] == [steps] * len(SHAPES)
    problem.params[-1][5, 7] += 1e-4  # a wrong result fails
    with pytest.raises(AssertionError, match="too far"):
        hold(problem.params, ref64, plain, steps * 1e-2)


SGD = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "maximize": True},
    "momentum": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True},
}


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("name", SGD)
def test_sgd_follows_torch_over_many_steps(dtype: str, level: str, name: str) -> None:
    steps = 30

    def make(leaves: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(leaves, lr=1e-2, fused=True, **SGD[name])

    problem = Problem(DTYPES[dtype])
    buffers = problem.first if "momentum" in SGD[name] else []
    with isa(level), expect(f"cpu.{level_of(level, dtype)}.fused_sgd.{dtype}.fused"):
        for step in range(steps):
            fused_sgd(
                problem.params,
                problem.grads(step),
                buffers,
                lr=1e-2,
                first_step=step == 0,
                **SGD[name],
            )
    plain = trajectory(make, DTYPES[dtype], steps)
    ref64 = trajectory64(make, DTYPES[dtype], steps)
    hold(problem.params, ref64, plain, steps * 1e-2 * 10)


@pytest.mark.parametrize(
    ("way", "dtype", "form"),
    [(way, dtype, form) for way in (REFERENCE, *CPU) for dtype in DTYPES for form in FORMS]
    + covering([TRITON], [dtype for dtype in DTYPES if dtype != "f64"], FORMS)
    + covering([HOSTRUN], [dtype for dtype in DTYPES if dtype != "f64"], FORMS),
    ids=str,
)
def test_every_dtype_follows_the_reference(way: Way, dtype: str, form: str) -> None:
    """One step from each point of the reference's way, so that codes do not drift apart."""
    eight_bit = form == "8bit"
    end = "8bit" if eight_bit and dtype != "f64" else "fused"
    source = "cuda" if way is HOSTRUN else way.name
    kernel = f"{source}.fused_adamw.{dtype}.{end}"
    if way.name == "cpu":
        kernel = f"cpu.{level_of(way.level, dtype)}.fused_adamw.{dtype}.{end}"
    slow = way in (TRITON, HOSTRUN)
    shapes = [*SHAPES[:-1], (70, 67)] if slow else SHAPES
    theirs = Problem(DTYPES[dtype], shapes=shapes, eight_bit=eight_bit)
    for step in range(2 if slow else 4):
        ours = Problem(DTYPES[dtype], shapes=shapes, eight_bit=eight_bit)
        for mine, other in zip(ours.all(), theirs.all(), strict=True):
            mine.copy_(other)
        streams = list(range(len(SHAPES))) if form == "stochastic" else []
        grads = ours.grads(step)
        ours.grads = lambda _, grads=grads: grads  # type: ignore[method-assign,misc]
        with way.serving("fused_adamw", kernel), reachable(way, [*ours.all(), *grads]):
            ours.adamw(step, streams=streams, seed=5, rounding_step=step)
        theirs.adamw_reference(step, streams=form == "stochastic")
        for mine, other in zip(ours.all(), theirs.all(), strict=True):
            if mine.dtype == torch.uint8:  # where rounding decides, the code beside it is as good
                apart = (mine.int() - other.int()).abs()
                assert not (apart > 1).any()
                assert int(apart.sum()) <= 0.01 * apart.numel()
                continue
            tolerance.check(mine, other.double(), other, other.double().abs() + 1e-2)


@pytest.mark.parametrize("way", [REFERENCE, *CPU, TRITON], ids=str)
@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("name", SGD)
def test_sgd_follows_the_reference(way: Way, name: str, first_step: bool) -> None:
    """Parameters of three dtypes in one call."""
    options = {
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        **SGD[name],
    }
    mixed, shapes = [DTYPES[d] for d in ("f32", "bf16", "f16")], [*SHAPES[:-1], (70, 67)]
    ours, theirs = (Problem(*mixed, shapes=shapes) for _ in range(2))
    grads = ours.grads(0)
    buffers = ours.first if options["momentum"] else []
    with way.serving("fused_sgd"), reachable(way, [*ours.all(), *grads]):
        fused_sgd(ours.params, grads, buffers, lr=0.1, first_step=first_step, **options)
    maximize = options.pop("maximize")
    for p, g, m in zip(theirs.params, grads, theirs.first, strict=True):
        buffer = m if options["momentum"] else None
        reference_sgd(
            p, g, buffer, None, None, 0.1, *options.values(), first_step, -1.0 if maximize else 1.0
        )
    for mine, other in zip(ours.all(), theirs.all(), strict=True):
        tolerance.check(mine, other.double(), other, other.double().abs() + 1e-2)


@pytest.mark.parametrize("way", [REFERENCE, *CPU, TRITON, HOSTRUN], ids=str)
def test_the_norm_of_mixed_gradients(way: Way) -> None:
    dtypes = [DTYPES[d] for d in ("f32", "bf16", "f16")]
    grads = [torch.randn(s).to(dtypes[i % 3]) for i, s in enumerate([*SHAPES[:-1], (70, 67)])]
    grads += [torch.full((3,), 1e30), torch.randn(5, dtype=torch.float64)]
    with way.serving("fused_grad_norm"), reachable(way, grads):
        norm = fused_grad_norm(grads)
        grads[3][7] = float("inf")
        assert fused_grad_norm(grads).isinf()
    grads[3][7] = 0
    truth = reference_norm(grads)
    tolerance.check(fused_grad_norm(grads), truth, truth, truth)
    assert norm.dtype == torch.float64


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_one_step_of_16_bit_parameters_against_float64(dtype: str) -> None:
    def make(leaves: list[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(leaves, lr=1e-2, **ADAMW)

    problem = Problem(DTYPES[dtype])
    problem.adamw(0)
    plain = [p.to(DTYPES[dtype]) for p in trajectory64(make, DTYPES[dtype], 1)]
    hold(problem.params, trajectory64(make, DTYPES[dtype], 1), plain, 1e-2)


def test_mixed_dtypes_in_one_call_are_those_of_single_calls() -> None:
    mixed = Problem(*DTYPES.values())
    with expect(*(f"fused_adamw.{d}." for d in DTYPES)):
        mixed.adamw(0)
    for i in range(len(SHAPES)):
        alone = Problem(*DTYPES.values())
        one = [[t[i]] for t in (alone.params, alone.grads(0), alone.first, alone.second)]
        fused_adamw(*one, [alone.steps[i]], lr=1e-2, **ADAMW)  # type: ignore[misc]
        assert torch.equal(mixed.params[i], alone.params[i])


@pytest.mark.parametrize("copy", ["bf16", "f16"])
@pytest.mark.parametrize("grad", ["f32", "bf16", "f16"])
def test_masters_take_16_bit_gradients_and_write_copies(copy: str, grad: str) -> None:
    problem, same = Problem(torch.float32), Problem(torch.float32)
    grads = [g.to(DTYPES[grad]) for g in problem.grads(0)]
    copies = [torch.empty(p.shape, dtype=DTYPES[copy]) for p in problem.params]
    copies[3] = torch.empty(0)  # none of this one
    fused_adamw(
        problem.params, grads, problem.first, problem.second, problem.steps, lr=0.1, copies=copies
    )
    fused_adamw(
        same.params, [g.float() for g in grads], same.first, same.second, same.steps, lr=0.1
    )
    for i, (p, q) in enumerate(zip(problem.params, same.params, strict=True)):
        tolerance.check(p, q.double(), q, q.double().abs() + 0.1)
        if i != 3:
            assert torch.equal(copies[i], p.to(DTYPES[copy]))


def test_grad_factor_scales_the_gradients() -> None:
    a, b = Problem(torch.float32), Problem(torch.float32)
    grads = a.grads(0)
    fused_sgd(a.params, grads, lr=0.1, grad_factor=0.125)
    fused_sgd(b.params, [g * 0.125 for g in grads], lr=0.1)
    assert all(torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True))
    assert all(torch.equal(g, h) for g, h in zip(grads, a.grads(0), strict=True))


# norm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(level: str, dtype: str) -> None:
    grads = Problem(DTYPES[dtype]).grads(1)
    with isa(level), expect(f"cpu.{level_of(level, dtype)}.fused_grad_norm.{dtype}.double"):
        norm = fused_grad_norm(grads)
    want = torch.cat([g.reshape(-1).double() for g in grads]).norm()
    tolerance.check(norm, want, want, want)
    assert norm.dtype == torch.float64


def test_norm_of_large_gradients_is_finite() -> None:
    assert float(fused_grad_norm([torch.full((3,), 3e38)])) == pytest.approx(3**0.5 * 3e38)
    assert float(fused_grad_norm([])) == 0
    assert float(fused_grad_norm([torch.empty(0)])) == 0


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 254, 16769])
def test_norm_sees_every_bad_element(value: float, dtype: str, at: int) -> None:
    grads = Problem(DTYPES[dtype]).grads(1)
    assert bool(fused_grad_norm(grads).isfinite())
    grads[3 if at == 254 else 6].view(-1)[at] = value
    assert not bool(fused_grad_norm(grads).isfinite())


# determinism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_same_bits_from_run_to_run(eight_bit: bool) -> None:
    """At every thread count and instruction set; across them the other tests hold the values."""
    shapes = [(300, 301), (5,), (70001,), (1 << 15,)]
    for count, level in [(1, ISAS[-1]), (5, ISAS[-1]), *((2, i) for i in ISAS)]:
        results = []
        for _ in range(2):
            with threads(count), isa(level):
                kinds = (torch.float32, torch.bfloat16)
                problem = Problem(*kinds, shapes=shapes, eight_bit=eight_bit)
                for step in range(3):
                    problem.adamw(step, streams=[4, 5, 6, 7], seed=9, rounding_step=step)
                results.append([*problem.all(), fused_grad_norm(problem.grads(9))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# layouts -------------------------------------------------------------------------------------


def layouts() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "transposed": lambda t: t.t().contiguous().t(),
        "sliced": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "contiguous": lambda t: t,
    }


@pytest.mark.parametrize("param", layouts())
@pytest.mark.parametrize("grad", layouts())
@pytest.mark.parametrize("eight_bit", [False, True])
def test_any_strides(param: str, grad: str, eight_bit: bool) -> None:
    make = layouts()
    plain = Problem(torch.float32, shapes=[(37, 41)], eight_bit=eight_bit)
    strided = Problem(torch.float32, shapes=[(37, 41)], eight_bit=eight_bit)
    strided.params = [make[param](p.clone()) for p in strided.params]
    if not eight_bit:
        strided.first = [make[param](m.clone()) for m in strided.first]
    copies = [make[param](torch.zeros(37, 41, dtype=torch.bfloat16))]
    scales = {
        "exp_avg_scales": strided.first_scales,
        "exp_avg_sq_scales": strided.second_scales,
    }
    for step in range(2):
        plain.adamw(step)
        grads = [make[grad](g) for g in plain.grads(step)]
        fused_adamw(
            strided.params,
            grads,
            strided.first,
            strided.second,
            strided.steps,
            lr=1e-2,
            copies=copies,
            **ADAMW,
            **(scales if eight_bit else {}),
        )
    for a, b in zip(plain.all(), strided.all(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(copies[0], plain.params[0].bfloat16())
    assert torch.equal(fused_grad_norm(grads), fused_grad_norm([make[grad](grads[0])]))
