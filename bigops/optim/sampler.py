"""Which rows a step takes: shuffled batches, the same on any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_NONE: Any = object()
_KEYS = ("rows", "seed", "epoch", "samples_seen")


class Taken(NamedTuple):
    """The batch that a loop holds."""

    indices: Tensor
    """int64 [local rows] on the CPU: the rows of this rank."""
    real: Tensor
    """bool [local rows]: False for padding, which a metric leaves out."""
    epoch: int
    size: int
    """Rows of the batch over all ranks, padding left out."""


class Sampler:
    """Batches of rows in a random order; iterating it gives what is left of an epoch.

    The order is a matter of ``rows``, ``seed`` and the epoch alone. A global batch is the next
    ``batch_size`` rows of it, and rank r has the rows r, r + world_size, .. of the batch: a step
    sees the same rows on any number of ranks, and a run saved on two goes on on one. With its state
    in `bigops.train.TrainState` a run that is loaded goes on behind the last batch that was taken.

    An epoch has each row once. Where ranks do not divide a batch, those with fewer rows repeat some
    of it, so that all step with equal sizes; ``taken.real`` says which rows are such padding.

    It is a ``batch_sampler`` of torch's DataLoader. Workers fetch ahead, so that the loop says what
    was consumed::

        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=4)
        for x, y in sampler.over(loader):
            hits += ((model(x).argmax(-1) == y) & sampler.taken.real).sum()

    Args:
        rows: how many there are.
        batch_size: of them in a batch over all ranks; the last one of an epoch may be smaller.
        seed: of the order.
        shuffle: False gives the rows in their own order.
        drop_last: leave a smaller last batch out.
        pad: False leaves the shares of ranks as they fall: they differ by one row, and may be
            empty.
        rank, world_size: of this process.

    Attributes:
        epoch: that comes next, or that the loop is in.
        samples_seen: rows of this epoch that the loop took, over all ranks.
        taken: the batch that the loop holds; there is none outside of a loop.

    Raises:
        ValueError: an argument out of range.
    """

    taken: Taken

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        pad: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if rows < 1 or batch_size < 1:
            raise ValueError(f"rows, batch_size: expected at least 1; got {rows}, {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 to below world_size, {world_size}; got {rank}")
        if drop_last and batch_size > rows:
            raise ValueError(f"batch_size: expected at most rows, {rows}; got {batch_size}")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.shuffle, self.drop_last, self.pad = shuffle, drop_last, pad
        self.rank, self.world_size = rank, world_size
        self.epoch = self.samples_seen = 0
        self._outside = False  # whether `over` counts
        self._shipped = False  # whether batches went to workers that nobody counts
        # Random state behind the last order that was drawn, of which seed and epoch.
        self._drawn: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        full, rest = divmod(self.rows, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """The rows of this rank, batch by batch."""
        self._shipped = False
        return self._batches(counts=not self._outside)

    def _batches(self, *, counts: bool) -> Iterator[list[int]]:
        order, epoch = self._order(), self.epoch
        for begin, end in self._spans():
            if counts:
                self._take(order, epoch, begin, end)
            share, _ = self._share(order[begin:end])
            yield _Rows(share.tolist(), self.seed, epoch, self if counts else None)
        if counts:
            self._end(epoch)

    def over(self, loader: Iterable[T]) -> Iterator[T]:
        """The batches of a loader that has this sampler, counted as the loop takes them.

        The loader draws its workers' seed from torch's global random state, where a run that goes
        on in the middle of an epoch would draw once more: that state is as before afterwards.

        Raises:
            RuntimeError: the loader gave another number of batches than this sampler has.
        """
        order, epoch, spans = self._order(), self.epoch, self._spans()
        before, self._outside = torch.get_rng_state(), True
        try:
            batches = iter(loader)
            torch.set_rng_state(before)
            for span in spans:
                batch = next(batches, _NONE)
                if batch is _NONE:
                    raise RuntimeError(
                        f"loader: expected a batch of rows {span[0]} to {span[1]} of the epoch's "
                        "order; got the end (does it have this sampler?)"
                    )
                self._take(order, epoch, *span)
                yield batch
            if next(batches, _NONE) is not _NONE:
                raise RuntimeError(f"loader: expected the end of epoch {epoch}; got a batch")
        finally:
            self._outside = False
        self._end(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Go to the begin of an epoch; nothing happens in the middle of that one."""
        if epoch != self.epoch:
            self.epoch, self.samples_seen = epoch, 0

    # --- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """rows, seed, epoch and samples_seen, of all ranks alike.

        Raises:
            RuntimeError: batches went to workers of a loader that `over` does not hold: how many
                of them the loop has taken is not known.
        """
        if self._shipped:
            raise RuntimeError(
                "sampler: expected a loop over sampler.over(loader), since the loader's workers "
                "fetch ahead; got one over the loader itself"
            )
        return {name: getattr(self, name) for name in _KEYS}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a sampler of as many rows, of any batch size and world size.

        Raises:
            ValueError: it is of another number of rows, or no such state; nothing has changed then.
        """
        found = dict(state)
        if set(found) == {"rows", "batch_size", "begin", "taken"}:
            found = _of_older(found)
        if set(found) != set(_KEYS) or any(type(value) is not int for value in found.values()):
            raise ValueError(f"state: expected whole numbers {', '.join(_KEYS)}; got {found}")
        if found["rows"] != self.rows:
            raise ValueError(
                f"state: expected that of a sampler of {{'rows': {self.rows}}}; got "
                f"{{'rows': {found['rows']}}}"
            )
        if found["epoch"] < 0 or not 0 <= found["samples_seen"] <= self.rows:
            raise ValueError(f"state: expected samples_seen from 0 to {self.rows}; got {found}")
        for name, value in found.items():
            setattr(self, name, value)
        self._shipped = False

    # --- the order ---------------------------------------------------------------------------

    def _order(self) -> Tensor:
        """Rows in the order of the epoch, int64 [rows]: the epoch-th permutation of a generator."""
        if not self.shuffle:
            return torch.arange(self.rows, device="cpu")
        generator = torch.Generator().manual_seed(self.seed)
        drawn = 0
        if self._drawn is not None and self._drawn[0] == self.seed and self._drawn[1] <= self.epoch:
            _, drawn, state = self._drawn
            generator.set_state(state)
        for _ in range(drawn, self.epoch):
            torch.randperm(self.rows, generator=generator, device="cpu")
        self._drawn = self.seed, self.epoch, generator.get_state()
        return torch.randperm(self.rows, generator=generator, device="cpu")

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Where the batches that are left begin and end in the order."""
        last = self.rows - (self.batch_size if self.drop_last else 1)
        for begin in range(self.samples_seen, last + 1, self.batch_size):
            yield begin, min(begin + self.batch_size, self.rows)

    def _share(self, batch: Tensor) -> tuple[Tensor, int]:
        """This rank's rows of a global batch, and how many of them are no padding."""
        share = batch[self.rank :: self.world_size]
        missing = -(-len(batch) // self.world_size) - len(share) if self.pad else 0
        return (torch.cat([share, batch[:missing]]) if missing else share), len(share)

    def _take(self, order: Tensor, epoch: int, begin: int, end: int) -> None:
        indices, real = self._share(order[begin:end])
        mask = torch.arange(len(indices), device="cpu") < real
        self.taken = Taken(indices, mask, epoch, end - begin)
        self.samples_seen = end

    def _end(self, epoch: int) -> None:
        self.epoch, self.samples_seen = epoch + 1, 0
        vars(self).pop("taken", None)


class Rows(list[int]):
    """The rows of a batch, which know their epoch."""

    def __init__(self, rows: Iterable[int], seed: int, epoch: int) -> None:
        super().__init__(rows)
        self.seed, self.epoch = seed, epoch


class _Rows(Rows):
    """Rows that tell the sampler that counted them when they are sent to a worker."""

    def __init__(self, rows: Iterable[int], seed: int, epoch: int, counted: Sampler | None) -> None:
        super().__init__(rows, seed, epoch)
        self._counted = counted

    def __reduce__(self) -> Any:
        if self._counted is not None:
            self._counted._shipped = True
        return Rows, (list(self), self.seed, self.epoch)


def _of_older(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state of before there were epochs in it: a generator's at the begin of one."""
    generator = torch.Generator()
    generator.set_state(state["begin"])
    seed, epoch = generator.initial_seed(), 0
    generator.manual_seed(seed)
    while not torch.equal(generator.get_state(), state["begin"]):
        torch.randperm(state["rows"], generator=generator, device="cpu")
        epoch += 1
        if epoch > 100_000:
            raise ValueError("state: expected the random state of an epoch; got another")
    seen = min(state["taken"] * state["batch_size"], state["rows"])
    numbers = {"seed": seed, "epoch": epoch, "samples_seen": seen}
    return {"rows": state["rows"], **numbers}
