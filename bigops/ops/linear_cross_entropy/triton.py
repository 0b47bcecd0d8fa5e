"""The road from the loss and the optimiser steps to their Triton kernels: names what ran."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.fused_adamw import states
from bigops.ops.linear_cross_entropy import reference as _cross_entropy
from bigops.ops.targets import present


def why_not(dtype: torch.dtype, target: targets.Target) -> str:
    """The reason why no kernel passes over logits on ``target``; empty where one does."""
    return targets.why_not(dtype, target, "fused_linear")


def chunk(logits: Tensor, *rest: Any) -> Tensor:
    """`kernels/linear_cross_entropy.py` on a chunk: losses [M]; logits become their gradient."""
    from bigops.kernels import linear_cross_entropy as kernels

    losses = kernels.chunk(logits, *rest)
    form = "gradient" if rest[-1] else "loss"
    backend.note(f"triton.linear_cross_entropy.{checks.short(logits.dtype)}.{form}")
    return losses


def serve_chunk(logits: Tensor, *rest: Any) -> Tensor:
    """The pass over a chunk on a GPU: the kernel, or plain torch where it does not serve."""
    if why_not(logits.dtype, logits.device):
        return _cross_entropy.serve_chunk(logits, *rest)  # type: ignore[no-any-return]
    return chunk(logits, *rest)


def explain_chunk(
    target: str, dtype: torch.dtype, classes: int, config: dict[str, Any]
) -> backend.Explanation:
    """Kernel, config and reason of the pass over logits on ``target`` ("cuda", "sm_90" ...)."""
    from bigops.kernels import linear_cross_entropy as kernels

    op = "linear_cross_entropy"
    block, warps = kernels.block_size(present(target), classes)
    name = f"triton.{op}.{checks.short(dtype)}.gradient"
    reason = f"own pass over chunks of {config['chunk']} tokens, one program a token"
    return backend.Explanation(op, name, reason, {**config, "block": block, "num_warps": warps})


# --- optimiser steps -----------------------------------------------------------------------


@functools.cache
def maps_of(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(  # type: ignore[return-value]
        table(signed).to(device)
        for signed in (True, False)
        for table in (states.dynamic_map, states.buckets)
    )


def serves_step(params: Sequence[Tensor]) -> bool:
    """Whether the kernels serve all of these parameters; a list with float64 takes plain torch."""
    if not params:
        return False
    dtypes, device = {p.dtype for p in params}, params[0].device
    return all(targets.serves(dtype, device, "fused_linear") for dtype in dtypes)


def _names(op: str, params: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    for i, param in enumerate(params):
        if param.numel():
            coded = len(first) > 0 and first[i].dtype == torch.uint8
            form = "8bit" if coded else "fused"
            backend.note(f"triton.{op}.{checks.short(param.dtype)}.{form}")


def adamw(  # type: ignore[no-untyped-def]
    params, grads, exp_avgs, exp_avg_sqs, steps, exp_avg_scales, exp_avg_sq_scales, copies,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_factor, streams, seed, rounding_step,
):  # fmt: skip
    """`kernels/fused_adamw/kernels.py` by the arguments of the op `fused_adamw`."""
    from bigops.kernels.fused_adamw import launch

    step = launch.Step(
        params, grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, copies,
        streams, seed, rounding_step,
    )  # fmt: skip
    factor = -grad_factor if maximize else grad_factor
    maps = maps_of(params[0].device)
    launch.adamw(step, steps, maps, lr, beta1, beta2, eps, weight_decay, factor)
    _names("fused_adamw", params, exp_avgs)


def sgd(  # type: ignore[no-untyped-def]
    params, grads, momentum_buffers, momentum_scales, copies,
    lr, momentum, dampening, weight_decay, nesterov, first_step, maximize, grad_factor,
    streams, seed, rounding_step,
):  # fmt: skip
    """`kernels/fused_adamw/kernels.py` by the arguments of the op `fused_sgd`."""
    from bigops.kernels.fused_adamw import launch

    step = launch.Step(
        params, grads, momentum_buffers, (), momentum_scales, (), copies,
        streams, seed, rounding_step,
    )  # fmt: skip
    factor = -grad_factor if maximize else grad_factor
    maps = maps_of(params[0].device)
    launch.sgd(step, maps, lr, momentum, dampening, weight_decay, nesterov, first_step, factor)
    _names("fused_sgd", params, momentum_buffers)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """`kernels/fused_adamw/kernels.py`: the norm of all gradients together."""
    from bigops.kernels.fused_adamw import launch

    result = launch.norm(grads)
    for grad in grads:
        backend.note(f"triton.fused_grad_norm.{checks.short(grad.dtype)}.double")
    return result
