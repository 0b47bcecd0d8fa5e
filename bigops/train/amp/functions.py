"""Decorators that say in which dtype a function of the user's own runs under O1 and O4."""

from __future__ import annotations

import functools
from typing import Any

import torch

from bigops.train.amp.casting import Function, cast, widest


def half_function(function: Function) -> Function:
    """``function`` with floating arguments in autocast's dtype, while autocast is on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        kind = _autocast()
        if kind is not None:
            dtype = torch.get_autocast_dtype(kind)
            args, kwargs = cast(args, dtype), cast(kwargs, dtype)
        return function(*args, **kwargs)

    return run


def float_function(function: Function) -> Function:
    """``function`` with floating arguments in float32 and no autocast in it, while that is on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        kind = _autocast()
        if kind is None:
            return function(*args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(*cast(args, torch.float32), **cast(kwargs, torch.float32))

    return run


def promote_function(function: Function) -> Function:
    """``function`` with floating arguments in the widest dtype among them, while autocast is on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        dtype = None if _autocast() is None else widest((args, kwargs))
        if dtype is not None:
            args, kwargs = cast(args, dtype), cast(kwargs, dtype)
        return function(*args, **kwargs)

    return run


def _autocast() -> str | None:
    return next((kind for kind in ("cuda", "cpu") if torch.is_autocast_enabled(kind)), None)
