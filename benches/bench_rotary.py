"""Rotary embeddings of q against torch, eager and compiled: as transformers writes them.

x is the view of q that a merged projection leaves; M is tokens, K columns of a head, N those that
turn.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import bigops
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, EAGER, OWN, Case, Side
from bigops.benches.limits import Cost
from bigops.ops.rotary import reference

SHAPES = (  # name, batch, heads, tokens, columns, columns that turn
    ("overhead", 1, 1, 1, 16, 16),
    ("decode", 1, 9, 1, 64, 64),
    ("prefill", 1, 9, 64, 64, 64),
    ("prefill", 1, 9, 256, 64, 64),
    ("prefill", 1, 32, 512, 128, 128),
    ("partial", 1, 32, 256, 80, 32),
)


def cases() -> list[Case]:
    """A step of decoding, SmolLM-135M's q, Llama's, and Phi-2's, of which a part turns."""
    return [
        Case(
            "rotary",
            name,
            tokens,
            columns,
            turning,
            dtype,
            params={"batch": batch, "heads": heads},
            quick=name == "overhead" or tokens == 64,
        )
        for dtype in ("fp32", "bf16")
        for name, batch, heads, tokens, columns, turning in SHAPES
    ]


def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As a user writes it."""
    r = cos.shape[-1]
    v, rest = x[..., :r], x[..., r:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = v * cos + torch.cat((-v[..., r // 2 :], v[..., : r // 2]), dim=-1) * sin
    return y if r == x.shape[-1] else torch.cat((y, rest), dim=-1)


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, d = DTYPES[case.dtype], case.k
    batch, heads = (int(case.params[name]) for name in ("batch", "heads"))
    merged = torch.randn(batch, case.m, 3 * heads * d, device=device).to(dtype)
    x = merged[..., : heads * d].unflatten(-1, (heads, d)).transpose(1, 2)
    angle = torch.rand(1, case.m, case.n // 2, device=device).repeat(1, 1, 2) * 6.28
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    cost = Cost(case.dtype, 0.0, 2.0 * x.element_size() * x.numel())
    truth = reference(x.double(), cos.double(), sin.double())
    call: Callable[..., Tensor] = lambda f: f(x, cos, sin)  # noqa: E731
    return [truth.cpu()], [
        Side(OWN, lambda: bigops.rotary(x, cos, sin), cost),
        Side(EAGER, lambda: eager(x, cos, sin), cost, "aten"),
        rivals.compiled_side(eager, call, cost),
    ]


def test_rotary(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
