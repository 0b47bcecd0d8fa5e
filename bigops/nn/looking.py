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

from bigops.nn.atomic import CONTAINERS, Before, is_ours


@contextlib.contextmanager
def looking(*models: nn.Module) -> Iterator[None]:
    """Run or trace ``models`` inside; afterwards they and the random states are as before.

    Inside, the modules hold copies of their buffers, of tensors that are plain attributes, in lists
    and dictionaries too, and of random generators: what forward writes in place goes there. The
    originals are never written, and come back together with all other attributes (`Before`), also
    when the model raises. Parameters are not copied. Layers of `bigops.nn` keep their buffers, for
    their forward never writes one, and the packs that they made.

    The random states of torch on the CPU and on every GPU in use, of `random` and of `numpy.random`
    are as before at the end, whatever another thread drew meanwhile.
    """
    before, states = Before(*models, layers=False), _random_states()
    try:
        memo: dict[int, Any] = {}
        for model in models:
            for module in model.modules():
                if not is_ours(module):
                    _substitute(vars(module), memo)
        yield
    finally:
        before.restore()
        for restore, state in states:
            restore(state)


def _substitute(value: Any, memo: dict[int, Any]) -> Any:
    """What stands for ``value`` meanwhile; what lies in a plain container is exchanged there."""
    if type(value) in CONTAINERS:
        if id(value) not in memo:
            memo[id(value)] = value
            if isinstance(value, dict):
                value.update({key: _substitute(item, memo) for key, item in value.items()})
            elif isinstance(value, list | deque):
                items = [_substitute(item, memo) for item in value]
                value.clear()
                value.extend(items)
        return value
    if type(value) is tuple:
        return tuple(_substitute(item, memo) for item in value)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        # A non-leaf has no deep copy; one memo keeps views of one storage together.
        kept = value if value.is_leaf else value.detach()
        return copy.deepcopy(kept, memo)
    if isinstance(value, torch.Generator):
        return memo.setdefault(id(value), value.clone_state())
    if isinstance(value, np.random.Generator | np.random.RandomState | random.Random):
        return copy.deepcopy(value, memo)
    return value


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
