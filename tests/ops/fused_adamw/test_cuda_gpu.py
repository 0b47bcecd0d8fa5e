"""The optimiser kernels of csrc/cuda (fused_adamw) on a GPU: what steps on the CPU give."""

from __future__ import annotations

import math

import pytest
import torch

from bigops import fused_grad_norm
from bigops.backend import machine
from tests.support.cases.optimizer import Problem, round_roots
from tests.support.kernels_ran import expect
from tests.support.tolerance import check

MIXED = (torch.float32, torch.bfloat16, torch.float16)
# Ragged against blocks of 256, and past a chunk of 8192.
SHAPES = [(1,), (0,), (), (255,), (257,), (7, 11, 13), (70, 127)]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def to_gpu(problem: Problem) -> None:
    for name in ("params", "first", "second", "first_scales", "second_scales", "steps"):
        setattr(problem, name, [t.cuda() for t in getattr(problem, name)])


class TestOnAGpu:
    @pytest.fixture(autouse=True)
    def _roots(self, monkeypatch: pytest.MonkeyPatch) -> None:
        round_roots(monkeypatch)

    @pytest.mark.parametrize("eight_bit", [False, True], ids=["full", "8bit"])
    def test_steps_in_a_graph(self, eight_bit: bool) -> None:
        """Norm, clipping and step captured once and replayed: what steps on the CPU give.

        8-bit states, which no size of the step enters, by their codes; there nothing is clipped, so
        that no last bit of a norm chooses another code.
        """
        clip = math.inf if eight_bit else 100.0
        shapes = [*SHAPES, (1000, 1001)]
        ours, theirs = (Problem(*MIXED, shapes=shapes, eight_bit=eight_bit) for _ in range(2))
        to_gpu(ours)
        grads = [torch.zeros_like(p) for p in ours.params]
        ours.grads = lambda step: grads  # type: ignore[method-assign]
        before = [t.clone() for t in ours.all()]

        def step() -> None:
            ours.adamw(0, norm=fused_grad_norm(grads), clip_norm=clip)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), expect("cuda.fused_adamw.", "cuda.fused_grad_norm."):
            step()
        torch.cuda.synchronize()
        for t, old in zip(ours.all(), before, strict=True):
            t.copy_(old)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for i in range(3):
            for g, new in zip(grads, theirs.grads(i), strict=True):
                g.copy_(new)
            graph.replay()
            if eight_bit:
                theirs.adamw_reference(i)
            else:
                theirs.adamw(i, norm=fused_grad_norm(theirs.grads(i)), clip_norm=clip)
        grads[-1].fill_(math.inf)
        kept = [t.clone() for t in ours.all()]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(ours.all(), kept, strict=True))
        for got, want in zip(ours.all(), theirs.all(), strict=True):
            if got.dtype != torch.uint8:
                check(got.cpu(), want.double(), want, want.double().abs() + 1e-2)
            else:
                assert torch.equal(got.cpu(), want)

    def test_steps_counted_on_the_cpu(self) -> None:
        ours, theirs = (Problem(*MIXED, shapes=SHAPES) for _ in range(2))
        to_gpu(ours)
        ours.steps = [t.cpu() for t in ours.steps]
        given = ours.grads
        ours.grads = lambda step: [g.cuda() for g in given(step)]  # type: ignore[method-assign]
        for step in range(2):
            with expect("cuda.fused_adamw."):
                ours.adamw(step)
            theirs.adamw(step)
        for got, want in zip(ours.all(), theirs.all(), strict=True):
            check(got.cpu(), want.double(), want, want.double().abs() + 1e-2)
