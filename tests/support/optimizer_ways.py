"""Optimisers beside torch's and the ways that they take: what the tests of bigops.train share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigops.train import SGD, Adam, AdamW

SHAPES = [(70, 90), (90,), (), (0,), (3, 4, 5)]
PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adamw": (
        lambda p, **o: AdamW(p, lr=1e-2, **o),
        lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    ),
    "adam": (
        lambda p, **o: Adam(p, lr=1e-2, weight_decay=0.1, **o),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, fused=True),
    ),
    "sgd": (lambda p, **o: SGD(p, lr=1e-2, **o), lambda p: torch.optim.SGD(p, lr=1e-2, fused=True)),
    "momentum": (
        lambda p, **o: SGD(p, lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1, **o),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.2, weight_decay=0.1),
    ),
}
OWN = {name: own for name, (own, _) in PAIRS.items()}


def leaves(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def give_gradients(params: list[Tensor], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def run(
    make: Callable[..., Any], steps: int, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[Tensor], Any]:
    params = leaves(dtype)
    optimizer = make(params, **options)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return [p.detach() for p in params], optimizer


def in_float64(
    make: Callable[..., Any], steps: int, clip_norm: float | None = None
) -> list[Tensor]:
    params = [p.detach().double().requires_grad_() for p in leaves()]
    optimizer = make(params)
    for step in range(steps):
        singles = leaves()
        give_gradients(singles, step)
        for p, single in zip(params, singles, strict=True):
            assert single.grad is not None
            p.grad = single.grad.double()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(params, clip_norm)
        optimizer.step()
    return [p.detach() for p in params]


def snapshot(params: list[Tensor], optimizer: torch.optim.Optimizer) -> list[Any]:
    states = [dict(optimizer.state[p]) for p in params if p in optimizer.state]
    counters = [(g.get("seed"), g.get("rounding_step")) for g in optimizer.param_groups]
    return copy.deepcopy([[p.detach().clone() for p in params], states, counters])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
