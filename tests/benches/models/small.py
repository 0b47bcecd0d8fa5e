"""Small models for the bench of whole models: a factory of a user's, and configs cut down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}
LLAMA = BERT | {"num_key_value_heads": 1}
VIT = {k: v for k, v in BERT.items() if k != "vocab_size"} | {"image_size": 32}
T5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 128}


class Tokens(nn.Module):
    """ids [batch, tokens] -> (logits, something else)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.ffn = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(ids)
        return self.ffn(hidden), hidden


def tokens() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Tokens(), torch.arange(12).view(2, 6)


def with_calibration() -> tuple[nn.Module, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    model, ids = tokens()
    return model, (ids,), [(ids + 1,), (ids + 2,)]


def pictures() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), torch.ones(1, 3, 4, 4)


def nothing() -> None:
    return None
