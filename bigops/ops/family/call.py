"""One call of a linear op as an object: its weight is a format, its activation a word."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.formats.base import Format
from bigops.ops import activation as act


class Call(NamedTuple):
    """The arguments of ``y = act(x W^T + bias) + residual``."""

    x: Tensor  # [.., K]
    weight: Format  # [N, K]
    bias: Tensor | None = None  # [N]
    residual: Tensor | None = None  # [.., N]
    activation: str = "none"

    @property
    def rows(self) -> int:
        """M, the rows of x."""
        return self.x.shape[:-1].numel()

    @property
    def code(self) -> int:
        """The activation as kernels take it."""
        return act.CODES[self.activation]

    @property
    def n(self) -> int:
        """Columns of the result: the rows of W, of a gated pair half of them."""
        return self.weight.n // 2 if self.activation in act.GATED else self.weight.n

    @property
    def dtype(self) -> torch.dtype:
        """In which the reference computes."""
        return self.x.dtype if self.weight.PLAIN else torch.float32

    def check(self) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came."""
        self.weight.check_tensors()
        self.weight.check()
        self.weight.check_beside(self.x)
        x, (n, k) = self.x, self.weight.shape
        act.check_name(self.activation, self.weight.GATED)
        if x.dim() == 0 or checks.differ(x.shape[-1], k):
            raise ValueError(
                f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
            )
        if self.activation in act.GATED and n % 2:
            raise ValueError(
                f"weight: {self.activation} needs an even number of rows (gate, then up); got {n}"
            )
        if self.bias is not None:
            checks.shape("bias", self.bias, [n])
            checks.like("bias", self.bias, x)
        if self.residual is not None:
            checks.shape("residual", self.residual, [*x.shape[:-1], self.n])
            checks.like("residual", self.residual, x)

    def kept(self) -> dict[str, Tensor]:
        """What a forward keeps, the pre-activation in it, as a differentiable expression."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.weight.kept(self.x.to(self.dtype), bias)

    def biased(self, z: Tensor) -> Tensor:
        """x W^T with the bias, the pre-activation."""
        return z if self.bias is None else z + self.bias.to(self.dtype)

    def finish(self, z: Tensor) -> Tensor:
        """Activation and residual on the pre-activation, in the dtype of the computation."""
        y = act.epilogue(self.activation, z)
        return y if self.residual is None else y + self.residual.to(self.dtype)
