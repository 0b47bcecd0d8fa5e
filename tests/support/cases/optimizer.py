"""Parameters, gradients and states that the tests of the optimiser steps share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigops import fused_adamw
from bigops.ops.fused_adamw import reference_adamw, states
from tests.support.kernels_ran import served_by

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
# ragged, empty, 0-dimensional, and past a chunk of 16384
SHAPES = [(1,), (0,), (), (255,), (257,), (7, 11, 13), (130, 129)]
ADAMW = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def level_of(level: str, dtype: str) -> str:
    return "portable" if dtype == "f64" else served_by(level)


def round_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round torch's square roots: of many float32 at once it is off by the last bit now and then.

    The reference is then one of bits, for kernels that round where it rounds.
    """
    root = Tensor.sqrt
    monkeypatch.setattr(Tensor, "sqrt", lambda t: root(t.double()).to(t.dtype))


class Problem:
    """Parameters, gradients and states of one dtype, or of several in turn."""

    def __init__(self, *dtypes: torch.dtype, shapes: Any = SHAPES, eight_bit: bool = False) -> None:
        torch.manual_seed(3)
        self.params = [torch.randn(s).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
        self.eight_bit = eight_bit
        self.first = [self.state(p, 127) for p in self.params]
        self.second = [self.state(p, 0) for p in self.params]
        self.first_scales = [torch.zeros(states.scales_shape(p.shape)) for p in self.params]
        self.second_scales = [torch.zeros(states.scales_shape(p.shape)) for p in self.params]
        self.steps = [torch.zeros(()) for _ in self.params]
        self.options: dict[str, Any] = {}

    def state(self, p: Tensor, zero: int) -> Tensor:
        if self.eight_bit and p.dtype != torch.float64:
            return torch.full(p.shape, zero, dtype=torch.uint8)
        return torch.zeros_like(
            p,
            dtype=torch.float64
            if p.dtype == torch.float64
            else None
            if p.dtype == torch.float32
            else torch.float32,
        )

    def grads(self, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in self.params]

    def adamw(self, step: int, **more: Any) -> None:
        scales = {"exp_avg_scales": self.first_scales, "exp_avg_sq_scales": self.second_scales}
        fused_adamw(
            self.params,
            self.grads(step),
            self.first,
            self.second,
            self.steps,
            **{"lr": 1e-2, **ADAMW, **(scales if self.eight_bit else {}), **more},
        )

    def adamw_reference(self, step: int, streams: bool = False) -> None:
        for i, (p, g) in enumerate(zip(self.params, self.grads(step), strict=True)):
            coded = self.eight_bit and p.dtype != torch.float64 and p.numel() > 0
            reference_adamw(
                p,
                g,
                self.first[i],
                self.second[i],
                self.steps[i],
                self.first_scales[i] if coded else None,
                self.second_scales[i] if coded else None,
                None,
                1e-2,
                *ADAMW["betas"],
                ADAMW["eps"],
                ADAMW["weight_decay"],
                1.0,
                (5, i, step) if streams else None,
            )

    def all(self) -> list[Tensor]:
        return [
            *self.params,
            *self.first,
            *self.second,
            *self.first_scales,
            *self.second_scales,
            *self.steps,
        ]


def same(problem: Problem, reference: Problem) -> None:
    """Hold one problem to the bits of another."""
    for i, (ours, theirs) in enumerate(zip(problem.all(), reference.all(), strict=True)):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), i
