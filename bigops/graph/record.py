"""What a verb (`fuse_`, `pack_`, `smooth_`, `compress_` ..) did to a model, left, and why."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bigops.timing import Ratio

_TINY = 0.01  # share of the model's bytes up to which a vector is not named by itself
_FEW = 8  # weights of one kind that get a line each


@dataclass(frozen=True)
class Done:
    """One layer that was swapped.

    ``speedup`` is old time / new time with its 95% interval, where ``example_inputs`` allowed to
    measure; ``why`` says what the decision rests on.
    """

    name: str
    what: str
    why: str
    bytes_before: int = 0
    bytes_after: int = 0
    density: float = 1.0
    us_before: float | None = None
    us_after: float | None = None
    speedup: Ratio | None = None

    def __str__(self) -> str:
        text = f"{self.name}: {self.what}"
        if self.bytes_before != self.bytes_after:
            text += f", {self.bytes_before:,} -> {self.bytes_after:,} bytes"
        return f"{text} ({self.why})"


@dataclass(frozen=True)
class Skipped:
    """One layer that stays as it was, and why."""

    name: str
    reason: str
    bytes: int = 0

    def __str__(self) -> str:
        return f"{self.name}: left as it is: {self.reason}"


@dataclass(frozen=True)
class Unseen:
    """Weights that are no linear layer's, at which the verb did not look.

    One parameter or buffer by name; or all the small vectors (biases, norms, counters) that
    modules of one class hold, with an empty name.
    """

    name: str
    kind: str  # class of the module that holds them
    tensors: int
    bytes: int
    share: float  # of the model's bytes


@dataclass(frozen=True)
class Record:
    """The outcome of one verb on one model; print it, or take `to_dict()`.

    Where the verb counted bytes, each byte of the model's parameters and buffers as they were
    belongs to one entry of ``done``, ``skipped`` or ``unseen``; `shares` sums them up.
    """

    verb: str
    done: list[Done] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unseen: list[Unseen] = field(default_factory=list)
    model_bytes: int = 0  # of parameters and buffers before, each storage once; 0: not counted
    decided: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        data = asdict(self)
        for entry in data["done"]:
            if entry["speedup"] is not None:
                entry["speedup"] = list(entry["speedup"])
        data["shares"] = self.shares()
        return data

    def plan(self) -> dict[str, Any]:
        """What was decided, as plain data for JSON: the config of each layer, choices resolved.

        ``compress_(fresh, record.plan())`` on a model with the same weights makes the same layers,
        to the bit at the same number of threads, and times nothing: ranks that an energy chose,
        the qparams of static activations, configs that fell back and what was left are in it.

        Raises:
            ValueError: the record of another verb than `compress_`.
        """
        if self.decided is None:
            raise ValueError(f"plan: expected a record of compress_; got one of {self.verb}")
        return self.decided

    def shares(self) -> dict[str, float]:
        """Shares of the model's bytes that were compressed, looked at and left, not looked at."""
        whole = self.model_bytes or 1
        return {
            "done": sum(entry.bytes_before for entry in self.done) / whole,
            "skipped": sum(entry.bytes for entry in self.skipped) / whole,
            "unseen": sum(entry.bytes for entry in self.unseen) / whole,
        }

    def reason(self, name: str) -> str | None:
        """Why the layer ``name`` was left, or None if it was not."""
        return next((entry.reason for entry in self.skipped if entry.name == name), None)

    def __str__(self) -> str:
        head = f"{self.verb}: {len(self.done)} done, {len(self.skipped)} left"
        if self.model_bytes:
            done, left, unseen = self.shares().values()
            head += (
                f"; of {self.model_bytes:,} bytes {done:.1%} done, {left:.1%} left, {unseen:.1%} "
                "not looked at"
            )
        lines = [head, *map(str, self.done), *map(str, self.skipped), *self._unseen_lines()]
        return "\n  ".join([*lines, *self.notes])

    def _unseen_lines(self) -> Iterator[str]:
        for kind, group in groupby(self.unseen, lambda entry: entry.kind):
            entries = list(group)
            several = len(entries) > _FEW
            for entry in [] if several else entries:
                what = entry.name or f"{entry.tensors} small vectors"
                yield f"{what}: not looked at: {kind}, {entry.bytes:,} bytes ({entry.share:.1%})"
            if several:
                names = ", ".join(e.name or f"{e.tensors} small vectors" for e in entries)
                size, share = sum(e.bytes for e in entries), sum(e.share for e in entries)
                yield f"{kind}: not looked at: {size:,} bytes ({share:.1%}): {names}"


class Account(NamedTuple):
    """The bytes of a model's parameters and buffers, each storage counted once."""

    layers: dict[str, int]  # below each of the paths that were asked for
    unseen: list[Unseen]  # all the rest
    total: int


def account(model: nn.Module, paths: Iterable[str]) -> Account:
    """Lay every byte of a model's parameters and buffers to one layer or one other entry.

    Args:
        paths: of the layers that a verb looked at. What several hold is laid to the first holder.
    """
    layers = dict.fromkeys(paths, 0)
    named: dict[str, list[tuple[str, int]]] = {}
    small: dict[str, list[int]] = {}
    seen: set[tuple[int, int]] = set()
    loose: list[tuple[str, str, Tensor, int]] = []
    for path, module in model.named_modules():
        owner = _owner(path, layers)
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or is_lazy(tensor):  # which has no memory yet
                continue
            key, size = _storage(tensor)
            if key in seen:
                continue
            seen.add(key)
            if owner is not None:
                layers[owner] += size
            else:
                name = f"{path}.{leaf}" if path else leaf
                loose.append((type(module).__name__, name, tensor, size))
    total = sum(layers.values()) + sum(size for *_, size in loose)
    for kind, name, tensor, size in loose:
        named.setdefault(kind, [])
        if tensor.dim() > 1 or size > _TINY * total:
            named[kind].append((name, size))
        else:
            small.setdefault(kind, []).append(size)
    unseen = []
    for kind, entries in named.items():
        unseen += [Unseen(n, kind, 1, size, size / (total or 1)) for n, size in entries]
        if kind in small:
            size = sum(small[kind])
            unseen.append(Unseen("", kind, len(small[kind]), size, size / (total or 1)))
    return Account(layers, unseen, total)


def class_name(module: nn.Module) -> str:
    """The class of a module, with its own module unless that is torch's or this package's."""
    cls = type(module)
    if cls.__module__.startswith(("torch.nn.", "bigops.nn.")):
        return cls.__qualname__
    return f"{cls.__module__}.{cls.__qualname__}"


def _storage(tensor: Tensor) -> tuple[tuple[int, int], int]:
    """What tells a tensor's memory from that of others, and its bytes."""
    size = tensor.element_size() * tensor.numel()
    try:
        storage = tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a layout that has none
        return (id(tensor), 0), size
    # parameters may be slices of one storage, and an expanded one is smaller than it looks
    return (storage._cdata, int(tensor.storage_offset())), min(size, storage.nbytes())


def _owner(path: str, layers: dict[str, int]) -> str | None:
    """The nearest of ``layers`` at or above ``path``."""
    while path not in layers:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path
