"""Nested tensors: the op on their values, of the strided layout on their rows side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_values(
    call: Callable[..., Tensor],
    x: Any,
    arguments: tuple[Any, ...],
    k: int,
    bias: Tensor | None,
    residual: Any,
    activation: str,
) -> Tensor:
    """``call`` on x [B, j, .., K] where j is jagged, and a residual that is jagged alike.

    `nn.TransformerEncoder` hands the strided layout on to its layers; it has no residual here.

    Raises:
        ValueError: K is jagged, or the residual is not as x is.
        TypeError: a strided x beside a residual.
    """
    if x.layout is torch.strided:
        if residual is not None:
            raise TypeError(
                "x: expected a nested tensor of the jagged layout beside a residual; got a strided"
            )
        rows = x.unbind()
        if not rows or any(row.shape[1:] != rows[0].shape[1:] or row.dim() < 2 for row in rows):
            raise ValueError(
                "x: expected at least one row, and the second dimension to be the jagged one"
            )
        y = call(torch.cat(rows), arguments, k, bias, None, activation)
        return torch.nested.as_nested_tensor(list(y.split([row.shape[0] for row in rows])))
    if x._ragged_idx != 1 or x.dim() < 3:
        raise ValueError(
            f"x: expected the second of at least 3 dimensions to be the jagged one; got {x.shape}"
        )
    if residual is not None:
        if not residual.is_nested or residual.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"residual: expected a tensor with the offsets of x, {[*x.shape[:-1], 'N']}; "
                f"got {list(residual.shape)}"
            )
        residual = residual.values()
    y = call(x.values(), arguments, k, bias, residual, activation)
    return torch.nested.nested_tensor_from_jagged(y, x.offsets(), x.lengths())
