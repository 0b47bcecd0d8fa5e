"""The loss scale of fp16 gradients and its growth, on the device: nobody waits for it."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max  # the scale is a float32
LEAST_SCALE = 2.0**-14
"""What the loss scale falls to at most: float16's smallest normal number. The backward pass starts
with the scale itself, so that a smaller one would lose bits of every gradient."""


class LossScale:
    """A scale that halves where gradients overflow and grows after enough steps without.

    Method: Micikevicius et al., Mixed Precision Training (2018), section 3.2; the rule is that of
    torch.amp.GradScaler and of apex.

    Args:
        value: the first scale.
        device: where it lives.
        growth_factor, backoff_factor, growth_interval: as in torch.amp.GradScaler.
        least, most: what it never leaves.
        dynamic: False: it stays.
    """

    def __init__(
        self,
        value: float,
        device: torch.device,
        *,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        least: float = 0.0,
        most: float = LARGEST,
        dynamic: bool = True,
    ) -> None:
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval
        self.least, self.most, self.dynamic = least, most, dynamic
        self.value = torch.full((), value, dtype=torch.float32, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)  # since it changed
        self.pending: Tensor | None = None  # a verdict that is not counted yet

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale, float32 at least: fp16 ends below the usual first scale."""
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()
        return loss * self.value.to(loss.device, non_blocking=True)

    def inverse(self, device: torch.device) -> Tensor:
        """One over the scale; float64, 0-dimensional."""
        return self.value.to(device, torch.float64, non_blocking=True).reciprocal()

    def update(self, good: Tensor | bool) -> None:
        """Count gradients without inf and NaN, or with one (bool, or a 0-dimensional tensor)."""
        if self.dynamic:
            if isinstance(good, Tensor):
                found = good.to(self.value.device, non_blocking=True).logical_not().float()
            else:  # torch.tensor would wait for the device
                found = torch.full_like(self.value, float(not good))
            torch._amp_update_scale_(
                self.value,
                self.good_steps,
                found,
                self.growth_factor,
                self.backoff_factor,
                self.growth_interval,
            )
            self.value.clamp_(self.least, self.most)

    def set(self, value: float, good_steps: int) -> None:
        """Take over what was saved."""
        self.value.fill_(min(max(value, self.least), self.most))
        self.good_steps.fill_(good_steps)
