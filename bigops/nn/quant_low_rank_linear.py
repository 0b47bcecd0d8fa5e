"""QuantLowRankLinear: two factors in int8; what low-rank layers of stored factors share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bigops.formats.base import Format
from bigops.formats.low_rank import LowRankWeight
from bigops.formats.quantized import QuantizedWeight
from bigops.nn import fields
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.low_rank_linear import FACTORS, LowRankLinear, check_rank, density_of
from bigops.ops.choice import Choice
from bigops.ops.explain import explain
from bigops.ops.low_rank_linear import low_rank_linear

Self = TypeVar("Self", bound="FactoredLinear")


class FactoredLinear(CompressedLinear):
    """A `CompressedLinear` whose weight is two factors, each stored in ``format``.

    Tensors of the frozen state are those of the format by the factor: ``u_values`` and so on. The
    rank stays in either state.
    """

    FIELDS = fields.COMPRESSED | {"rank": fields.SIZE}
    trained_names = ("u", "v")
    rank: int
    u: Tensor  # Parameters until frozen
    v: Tensor

    def __init__(
        self,
        format: type[Format],
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **form: Any,
    ) -> None:
        self._rank = rank  # the Parameters are made of it
        super().__init__(format, in_features, out_features, bias, activation, device, dtype, **form)
        self.rank = rank

    def _trainable(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> dict[str, Any]:
        sizes = (self.in_features, self.out_features, self._rank)
        check_rank(self._rank, *sizes[:2], least=0)
        source = LowRankLinear(*sizes, bias, device=device, dtype=dtype)
        return {"u": source.u, "v": source.v, "bias": source.bias}

    @classmethod
    def from_low_rank(cls: type[Self], layer: nn.Module) -> Self:
        """A layer, not frozen, that shares the Parameter objects of ``layer``.

        Args:
            layer: a `LowRankLinear` (`LowRankLinear.from_linear` makes one of a dense layer), or a
                layer of this class that is not frozen.

        Raises:
            TypeError: ``layer`` is another module.
            ValueError: ``layer`` is frozen.
        """
        if not isinstance(layer, LowRankLinear | cls):
            raise TypeError(f"layer: expected a LowRankLinear; got {type(layer).__name__}")
        if getattr(layer, "frozen", False):
            raise ValueError("layer: expected float factors; got a frozen layer")
        new = cls(  # type: ignore[call-arg]  # of the subclasses
            in_features=layer.in_features,
            out_features=layer.out_features,
            rank=layer.rank,
            bias=False,
            activation=layer.activation,
            device="meta",
        )
        new.u, new.v, new.bias = layer.u, layer.v, layer.bias
        return new.train(layer.training)

    @property
    def computes_weight(self) -> str | None:
        return self._where_it_went if self.frozen else FACTORS

    @property
    def storage_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(f"{factor}_{name}" for factor in "uv" for name in self.format.TENSORS)

    def make_storage(self) -> LowRankWeight:
        return LowRankWeight.from_factors(self.u, self.v, self.format, **self.form)

    def empty_storage(self) -> LowRankWeight:
        n, k, rank = self.out_features, self.in_features, self.rank
        u, v = (self.format.empty(*shape, **self.form) for shape in ((n, rank), (rank, k)))
        return LowRankWeight(u, v)

    def trained_weight(self) -> Tensor:
        return self._straight_through(self.u) @ self._straight_through(self.v)

    def run_trained(self, x: Tensor, residual: Tensor | None) -> Tensor:
        u, v = self._straight_through(self.u), self._straight_through(self.v)
        return low_rank_linear(x, u, v, self.bias, residual, self.activation)

    def _sizes_of(self, storage: Any) -> tuple[Any, ...]:
        return storage.u.sizes, storage.v.sizes

    def _arguments(self) -> tuple[Any, ...]:
        stored, names = self._parameters, self.format.TENSORS
        of_u, of_v = self._sizes
        return (
            (*[stored[f"u_{name}"] for name in names], *of_u),
            (*[stored[f"v_{name}"] for name in names], *of_v),
        )

    def run(self, x: Tensor, arguments: tuple[Any, ...], residual: Tensor | None) -> Tensor:
        u, v = arguments
        inner = self.op.run(x, v, self.in_features)
        return self.op.run(inner, u, self.rank, self.bias, residual, self.activation)

    def explain(self, x: Tensor) -> Choice:
        factors = self.storage()
        given = (x, factors.u, factors.v, self.bias)
        return explain("low_rank_linear", *given, activation=self.activation)

    @property
    def density(self) -> float:
        """Entries of the factors over entries of the dense weight."""
        return density_of(self.in_features, self.out_features, self.rank)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "rank": self.rank}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class QuantLowRankLinear(FactoredLinear):
    """``act(x @ (u @ v).T + bias) + residual`` with both factors in int8, by `low_rank_linear`.

    What lies between the two products stays in x's dtype; each row of it is rounded to u8 as one of
    x is.

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
        super().__init__(QuantizedWeight, *sizes)

    def arguments(self) -> dict[str, Any]:
        # all of its form is fixed
        return {k: v for k, v in super().arguments().items() if k not in self.form}
