"""The processes that save and load one state together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist

from bigops.files import FormatError

# What an error of another rank is raised as.
_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (FormatError, OSError, TypeError, ValueError)
}


class Ranks(NamedTuple):
    """The default process group; a world of one where there is none."""

    rank: int
    size: int

    @classmethod
    def now(cls) -> Ranks:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    def gather(self, value: Any) -> list[Any]:
        """What each rank has, on all of them."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def of_first(self, value: Any) -> Any:
        """What the first rank has, on all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks where one has an error: its own, or one of the same kind."""
        told = None if error is None else (type(error).__name__, str(error))
        all_told = self.gather(told)
        if error is not None:
            raise error
        for rank, one in enumerate(all_told):
            if one is not None:
                kind, words = one
                raise _KINDS.get(kind, RuntimeError)(f"rank {rank}: {words}")
