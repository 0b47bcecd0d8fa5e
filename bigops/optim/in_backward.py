"""The step of an optimiser inside the backward pass, so that gradients never all exist at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bigops.optim import placed
from bigops.optim.fused_optimizer import FusedOptimizer
from bigops.optim.options import RefusedError

_scaled = False


@contextlib.contextmanager
def scaled_loss(scaled: bool = True) -> Iterator[None]:
    """A backward pass whose gradients have to be divided later: a step inside it is refused."""
    global _scaled
    before, _scaled = _scaled, scaled or _scaled
    try:
        yield
    finally:
        _scaled = before


class StepInBackward:
    """What `step_in_backward` gives: ``remove()``, or the end of a ``with``, ends it."""

    def __init__(self, optimizer: FusedOptimizer, places: dict[Tensor, tuple[int, int]]) -> None:
        self._optimizer, self._places = optimizer, places
        self._stepped: set[Tensor] = set()
        self._handles: list[Any] = [
            p.register_post_accumulate_grad_hook(self._step) for p in places
        ]
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self._stepped.clear()))
        optimizer.in_backward = True

    def _step(self, param: Tensor) -> None:
        if _scaled:
            raise RefusedError(
                "step_in_backward: expected a loss that is not scaled, nor a sum over tokens, "
                "since no step is divided or skipped later; got a backward pass of such a loss"
            )
        group, stream = self._places[param]
        if param in self._stepped:
            raise RefusedError(
                "step_in_backward: expected a call of optimizer.step() after each backward pass, "
                "which counts the step; got a second gradient of parameter "
                f"{stream} before it (gradients cannot be accumulated, nor checkpointing be "
                "reentrant, where each is used up when it is made)"
            )
        if param.grad is None:
            return
        if param.grad.layout != torch.strided:
            raise RefusedError(
                f"step_in_backward: expected dense gradients; got {param.grad.layout} of parameter "
                f"{stream}"
            )
        self._optimizer._step_one(self._optimizer.param_groups[group], stream, param)
        param.grad = None
        self._stepped.add(param)

    def remove(self) -> None:
        """Gradients are kept for ``step()`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizer.in_backward = False

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def step_in_backward(optimizer: FusedOptimizer) -> StepInBackward:
    """Step each parameter as soon as its gradient is made, and free the gradient.

    ::

        step_in_backward(optimizer)
        for x, y in batches:
            loss_fn(model(x), y).backward()  # parameters move here
            optimizer.step()  # counts the step, calls its hooks
            schedule.step()

    The largest gradients at a time are those of one layer, not of the model. The bits are those of
    the ordinary step, with states in 8 bits, masters and stochastic rounding too. FSDP2 calls it
    with the reduced gradient.

    What needs all gradients of a step together is refused: `step_checked` (clipping by the norm, a
    loss scale with skipped steps) and `grad_factor`; a loss that `MixedPrecision` or `bigops.amp`
    scales, or that has a weight; a second backward pass before ``optimizer.step()``
    (accumulation). torch.amp.GradScaler knows nothing of it: do not scale by that. An inf or NaN
    of a gradient is in the weights, as with ``step()``.

    Args:
        optimizer: `AdamW`, `Adam` or `SGD` of this package; parameters that are added later step
            in ``step()``.

    Returns:
        A handle; ``remove()`` ends it.

    Raises:
        TypeError: another optimiser.
        RefusedError: one that does so already or holds a parameter twice; gradients that are there;
            plain parameters in a process group of several ranks, whose gradients
            DistributedDataParallel reduces later. A ValueError and a RuntimeError.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            "optimizer: expected AdamW, Adam or SGD of bigops.train; got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}"
        )
    if optimizer.in_backward:
        raise RefusedError("optimizer: expected one that steps after the backward pass; got again")
    distributed = torch.distributed
    several = (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
    places: dict[Tensor, tuple[int, int]] = {}
    stream = 0
    for g, group in enumerate(optimizer.param_groups):
        for p, param in enumerate(group["params"]):
            name = f"param_groups[{g}]['params'][{p}]"
            if param in places:
                raise RefusedError(f"{name}: expected each parameter once; got it again")
            if param.grad is not None:
                raise RefusedError(f"{name}: expected no gradient (zero_grad() first); got one")
            if several and param.requires_grad and not placed.is_split(param):
                raise RefusedError(
                    f"{name}: expected a DTensor among {distributed.get_world_size()} ranks; got a "
                    "plain parameter, whose gradient is reduced after it was used up"
                )
            if param.requires_grad:
                places[param] = g, stream
            stream += 1
    return StepInBackward(optimizer, places)
