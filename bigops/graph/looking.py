"""Looking at a model changes nothing: what a run or a trace of it moves is as before afterwards."""

from __future__ import annotations

import contextlib
import copy
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigops.graph.atomic import CONTAINERS, LEAVES, Before, is_of, is_ours


@contextlib.contextmanager
def looking(*models: nn.Module, timed: bool = False) -> Iterator[None]:
    """Run or trace ``models`` inside; afterwards they and the random states are as before.

    Inside, the modules hold copies of their buffers, of tensors and arrays that are plain
    attributes, in lists, dictionaries and objects too (`Before`), and of random generators: what
    forward writes in place goes there. The originals are never written, and come back together with
    all other attributes, also when the model raises. A Parameter is copied before the first write
    to it, and written back: a momentum encoder follows its model in forward. Layers of `bigops.nn`
    keep their buffers, for their forward never writes one, and the packs that they made.

    The random states of torch on the CPU and on every GPU in use, of `random` and of `numpy.random`
    are as before at the end, whatever another thread drew meanwhile.

    Args:
        models: what is looked at.
        timed: whether calls are timed inside. What watches over the Parameters takes microseconds
            an operation, and stays away then; the same calls should have run without before.
    """
    before, states = Before(*models, layers=False), _random_states()
    journal = _Journal([data for _, data in before.data])
    try:
        _exchange(before.modules, before.homes)
        with contextlib.nullcontext() if timed else journal:
            yield
    finally:
        pressed: KeyboardInterrupt | None = None
        while True:
            try:
                before.restore()
                journal.restore()
                for restore, state in states:
                    restore(state)
                break
            except KeyboardInterrupt as interrupt:  # all of it is done anew, then it is raised
                pressed = interrupt
        if pressed is not None:
            raise pressed


def _exchange(modules: list[nn.Module], packages: set[str]) -> None:
    """Put copies in the place of what forward may write to.

    Args:
        modules: whose attributes are gone through; layers of `bigops.nn` are left.
        packages: whose objects are looked into (`bigops.graph.atomic.homes`).
    """
    memo: dict[int, Any] = {}
    pending: list[Any] = [vars(module) for module in modules if not is_ours(module)]
    while pending:  # a structure may be deeper than Python calls may be
        held = pending.pop()
        if id(held) in memo:
            continue
        memo[id(held)] = held
        if isinstance(held, dict):
            held.update({key: _copy(item, memo, packages, pending) for key, item in held.items()})
        elif isinstance(held, list | deque):
            items = [_copy(item, memo, packages, pending) for item in held]
            held.clear()
            held.extend(items)


def _copy(value: Any, memo: dict[int, Any], packages: set[str], pending: list[Any]) -> Any:
    """What stands for ``value`` meanwhile; what is a container itself becomes ``pending``."""
    if type(value) in CONTAINERS:
        pending.append(value)
        return value
    if isinstance(value, tuple):
        new = [_copy(item, memo, packages, pending) for item in value]
        if type(value) is tuple:
            return tuple(new)
        return value._make(new) if hasattr(value, "_make") else value  # a named one
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        # A non-leaf has no deep copy; one memo keeps views of one storage together.
        kept = value if value.is_leaf else value.detach()
        return copy.deepcopy(kept, memo)
    if isinstance(value, torch.Generator):
        return memo.setdefault(id(value), value.clone_state())
    copied = np.ndarray | np.random.Generator | np.random.RandomState | random.Random
    if isinstance(value, copied):
        return copy.deepcopy(value, memo)
    if not isinstance(value, (*LEAVES, nn.Module)) and is_of(value, packages):
        pending.append(vars(value))
    return value


class _Journal(TorchDispatchMode):
    """Keeps what stands in ``tensors`` before the first write to it."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._storages = {storage_of(t): t for t in tensors}
        self._kept: dict[int | None, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        for tensor in written(func, args, kwargs or {}):
            key = storage_of(tensor)
            if key is not None and key in self._storages and key not in self._kept:
                whole = self._storages[key]
                self._kept[key] = (whole, whole.clone())
        return func(*args, **(kwargs or {}))

    def restore(self) -> None:
        """Write back what was kept."""
        with torch.no_grad():
            for tensor, kept in self._kept.values():
                tensor.copy_(kept)


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a call of an operator writes in place."""
    if not func._schema.is_mutable:
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        for t in value if isinstance(value, list | tuple) else [value]:
            if isinstance(t, Tensor):
                yield t


def storage_of(tensor: Tensor) -> int | None:
    """What tells one storage from another, or None of a tensor that has none."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


def _random_states() -> list[tuple[Any, Any]]:
    """Functions that set a random state, and the state to set."""
    states: list[tuple[Any, Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_initialized():
        states += [(g.set_state, g.get_state()) for g in torch.cuda.default_generators]
    return states
