"""Random cases of rotary embeddings, their float64 truth and error scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigops.ops.rotary import rotary
from tests.support.tolerance import check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass
class Case:
    """Inputs of one call."""

    x: Tensor  # [B, H, T, D]
    cos: Tensor  # [T, R], [B or 1, T, R] or [B or 1, 1, T, R]
    sin: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of the schema."""
        return self.x, self.cos, self.sin

    def run(self) -> Tensor:
        return rotary(self.x, self.cos, self.sin)

    def plain(self) -> Tensor:
        """As transformers writes it, in x's dtype."""
        return _turned(self.x, *(_by_head(t).to(self.x.dtype) for t in (self.cos, self.sin)))

    def check(self, y: Tensor, what: str = "output") -> None:
        """Hold a result to the rule."""
        x, cos, sin = (t.double() for t in self.tensors)
        cos, sin = _by_head(cos), _by_head(sin)
        size = _turned(x.abs(), cos.abs(), sin.abs(), sign=1)
        check(y, _turned(x, cos, sin), self.plain(), size, what=what)
        r = cos.shape[-1]
        assert torch.equal(y[..., r:], self.x[..., r:]), "columns that do not turn are copied"
        assert y.transpose(1, 2).is_contiguous()


def _by_head(table: Tensor) -> Tensor:
    return table.unsqueeze(1) if table.dim() == 3 else table


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int = -1) -> Tensor:
    r = cos.shape[-1]
    a, b, rest = x.split([r // 2, r // 2, x.shape[-1] - r], -1)
    return torch.cat([torch.cat([a, b], -1) * cos + torch.cat([sign * b, a], -1) * sin, rest], -1)


def make(
    sizes: tuple[int, int, int, int, int] = (2, 3, 5, 16, 16),
    dtype: str = "f32",
    *,
    wide: bool = False,
    lead: tuple[int, ...] = (1,),
) -> Case:
    """x [B, H, T, D] is a view of a merged projection; R is the last size, ``lead`` of tables.

    ``wide``: cos and sin in float32. Their numbers are no angle's: each column has its own.
    """
    b, heads, t, d, r = sizes
    merged = torch.randn(b, t, (heads + 2) * d).to(DTYPES[dtype])
    x = merged[..., d : (heads + 1) * d].unflatten(-1, (heads, d)).transpose(1, 2)
    cos, sin = (torch.randn(*lead, t, r).to(torch.float32 if wide else x.dtype) for _ in range(2))
    return Case(x, cos, sin)
