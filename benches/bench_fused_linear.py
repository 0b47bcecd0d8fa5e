"""fused_linear against eager torch, torch.compile and all dense rivals, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops.benches import families, rivals
from bigops.benches.harness import DTYPES, OWN, Case, Side, clones, in_turn
from bigops.benches.limits import Cost

_GATED = tuple(rivals.GATED)


def cases() -> list[Case]:
    """Overhead on a tiny layer, the demo's layers, a transformer's, and 4096x4096 from DRAM."""

    def case(name: str, m: int, k: int, n: int, dtype: str = "fp32", **more: Any) -> Case:
        params = {"activation": more.pop("activation", "gelu"), "bias": more.pop("bias", True)}
        if more.pop("residual", False):
            params["residual"] = True
        return Case("fused_linear", name, m, k, n, dtype, params=params, **more)

    both = ("fp32", "bf16")
    found = [
        case("overhead", 8, 8, 8, activation="relu", quick=True),
        case("overhead", 8, 8, 8, activation="relu", direction="forward+graph", quick=True),
    ]
    for dtype in both:
        found += [
            case("mlp", 64, 784, 2048, dtype, activation="relu", quick=True),
            case("ffn", 16, 768, 3072, dtype, quick=dtype == "fp32"),
            case("ffn", 128, 768, 3072, dtype, direction="forward+backward", quick=dtype == "fp32"),
            case("residual", 128, 3072, 768, dtype, activation="none", residual=True),
            case("gated", 128, 768, 2048, dtype, activation="swiglu", quick=dtype == "fp32"),
            case("gated", 128, 768, 2048, dtype, activation="swiglu", direction="forward+backward"),
        ]
        found += [
            case("square", m, 4096, 4096, dtype, activation="none", bias=False, rotate=True)
            for m in (1, 16, 64, 256)
        ]
    found.append(case("ffn", 16, 768, 3072, "fp16"))
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, activation = DTYPES[case.dtype], str(case.params["activation"])
    rows = 2 * case.n if activation in _GATED else case.n
    learns = case.direction != "forward"

    def tensor(*shape: int, scale: float = 1.0) -> Tensor:
        value = (torch.randn(*shape, device=device) * scale).to(dtype)
        return value.requires_grad_(learns)

    x, weight = tensor(case.m, case.k), tensor(rows, case.k, scale=case.k**-0.5)
    bias = tensor(rows) if case.params["bias"] else None
    residual = tensor(case.m, case.n) if case.params.get("residual") else None
    rest = (bias,) if residual is None else (bias, residual)
    passes = 3 if case.direction == "forward+backward" else 1
    size = x.element_size()
    cost = Cost(
        case.dtype,
        2.0 * case.m * case.k * rows * passes,
        float(size * (rows * case.k * passes + case.m * (case.k + case.n))),
    )
    plain = rivals.eager(activation, residual is not None)

    def own(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None = None) -> Tensor:
        return bigops.fused_linear(x, w, b, r, activation)

    inputs = [t for t in (x, weight, bias, residual) if t is not None]
    wide = [t.detach().double().cpu() for t in inputs]
    if case.direction == "forward+backward":
        grad = torch.randn(case.m, case.n, device=device).to(dtype)
        reference = _gradients(plain, wide, bias is not None, grad.double().cpu())
        sides = [
            Side(OWN, lambda: torch.autograd.grad(own(x, weight, *rest), inputs, grad), cost),
            Side(
                "eager",
                lambda: torch.autograd.grad(plain(x, weight, *rest), inputs, grad),
                cost,
                "aten",
            ),
            rivals.compiled_side(
                plain,
                lambda f: torch.autograd.grad(f(x, weight, *rest), inputs, grad),
                cost,
            ),
        ]
        return reference, sides
    reference = [_call(plain, wide, bias is not None)]
    take_own, take = in_turn(clones(case, weight)), in_turn(clones(case, weight))
    sides = [
        Side(OWN, lambda: own(x, take_own(), *rest), cost),
        rivals.eager_side(case, x, weight, rest, plain, cost),
        rivals.compiled_side(plain, lambda f: f(x, take(), *rest), cost),
    ]
    if learns or device != "cpu":
        return reference, sides
    if case.dtype == "fp32":
        sides += families.dense_fp32_sides(case, x, weight, bias, activation, residual)
    elif case.dtype == "bf16":
        sides += families.dense_bf16_sides(case, x, weight, bias, activation, residual)
    return reference, sides


def _call(function: Callable[..., Tensor], inputs: list[Tensor], has_bias: bool) -> Tensor:
    x, weight, *rest = inputs
    return function(x, weight, *rest) if has_bias else function(x, weight, None, *rest)


def _gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], has_bias: bool, grad: Tensor
) -> list[Tensor]:
    inputs = [t.requires_grad_() for t in inputs]
    return list(torch.autograd.grad(_call(function, inputs, has_bias), inputs, grad))


def test_fused_linear(case: Case, versus: Callable[[Case], None]) -> None:
    versus(case)
