"""What the options of `FusedOptimizer` may be: torch's names, and errors of torch's classes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class RefusedError(ValueError, RuntimeError):
    """What is not served; of both classes, since torch.optim raises now one, now the other."""


def unordered(params: Any) -> TypeError:
    """The error of parameters in a set."""
    return TypeError(
        f"params: expected an ordered collection; got a {type(params).__name__}, whose order is "
        "another in each run, and with it whose state is whose"
    )


def check_number(name: str, value: Any, low: float, below: float = math.inf) -> None:
    """Raise unless ``low <= value < below``.

    Raises:
        ValueError: it is not; RefusedError for a tensor of several elements.
        TypeError: no real number.
    """
    if isinstance(value, Tensor) and value.numel() != 1:
        raise RefusedError(f"{name}: expected one element; got shape {list(value.shape)}")
    try:
        number = None if isinstance(value, str) else float(value)
    except (TypeError, RuntimeError):  # RuntimeError: a complex tensor
        number = None
    if number is None:
        raise TypeError(f"{name}: expected a number; got {value!r}")
    if not low <= number < below:
        limit = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"{name}: expected at least {low:g}{limit}; got {value}")


def check_flags(group: dict[str, Any]) -> None:
    """Raise `RefusedError` for flags that contradict each other or ask for what is not served."""
    if group["fused"] and group["foreach"]:
        raise RefusedError("fused, foreach: expected at most one of them; got True for both")
    for name, instead in (
        ("capturable", "fused_adamw(norm=) is written for capture in a CUDA graph"),
        ("differentiable", "torch.optim has it"),
    ):
        if group.get(name):
            raise RefusedError(f"{name}: expected False, {instead}; got {group[name]}")


def check_tensors(group: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raise `RefusedError` for tensors beside ``foreach=True``, as torch.optim.AdamW does."""
    for name in names:
        value = group[name]
        held = any(isinstance(v, Tensor) for v in (value if isinstance(value, tuple) else [value]))
        if held and group["foreach"]:
            raise RefusedError(f"{name}: expected numbers beside foreach=True; got a tensor")


def refuse_capture() -> None:
    """Raise `RefusedError` while a CUDA graph is captured: it would replay one step's counter."""
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RefusedError(
            "step: expected a call outside the capture of a CUDA graph (capturable=True is not "
            "served; fused_adamw(norm=) is written for capture); got one inside"
        )
