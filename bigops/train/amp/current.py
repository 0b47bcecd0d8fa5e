"""The run of amp that calls without an optimiser speak of: that of the last `initialize`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bigops.train.loss_scale import LossScale


@dataclass
class Run:
    """One call of `initialize`."""

    enabled: bool
    scales: list[LossScale] = field(default_factory=list)


run: Run | None = None
