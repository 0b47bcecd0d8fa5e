"""scale_loss: the backward pass of a scaled loss, and the unscaling behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.optim.grad_norm import norm_over_ranks
from bigops.optim.in_backward import scaled_loss
from bigops.train.amp import current
from bigops.train.amp.optimizer import Stash, stash_of


@contextmanager
def scale_loss(
    loss: Tensor,
    optimizers: Optimizer | list[Optimizer],
    loss_id: int = 0,
    model: Any = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[Tensor]:
    """Gives ``loss.float() * scale`` to call ``backward()`` on; behind it gradients are unscaled.

    ``amp.master_params(optimizer)`` then hold them, added to what they held before. A dynamic scale
    changes here, once per exit, not per step. Where gradients hold inf or NaN, on any rank, the
    next ``step`` of every optimiser given is skipped; a static scale is never checked.

    Args:
        loss: of one element.
        optimizers: whose gradients this backward pass makes; one or a list.
        loss_id: which of ``num_losses`` scales.
        model: unused, as in apex.
        delay_unscale: gradients keep the scale, another backward pass adds to them.
        delay_overflow_check: gradients are unscaled, but the scale and the skip wait for the next
            exit without it.

    Raises:
        RuntimeError: `initialize` was not called, or not with one of these optimisers.
        TypeError: the loss is no tensor. ValueError: no such ``loss_id``.

    Where the block raises, gradients are as they were before it; only those that waited for a
    delayed unscaling are dropped.
    """
    run = current.run
    if run is None:
        raise RuntimeError(
            "scale_loss: expected model, optimizer = amp.initialize(model, optimizer, opt_level) "
            "before it; got no such call"
        )
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss: expected a tensor; got {type(loss).__name__}")
    every = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    stashes = [_stash(optimizer) for optimizer in every]
    if not run.enabled and None in stashes:
        yield loss
        return
    known = [stash for stash in stashes if stash is not None]
    if len(known) < len(stashes) or not known:
        raise RuntimeError(
            "optimizers: expected ones that amp.initialize was given; got "
            + (type(every[stashes.index(None)]).__name__ if every else "none")
        )
    level, scales = known[0].level, known[0].scales
    if not 0 <= loss_id < len(scales):
        raise ValueError(
            f"loss_id: expected 0 to num_losses - 1 = {len(scales) - 1}; got {loss_id}"
        )
    scale = scales[loss_id]
    if not level.master_weights and not level.scales:
        yield loss.float()
        return
    for stash in known:
        stash.begin()
    try:
        with scaled_loss():
            yield loss.float() * scale.value.to(loss.device, non_blocking=True)
    except BaseException:
        for stash in known:
            stash.give_up()
        raise
    for stash in known:
        stash.scaled = True
    if delay_unscale:
        return
    if scale.dynamic:
        good = _good(known)
        scale.pending = good if scale.pending is None else scale.pending & good
    for stash in known:
        stash.unscale(scale)
    if scale.pending is not None and not delay_overflow_check:
        good, scale.pending = scale.pending, None
        scale.update(good)
        for stash in known:
            stash.verdicts.append(good)


def master_params(optimizer: Optimizer) -> Iterator[Tensor]:
    """What the optimiser steps: float32 masters where a level has them, else the parameters."""
    for group in optimizer.param_groups:
        yield from group["params"]


def _stash(optimizer: Any) -> Stash | None:
    # A wrapper of another package hands attributes on, or holds the optimiser as .optimizer.
    found = stash_of(optimizer)
    return found if found is not None else stash_of(getattr(optimizer, "optimizer", None))


def _good(stashes: list[Stash]) -> Tensor:
    grads = [grad for stash in stashes for grad in stash.gradients()]
    if not grads:
        return torch.ones((), dtype=torch.bool, device="cpu")
    return norm_over_ranks(grads)[0].isfinite()
