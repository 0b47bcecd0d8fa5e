"""A step of several optimisers by one verdict, with nobody waiting where they can skip by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.optim.fused_optimizer import FusedOptimizer
from bigops.optim.grad_norm import own_parts


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


def take(
    optimizers: Sequence[Optimizer], params: Sequence[Tensor], stepped: Tensor, factor: Tensor
) -> None:
    """Multiply the gradients by ``factor`` and step where ``stepped``; else change nothing.

    Both are 0-dimensional. They are read, for which the host waits for a GPU, unless every
    optimiser can skip on the device: torch's fused ones, from their second step on.
    """
    if all(skips_on_device(optimizer) for optimizer in optimizers):
        for optimizer in optimizers:
            _step_on_device(optimizer, stepped, factor)
        return
    if not bool(stepped):
        return
    number = float(factor)
    own = [o for o in optimizers if isinstance(o, FusedOptimizer)]
    if number != 1:
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


def _step_on_device(optimizer: Any, stepped: Tensor, factor: Tensor) -> None:
    optimizer.grad_scale = factor.reciprocal().float()  # the kernel divides by it
    optimizer.found_inf = stepped.logical_not().float()
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf
