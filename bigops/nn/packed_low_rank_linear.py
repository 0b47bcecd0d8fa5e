"""PackedLowRankLinear: two factors in panels, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.formats.packed import PackedWeight
from bigops.nn.low_rank_linear import LowRankLinear
from bigops.nn.packed_linear import PackedBase
from bigops.nn.quant_low_rank_linear import FactoredLinear
from bigops.ops.choice import Choice
from bigops.ops.low_rank_linear import low_rank_linear


class PackedLowRankLinear(PackedBase, FactoredLinear):
    """``act(x @ (u @ v).T + bias) + residual``, both factors in panels (`PackedWeight`).

    For inference on the CPU, by two `bigops.packed_linear` calls; packed and thawed as a
    `PackedLinear` is, with ``u_panels`` and ``v_panels`` in place of ``u`` and ``v``.

    Args:
        in_features: K.
        out_features: N.
        rank: r, from 0 to min(K, N).
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K] in the factors' dtype, residual [.., N] or None, result [.., N].

    Raises:
        TypeError: a size that is no int.
        ValueError: unknown activation, a size below 0, or a rank above the smaller side.
    """

    FIELDS = FactoredLinear.FIELDS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (in_features, out_features, rank, bias, activation, device, dtype)
        super().__init__(PackedWeight, *sizes)

    def unpacked(self) -> LowRankLinear:
        """A `LowRankLinear` with the bias of this layer, and its factors, unpacked if need be."""
        new = LowRankLinear(
            self.in_features, self.out_features, self.rank, False, self.activation, device="meta"
        )
        new.u, new.v = self._float("u"), self._float("v")
        new.bias = self._parameters["bias"]
        return new.train(self.training)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"u": (self.out_features, self.rank), "v": (self.rank, self.in_features)}

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return low_rank_linear(x, self.u, self.v, self.bias, residual, self.activation)

    def explain(self, x: Tensor) -> Choice:
        if not self.frozen:
            return self.unpacked().explain(x)
        inner = x.new_empty((*x.shape[:-1], self.rank))
        return self.op.explain(inner, self.storage().u, self.bias, activation=self.activation)
