"""The lists that one kernel call of `FusedOptimizer` takes."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from bigops.ops.fused_adamw import transposed
from bigops.optim import placed

_NONE = torch.empty(0, dtype=torch.float32, device="cpu")  # says that this parameter has none


class Batch:
    """Parameters of one device, each once, with their gradients and states.

    Args:
        states: of each parameter, made.
        group: whose options they have.
        items: number among all parameters, which is that of its random bits, and parameter.
    """

    def __init__(
        self,
        states: list[dict[str, Any]],
        group: dict[str, Any],
        items: list[tuple[int, Tensor]],
    ) -> None:
        self.states = states
        self._given = given = [param for _, param in items]
        self._split = any(map(placed.is_split, given))
        self.grads = [placed.gradient(p) if self._split else p.grad for p in given]
        self.params = self._local([s.get("master", p) for s, p in zip(states, given, strict=True)])
        self.copies: list[Tensor] = []
        if any("master" in s for s in states):
            copies = [p if "master" in s else _NONE for s, p in zip(states, given, strict=True)]
            self.copies = self._local(copies)
        rounds = group["stochastic_rounding"] and any(
            p.dtype == torch.bfloat16 for p in self.params
        )
        self.streams = [stream for stream, _ in items] if rounds else []
        self.places: list[placed.Place] = []
        if rounds and self._split:
            self.places = [
                placed.place(p) if part.dtype == torch.bfloat16 else placed.whole(part)
                for p, part in zip(given, self.params, strict=True)
            ]
        self._seed: tuple[int, int] = group["seed"], group["rounding_step"]

    @property
    def rounding(self) -> tuple[Any, ...]:
        """The last arguments of a step."""
        return self.streams, *self._seed, *transposed(self.places)

    def count_versions(self) -> None:
        """Tell autograd that DTensors were changed: the kernel wrote into their parts."""
        if self._split:
            torch.autograd.graph.increment_version(list(filter(placed.is_split, self._given)))

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return [placed.local(t) for t in tensors] if self._split else tensors

    def lists(self, name: str) -> tuple[list[Tensor], list[Tensor]]:
        """The states of a name and their scales ([] where none is in 8 bits)."""
        key = f"{name}_scale"
        scales = (
            [s.get(key, _NONE) for s in self.states] if any(key in s for s in self.states) else []
        )
        return self._local([s[name] for s in self.states]), self._local(scales)

    def part(self, chosen: list[bool]) -> Batch:
        """The batch of those parameters alone."""
        if all(chosen):
            return self
        part = object.__new__(Batch)
        for name, value in vars(self).items():
            kept = list(itertools.compress(value, chosen)) if isinstance(value, list) else value
            setattr(part, name, kept)
        return part
