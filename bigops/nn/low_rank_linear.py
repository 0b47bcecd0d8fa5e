"""LowRankLinear: a linear layer whose weight is kept as two factors."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bigops.nn import fields
from bigops.nn.computed_weight import ComputedLinear, is_dense
from bigops.nn.layer import Layer, layer_of
from bigops.nn.linear import Linear, check_size
from bigops.nn.truncated_svd import TruncatedSVD, truncated_svd
from bigops.ops import activation as act
from bigops.ops.choice import Choice
from bigops.ops.explain import explain
from bigops.ops.low_rank_linear import low_rank_linear

Self = TypeVar("Self", bound="LowRankLinear")


# why there is no `weight` to write
FACTORS = "the layer keeps two factors, u and v; to_linear() gives a dense layer"


class LowRankLinear(Layer, ComputedLinear):
    """``act(x @ (u @ v).T + bias) + residual`` by one `bigops.low_rank_linear` call.

    The product ``u @ v`` is never formed: a row costs ``rank * (K + N)`` multiply-adds in place of
    ``K * N``, and the factors are trained as they are, so the rank stays. An `nn.Linear` by type;
    ``weight`` is their product, made where it is read, and refuses to be written.

    Args:
        in_features: K, length of the last dimension of x.
        out_features: N, length of the last dimension of the result.
        rank: r, from 0 to min(K, N). It saves work and memory below K * N / (K + N).
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K], residual [.., N] or None, result [.., N]; u [N, r], v [r, K], bias [N].

    Raises:
        TypeError: a size that is no int.
        ValueError: unknown activation, a size below 0, or a rank above the smaller side.
    """

    FIELDS = fields.ACTIVATED | {"rank": fields.SIZE}
    compressed = True
    closed_to_pack = None
    rank: int
    bias: Any  # [N] or None

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
        act.check_name(activation, gated=False)
        in_features = check_size("in_features", in_features)
        out_features = check_size("out_features", out_features)
        rank = check_rank(rank, in_features, out_features, least=0)
        nn.Module.__init__(self)  # there is no weight
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.activation = rank, activation
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Parameter(torch.empty(out_features, rank, **where))
        self.v = nn.Parameter(torch.empty(rank, in_features, **where))
        self.bias = nn.Parameter(torch.empty(out_features, **where)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance of `nn.Linear`'s weight, 1 / (3 K)."""
        if self.u.is_meta:
            return
        with torch.no_grad():
            if self.rank and self.in_features:
                # var(v) = 1 / K and var(u) = 1 / (3 r): r var(u) var(v) = 1 / (3 K).
                nn.init.uniform_(
                    self.v, -math.sqrt(3 / self.in_features), math.sqrt(3 / self.in_features)
                )
                nn.init.uniform_(self.u, -1 / math.sqrt(self.rank), 1 / math.sqrt(self.rank))
            if self.bias is not None:
                bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
                nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int | None = None,
        energy: float | None = None,
        activation: str | None = None,
        exact: bool = False,
    ) -> LowRankLinear:
        """The best approximation of ``linear`` in the Frobenius norm, by its singular values.

        The singular values are shared between the factors by their square roots, so that both
        train at one scale (Eckart and Young 1936 for the optimum).

        Args:
            linear: an `nn.Linear`; it is not changed, and no tensor is shared with it.
            rank: r, from 0 to min(K, N); or
            energy: the share of the squared Frobenius norm to keep, above 0 up to 1: the least
                rank that keeps it is taken. Give one of the two.
            activation: by default that of ``linear`` where it has one, else none.
            exact: take LAPACK's SVD; else the Gram matrix serves where it holds (`truncated_svd`).

        Raises:
            TypeError: ``linear`` is no `nn.Linear`.
            ValueError: both or none of rank and energy, one of them out of range, or a weight with
                NaN or inf.
        """
        if not is_dense(linear):
            raise TypeError(f"linear: expected a torch.nn.Linear; got {type(linear).__name__}")
        if (rank is None) == (energy is None):
            raise ValueError(f"rank, energy: expected one of the two; got {rank} and {energy}")
        if rank is not None:
            check_rank(rank, linear.in_features, linear.out_features, least=0)
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy: expected above 0 and at most 1; got {energy}")
        if not bool(torch.isfinite(linear.weight).all()):
            raise ValueError("linear: expected a finite weight; got NaN or inf in it")
        return cls.from_svd(linear, truncated_svd(linear.weight, rank, energy, exact), activation)

    @classmethod
    def from_svd(
        cls, linear: nn.Linear, svd: TruncatedSVD, activation: str | None = None
    ) -> LowRankLinear:
        """`from_linear` with the singular values at hand."""
        if activation is None:
            activation = getattr(layer_of(linear), "activation", "none")
        dtype, root = linear.weight.dtype, svd.values.sqrt()
        new = cls(
            linear.in_features,
            linear.out_features,
            svd.rank,
            linear.bias is not None,
            activation,
            device="meta",
            dtype=dtype,
        )
        new.u = nn.Parameter((svd.left * root).to(dtype).contiguous())
        new.v = nn.Parameter((root[:, None] * svd.right).to(dtype).contiguous())
        if linear.bias is not None:
            new.bias = nn.Parameter(linear.bias.detach().clone())
            new.bias.requires_grad_(linear.bias.requires_grad)
        for factor in (new.u, new.v):
            factor.requires_grad_(linear.weight.requires_grad)
        return new.train(linear.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return low_rank_linear(x, self.u, self.v, self.bias, residual, self.activation)

    @property
    def computes_weight(self) -> str | None:
        return FACTORS

    # of a weight that is never a Parameter: other attributes are found as fast as ever
    __getattr__ = nn.Module.__getattr__

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """``u @ v`` [N, K], a `ComputedWeight`."""
        return self.computed_weight()

    def make_weight(self) -> Tensor:
        return self.u @ self.v

    def _weight_like(self) -> tuple[torch.dtype, torch.device, bool]:
        u, v = self.u, self.v
        return u.dtype, u.device, u.requires_grad or v.requires_grad

    def explain(self, x: Tensor) -> Choice:
        """Which kernel serves the layer on x."""
        given = (x, self.u, self.v, self.bias)
        return explain("low_rank_linear", *given, activation=self.activation)

    def packed(self) -> Layer:
        from bigops.nn.packed_low_rank_linear import PackedLowRankLinear  # made of this one

        return PackedLowRankLinear.from_low_rank(self).freeze()

    def to_dense(self) -> Tensor:
        """The weight [N, K] that the factors stand for, in their dtype."""
        return (self.u.detach().double() @ self.v.detach().double()).to(self.u.dtype)

    def to_linear(self) -> Linear:
        """A dense layer with the weight `to_dense()`; nothing is shared."""
        new = Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            activation=self.activation,
            device="meta",
        )
        new.weight = nn.Parameter(self.to_dense(), requires_grad=self.u.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().clone()
            new.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return new.train(self.training)

    @property
    def density(self) -> float:
        """Entries of the factors over entries of the dense weight; above 1 nothing is saved."""
        return density_of(self.in_features, self.out_features, self.rank)

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
        return text + ("" if self.activation == "none" else f", activation={self.activation}")

    def arguments(self) -> dict[str, Any]:
        """What the constructor needs to make this layer again, as plain data."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
            "activation": self.activation,
        }


def check_rank(rank: int, in_features: int, out_features: int, least: int) -> int:
    """``rank`` as an int; raise unless it is from ``least`` to the smaller side."""
    rank = check_size("rank", rank)
    most = min(in_features, out_features)
    if not least <= rank <= most:
        raise ValueError(
            f"rank: expected {least} to {most}, the smaller side of "
            f"[{out_features}, {in_features}]; got {rank}"
        )
    return rank


def density_of(in_features: int, out_features: int, rank: int) -> float:
    """Entries of two factors over entries of the dense weight."""
    dense = in_features * out_features
    return rank * (in_features + out_features) / dense if dense else 0.0
