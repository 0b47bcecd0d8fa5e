"""attention against torch's scaled_dot_product_attention, eager and compiled: inference of a layer.

q, k and v are the views that a merged projection leaves. ``name`` is prefill, of sequences as
models of sentences have them and up to where torch's own takes over; or decode, one query over a
cache. M is queries, N keys, K columns of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side
from bigops.benches.limits import Cost
from bigops.ops.attention import reference

CPU_ONLY = "attention: torch's own serves on a GPU"


class Shape(NamedTuple):
    """Of a call."""

    name: str
    batch: int
    heads: int  # of q
    groups: int  # heads of k and v
    t: int
    s: int
    d: int


SHAPES = (
    Shape("overhead", 1, 1, 1, 8, 8, 16),
    Shape("prefill", 1, 12, 12, 32, 32, 32),
    Shape("prefill", 8, 12, 12, 64, 64, 32),
    Shape("prefill", 8, 12, 12, 128, 128, 64),
    Shape("prefill", 1, 12, 12, 197, 197, 64),
    Shape("prefill", 1, 9, 3, 256, 256, 64),
    Shape("prefill", 1, 12, 12, 1024, 1024, 64),
    Shape("prefill", 1, 12, 12, 2048, 2048, 64),
    Shape("decode", 1, 12, 12, 1, 512, 64),
    Shape("decode", 1, 9, 3, 1, 2048, 64),
)


def cases() -> list[Case]:
    """Ten shapes in three dtypes, most of them with and without key padding."""
    return [
        Case(
            "attention",
            f"{shape.name}-{shape.batch}x{shape.heads}-{mask}",
            shape.t,
            shape.d,
            shape.s,
            dtype,
            params={
                "batch": shape.batch,
                "heads": shape.heads,
                "groups": shape.groups,
                "mask": mask,
            },
            quick=shape.name == "overhead" or (shape.batch, shape.t) == (8, 64),
        )
        for dtype in ("fp32", "bf16", "fp16")
        for shape in SHAPES
        for mask in (("none",) if shape.name == "overhead" else ("none", "padding"))
    ]


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As a user writes it, to the input of the next product."""
    y = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return bigops.attention(q, k, v, mask).transpose(1, 2).flatten(2)


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, d = DTYPES[case.dtype], case.k
    batch, heads, groups = (int(case.params[name]) for name in ("batch", "heads", "groups"))
    if case.m == case.n:
        merged = torch.randn(batch, case.m, (heads + 2 * groups) * d, device=device).to(dtype)
        q, k, v = merged.split([heads * d, groups * d, groups * d], -1)
    else:
        q = torch.randn(batch, case.m, heads * d, device=device).to(dtype)
        k, v = (torch.randn(batch, case.n, groups * d, device=device).to(dtype) for _ in range(2))
    q, k, v = (t.unflatten(-1, (-1, d)).transpose(1, 2) for t in (q, k, v))
    mask = None
    if case.params["mask"] == "padding":
        mask = torch.ones(batch, 1, 1, case.n, dtype=torch.bool, device=device)
        mask[..., case.n * 7 // 8 :] = False
    unit = "fp32" if case.dtype == "fp16" else case.dtype
    moved = float(q.element_size() * (2 * q.numel() + k.numel() + v.numel()))
    cost = Cost(unit, 4.0 * batch * heads * case.m * case.n * d, moved)
    truth = reference(q.double(), k.double(), v.double(), mask).transpose(1, 2).flatten(2)
    call: Callable[..., Tensor] = lambda f: f(q, k, v, mask)  # noqa: E731
    return [truth.cpu()], [
        Side(OWN, lambda: own(q, k, v, mask), cost),
        Side("eager", lambda: eager(q, k, v, mask), cost, "aten"),
        rivals.compiled_side(eager, call, cost),
    ]


def test_attention(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
