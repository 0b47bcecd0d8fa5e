"""QuantLowRankLinear: a weight in two int8 factors, activations rounded row by row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.formats.low_rank import LowRankWeight
from bigops.formats.quantized import QuantizedWeight
from bigops.nn.compressed_linear import STATES, CompressedLinear
from bigops.nn.low_rank_linear import LowRankLinear, check_rank, density_of
from bigops.nn.quant_linear import straight_through
from bigops.ops.low_rank_linear import low_rank_linear


class QuantLowRankLinear(CompressedLinear):
    """``act(x @ (u @ v).T + bias) + residual`` with both factors in int8.

    Two products, as `quantized_linear` makes them: each row of x, and of what lies between them in
    x's dtype, becomes u8 with its own scale and zero point.

    Recovery state: float factors ``u`` [N, r] and ``v`` [r, K], each rounded to its grid in the
    forward pass with a straight-through gradient; in eval with gradients off the int8 kernels run,
    on factors that each call rounds anew: for their numbers. The speed comes with `freeze()`, which
    leaves the fields of two `QuantizedWeight` as buffers: ``u_values``, ``u_scale``, ``u_row_sum``,
    and the same of v. The rank stays in either state.

    Args:
        in_features: K.
        out_features: N.
        rank: r, from 0 to min(K, N).
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K] float32, bfloat16 or float16; residual [.., N] or None; result [.., N].

    Raises:
        TypeError: a size that is no int.
        ValueError: unknown activation, a size below 0, or a rank above the smaller side.
    """

    storage_names = ("u_values", "u_scale", "u_row_sum", "v_values", "v_scale", "v_row_sum")
    trained_names = ("u", "v")
    activations = "dynamic"
    u: Tensor  # Parameters; absent once frozen
    v: Tensor

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
        super().__init__(in_features, out_features, activation)
        check_rank(rank, in_features, out_features, least=0)
        self.rank = rank
        self.register_buffer("x_grid", None)
        source = LowRankLinear(in_features, out_features, rank, bias, device=device, dtype=dtype)
        self.u, self.v, self.bias = source.u, source.v, source.bias

    @classmethod
    def from_low_rank(cls, layer: nn.Module) -> QuantLowRankLinear:
        """A layer in recovery state that shares the Parameter objects of ``layer``.

        Args:
            layer: a `LowRankLinear` (`LowRankLinear.from_linear` makes one of a dense layer), or a
                layer of this class that is not frozen.

        Raises:
            TypeError: ``layer`` is another module.
            ValueError: ``layer`` is frozen.
        """
        if not isinstance(layer, LowRankLinear | QuantLowRankLinear):
            raise TypeError(f"layer: expected a LowRankLinear; got {type(layer).__name__}")
        if isinstance(layer, QuantLowRankLinear) and layer.frozen:
            raise ValueError("layer: expected float factors; got a frozen layer")
        new = cls(layer.in_features, layer.out_features, layer.rank, False, layer.activation,
                  device="meta")  # fmt: skip
        new.u, new.v, new.bias = layer.u, layer.v, layer.bias
        return new.train(layer.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> QuantLowRankLinear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        frozen = arguments["frozen"]
        new = cls(**{k: v for k, v in arguments.items() if k not in STATES}, device="meta")
        if frozen:
            n, k, rank = new.out_features, new.in_features, new.rank
            new.set_storage(
                LowRankWeight(QuantizedWeight.empty(n, rank), QuantizedWeight.empty(rank, k))
            )
        return new

    def make_storage(self) -> LowRankWeight:
        return LowRankWeight.from_factors(self.u, self.v, QuantizedWeight)

    def make_frozen(self, tensors: dict[str, Any]) -> LowRankWeight:
        def factor(name: str, n: int, k: int) -> QuantizedWeight:
            values, scale, row_sum = (
                tensors[f"{name}_{t}"] for t in ("values", "scale", "row_sum")
            )
            return QuantizedWeight(values, scale, None, row_sum, None, n, k, 8, 0, "dynamic")

        n, k, rank = self.out_features, self.in_features, self.rank
        return LowRankWeight(factor("u", n, rank), factor("v", rank, k))

    def trained_weight(self) -> Tensor:
        return straight_through(self.u) @ straight_through(self.v)

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        u, v = straight_through(self.u), straight_through(self.v)
        return low_rank_linear(x, u, v, self.bias, residual, self.activation)

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        return low_rank_linear(x, storage.u, storage.v, self.bias, residual, self.activation)

    @property
    def density(self) -> float:
        """Entries of the factors over entries of the dense weight."""
        return density_of(self.in_features, self.out_features, self.rank)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "rank": self.rank}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
