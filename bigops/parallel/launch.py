"""Data parallel runs under torchrun: the same script serves one process and many.

``torchrun --nproc-per-node 2 -m bigops.recipes.mlp`` starts the processes and sets RANK,
WORLD_SIZE, LOCAL_RANK and the address; ``init`` reads them. Started without torchrun, the world
is one process, and every method is its own trivial case.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """The processes of a run as one of them sees it; made by ``init``."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def print(self, *values: object) -> None:
        """Print on the first rank only."""
        if self.is_first:
            print(*values, flush=True)

    def shard(self, rows: Tensor) -> Tensor:
        """This rank's rows of a global batch [rows, ...]: rank, rank + size, rank + 2 size, ...

        Shares differ by one row where ``size`` does not divide the batch, and may be empty.
        """
        return rows[self.rank :: self.size]

    def wrap(self, model: nn.Module) -> nn.Module:
        """DistributedDataParallel around the model; the model itself in a world of one.

        All ranks then hold the weights of rank 0, and gradients are averaged over ranks.
        """
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def batch_loss(self, losses: Tensor, batch: int) -> Tensor:
        """Loss whose averaged gradient is that of the mean over the global batch.

        A mean over the local rows would be wrong where the shares differ in size.

        Args:
            losses: [local rows], the loss of each row, not reduced.
            batch: number of rows in the global batch.
        """
        return losses.sum() * (self.size / batch)

    def mean(self, value: Tensor) -> Tensor:
        """Average of a tensor over ranks, detached: the global loss from ``batch_loss``."""
        value = value.detach().clone()
        if self.size > 1:
            torch.distributed.all_reduce(value)
            value /= self.size
        return value


@contextmanager
def init(device: str = "cpu", timeout_s: float = 600.0) -> Iterator[World]:
    """Join the run that torchrun started, and leave it in order.

    Args:
        device: ``"cpu"`` (backend gloo) or ``"cuda"`` (backend nccl; rank i takes GPU LOCAL_RANK).
        timeout_s: how long a collective call waits for the other ranks.

    Raises:
        ValueError: another device, or an environment that is not torchrun's.
        RuntimeError: ``"cuda"`` without enough GPUs.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda'; got {device!r}")
    size, rank, local = _env("WORLD_SIZE", 1), _env("RANK", 0), _env("LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(f"RANK: expected 0 to WORLD_SIZE - 1 = {size - 1}; got {rank}")
    place = torch.device("cpu")
    if device == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local >= count:
            raise RuntimeError(f"device: rank {rank} needs GPU {local}, this torch sees {count}")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if size == 1:
        yield World(0, 1, place)
        return
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
    )
    try:
        yield World(rank, size, place)
        # Nobody leaves while another rank still talks: its collective would fail, not end. With
        # gloo not by barrier(): its worker thread drops the tensors of all calls before it, for
        # which it takes the interpreter's lock, and aborts the process if that has ended by then.
        if device == "cuda":
            dist.barrier()
        else:
            dist.monitored_barrier()
    finally:
        dist.destroy_process_group()


def _env(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number from torchrun; got {text!r}") from None
