"""Sharding rules of the norms; `bigops.parallel.sharding` says what they allow."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from bigops.ops.norm.schema import ACT_QUANT, NORM, WITH_SUM, Form
from bigops.ops.sharding import Rule, Rules, if_given


def rules_of() -> Iterator[tuple[Form, Rules]]:
    """Each of the ops, and its rules."""
    for form in (NORM, WITH_SUM, ACT_QUANT):
        yield form, functools.partial(_rules, form)


def _rules(
    form: Form, x: Any, weight: Any, bias: Any, residual: Any, eps: float, kind: str, *flags: bool
) -> list[Rule]:
    """Rows are independent: x and residual split by any dimension but the last, as the results."""
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    parameters = [if_given(weight, whole), if_given(bias, whole)]
    placements = [whole, *(Shard(d) for d in range(x.ndim - 1))]
    return [
        (
            # an empty tensor stands for what is not kept, and cannot be split
            [rows if kept else whole for kept in form.kept(*flags)],
            [rows, *parameters, if_given(residual, rows), *[None] * (2 + len(flags))],
        )
        for rows in placements
    ]
