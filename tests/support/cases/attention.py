"""Random cases of attention, their float64 truth and error scales."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.ops.attention import attention
from tests.support.tolerance import C, check

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Sizes = tuple[int, int, int, int, int, int, int]
"""B, heads of k, heads of q to each of them, T, S, D, Dv."""


@dataclass
class Case:
    """Inputs of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    causal: bool = False
    scale: float | None = None
    bf16: bool = False

    def run(self) -> Tensor:
        return attention(
            self.q, self.k, self.v, self.mask, causal=self.causal, scale=self.scale, bf16=self.bf16
        )

    def plain(self) -> Tensor:
        """By torch in the dtype of q, of q, k and v as the products have them."""
        q, k, v = (t.bfloat16().to(t) if self.bf16 else t for t in (self.q, self.k, self.v))
        mask, causal = self.mask, self.causal
        if mask is not None:
            mask = torch.atleast_2d(mask)
        if mask is not None and causal:  # of which torch takes one
            keep = torch.ones(self.q.shape[2], self.k.shape[2], dtype=torch.bool).tril()
            shut = False if mask.dtype == torch.bool else -math.inf
            mask, causal = mask.masked_fill(~keep, shut), False
        if mask is not None and mask.is_floating_point():
            mask = mask.to(self.q.dtype)
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=True,
        )

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """(result, error scale, what probabilities rounded to 16 bits carry), in float64.

        An error e of a score changes the result by at most 2 e sum(p |v|).
        """
        group = self.q.shape[1] // max(self.k.shape[1], 1)
        q, k, v = (t.double() for t in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores, size = q @ k.mT * scale, q.abs() @ k.abs().mT * abs(scale)
        if self.mask is not None:
            if self.mask.dtype == torch.bool:
                scores = scores.masked_fill(~self.mask, -math.inf)
            else:
                scores, size = scores + self.mask.double(), size + self.mask.double().abs()
        if self.causal:
            keys = torch.arange(k.shape[2])
            scores = scores.masked_fill(keys > torch.arange(q.shape[2])[:, None], -math.inf)
        shut = (scores == -math.inf).all(-1, keepdim=True)
        p = torch.softmax(scores.masked_fill(shut, 0.0), -1).masked_fill(shut, 0.0)
        size = torch.where((p > 0) & (size < 1e30), size, 0.0)
        worst = size.amax(-1, keepdim=True) if size.shape[-1] else size.new_zeros(())
        return p @ v, (1 + 2 * worst) * (p @ v.abs()), (p.square() @ v.square()).sqrt()

    def check(self, y: Tensor, what: str = "output") -> None:
        """Hold a result to the rule."""
        truth, scale, rounding = self.truth()
        if self.bf16:
            eps = torch.finfo(torch.bfloat16).eps / (C[y.dtype] * torch.finfo(y.dtype).eps)
            scale = scale + 2 * eps * rounding
        check(y, truth, self.plain(), scale, rounding=rounding, what=what)


def _padding(b: int, heads: int, t: int, s: int, dtype: torch.dtype) -> Tensor:
    lengths = torch.randint(1, s + 1, (b, 1, 1, 1)) if s else torch.zeros(b, 1, 1, 1)
    return torch.arange(s) < lengths


def _rows(b: int, heads: int, t: int, s: int, dtype: torch.dtype) -> Tensor:
    mask = torch.rand(b, 1, t, s) < 0.6
    mask[..., t // 2 : t // 2 + 1, :] = False  # a row that is shut
    return mask


def _infinite(b: int, heads: int, t: int, s: int, dtype: torch.dtype) -> Tensor:
    return torch.where(_rows(b, heads, t, s, dtype), torch.randn(t, s), -math.inf).to(dtype)


def _lowest(b: int, heads: int, t: int, s: int, dtype: torch.dtype) -> Tensor:
    """As transformers makes them: whole blocks, scattered keys and a row at the lowest number."""
    mask = torch.where(_rows(b, heads, t, s, dtype), 0.0, torch.finfo(torch.float32).min)
    mask[..., : s // 2] = torch.finfo(torch.float32).min
    return mask


MASKS: dict[str, Callable[[int, int, int, int, torch.dtype], Tensor | None]] = {
    "none": lambda b, heads, t, s, dtype: None,
    "padding": _padding,
    "rows": _rows,
    "infinite": _infinite,
    "lowest": _lowest,
    "bias": lambda b, heads, t, s, dtype: torch.randn(1, heads, t, s).to(dtype),
    "1-D": lambda b, heads, t, s, dtype: torch.rand(s) < 0.7,
    "2-D": lambda b, heads, t, s, dtype: torch.randn(t, s).double(),
    "by head": lambda b, heads, t, s, dtype: torch.rand(heads, 1, s) < 0.7,
    "one column": lambda b, heads, t, s, dtype: torch.randn(b, 1, t, 1).half(),
    "strided": lambda b, heads, t, s, dtype: torch.randn(s, 2 * t).to(dtype).t()[::2],
}


def make(
    sizes: Sizes,
    dtype: str = "f32",
    mask: str = "none",
    causal: bool = False,
    scale: float | None = None,
) -> Case:
    """q, k and v are views of one merged projection where the lengths agree, else of two."""
    b, own, group, t, s, d, dv = sizes
    of = DTYPES[dtype]
    heads = own * group
    width = own * (d + dv)
    if t == s:
        merged = torch.randn(b, t, heads * d + width).to(of)
        q, kv = merged.split([heads * d, width], -1)
    else:
        q, kv = torch.randn(b, t, heads * d).to(of), torch.randn(b, s, width).to(of)
    k, v = kv.split([own * d, own * dv], -1)
    return Case(
        q.unflatten(-1, (heads, d)).transpose(1, 2),
        k.unflatten(-1, (own, d)).transpose(1, 2),
        v.unflatten(-1, (own, dv)).transpose(1, 2),
        MASKS[mask](b, heads, t, s, of),
        causal,
        scale,
    )
