"""fused_adamw, fused_sgd, fused_grad_norm: the raw op, compiled, exported; what they refuse.

A step has no gradient, so the paths are those of the step itself.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops import backend, fused_adamw, fused_grad_norm, fused_sgd
from bigops.backend import machine
from bigops.ops.fused_adamw import AdamWStep, reference
from tests.support import tolerance
from tests.support.cases.optimizer import ADAMW, DTYPES, Problem
from tests.support.kernels_ran import expect, needs_extension

pytestmark = needs_extension


def raw_arguments(problem: Problem, grads: list[Tensor]) -> tuple[Any, ...]:
    return (
        problem.params,
        grads,
        problem.first,
        problem.second,
        problem.steps,
        problem.first_scales if problem.eight_bit else [],
        problem.second_scales if problem.eight_bit else [],
        [],
        1e-2,
        *ADAMW["betas"],
        ADAMW["eps"],
        ADAMW["weight_decay"],
        True,
        False,
        1.0,
        [],
        0,
        0,
        [],
        [],
        [],
    )


@pytest.mark.parametrize("eight_bit", [False, True])
def test_raw_op_and_compiled_are_the_eager_step(eight_bit: bool) -> None:
    shapes = [(300,), (7, 11)]
    eager, raw, compiled = (
        Problem(torch.float32, shapes=shapes, eight_bit=eight_bit) for _ in range(3)
    )
    torch.compiler.reset()

    def step(problem: Problem, grads: list[Tensor]) -> Tensor:
        scales = {
            "exp_avg_scales": problem.first_scales,
            "exp_avg_sq_scales": problem.second_scales,
        }
        fused_adamw(
            problem.params,
            grads,
            problem.first,
            problem.second,
            problem.steps,
            lr=1e-2,
            **ADAMW,
            **(scales if eight_bit else {}),
        )
        return fused_grad_norm(grads)

    graph = torch.compile(step, fullgraph=True, backend="aot_eager")
    for i in range(2):
        eager.adamw(i)
        torch.ops.bigops.fused_adamw(*raw_arguments(raw, raw.grads(i)))
        with expect("fused_adamw.f32"):
            norm = graph(compiled, compiled.grads(i))
        assert torch.equal(norm, fused_grad_norm(eager.grads(i)))
    for a, b, c in zip(eager.all(), raw.all(), compiled.all(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_exported() -> None:
    class Step(torch.nn.Module):
        def forward(self, p: Tensor, g: Tensor, m: Tensor, v: Tensor, s: Tensor) -> Tensor:
            fused_adamw([p], [g], [m], [v], [s], lr=1e-2)
            return fused_grad_norm([g])

    def fresh() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.randn(50), torch.randn(50), torch.zeros(50), torch.zeros(50), torch.zeros(())

    a, b = fresh(), fresh()
    program = torch.export.export(Step(), fresh())
    with expect("fused_adamw.f32"):
        norm = program.module()(*a)
    assert torch.equal(norm, Step()(*b))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_opcheck(eight_bit: bool) -> None:
    problem = Problem(torch.float32, shapes=[(300,), (4, 5)], eight_bit=eight_bit)
    torch.library.opcheck(torch.ops.bigops.fused_adamw, raw_arguments(problem, problem.grads(0)))
    sgd = (
        [torch.randn(30)],
        [torch.randn(30)],
        [torch.randn(30)],
        [],
        [],
        0.1,
        0.9,
        0.0,
        0.0,
        False,
        False,
        False,
        1.0,
        [],
        0,
        0,
        [],
        [],
        [],
    )
    torch.library.opcheck(torch.ops.bigops.fused_sgd, sgd)
    torch.library.opcheck(torch.ops.bigops.fused_grad_norm, ([torch.randn(30), torch.randn(2, 3)],))


def test_a_stale_graph_is_caught() -> None:
    for op in ("adamw", "sgd"):
        weight = torch.randn(4, 4, requires_grad=True)
        y = (torch.randn(2, 4, requires_grad=True) @ weight).square().sum()
        grads, m, v = [torch.randn(4, 4)], [torch.zeros(4, 4)], [torch.zeros(4, 4)]
        copy = torch.zeros(4, 4, dtype=torch.bfloat16)
        before = [t._version for t in (weight, m[0], v[0], copy)]
        if op == "adamw":
            fused_adamw([weight], grads, m, v, [torch.zeros(())], lr=0.1, copies=[copy])
            assert v[0]._version > before[2]
        else:
            fused_sgd([weight], grads, m, lr=0.1, momentum=0.9, copies=[copy])
        assert weight._version > before[0]
        assert m[0]._version > before[1]
        assert copy._version > before[3]
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_it_refuses_to_be_differentiated() -> None:
    problem = Problem(torch.float32, shapes=[(3,)])
    problem.params[0].requires_grad_()
    with pytest.raises(RuntimeError, match="fused_adamw: expected a call under torch.no_grad"):
        torch.ops.bigops.fused_adamw(*raw_arguments(problem, problem.grads(0)))
    grad = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="fused_grad_norm: expected a call under"):
        torch.ops.bigops.fused_grad_norm([grad])
    assert not fused_grad_norm([grad]).requires_grad


# errors --------------------------------------------------------------------------------------


def call(problem: Problem, **more: Any) -> None:
    arguments = {
        "params": problem.params,
        "grads": problem.grads(0),
        "exp_avgs": problem.first,
        "exp_avg_sqs": problem.second,
        "steps": problem.steps,
        "lr": 1e-2,
        **more,
    }
    fused_adamw(**arguments)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few": ({"grads": [torch.ones(3)]}, ValueError, "grads: expected 2 tensors"),
    "shape": (
        {"grads": [torch.ones(3), torch.ones(5)]},
        ValueError,
        r"grads\[1\]: expected shape \[4\]; got \[5\]",
    ),
    "sparse": (
        {"grads": [torch.ones(3), torch.ones(4).to_sparse()]},
        ValueError,
        r"grads\[1\]: expected a dense tensor; got layout torch.sparse_coo",
    ),
    "integer": ({"params": [torch.ones(3).int()] * 2}, TypeError, r"params\[0\]: expected dtype"),
    "no tensor": ({"grads": [torch.ones(3), 4.0]}, TypeError, r"grads\[1\]: expected a torch.T"),
    "double": (
        {"grads": [torch.ones(3), torch.ones(4).double()]},
        TypeError,
        r"grads\[1\]: expected dtype float64 where",
    ),
    "state dtype": (
        {"exp_avgs": [torch.ones(3), torch.ones(4).half()]},
        TypeError,
        r"exp_avgs\[1\]: expected dtype float32; got float16",
    ),
    "no scales": (
        {"exp_avgs": [torch.ones(3).byte(), torch.ones(4).byte()]},
        ValueError,
        "scales of exp_avgs: expected one tensor",
    ),
    "device": (
        {"grads": [torch.ones(3), torch.ones(4, device="meta")]},
        ValueError,
        r"grads\[1\]: expected device cpu; got meta",
    ),
    "devices": (
        {k: [torch.ones(3), torch.ones(4, device="meta")] for k in ("params", "grads")},
        ValueError,
        r"params\[1\]: expected device cpu; got meta",
    ),
    "steps": ({"steps": [torch.ones(2)] * 2}, ValueError, r"steps\[0\]: expected one element"),
    "copies": (
        {"copies": [torch.ones(3), torch.ones(4)]},
        TypeError,
        r"copies\[0\]: expected dtype bfloat16, float16; got float32",
    ),
    "streams": ({"streams": [1]}, ValueError, "streams: expected none or 2; got 1"),
    "places": ({"places": [(0, 3, 3)]}, ValueError, "places: expected none or 2; got 1"),
    "a run": (
        {"places": [(0, 3, 3), (8, 3, 8)]},
        ValueError,
        r"places\[1\]: expected first, run and stride of 4 elements in whole runs; got \(8, 3, 8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments_change_nothing(name: str) -> None:
    problem = Problem(torch.float32, shapes=[(3,), (4,)])
    before = [t.clone() for t in problem.all()]
    more, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        call(problem, **more)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.all(), strict=True))
    call(problem)
    assert not torch.equal(before[0], problem.params[0])


@pytest.mark.parametrize(
    ("position", "value", "match"),
    [
        (1, [torch.ones(3)], "grads: expected 2 tensors"),
        (1, [torch.ones(3), torch.ones(5)], r"grads\[1\]: expected the parameter's shape"),
        (2, [torch.ones(3), torch.ones(4).half()], r"exp_avgs\[1\]: expected dtype f32; got f16"),
        (2, [torch.ones(3), torch.ones(4).byte()], "scales: expected one tensor"),
        (4, [torch.ones(()), torch.ones(2)], r"steps\[1\]: expected one element"),
        (7, [torch.ones(3), torch.ones(4)], r"copies\[0\]: expected dtype bf16 or f16; got f32"),
        (16, [1], "streams, firsts, runs, strides: expected none, or one for each"),
        (19, [0], "streams, firsts, runs, strides: expected none, or one for each"),
        (20, [3, 4], "firsts, runs, strides: expected all of them or none"),
    ],
)
def test_the_kernel_checks_again(position: int, value: Any, match: str) -> None:
    problem = Problem(torch.float32, shapes=[(3,), (4,)])
    before = [t.clone() for t in problem.all()]
    arguments = list(raw_arguments(problem, problem.grads(0)))
    arguments[position] = value
    with pytest.raises(RuntimeError, match=match):
        torch.ops.bigops.fused_adamw(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.all(), strict=True))


def test_explain_names_the_kernel_that_runs() -> None:
    for dtype in DTYPES.values():
        problem = Problem(dtype, shapes=[(5,)])
        with backend.record() as names:
            problem.adamw(0)
        assert bigops.explain("fused_adamw", problem.params).kernel == names[0]
    said = bigops.explain("fused_sgd", [torch.ones(2)], device="sm_90")
    if machine.has_triton():
        assert said.kernel == "triton.fused_sgd.f32.fused"
        if not torch.cuda.is_available():  # as of every op with Triton kernels
            with pytest.raises(ValueError, match="torch sees no GPU here"):
                bigops.explain("fused_sgd", [torch.ones(2)], device="cuda")


def test_the_reference_serves_other_devices_and_says_so() -> None:
    """The composite key, called as a device without a kernel would."""
    ours, theirs = (Problem(torch.float32, shapes=[(300,)], eight_bit=True) for _ in range(2))
    ours.adamw(0)
    with backend.record() as names:
        reference.adamw(AdamWStep(*raw_arguments(theirs, theirs.grads(0))))
    assert names == ["reference.fused_adamw"]
    for a, b in zip(ours.all(), theirs.all(), strict=True):
        if a.dtype == torch.uint8:
            assert torch.equal(a, b)
        else:
            tolerance.check(a, b.double(), b, b.double().abs() + 1e-2)
