"""Random cases of the norms, their float64 truth and error scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from tests.support.tolerance import bound, check

KINDS = ("layer", "rms")


@dataclass
class NormCase:
    """Inputs of one call, as the ops take them."""

    x: Tensor  # [.., K]
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    kind: str = "layer"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of the schema."""
        return self.x, self.weight, self.bias, self.residual

    @property
    def options(self) -> dict[str, Any]:
        """The others, as the public functions take them."""
        return {"eps": self.eps, "kind": self.kind}

    def to(self, dtype: torch.dtype) -> NormCase:
        """All tensors in a dtype."""
        x, *others = (None if t is None else t.to(dtype) for t in self.tensors)
        assert x is not None
        weight, bias, residual = others
        return replace(self, x=x, weight=weight, bias=bias, residual=residual)

    def plain(self) -> Tensor:
        """By torch's own norms, as a user writes it."""
        k = [self.x.shape[-1]]
        v = self.x if self.residual is None else self.x + self.residual
        if self.kind == "layer":
            return F.layer_norm(v, k, self.weight, self.bias, self.eps)
        y = F.rms_norm(v, k, self.weight, self.eps)
        return y if self.bias is None else y + self.bias

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """(y, sum, scale) in float64; scale: what the last steps act on.

        That a row's mean is taken off exactly is part of what is tested: it is not in the scale.
        """
        wide = self.to(torch.float64)
        v = wide.x if wide.residual is None else wide.x + wide.residual
        left = v - v.mean(-1, keepdim=True) if self.kind == "layer" else v
        factor = torch.rsqrt(left.square().mean(-1, keepdim=True) + self.eps)
        size = left.abs()
        if wide.residual is not None:  # the sum is rounded to float32
            size = size + wide.x.abs() + wide.residual.abs()
        scale = size * factor
        if wide.weight is not None:
            scale = scale * wide.weight.abs()
        if wide.bias is not None:
            scale = scale + wide.bias.abs()
        return wide.plain(), v, scale

    def call(self) -> Tensor:
        """By the public function."""
        return bigops.norm(*self.tensors, **self.options)

    def check(self, y: Tensor, what: str = "y") -> None:
        """Hold a norm to the rule."""
        truth, _, scale = self.truth()
        check(y, truth, self.plain().to(self.x.dtype), scale, what=what)

    def check_sum(self, total: Tensor) -> None:
        """Hold x + residual to the rule."""
        assert self.residual is not None
        _, truth, _ = self.truth()
        size = self.x.double().abs() + self.residual.double().abs()
        check(total, truth, self.x + self.residual, size, what="sum")

    def check_quantised(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        """Hold the u8 of finite rows to the truth: one step of theirs beside float32's rule.

        Half a step is the rounding of a number, half that of the zero point, where the range ends.
        """
        assert (values.dtype, scale.dtype, zero_point.dtype) == (
            torch.uint8,
            torch.float32,
            torch.int32,
        )
        assert values.shape == self.x.shape
        assert scale.shape == zero_point.shape == self.x.shape[:-1]
        if not self.x.numel():
            return
        truth, _, size = self.truth()
        step = scale.double().unsqueeze(-1)
        found = (values.double() - zero_point.double().unsqueeze(-1)) * step
        plain = self.to(torch.float32).plain()
        allowed = step * (1 + 1e-5) + bound(truth, plain, size)
        error = (found - truth).abs()
        assert bool((error <= allowed).all()), f"{float((error / allowed).max())} of the allowed"


def make(
    lead: Sequence[int],
    k: int,
    dtype: torch.dtype = torch.float32,
    *,
    kind: str = "layer",
    weight: bool = True,
    bias: bool = True,
    residual: bool = False,
    wide: bool = False,
    mean: float = 0.0,
    eps: float = 1e-5,
) -> NormCase:
    """A random case; ``wide``: weight and bias in float32; ``mean`` of the rows of x."""
    own = torch.float32 if wide else dtype
    return NormCase(
        (torch.randn(*lead, k) + mean).to(dtype),
        (torch.rand(k) + 0.5).to(own) if weight else None,
        torch.randn(k).to(own) if bias else None,
        torch.randn(*lead, k).to(dtype) if residual else None,
        eps,
        kind,
    )
