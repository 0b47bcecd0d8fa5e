"""One call of a linear op as an object: its weight is a format, its activation a word."""

from __future__ import annotations

from typing import NamedTuple

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

    def check(self) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came."""
        self.weight.check_tensors()
        self.weight.check()
        for name, tensor in self.weight.tensors().items():
            if tensor is not None and tensor.device != self.x.device:
                checks.device(name, tensor, self.x)
        x, (n, k) = self.x, self.weight.shape
        act.check_name(self.activation, gated=False)
        checks.floating("x", x, self.weight.x_dtypes)
        if x.dim() == 0 or x.shape[-1] != k:
            raise ValueError(
                f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
            )
        if self.bias is not None:
            checks.shape("bias", self.bias, [n])
            checks.like("bias", self.bias, x)
        if self.residual is not None:
            checks.shape("residual", self.residual, [*x.shape[:-1], n])
            checks.like("residual", self.residual, x)

    def finish(self, z: Tensor) -> Tensor:
        """Bias, activation and residual on z = x W^T, in float32."""
        if self.bias is not None:
            z = z + self.bias.float()
        y = act.apply(self.activation, z)
        return y if self.residual is None else y + self.residual.float()
