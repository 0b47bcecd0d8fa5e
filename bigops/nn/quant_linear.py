"""QuantLinear: int8 weight with one scale per row, activations quantised per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn.compressed_linear import CompressedLinear, check_source
from bigops.ops import _quantize as quantize
from bigops.ops.quantized_linear import QuantizedWeight, quantize_weight, quantized_linear


class QuantLinear(CompressedLinear):
    """``act(x @ weight.T + bias) + residual`` with the weight in int8.

    Recovery state: a float ``weight`` [N, K], rounded to its int8 values in the forward pass with
    a straight-through gradient (arXiv 1308.3432); in eval with gradients off the int8 kernel runs.
    `freeze()` leaves the buffers ``values`` int8 [N, K] and ``scale`` float32 [N].

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K] float32, bfloat16 or float16; residual [.., N] or None; result [.., N].

    Raises:
        ValueError: unknown activation, or a size below 0.
    """

    storage_names = ("values", "scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, activation)
        source = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = source.weight, source.bias

    @classmethod
    def from_linear(cls, linear: nn.Module, activation: str | None = None) -> QuantLinear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen.
        """
        source = check_source(linear)
        name = source.activation if activation is None else activation
        new = cls(source.in_features, source.out_features, False, name, device="meta")
        new.weight, new.bias = source.weight, source.bias
        return new.train(linear.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> QuantLinear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        frozen = arguments["frozen"]
        new = cls(**{k: v for k, v in arguments.items() if k != "frozen"}, device="meta")
        if frozen:
            n, k = new.out_features, new.in_features
            values = torch.empty(n, k, dtype=torch.int8, device="meta")
            new.set_storage(QuantizedWeight(values, torch.empty(n, device="meta")))
        return new

    def make_storage(self) -> QuantizedWeight:
        return quantize_weight(self.weight)

    def make_frozen(self, tensors: dict[str, Any]) -> QuantizedWeight:
        return QuantizedWeight(tensors["values"], tensors["scale"])

    def check_storage(self, storage: Any) -> None:
        super().check_storage(storage)
        expected = [self.out_features, self.in_features]
        if list(storage.values.shape) != expected:
            raise ValueError(f"values: expected {expected}; got {list(storage.values.shape)}")

    def trained_weight(self) -> Tensor:
        return straight_through(self.weight)

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        return quantized_linear(x, storage, self.bias, residual, self.activation)


def straight_through(weight: Tensor) -> Tensor:
    """``weight`` [N, K] rounded to its int8 grid; the gradient passes as if it were not."""
    with torch.no_grad():
        scale = quantize.row_scales(weight).unsqueeze(1)
        rounded = (weight / scale).round_().mul_(scale).to(weight.dtype)
    # weight - weight is 0 exactly, so the value is that of `rounded` to the last bit.
    return rounded + (weight - weight.detach())
