"""Which arguments `linear_cross_entropy` takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    p = problem
    options = p.reduction, p.ignore_index, p.label_smoothing, p.z_loss, p.softcap or None
    check_options(*options)
    x, classes, tokens = p.x, *_head("", p.x, p.weight, p.bias)
    checks.device("target", p.target, x)
    if p.target.is_floating_point():
        checks.shape("target", p.target, [*tokens, classes])
        if p.ignore_index >= 0:
            raise ValueError(
                "ignore_index: expected a number below 0 with class probabilities, which ignore "
                f"none; got {p.ignore_index}"
            )
        if p.target.requires_grad:
            raise ValueError(
                "target: expected probabilities that need no gradient, which is not made; got "
                "requires_grad=True"
            )
    else:
        checks.dtype("target", p.target, torch.int64)
        checks.shape("target", p.target, tokens)
    if p.class_weight is not None:
        checks.shape("class_weight", p.class_weight, [classes])
        checks.floating("class_weight", p.class_weight)
        checks.device("class_weight", p.class_weight, x)
    if p.teacher_x is not None:
        _check_teacher(p, classes, tokens)


def _head(of: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[int, Sequence[int]]:
    """(classes, shape of the tokens) of a head that fits; ``of`` stands before its names."""
    checks.floating(f"{of}x", x)
    checks.matrix(f"{of}weight", weight)
    classes, features = weight.shape
    if x.dim() == 0 or checks.differ(x.shape[-1], features):
        raise ValueError(
            f"{of}x: expected shape [.., {features}] for a weight of "
            f"{list(weight.shape)}; got {list(x.shape)}"
        )
    checks.like(f"{of}weight", weight, x, f"{of}x")
    if bias is not None:
        checks.shape(f"{of}bias", bias, [classes])
        checks.like(f"{of}bias", bias, x, f"{of}x")
    return classes, x.shape[:-1]


def _check_teacher(p: Any, classes: int, tokens: Sequence[int]) -> None:
    if p.teacher_weight is None:
        raise TypeError("teacher_weight: expected a torch.Tensor; got None")
    theirs, of = _head("teacher_", p.teacher_x, p.teacher_weight, p.teacher_bias)
    if checks.differ(theirs, classes):
        raise ValueError(
            f"teacher_weight: expected {classes} classes, those of weight; got {theirs}"
        )
    if len(of) != len(tokens) or any(map(checks.differ, of, tokens)):
        raise ValueError(
            f"teacher_x: expected shape {[*tokens, '..']}, the tokens of x; "
            f"got {list(p.teacher_x.shape)}"
        )
    checks.device("teacher_x", p.teacher_x, p.x)
    plain = p.class_weight is None and not (p.label_smoothing or p.z_loss or p.softcap)
    if not plain or p.target.is_floating_point():
        raise ValueError(
            "teacher_x: expected no class_weight, label_smoothing, z_loss, softcap or class "
            "probabilities beside a teacher"
        )
    check_teacher_options(p.temperature, p.beta)


def check_teacher_options(temperature: float, beta: float) -> None:
    """Raise ValueError for numbers that a divergence from a teacher does not take."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive finite number; got {temperature}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta: expected at least 0 and below 1; got {beta}")


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is neither a class nor ``ignore_index``."""
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"target: expected classes 0 to {classes - 1} or ignore_index {ignore_index}; "
            f"got {int(target[bad][0])}"
        )
