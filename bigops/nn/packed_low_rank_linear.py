"""PackedLowRankLinear: two factors in panels, for inference."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops.formats.packed import PackedWeight
from bigops.nn.low_rank_linear import LowRankLinear, check_rank, density_of
from bigops.nn.packed_linear import PackedBase
from bigops.ops.low_rank_linear import low_rank_linear
from bigops.ops.packed_linear import packed_linear


class _PackedFactors(NamedTuple):
    """Both factors of a low-rank weight as `packed_linear` reads them."""

    u: PackedWeight
    v: PackedWeight

    @property
    def u_panels(self) -> Tensor:
        return self.u.panels

    @property
    def v_panels(self) -> Tensor:
        return self.v.panels

    def to_dense(self) -> Tensor:
        """The matrix [N, K] that the factors stand for, in their dtype."""
        u, v = self.u.to_dense(), self.v.to_dense()
        return (u.double() @ v.double()).to(u.dtype)


class PackedLowRankLinear(PackedBase):
    """``act(x @ (u @ v).T + bias) + residual``, both factors in the panels of `pack_weight`.

    For inference on the CPU, by two `bigops.packed_linear` calls; packed and thawed as a
    `PackedLinear` is, with buffers ``u_panels`` and ``v_panels`` in place of ``u`` and ``v``.

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

    storage_names = ("u_panels", "v_panels")
    trained_names = ("u", "v")
    u: Tensor  # Parameters; absent while packed
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
        source = LowRankLinear(in_features, out_features, rank, bias, device=device, dtype=dtype)
        self.u, self.v, self.bias = source.u, source.v, source.bias

    @classmethod
    def from_low_rank(cls, layer: LowRankLinear) -> PackedLowRankLinear:
        """A layer, not packed yet, that shares the Parameter objects of ``layer``.

        Raises:
            TypeError: ``layer`` is another module.
        """
        if not isinstance(layer, LowRankLinear):
            raise TypeError(f"layer: expected a LowRankLinear; got {type(layer).__name__}")
        new = cls(layer.in_features, layer.out_features, layer.rank, False, layer.activation,
                  device="meta")  # fmt: skip
        new.u, new.v, new.bias = layer.u, layer.v, layer.bias
        return new.train(layer.training)

    def unpacked(self) -> LowRankLinear:
        """A `LowRankLinear` with the bias of this layer, and its factors, unpacked if need be."""
        new = LowRankLinear(self.in_features, self.out_features, self.rank, False, self.activation,
                            device="meta")  # fmt: skip
        new.u, new.v = self._float("u"), self._float("v")
        new.bias = self._parameters["bias"]
        return new.train(self.training)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"u": (self.out_features, self.rank), "v": (self.rank, self.in_features)}

    def make_storage(self) -> _PackedFactors:
        return _PackedFactors(PackedWeight.from_dense(self.u), PackedWeight.from_dense(self.v))

    def make_frozen(self, tensors: dict[str, Any]) -> _PackedFactors:
        shapes = zip(self.storage_names, self._shapes().values(), strict=True)
        return _PackedFactors(*(PackedWeight(tensors[name], *shape) for name, shape in shapes))

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        return low_rank_linear(x, self.u, self.v, self.bias, residual, self.activation)

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        inner = packed_linear(x, storage.v)
        return packed_linear(inner, storage.u, self.bias, residual, self.activation)

    @property
    def density(self) -> float:
        """Entries of the factors over entries of the dense weight."""
        return density_of(self.in_features, self.out_features, self.rank)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "rank": self.rank}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"
