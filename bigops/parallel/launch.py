"""Data parallel runs under torchrun: the same script serves one process and many.

``torchrun --nproc-per-node 2 -m bigops.recipes.mlp`` starts the processes and sets RANK,
WORLD_SIZE, LOCAL_RANK and the address; ``init`` reads them. Started without torchrun, the world
is one process, and every method is its own trivial case. Processes that the caller spawns, as
torch.multiprocessing.spawn does, give ``init`` their rank and the number of ranks.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

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
def init(
    device: str = "cpu",
    timeout_s: float = 600.0,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    address: str | None = None,
) -> Iterator[World]:
    """Join the run that torchrun started, or that of spawned processes, and leave it in order.

    ::

        def work(rank: int, size: int) -> None:
            with bigops.parallel.init(rank=rank, world_size=size) as world:
                ...

        torch.multiprocessing.spawn(work, args=(2,), nprocs=2)

    Args:
        device: ``"cpu"`` (backend gloo) or ``"cuda"`` (backend nccl; rank i takes GPU LOCAL_RANK,
            without that variable GPU i).
        timeout_s: how long a collective call waits for the other ranks.
        rank, world_size: of this process and of all, both or none; by default those of torchrun's
            environment, and without that a world of one.
        address: ``"host:port"`` of a free port of rank 0, the same in all ranks. By default
            MASTER_ADDR and MASTER_PORT where set; else the processes that the same parent started
            with `multiprocessing` find each other.

    Raises:
        ValueError: another device, an environment that is not torchrun's, a rank out of range or
            against the environment, or a process that `multiprocessing` started and that has a
            rank neither from the caller nor from the environment: it would be a world of its own.
        RuntimeError: ``"cuda"`` without enough GPUs, or ranks that do not fit together.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda'; got {device!r}")
    rank, size = _place(rank, world_size)
    local = _env("LOCAL_RANK")
    local = rank if local is None else local
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

    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        timeout=timeout,
        **_meeting(rank, size, address, timeout),
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
        # A DistributedDataParallel refers to itself and to the group: left to the end of the
        # process, its worker thread would take the lock then, too.
        gc.collect()
        dist.destroy_process_group()


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and number of ranks, of the caller or of the environment."""
    given = {"rank": rank, "world_size": world_size}
    found = {"RANK": _env("RANK"), "WORLD_SIZE": _env("WORLD_SIZE")}
    asked = any(value is not None for value in given.values())
    own = given if asked else found
    values = [value for value in own.values() if value is not None]
    if len(values) == 1:
        raise ValueError(f"{' and '.join(own)}: expected both or none; got {values[0]} alone")
    if asked:
        for (name, value), other in zip(given.items(), found.values(), strict=True):
            if type(value) is not int:
                raise TypeError(f"{name}: expected an int; got {value!r}")
            if other not in (None, value):
                raise ValueError(f"{name}: expected {other}, as in the environment; got {value}")
    elif not values:
        if multiprocessing.parent_process() is not None:
            raise ValueError(
                "rank: expected init(rank=, world_size=) in a process that multiprocessing "
                "started, which would else be a world of its own; got neither them nor RANK and "
                "WORLD_SIZE"
            )
        return 0, 1
    place, size = values
    if not 0 <= place < size:
        first, second = own
        raise ValueError(f"{first}: expected 0 to {second} - 1 = {size - 1}; got {place}")
    return place, size


def _meeting(rank: int, size: int, address: str | None, timeout: timedelta) -> dict[str, Any]:
    """What tells `init_process_group` where the ranks meet."""
    ranks = {"rank": rank, "world_size": size}
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"address: expected 'host:port'; got {address!r}")
        return {"init_method": f"tcp://{address}", **ranks}
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if not missing:
        return {"init_method": "env://", **ranks}
    if multiprocessing.parent_process() is None:
        raise ValueError(
            "address: expected 'host:port' in processes that multiprocessing did not start; got "
            f"none, nor {' and '.join(missing)}"
        )
    from bigops.parallel._rendezvous import meet

    return {"store": meet(rank, size, timeout), **ranks}


def _env(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected a whole number from torchrun; got {text!r}") from None
