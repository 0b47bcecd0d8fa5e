"""What is the Triton kernels' own in the optimiser steps: mixed lists in one launch, tables.

Their values of each dtype, of SGD and of the norm are in test_values.py.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from bigops import fused_adamw
from bigops.ops.fused_adamw import choose, reference, states
from tests.support import triton_interpreter
from tests.support.cases.optimizer import Problem
from tests.support.kernels_ran import expect
from tests.support.tolerance import check

triton_interpreter.install()
module = sys.modules["bigops.ops.fused_adamw"]
assert fused_adamw

SHAPES = [(1,), (0,), (), (255,), (257,), (7, 11, 13), (70, 67)]
MIXED = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops as a GPU takes them."""
    monkeypatch.setattr(module, "step_adamw", choose.adamw)
    monkeypatch.setattr(module, "step_sgd", choose.sgd)
    monkeypatch.setattr(module, "norm_op", choose.norm)


def same(problem: Problem, reference: Problem) -> None:
    for ours, theirs in zip(problem.all(), reference.all(), strict=True):
        if ours.dtype == torch.uint8:
            assert torch.equal(ours, theirs)
        else:
            check(ours, theirs.double(), theirs, theirs.double().abs() + 1e-2)


def run(problem: Problem, step: int, **more: Any) -> None:
    grads = [problem.grads(step)]
    problem.grads = lambda _: grads[0]  # type: ignore[method-assign]
    with triton_interpreter.reachable([*problem.all(), *grads[0], *more.get("copies", ())]):
        problem.adamw(step, **more)
    del problem.grads  # type: ignore[method-assign]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("eight_bit", [False, True])
def test_adamw_is_the_reference(eight_bit: bool, streams: bool) -> None:
    ours, theirs = (Problem(*MIXED, shapes=SHAPES, eight_bit=eight_bit) for _ in range(2))
    for step in range(2):
        random = {"streams": range(len(SHAPES)), "seed": 5, "rounding_step": step}
        with expect("triton.fused_adamw.bf16." + ("8bit" if eight_bit else "fused")):
            run(ours, step, **(random if streams else {}))
        theirs.adamw_reference(step, streams)
    same(ours, theirs)


def test_adamw_writes_copies_and_maximizes() -> None:
    ours, theirs = (Problem(torch.float32, shapes=SHAPES) for _ in range(2))
    copies = [torch.empty_like(p, dtype=torch.bfloat16) for p in ours.params]
    run(ours, 0, copies=copies, maximize=True, grad_factor=-1.0)
    theirs.adamw_reference(0)
    same(ours, theirs)
    assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, ours.params, strict=True))


def test_buckets_find_the_nearest_value() -> None:
    """By table as by search, at random magnitudes and at every middle and its neighbours."""
    for signed in (True, False):
        half = torch.tensor(states._magnitudes(1 if signed else 2), dtype=torch.float64).float()
        middles = states._middles(half)
        q = torch.cat([torch.rand(1000), middles, middles.nextafter(torch.tensor(2.0))])
        bits, table = q.view(torch.int32), states.buckets(signed)
        found = table[((bits >> 16) - ((127 - 22) << 7)).clamp(-1, 22 * 128 - 1) + 1]
        index = (found & 0xFF) + (bits > (found & -256)).int()
        assert torch.equal(index.long(), torch.bucketize(q, middles))


def test_float64_takes_the_reference() -> None:
    cpu, dtypes = torch.device("cpu"), (torch.float32, torch.float64)
    for op in ("fused_adamw", "fused_sgd"):
        assert choose.choose(op, dtypes, cpu) == (reference, "no Triton kernel for float64")


def test_perturbed_result_fails() -> None:
    ours, theirs = (Problem(torch.float32, shapes=[(300,)]) for _ in range(2))
    run(ours, 0, grad_factor=1.001)
    theirs.adamw_reference(0)
    with pytest.raises(AssertionError, match="too far"):
        same(ours, theirs)
