"""Linear layers of transformers whose weight is [in, out]: `Conv1D`, of GPT-2 and its kind."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is the `Conv1D` of transformers, which is not imported for that."""
    cls = type(module)
    return (cls.__module__, cls.__qualname__) == ("transformers.pytorch_utils", "Conv1D")


def transposed(module: nn.Module) -> nn.Linear:
    """The `nn.Linear` that does the same: a copy of the weight, the bias itself."""
    layer: Any = module
    k, n = layer.weight.shape
    linear = nn.Linear(k, n, False, device="meta")
    weight = layer.weight.detach().t().contiguous()
    linear.weight = nn.Parameter(weight, layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear.train(module.training)
