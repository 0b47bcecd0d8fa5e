"""Loader: batches of a Sampler from worker processes, on the device, the same on any of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate

from bigops.optim.checkpoint import random_states
from bigops.optim.sampler import Rows, Sampler
from bigops.train.data.keyed import keys


class Loader:
    """The batches of a sampler, from a data set with ``__len__`` and ``__getitem__``.

    ::

        sampler = Sampler(len(dataset), 256, rank=world.rank, world_size=world.size)
        for images, targets in Loader(dataset, sampler, device="cuda", num_workers=4):
            images = augment(images, sampler.taken.indices, sampler.taken.epoch)

    A torch DataLoader does the work. What a data set draws for a row, from torch, numpy or Python,
    is keyed by (seed, epoch, row), and nothing that it draws is missing behind it: results do not
    depend on workers, batches or ranks, and a run that goes on in the middle of an epoch sees what
    it would have seen. The sampler counts what the loop took, not what was fetched ahead; the
    loader's state is the sampler's.

    Args:
        dataset: rows; one with ``take(rows)`` gives whole batches (`Arrays`, `TokenFile`).
        sampler: whose ``rows`` are those of the data set.
        device: where batches go. To a GPU the next one is copied, from pinned memory, while the
            loop works on this one; on the CPU nothing is done.
        num_workers: processes that fetch; 0 fetches in the loop.
        collate: makes a batch of a list of rows; None for torch's default_collate.
        keyed: False leaves the random states to the data set.
        **options: of DataLoader.

    Raises:
        ValueError: sampler and data set of other lengths.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Sampler,
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        keyed: bool = True,
        **options: Any,
    ) -> None:
        if isinstance(dataset, Sized) and len(dataset) != sampler.rows:
            raise ValueError(
                f"sampler: expected one of the data set's {len(dataset)} rows; got one of "
                f"{sampler.rows}"
            )
        self.sampler, self.device = sampler, torch.device(device)
        options = {"persistent_workers": num_workers > 0, **options}
        self._loader = DataLoader(
            _Batches(dataset, collate or default_collate, keyed),
            batch_sampler=sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            **options,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """What is left of the epoch."""
        return self.sampler.over(_OnDevice(self._loader, self.device))

    def state_dict(self) -> dict[str, int]:
        """The sampler's."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Into the sampler."""
        self.sampler.load_state_dict(state)


class _Batches(Dataset):
    """A data set whose rows come batch by batch."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], keyed: bool) -> None:
        self._dataset, self._collate, self._keyed = dataset, collate, keyed

    def __getitem__(self, row: int) -> Any:
        return self._dataset[row]

    def __getitems__(self, rows: Rows) -> Any:
        if hasattr(self._dataset, "take"):
            return self._dataset.take(rows)
        if not self._keyed:
            return self._collate([self._dataset[row] for row in rows])
        with random_states.kept(gpus=False):
            return self._collate([*self._drawn(rows)])

    def _drawn(self, rows: Rows) -> Iterator[Any]:
        numbers = keys(rows.seed, rows.epoch, torch.tensor(rows, dtype=torch.int64, device="cpu"))
        for row, key in zip(rows, numbers.tolist(), strict=True):
            random.seed(key)
            np.random.seed(key % 2**32)
            torch.default_generator.manual_seed(key)  # torch.manual_seed goes on to GPUs
            yield self._dataset[row]


def _as_it_is(batch: Any) -> Any:
    return batch


class _OnDevice:
    """A loader whose batches come on a device."""

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        if self._device.type == "cpu":
            return batches
        return self._ahead(batches) if self._device.type == "cuda" else map(self._copied, batches)

    def _copied(self, batch: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.to(self._device, non_blocking=True), batch)

    def _ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Copy the next batch on a stream of its own before this one is handed out."""
        side = torch.cuda.Stream(self._device)
        ready: list[Any] = []
        for batch in batches:
            with torch.cuda.stream(side):
                copy = self._copied(batch)
            if ready:
                yield self._joined(ready.pop(), side)
            ready.append(copy)
        for copy in ready:
            yield self._joined(copy, side)

    def _joined(self, batch: Any, side: torch.cuda.Stream) -> Any:
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(side)
        for leaf in tree_leaves(batch):
            if isinstance(leaf, Tensor):
                leaf.record_stream(current)
        return batch
