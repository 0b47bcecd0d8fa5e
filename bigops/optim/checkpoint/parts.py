"""The objects whose states a file holds: reading a state, checking one, loading all or nothing."""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from bigops.files import FormatError
from bigops.optim.checkpoint.undo import undo_of

# What wraps a module, and under which name it holds it.
_WRAPPERS: dict[str, tuple[type[nn.Module], ...]] = {
    "_orig_mod": (OptimizedModule,),
    "module": (DistributedDataParallel, DataParallel),
}


def state_of(part: Any) -> Any:
    """A part's ``state_dict()``, the keys of a model without those of what wraps it."""
    state = part.state_dict()
    names = _plain_names(part, state) if isinstance(part, nn.Module) else {}
    return _renamed(state, names) if names else state


def load_all(
    where: str | os.PathLike[str],
    parts: Mapping[str, Any],
    states: Mapping[str, Any],
    undo: contextlib.ExitStack,
) -> None:
    """Load the states that are named; ``undo`` gets what sets them back.

    Raises:
        FormatError: a state that is not there or does not fit; ``undo`` has to be closed then.
    """
    missing = sorted(set(parts) - set(states))
    if missing:
        raise FormatError(f"parts: {where} holds {sorted(states)}, not {missing}")
    fitting = dict(states)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            fitting[name] = _fitted(f"{where}: {name}", part, states[name])
    for name, part in parts.items():
        undo.callback(undo_of(part))
        try:
            part.load_state_dict(fitting[name])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # what a part refuses may raise nearly anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise FormatError(f"{where}: {name}: {kind}{error}") from error


def _wraps(module: nn.Module | None) -> str | None:
    """The name under which a wrapper holds its module."""
    for name, classes in _WRAPPERS.items():
        if isinstance(module, classes):
            return name
    return None


def _plain_names(model: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a state and paths of modules without the names of wrappers; none without these."""
    if not any(map(_wraps, model.modules())):
        return {}
    inside = [path for path, module in model.named_modules(remove_duplicate=False) if path]
    # A wrapper has the plain path of what it holds, whose version counts: the later one stays.
    return {key: _plain(model, key) for key in [*inside, *state]}


def _plain(model: nn.Module, key: str) -> str:
    module: nn.Module | None = model
    kept = []
    for name in key.split("."):
        if name != _wraps(module):
            kept.append(name)
        module = module._modules.get(name) if module is not None else None
    return ".".join(kept)


def _renamed(state: Mapping[str, Any], names: Mapping[str, str]) -> Any:
    """A state, and the versions of modules in it, under other keys and paths."""
    new: Any = collections.OrderedDict((names.get(key, key), v) for key, v in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        new._metadata = {names.get(path, path): held for path, held in versions.items()}
    return new


def _fitted(where: str, module: nn.Module, state: Any) -> Any:
    """A state under the module's own keys. ``load_state_dict`` copies before it complains."""
    own = module.state_dict()
    if not isinstance(state, Mapping):
        raise FormatError(f"{where}: expected a state by names; got {type(state).__name__}")
    names = _plain_names(module, own)
    if names and set(state) != set(own):  # a file of before has the keys as they are
        state = _renamed(state, {plain: key for key, plain in names.items()})
    if missing := set(own) - set(state):  # others write a tied weight once
        held = module.state_dict(keep_vars=True)
        known = {id(held[key]): value for key, value in state.items() if key in held}
        tied = {key: known[id(held[key])] for key in missing if id(held[key]) in known}
        state = {**state, **tied} if tied else state
    for key in sorted(set(own) ^ set(state)):
        place = "the file" if key in state else "the model"
        raise FormatError(f"{where}: only {place} has {key!r}")
    for key, value in own.items():
        if not isinstance(value, Tensor):
            continue
        got = state[key]
        if not isinstance(got, Tensor):
            raise FormatError(f"{where}: {key} expected a tensor; got {type(got).__name__}")
        if value.shape != got.shape:
            raise FormatError(
                f"{where}: {key} expected shape {tuple(value.shape)}; got {tuple(got.shape)}"
            )
        if value.dtype != got.dtype and not (value.is_floating_point() and got.is_floating_point()):
            raise FormatError(f"{where}: {key} expected {value.dtype}; got {got.dtype}")
    return state
