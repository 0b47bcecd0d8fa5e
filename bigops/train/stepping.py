"""A step of several optimisers by one verdict, with nobody waiting where they can skip by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.optim.fused_optimizer import FusedOptimizer
from bigops.optim.grad_norm import own_parts
from bigops.train.loss_scale import LARGEST


def parameters_of(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Every parameter with a gradient, once.

    Raises:
        ValueError: no optimiser, or two that share a parameter.
        RuntimeError: an optimiser none of whose parameters has a gradient.
    """
    if not optimizers:
        raise ValueError("optimizers: expected at least one; got none")
    owners: dict[int, int] = {}
    found: dict[int, Tensor] = {}
    for i, optimizer in enumerate(optimizers):
        own = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        for key in own:
            first = owners.setdefault(key, i)
            if first != i:
                raise ValueError(
                    "optimizers: expected each parameter in one of them; got one of "
                    f"optimizers[{first}] in optimizers[{i}] too"
                )
        given = {key: p for key, p in own.items() if p.grad is not None}
        if not given:
            where = "the optimizer" if len(optimizers) == 1 else f"optimizers[{i}]"
            raise RuntimeError(f"step: expected gradients, no parameter of {where} has one")
        found |= given
    return list(found.values())


def check_dtypes(optimizers: Sequence[Optimizer], precision: str) -> None:
    """Raise ValueError for parameters that this precision does not train.

    Under a loss scale float16 parameters need masters; "bf16-true" needs bfloat16 ones, and an
    optimiser that does not lose what is below half a unit in their last place.
    """
    true = precision == "bf16-true"
    if not true and precision != "fp16-mixed":
        return
    dtypes = set()
    for i, optimizer in enumerate(optimizers):
        ours = isinstance(optimizer, FusedOptimizer)
        for g, group in enumerate(optimizer.param_groups):
            kept = ours and (group["master_weights"] or (true and group["stochastic_rounding"]))
            for p, param in enumerate(group["params"]):
                dtypes.add(param.dtype)
                if param.dtype == (torch.bfloat16 if true else torch.float16) and not kept:
                    how = "stochastic_rounding or master_weights" if true else "master_weights"
                    instead = "" if true else ", or float32 ones (autocast casts what ops compute)"
                    raise ValueError(
                        f"optimizers[{i}]: expected bigops.train's AdamW or SGD with {how} for "
                        f"{param.dtype} parameters{instead}; got {type(optimizer).__name__} with "
                        f"one at param_groups[{g}]['params'][{p}]"
                    )
    if true and torch.bfloat16 not in dtypes:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            "optimizers: expected torch.bfloat16 parameters, model.to(precision.dtype) before the "
            f"optimizer is made; got {got}"
        )


class Verdict(NamedTuple):
    """What is to become of a step: numbers, or 0-dimensional tensors that the host has not read."""

    norm: Tensor | float  # of the gradients without loss scale and weight
    factor: Tensor | float  # which they are multiplied by
    good: Tensor | bool  # no inf, no NaN, none past float32 once multiplied
    stepped: Tensor | bool  # good, and of some token


def judge(
    found: Tensor,
    inverse: Tensor | None,
    weight: Tensor | None,
    clip_norm: float | None,
    wide: bool,
) -> Verdict:
    """The verdict on gradients of norm ``found``; in numbers where reading them costs nothing.

    Args:
        found: float64, 0-dimensional, as ``inverse`` and ``weight`` are.
        inverse: one over the loss scale that the gradients carry.
        weight: on average of a rank: what the gradients are divided by.
        clip_norm: largest norm after that.
        wide: whether all gradients are float64.
    """
    size: Any = found
    factor: Any = 1.0 if inverse is None else inverse
    total: Any = 1.0 if weight is None else weight
    if not reading_waits(found.device):
        size, factor, total = float(size), float(factor), float(total)
    norm = size
    if weight is not None:
        factor = factor / _where_positive(total)
    if inverse is not None or weight is not None:
        norm = size * factor
    if clip_norm is not None:  # torch.nn.utils.clip_grad_norm_ adds the same 1e-6
        factor = factor * _at_most_one(clip_norm / (norm + 1e-6))
    # Also False for NaN, and for an inf, which clipping makes inf * 0.
    good = abs(norm) < math.inf if wide else size * factor <= LARGEST
    stepped = good if weight is None else good & (total > 0)
    return Verdict(norm, factor, good, stepped)


def reading_waits(device: torch.device) -> bool:
    """Whether the host waits for a number on this device."""
    return device.type != "cpu"


def _where_positive(total: Any) -> Any:
    if isinstance(total, Tensor):
        return torch.where(total > 0, total, 1.0)
    return total if total > 0 else 1.0


def _at_most_one(value: Any) -> Any:
    return value.clamp(max=1.0) if isinstance(value, Tensor) else min(value, 1.0)


def take(optimizers: Sequence[Optimizer], params: Sequence[Tensor], verdict: Verdict) -> None:
    """Multiply the gradients by the factor and step, or change nothing, as the verdict says.

    Tensors in it are read by one read, for which the host waits for a GPU, unless every optimiser
    can skip on the device: torch's fused ones, from their second step on.
    """
    stepped, factor = verdict.stepped, verdict.factor
    if isinstance(stepped, Tensor) and all(map(skips_on_device, optimizers)):
        for optimizer in optimizers:
            _step_on_device(optimizer, stepped, factor)
        return
    if isinstance(stepped, Tensor):
        stepped = (number := float(torch.where(stepped, factor, -1.0))) >= 0
    else:
        number = float(factor)
    if not stepped:
        return
    if number != 1:
        own = [o for o in optimizers if isinstance(o, FusedOptimizer)]
        theirs = {id(p) for o in own for group in o.param_groups for p in group["params"]}
        grads = own_parts(p.grad for p in params if id(p) not in theirs and p.grad is not None)
        if grads:
            torch._foreach_mul_(grads, number)
    for optimizer in optimizers:
        if isinstance(optimizer, FusedOptimizer):
            optimizer.step(grad_factor=number)
        else:
            optimizer.step()


def skips_on_device(optimizer: Optimizer) -> bool:
    """Whether the kernels of the optimiser read the verdict themselves.

    Not in a parameter's first step: torch's fused SGD leaves uninitialised memory as momentum where
    that one is skipped (2.13). Not in float64, where they would take a float32 factor.
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return False
    return getattr(optimizer, "_step_supports_amp_scaling", False) and all(
        optimizer.state.get(p) and p.dtype != torch.float64 and not hasattr(p, "device_mesh")
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    )


def _step_on_device(optimizer: Any, stepped: Tensor, factor: Tensor | float) -> None:
    if isinstance(factor, Tensor):
        optimizer.grad_scale = factor.reciprocal().float()  # the kernel divides by it
    optimizer.found_inf = stepped.logical_not().float()
    try:
        optimizer.step()
    finally:
        optimizer.__dict__.pop("grad_scale", None)
        del optimizer.found_inf
