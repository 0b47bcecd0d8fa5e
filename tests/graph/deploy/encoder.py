"""A small encoder as BERT has it, and inputs of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Embeddings, one block as BERT has it, a table of 20 positions; two results."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(100, width), nn.Embedding(20, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.drop, self.heads = nn.Dropout(0.1), heads

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        b, t, width = x.shape
        q, k, v = (
            m(x).view(b, t, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v)
        )
        seen = None if mask is None else mask[:, None, None, :].bool()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen)
        x = self.first(x + self.drop(self.out(mixed.transpose(1, 2).reshape(b, t, width))))
        y = self.second(x + self.drop(self.down(nn.functional.gelu(self.up(x)))))
        return {"last": y, "pooled": y.mean(1)}


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    """Ids, and a mask whose last row is half empty."""
    mask = torch.ones(batch, length)
    mask[-1, (length + 1) // 2 :] = 0
    return {"ids": torch.randint(0, 100, (batch, length)), "mask": mask}
