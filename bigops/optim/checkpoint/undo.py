"""Setting an object back to what it was before a state was loaded into it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bigops.optim.saved_states import restorer


def undo_of(part: Any) -> Callable[[], None]:
    """A function that sets an object back to what it is now."""
    if isinstance(part, nn.Module):
        return _undo_module(part)
    if isinstance(part, Optimizer):  # they take new states and groups, and write into no old one
        return _undo_optimizer(part)
    own = getattr(part, "__dict__", {})  # not of a class with __slots__
    state, kept = copy.deepcopy(part.state_dict()), dict(own)

    def undo() -> None:
        with contextlib.suppress(Exception):  # one that refuses its own state has its attributes
            part.load_state_dict(state)  # what lies deeper
        own.clear()
        own.update(kept)

    return undo


def _undo_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    kept, restore = dict(vars(optimizer)), restorer(optimizer)

    def undo() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(kept)
        restore()

    return undo


def _undo_module(module: nn.Module) -> Callable[[], None]:
    tables = [
        (table, dict(table)) for m in module.modules() for table in (m._parameters, m._buffers)
    ]
    tensors = {id(t): t for _, table in tables for t in table.values() if t is not None}
    # On the CPU, since a GPU that holds a model in training has no room for two.
    values = [(t, t.data, t.detach().to("cpu", copy=True)) for t in tensors.values()]
    extra = [
        (m, copy.deepcopy(m.get_extra_state()))
        for m in module.modules()
        if type(m).get_extra_state is not nn.Module.get_extra_state
    ]

    def undo() -> None:
        for table, old in tables:
            table.clear()
            table.update(old)  # type: ignore[arg-type]
        with torch.no_grad():
            for t, data, value in values:
                if t.data_ptr() != data.data_ptr():
                    t.data = data
                if not torch.equal(t.cpu(), value):
                    t.copy_(value)
        for m, state in extra:
            m.set_extra_state(state)

    return undo
