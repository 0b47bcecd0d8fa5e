"""The AdamW step against torch's: the loop, foreach, fused; with clipping; with 8-bit states.

A case is a transformer: m layers of width k with n hidden units, and an embedding of
``params["vocab"]`` rows. "clip" adds what a loss scale and clipping need: the look for inf, the
norm, the unscaling; on a GPU also with norm, clipping and the count of steps on the device, where
nothing waits for the host. A call changes its parameters; only the first is held against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigops import fused_adamw, fused_grad_norm, train
from bigops.benches.harness import EAGER, OWN, Case, Side, say_once
from bigops.benches.limits import Cost

LR = 1e-3
CLIP_NORM = 1.0


def cases() -> list[Case]:
    """Two small layers, and BERT's sizes at width 512: 50 million parameters, from DRAM."""

    def pair(name: str, form: str, quick: bool = False) -> Case:
        small = name == "layers"
        size = (2, 256, 1024) if small else (11, 512, 2048)
        params: dict[str, Any] = {"form": form, "vocab": 0 if small else 30522}
        return Case(
            "fused_adamw",
            f"{name}-{form}",
            *size,
            direction="step",
            params=params,
            rotate=not small,
            quick=quick,
        )

    forms = ("step", "clip", "8bit")
    return [pair(n, f, n == "layers") for n in ("layers", "bert") for f in forms]


def shapes(case: Case) -> list[tuple[int, ...]]:
    """The parameters of the transformer, the largest first."""
    k, n = case.k, case.n
    vocab = int(case.params["vocab"])
    head: list[tuple[int, ...]] = [(vocab, k), (512, k), (k,), (k,)] if vocab else []
    layer: list[tuple[int, ...]] = [(n, k), (k, n), (n,), (k,)]
    layer += [(k, k)] * 4 + [(k,)] * 8  # attention; two norms
    return head + layer * case.m


class _Problem:
    """Parameters with gradients of their own, the same for every side."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)

        def tensor(shape: tuple[int, ...], scale: float) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

        self.params = []
        for shape in shapes(case):
            param = nn.Parameter(tensor(shape, 0.02), requires_grad=True)
            param.grad = tensor(shape, 1e-3)
            self.params.append(param)


def _clipped(
    problem: _Problem, optimizer: torch.optim.Optimizer, device: str
) -> Callable[[], Tensor]:
    """What GradScaler.unscale_, clip_grad_norm_ and its look for inf do before the step."""
    grads = [p.grad for p in problem.params if p.grad is not None]
    found, one = torch.zeros(1, device=device), torch.ones((), device=device)

    def call() -> Tensor:
        found.zero_()
        # a scale of 1: the call is repeated, and 1/1024 each time would end in subnormals
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, one)
        nn.utils.clip_grad_norm_(problem.params, CLIP_NORM)
        if not found.item():
            optimizer.step()
        return problem.params[0].detach()

    return call


def on_device(case: Case, device: str) -> Callable[[], Tensor]:
    """The clipped step by the ops themselves, steps beside the parameters."""
    problem = _Problem(case, device)
    params = [p.detach() for p in problem.params]
    grads = [p.grad for p in problem.params if p.grad is not None]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    steps = [torch.zeros((), device=device) for _ in params]

    def call() -> Tensor:
        norm = fused_grad_norm(grads)
        fused_adamw(params, grads, first, second, steps, lr=LR, norm=norm, clip_norm=CLIP_NORM)
        return params[0]

    return call


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The largest parameter after one step in float64, and the sides that make it."""
    form = str(case.params["form"])
    numel = sum(math.prod(shape) for shape in shapes(case))
    read_and_written = 2.0 * 3 * 4 + 4  # parameter and two moments both ways, the gradient once
    clip = form == "clip"
    plain_cost = Cost("fp32", 14.0 * numel, read_and_written * numel)
    own_cost = Cost("fp32", 16.0 * numel, (read_and_written + 4) * numel) if clip else plain_cost

    def truth(clipped: bool) -> list[Tensor]:
        wide = _Problem(case, "cpu", torch.float64)
        if clipped:
            nn.utils.clip_grad_norm_(wide.params, CLIP_NORM)
        torch.optim.AdamW(wide.params[:1], lr=LR).step()
        return [wide.params[0].detach()]

    def own(eight_bit: bool) -> tuple[Callable[[], Tensor], train.AdamW]:
        problem = _Problem(case, device)
        optimizer = train.AdamW(problem.params, lr=LR, eight_bit=eight_bit)

        def call() -> Tensor:
            if clip:
                optimizer.step_checked(clip_norm=CLIP_NORM)
            else:
                optimizer.step()
            return problem.params[0].detach()

        return call, optimizer

    def torchs(**options: Any) -> Callable[[], Tensor]:
        problem = _Problem(case, device)
        optimizer = torch.optim.AdamW(problem.params, lr=LR, **options)

        def call() -> Tensor:
            optimizer.step()
            return problem.params[0].detach()

        return call

    if clip:
        problem = _Problem(case, device)
        fused = torch.optim.AdamW(problem.params, lr=LR, fused=True)
        eager = _clipped(problem, fused, device)
        sides = [
            Side(OWN, own(False)[0], own_cost),
            Side(EAGER, eager, plain_cost, "unscale+clip+fused"),
            Side("torch fused", torchs(fused=True), plain_cost, "no clip", reference=truth(False)),
        ]
        if device != "cpu":
            sides.append(Side(f"{OWN} on the device", on_device(case, device), own_cost))
        return truth(True), sides
    if form == "8bit":
        coded, optimizer = own(True)

        def call() -> Tensor:
            fresh, result = not optimizer.state, coded()
            if fresh:  # float32 states are two times 4 bytes
                ratio = optimizer.state_bytes() / (8 * numel)
                say_once(f"{case.id}: states take {ratio:.3f} of the bytes of float32 ones")
            return result

        moved = 2.0 * (4 + 2 * (1 + 4 / 256)) + 4
        sides = [
            Side(f"{OWN} 8bit", call, Cost("fp32", 40.0 * numel, moved * numel)),
            Side(OWN, own(False)[0], plain_cost),
            Side(EAGER, torchs(fused=True), plain_cost, "fused"),
        ]
        return truth(False), sides
    sides = [
        Side(OWN, own(False)[0], plain_cost),
        Side(EAGER, torchs(foreach=False), plain_cost, "loop"),
        Side("torch foreach", torchs(foreach=True), plain_cost, "foreach"),
        Side("torch fused", torchs(fused=True), plain_cost, "fused"),
    ]
    return truth(False), sides


def test_fused_adamw(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
