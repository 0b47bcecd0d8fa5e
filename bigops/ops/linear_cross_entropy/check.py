"""Which arguments `linear_cross_entropy` takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bigops.formats import checks

REDUCTIONS = ("mean", "sum", "none")


def check_options(
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Raise ValueError or TypeError for a number or a name that the op does not take."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | torch.SymInt):
        raise TypeError(f"ignore_index: expected an int; got {type(ignore_index).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1; got {label_smoothing}")
    if not (0 <= z_loss < math.inf):
        raise ValueError(f"z_loss: expected a finite number of at least 0; got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap: expected a positive finite number or None; got {softcap}")


def check(problem: Any) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came.

    ``problem`` is a `schema.Problem`, its reduction a word.
    """
    x, weight, target, bias, class_weight, reduction, ignore_index, *numbers = problem
    label_smoothing, z_loss, softcap = numbers
    check_options(reduction, ignore_index, label_smoothing, z_loss, softcap or None)
    checks.floating("x", x)
    checks.matrix("weight", weight)
    classes, features = weight.shape
    if x.dim() == 0 or checks.differ(x.shape[-1], features):
        raise ValueError(
            f"x: expected shape [.., {features}] for a weight of "
            f"{list(weight.shape)}; got {list(x.shape)}"
        )
    checks.like("weight", weight, x)
    checks.dtype("target", target, torch.int64)
    checks.shape("target", target, x.shape[:-1])
    checks.device("target", target, x)
    if bias is not None:
        checks.shape("bias", bias, [classes])
        checks.like("bias", bias, x)
    if class_weight is not None:
        checks.shape("class_weight", class_weight, [classes])
        checks.floating("class_weight", class_weight)
        checks.device("class_weight", class_weight, x)


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is neither a class nor ``ignore_index``."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"target: expected classes 0 to {classes - 1} or ignore_index {ignore_index}; "
            f"got {int(target[bad][0])}"
        )
