"""Which rows a step takes: shuffled batches, and where a run stands in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class BatchSampler:
    """Batches of rows in a random order; iterating it gives what is left of an epoch.

    The order is a matter of ``rows``, ``seed`` and the number of epochs before, not of torch's
    global random state. With its state in `bigops.train.save_checkpoint` a run that is loaded goes
    on behind the last batch that was taken.

    Args:
        rows: how many there are.
        batch_size: of them in a batch; the last one of an epoch may be smaller.
        seed: of the order.

    Raises:
        ValueError: ``rows`` or ``batch_size`` below 1.
    """

    def __init__(self, rows: int, batch_size: int, *, seed: int = 0) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows, batch_size: expected at least 1; got {rows}, {batch_size}")
        self.rows, self.batch_size = rows, batch_size
        self._generator = torch.Generator().manual_seed(seed)
        self._begin, self._taken = self._generator.get_state(), 0  # of the epoch

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.rows // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Indices of rows, int64 ``[batch_size]`` on the CPU."""
        self._generator.set_state(self._begin)
        order = torch.randperm(self.rows, generator=self._generator, device="cpu")
        for batch in order.split(self.batch_size)[self._taken :]:
            self._taken += 1
            yield batch
        self._begin, self._taken = self._generator.get_state(), 0

    def state_dict(self) -> dict[str, Any]:
        """Sizes, random state at the begin of the epoch, batches that were taken of it."""
        sizes = {"rows": self.rows, "batch_size": self.batch_size}
        return {**sizes, "begin": self._begin, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a sampler of the same sizes.

        Raises:
            ValueError: it is of other sizes; nothing has changed then.
        """
        sizes = {"rows": self.rows, "batch_size": self.batch_size}
        if {name: state.get(name) for name in sizes} != sizes:
            got = {name: state.get(name) for name in sizes}
            raise ValueError(f"state: expected that of a sampler of {sizes}; got {got}")
        self._begin, self._taken = state["begin"].clone(), int(state["taken"])
