"""Linear: `nn.Linear` with activation and residual in the same call."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn import fields
from bigops.nn.computed_weight import is_dense
from bigops.nn.layer import Layer
from bigops.ops import activation as act
from bigops.ops.choice import Choice
from bigops.ops.explain import explain
from bigops.ops.fused_linear import fused_linear


class Linear(Layer, nn.Linear):
    """``act(x @ weight.T + bias) + residual`` by one `bigops.fused_linear` call.

    A drop-in for `torch.nn.Linear`: the same parameters, initialisation and `state_dict` in both
    directions, and ``isinstance(layer, nn.Linear)`` holds. Each call reads the Parameters as they
    are then, whoever wrote them and how. `bigops.pack_` makes a layer for inference of it.

    Args:
        in_features: K, length of the last dimension of x.
        out_features: N, length of the last dimension of the result.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh. Gated pairs belong
            to `GatedMLP`.

    Shapes: x [.., K], residual [.., N] or None, result [.., N]; weight [N, K], bias [N].

    Raises:
        ValueError: unknown activation, or a size below 0.
    """

    FIELDS = fields.ACTIVATED
    closed_to_pack = None
    activation: str

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        act.check_name(activation, gated=False)
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = activation

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None) -> Linear:
        """A layer that shares the Parameter objects of ``linear``, so optimisers go on working.

        Args:
            linear: an `nn.Linear`; it is not changed.
            activation: by default that of ``linear`` where it has one, else none.
        """
        if not is_dense(linear):
            raise TypeError(f"linear: expected a torch.nn.Linear; got {type(linear).__name__}")
        if activation is None:
            activation = getattr(linear, "activation", "none")
        bias = linear.bias is not None
        # On "meta" nothing is allocated and no random number is drawn.
        new = cls(linear.in_features, linear.out_features, bias, activation, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return fused_linear(x, self.weight, self.bias, residual, self.activation)

    def explain(self, x: Tensor) -> Choice:
        """Which kernel serves the layer on x."""
        return explain("fused_linear", x, self.weight, self.bias, activation=self.activation)

    def packed(self) -> Layer:
        from bigops.nn.packed_linear import PackedLinear  # which is made of this one

        return PackedLinear.from_linear(self).freeze()

    def extra_repr(self) -> str:
        suffix = "" if self.activation == "none" else f", activation={self.activation}"
        return super().extra_repr() + suffix

    def arguments(self) -> dict[str, Any]:
        """What the constructor needs to make this layer again, as plain data."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "activation": self.activation,
        }


def check_size(name: str, value: Any) -> int:
    """The size as an int of at least 0; TypeError or ValueError for what is none.

    Hosts compute sizes by numpy and torch: what `operator.index` takes is one, as it is for torch.
    """
    number: Any = None if isinstance(value, bool) else value
    try:
        size = operator.index(number)
    except TypeError:
        raise TypeError(f"{name}: expected an int; got {type(value).__name__}") from None
    if size < 0:
        raise ValueError(f"{name}: expected at least 0; got {size}")
    return size
