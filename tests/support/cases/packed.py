"""A model of each kind of layer that is packed, and states that are compared to the bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigops.nn import GatedMLP, Linear, LowRankLinear


def make(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    """Each kind of layer that is packed; sizes that fill neither panels nor words."""
    return nn.Sequential(
        nn.Linear(65, 131, bias),
        Linear(131, 99, bias, activation="gelu"),
        GatedMLP(99, 67, 101, bias=bias),
        LowRankLinear(101, 97, 65, bias, "silu"),
    ).to(dtype)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit, NaN and the sign of 0 included."""
    kind = torch.int32 if a.dtype == torch.float32 else torch.int16
    same = a.dtype == b.dtype and a.is_contiguous() == b.is_contiguous()
    return same and torch.equal(a.detach().view(kind), b.detach().view(kind))


def same_state(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(equal_bits(now[k], v) for k, v in state.items())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
