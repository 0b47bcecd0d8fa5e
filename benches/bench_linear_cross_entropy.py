"""linear_cross_entropy against linear and cross_entropy: eager, compiled, and torch's own pair.

`fraction_of_limit` is against the products alone: three of 2 M K V operations for the gradients, at
the measured peak. What each side allocates goes to stderr, as a part of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.benches import memory, rivals, rivals_cuda
from bigops.benches.harness import DTYPES, OWN, Case, LeftOut, Side, optional_side, say_once
from bigops.benches.limits import Cost

Loss = Callable[..., Tensor]


def cases() -> list[Case]:
    """Overhead, the losses of a small classifier, a small and a GPT-2-like one in training."""

    def case(
        name: str, m: int, k: int, v: int, dtype: str = "fp32", *, quick: bool = False
    ) -> Case:
        forward = name in ("overhead", "layer")
        direction = "forward" if forward else "forward+backward"
        return Case("linear_cross_entropy", name, m, k, v, dtype, direction, quick=quick)

    return [
        case("overhead", 8, 8, 8, quick=True),
        case("layer", 256, 768, 8192),
        case("layer", 256, 768, 8192, "bf16"),
        case("small", 512, 512, 8192, quick=True),
        case("small", 512, 512, 8192, "bf16"),
        case("classifier", 2048, 768, 32000),
        case("classifier", 2048, 768, 32000, "bf16"),
    ]


def eager(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    """As a user writes it."""
    return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)


def own(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    return bigops.linear_cross_entropy(x, weight, target, reduction=reduction)


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, learns = DTYPES[case.dtype], case.direction != "forward"
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    weight = (torch.randn(case.n, case.k, device=device) * case.k**-0.5).to(dtype)
    target = torch.randint(0, case.n, (case.m,), device=device)
    reduction = "mean" if learns else "none"
    passes = 3 if learns else 1
    nbytes = float(x.element_size() * passes * (weight.numel() + x.numel()))
    cost = Cost(case.dtype, 2.0 * case.m * case.k * case.n * passes, nbytes)
    wide = [x.double().cpu(), weight.double().cpu()]
    if learns:
        x.requires_grad_()
        weight.requires_grad_()
        wide = [t.requires_grad_() for t in wide]

    def run(loss: Loss, inputs: Sequence[Tensor]) -> list[Tensor]:
        value = loss(*inputs, target.to(inputs[0].device), reduction)
        return list(torch.autograd.grad(value, inputs)) if learns else [value]

    def call(loss: Loss) -> Callable[[], Tensor | list[Tensor]]:
        if learns:
            return lambda: run(loss, (x, weight))
        return lambda: loss(x, weight, target, reduction)

    sides = [
        Side(OWN, call(own), cost),
        Side("eager", call(eager), cost, "aten"),
        rivals.compiled_side(eager, lambda f: call(f)(), cost),
    ]
    for name in ("torch linear_cross_entropy", "torch chunked"):
        optional_side(sides, torch_side, name, call, cost)
    if device != "cpu":
        optional_side(sides, rivals_cuda.liger, call, cost)
    if learns and device == "cpu":
        report_memory(case, sides, own, (x, weight, target, reduction))
    return run(eager, wide), sides


def torch_side(
    name: str, call: Callable[[Loss], Callable[[], Tensor | list[Tensor]]], cost: Cost
) -> Side:
    """torch's own op (2.13 and up): its reference path, or the tokens in chunks.

    Raises:
        LeftOut: this torch has none.
    """
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise LeftOut(f"{name}: torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions() if name == "torch chunked" else None  # type: ignore[attr-defined]

    def loss(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
        return function(x, weight, target, reduction=reduction, options=options)  # type: ignore[no-any-return]

    return Side(name, call(loss), cost, "aten")


def report_memory(
    case: Case, sides: Sequence[Side], loss: Loss, inputs: tuple[Tensor, Tensor, Tensor, str]
) -> None:
    """Say what each side holds beyond the gradients, and ours beyond its accumulator, too."""
    logits = case.m * case.n * inputs[0].element_size()
    shares = []
    for side in sides:
        try:
            use = memory.measure(side.call)
        except Exception as failure:  # `run_case` says why a provider is left out
            shares.append(f"{side.provider} failed ({failure!s:.80})")
            continue
        shares.append(f"{side.provider} {use.working / logits:.1%}")
    # Until the backward pass the loss keeps its gradients, that of a 16-bit weight in float32.
    forward = memory.measure(lambda: loss(*inputs))
    say_once(
        f"{case.id}: held beyond the gradients, as a part of the logits: {', '.join(shares)}; "
        f"{OWN} beyond gradients and fp32 accumulator {forward.working / logits:.1%}"
    )


def test_linear_cross_entropy(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
