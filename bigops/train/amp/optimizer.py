"""What amp adds to an optimiser: masters, gradients that are unscaled, a step that is skipped."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigops.optim.grad_norm import own_parts
from bigops.train.amp.casting import Masters
from bigops.train.amp.levels import Level
from bigops.train.loss_scale import LossScale

ATTRIBUTE = "_amp_stash"  # apex's name for it


class Stash:
    """Hangs on one optimiser; ``masters`` is shared with the models' state_dict hooks.

    Between two ``scale_loss`` a master, or a parameter without one, holds the unscaled gradient;
    within, what was there before waits in ``held``.
    """

    def __init__(self, optimizer: Optimizer, level: Level, scales: list[LossScale]) -> None:
        self.optimizer, self.level, self.scales = optimizer, level, scales
        self.masters: Masters = {}
        self.scaled = False  # whether gradients that carry a scale wait for an unscaling
        self.held: list[tuple[Tensor, Tensor]] = []
        self.verdicts: list[
            Tensor
        ] = []  # on the gradients since the last step: none was inf or NaN

    # --- gradients ---------------------------------------------------------------------------

    def begin(self) -> None:
        """Take the unscaled gradients away, so that a backward pass does not add to them."""
        if self.scaled:
            return
        self.held = [(p, p.grad) for p in self._plain() if p.grad is not None]
        for param in (*self.masters, *(p for p, _ in self.held)):
            param.grad = None

    def give_up(self) -> None:
        """Back to before `begin`: the backward pass raised."""
        for param in (*self.masters, *self._plain()):
            param.grad = None
        self._add_held()
        self.scaled = False

    def gradients(self) -> list[Tensor]:
        """Those that the backward pass left, scaled."""
        return [p.grad for p in (*self.masters, *self._plain()) if p.grad is not None]

    @torch.no_grad()
    def unscale(self, scale: LossScale) -> None:
        """Divide the gradients by the scale, into the masters, and add what waited."""
        given = [(p, master) for p, master in self.masters.items() if p.grad is not None]
        grads = [p.grad.float() for p, _ in given if p.grad is not None]
        _unscale_(grads, scale)
        _unscale_([p.grad for p in self._plain() if p.grad is not None], scale)
        for (param, master), grad in zip(given, grads, strict=True):
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            param.grad = None
        self._add_held()
        self.scaled = False

    def _add_held(self) -> None:
        for param, grad in self.held:
            param.grad = grad if param.grad is None else param.grad.add_(grad)
        self.held = []

    def _plain(self) -> list[Tensor]:
        """Parameters that are their own masters."""
        masters = {id(master) for master in self.masters.values()}
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if id(p) not in masters]

    # --- masters -----------------------------------------------------------------------------

    def make_masters(self, groups: list[dict[str, Any]], shared: Masters) -> None:
        """Put a float32 copy in the place of each 16-bit parameter of the groups."""
        for group in groups:
            for i, param in enumerate(group["params"]):
                if param.dtype not in (torch.float16, torch.bfloat16):
                    continue
                master = param.detach().float().requires_grad_()
                shared[param] = self.masters[param] = group["params"][i] = master
                state = self.optimizer.state
                if param in state:
                    state[master] = state.pop(param)

    @torch.no_grad()
    def write_weights(self) -> None:
        """Round the masters into the model."""
        if self.masters:
            torch._foreach_copy_(list(self.masters), list(self.masters.values()))

    def clear_masters(self) -> None:
        """Drop the masters' gradients, which ``model.zero_grad()`` does not reach."""
        for master in self.masters.values():
            master.grad = None


def _unscale_(grads: list[Tensor], scale: LossScale) -> None:
    for device in {grad.device for grad in grads}:
        here = own_parts(grad for grad in grads if grad.device == device)
        torch._foreach_mul_(here, scale.inverse(device).float())


def stash_of(optimizer: Any) -> Stash | None:
    """What `attach_` hung on an optimiser."""
    return getattr(optimizer, ATTRIBUTE, None)


def attach_(optimizer: Any, level: Level, scales: list[LossScale], shared: Masters) -> None:
    """Give an optimiser its stash, and masters where the level has them."""
    stash = Stash(optimizer, level, scales)
    if level.master_weights and level.halves:
        stash.make_masters(optimizer.param_groups, shared)
    if optimizer.state:  # of steps before: in the dtype of what is stepped now
        optimizer.load_state_dict(optimizer.state_dict())
    setattr(optimizer, ATTRIBUTE, stash)
    before, zero, add = optimizer.step, optimizer.zero_grad, optimizer.add_param_group

    @functools.wraps(before)  # with the mark by which a scheduler knows what it wrapped
    def step(self: Optimizer, closure: Any = None) -> Any:
        if closure is not None and (level.halves or level.scales):
            raise RuntimeError(
                "step: expected no closure under amp, which unscales gradients before the step; "
                "got one"
            )
        good = all(bool(verdict) for verdict in stash.verdicts)
        stash.verdicts = []
        result = None
        if good:
            result = before() if closure is None else before(closure)
            stash.write_weights()
        stash.clear_masters()
        return result

    def zero_grad(self: Optimizer, set_to_none: bool = True) -> None:
        zero(set_to_none)
        stash.held, stash.scaled = [], False
        for param in stash.masters:
            if set_to_none or param.grad is None:
                param.grad = None
            else:
                param.grad = torch.zeros_like(param.grad)

    def add_param_group(self: Optimizer, group: dict[str, Any]) -> None:
        add(group)
        if level.master_weights and level.halves:
            stash.make_masters(optimizer.param_groups[-1:], shared)

    # As methods, since schedulers of torch ask optimizer.step for its __func__.
    optimizer.step = MethodType(step, optimizer)
    optimizer.zero_grad = MethodType(zero_grad, optimizer)
    optimizer.add_param_group = MethodType(add_param_group, optimizer)
