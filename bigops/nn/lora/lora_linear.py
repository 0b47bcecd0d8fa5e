"""LoRALinear: a frozen linear layer with trainable low-rank adapters; add_lora.py swaps it in.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021; the scale
``alpha / sqrt(rank)`` is Kalajdzievski's "rank stabilization", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigops.nn.computed_weight import ComputedLinear, is_dense
from bigops.nn.layer import layer_of
from bigops.nn.linear import Linear, check_size
from bigops.nn.low_rank_linear import check_rank
from bigops.ops import activation as act
from bigops.ops.fused_linear import fused_linear
from bigops.ops.low_rank_linear import low_rank_linear

Self = TypeVar("Self", bound="LoRALinear")


class LoRAAdapter(nn.Module):
    """The factors of one adapter: its weight is ``scale * (b @ a)``.

    ``a`` [r, K] starts as `nn.Linear`'s weight does and ``b`` [N, r] at zero, so a new adapter
    changes nothing.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.a = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self) -> tuple[Tensor, Tensor]:
        """b and a: by a call, so that hooks that bring offloaded parameters run."""
        return self.b, self.a

    def delta(self) -> Tensor:
        """``scale * (b @ a)`` [N, K] in float64."""
        b, a = self()
        return self.scale * (b.detach().double() @ a.detach().double())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class LoRALinear(ComputedLinear):
    """``act(x @ (weight + sum of scale * b @ a).T + bias) + residual``, weight and bias frozen.

    All active adapters and the frozen weight take part in one `bigops.low_rank_linear` call. With
    dropout in training an adapter reads another x than the weight does, and each gets a call of
    its own. An `nn.Linear` by type: ``weight`` is the sum, differentiable for the factors, so that
    a model which reads it trains the adapters too; it refuses to be written while adapters are
    active. `fuse_` and `compress_` leave the layer; `to_linear()` gives one for them.

    Args:
        in_features: K, length of the last dimension of x.
        out_features: N, length of the last dimension of the result.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.

    Shapes: x [.., K], residual [.., N] or None, result [.., N]; weight [N, K], bias [N].

    The `state_dict` holds ``weight``, ``bias`` and ``adapters.<name>.a`` and ``.b``; while merged
    it holds the weight as it was before, so a file never counts an adapter twice.
    """

    _unmerged: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        base = Linear(in_features, out_features, bias, device, dtype, activation=activation)
        self._take(base)
        self._freeze()

    def _take(self, linear: nn.Linear) -> None:
        if not is_dense(linear):
            raise TypeError(
                f"linear: expected a torch.nn.Linear with a dense weight; got "
                f"{type(linear).__name__} (QLoRALinear takes a compressed one)"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.activation: str = getattr(layer_of(linear), "activation", "none")
        self.weight, self.bias = linear.weight, linear.bias
        self._start()

    def _start(self) -> None:
        """Have no adapter yet."""
        self.adapters = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        # The weight before a merge: subtracting what was added would not give it back in floats.
        self.register_buffer("_unmerged", None, persistent=False)

    @property
    def base_weight(self) -> Any:
        """The frozen weight [N, K], while merged with the adapters in it."""
        return self._parameters["weight"]

    @property
    def computes_weight(self) -> str | None:
        if self.__dict__.get("_active") and not self.merged:
            return "adapters are added to base_weight; merge() or set_active([]) leaves a Parameter"
        return None

    def _check_settable(self, name: str) -> None:
        pass  # a Parameter that is set is the frozen weight, as `load_state_dict(assign=True)` does

    def make_weight(self) -> Tensor:
        total: Tensor = self.base_weight
        for name in self._active:
            adapter = self._adapter(name)
            b, a = adapter()
            total = total + adapter.scale * (b @ a)
        return total

    def _weight_like(self) -> tuple[torch.dtype, torch.device, bool]:
        weight, trained = self.base_weight, [self._adapter(name) for name in self._active]
        parameters = [weight, *(p for adapter in trained for p in adapter.parameters())]
        return weight.dtype, weight.device, any(p.requires_grad for p in parameters)

    def _freeze(self) -> None:
        self.base_weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        name: str = "default",
        rank_stabilized: bool = False,
    ) -> LoRALinear:
        """A layer that shares the Parameters of ``linear``, freezes them and adds one adapter.

        Args:
            linear: an `nn.Linear`; `bigops.nn.Linear` hands on its activation. Its parameters are
                shared and stop requiring gradients.
            rank, alpha, dropout, name, rank_stabilized: see `add_adapter`.
        """
        new = cls._unfrozen(linear)
        new.add_adapter(name, rank, alpha, dropout, rank_stabilized)
        new._freeze()
        return new

    @classmethod
    def _unfrozen(cls, linear: nn.Linear) -> LoRALinear:
        """A layer without adapters that shares the Parameters of ``linear`` as they are."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._take(linear)
        return new.train(linear.training)

    # --- adapters ------------------------------------------------------------------------------

    def add_adapter(
        self,
        name: str,
        rank: int,
        alpha: float | None = None,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ) -> None:
        """Add a trainable adapter and make it active beside those that are.

        Args:
            name: a new name, without a dot, that `nn.ModuleDict` has no attribute of.
            rank: r, from 1 to the smaller side.
            alpha: the scale is ``alpha / rank``, or ``alpha / sqrt(rank)`` where
                ``rank_stabilized``; by default alpha = rank, a scale of 1 (sqrt(rank)).
            dropout: share of x's entries that the adapter does not see in training, [0, 1).

        Raises:
            TypeError, ValueError: an argument out of range, or a name that is taken.
            RuntimeError: the layer is merged.
        """
        self._take_adapter(name, self._new_adapter(name, rank, alpha, dropout, rank_stabilized))

    def _new_adapter(
        self, name: str, rank: int, alpha: float | None, dropout: float, rank_stabilized: bool
    ) -> LoRAAdapter:
        """What `add_adapter` adds under this name, checked but not added."""
        self._check_not_merged("add_adapter")
        check_adapter(self.in_features, self.out_features, rank, alpha, dropout)
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name: expected a name without a dot; got {name!r}")
        if name in self.adapters:
            raise ValueError(
                f"name: expected a new name; got {name!r}, which is an adapter already"
            )
        if hasattr(self.adapters, name):
            raise ValueError(
                f"name: expected a name that torch.nn.ModuleDict does not use; got {name!r}"
            )
        dtype, device, _ = self._weight_like()
        alpha = rank if alpha is None else alpha
        scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        adapter = LoRAAdapter(
            self.in_features,
            self.out_features,
            rank,
            scale,
            dropout,
            device,
            dtype,
        )
        return adapter.train(self.training)

    def _take_adapter(self, name: str, adapter: LoRAAdapter) -> None:
        """Add what `_new_adapter` made and make it active beside those that are."""
        self.adapters[name] = adapter
        self._active = (*self._active, name)

    def remove_adapter(self, name: str) -> None:
        """Drop an adapter and its factors."""
        self._check_not_merged("remove_adapter")
        self._check_names([name])
        del self.adapters[name]
        self._active = tuple(n for n in self._active if n != name)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that take part in the result."""
        return self._active

    def set_active(self, names: Sequence[str]) -> None:
        """Let exactly these adapters take part; with none the layer is the frozen one."""
        self._check_not_merged("set_active")
        names = [names] if isinstance(names, str) else list(names)
        self._check_names(names)
        self._active = tuple(names)

    def _check_names(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.adapters:
                known = ", ".join(self.adapters) or "no adapter"
                raise ValueError(f"name: expected one of {known}; got {name!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"names: expected each name once; got {list(names)}")

    # --- merging -------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the active adapters are in the weight at the moment."""
        return self._unmerged is not None

    def merge(self) -> None:
        """Add the active adapters to the weight, which is kept beside for an exact `unmerge`.

        Sums are made in float64 and rounded once. A merged layer runs as a dense one; `train()`
        unmerges it, since no gradient would reach the adapters. Merging twice changes nothing.

        Raises:
            ValueError: a factor holds NaN or inf. The weight is unchanged.
        """
        if self.merged:
            return
        total = self._merged_weight()
        weight = self.base_weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.copy_(total)
        self._unmerged = before

    def unmerge(self) -> None:
        """Give the weight back bit for bit as it was before `merge`."""
        if self._unmerged is None:
            return
        with torch.no_grad():
            self.base_weight.copy_(self._unmerged)
        self._unmerged = None

    def _merged_weight(self) -> Tensor:
        total: Tensor = self.base_weight.detach()
        if self.merged:
            return total
        dtype, total = total.dtype, total.double()
        for name in self._active:
            delta = self._adapter(name).delta()
            if not bool(torch.isfinite(delta).all()):
                raise ValueError(f"adapters: expected finite factors; got NaN or inf in {name!r}")
            total = total + delta
        return total.to(dtype)

    def to_linear(self) -> Linear:
        """A `bigops.nn.Linear` with the active adapters in its weight; nothing is shared."""
        new = Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            activation=self.activation,
            device="meta",
        )
        new.weight = nn.Parameter(self._merged_weight().clone())
        if self.bias is not None:
            new.bias = nn.Parameter(self.bias.detach().clone())
        return new.train(self.training)

    def _check_not_merged(self, verb: str) -> None:
        if self.merged:
            raise RuntimeError(f"{verb}: expected an unmerged layer; call unmerge() first")

    # --- running -------------------------------------------------------------------------------

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.merged or not self._active:
            return self._frozen(x, residual, self.activation)
        active = [self._adapter(name) for name in self._active]
        if self.training and any(adapter.dropout > 0 for adapter in active):
            return self._with_dropout(x, residual, active)
        u: Tensor
        v: Tensor
        if len(active) == 1:
            (u, v), scale = active[0](), active[0].scale
        else:  # one product of all: b side by side with their scales, a on top of each other
            pairs = [adapter() for adapter in active]
            u = torch.cat([b * one.scale for (b, _), one in zip(pairs, active, strict=True)], dim=1)
            v = torch.cat([a for _, a in pairs])
            scale = 1.0
        if sum(adapter.rank for adapter in active) > min(self.in_features, self.out_features):
            # Together they are no factorisation any more: one call each, summed before act.
            return self._one_by_one(x, residual, [(x, adapter) for adapter in active])
        base = self._base_beside(x)
        return low_rank_linear(
            x, u, v, self.bias, residual, self.activation, base=base, scale=scale
        )

    def _base_beside(self, x: Tensor) -> Tensor:
        # A graph of torch.fx would find a Parameter by its name, which means the sum.
        weight: Tensor = self.base_weight
        return weight if isinstance(x, Tensor) else weight.detach()

    def _frozen(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """The product with the frozen weight."""
        return fused_linear(x, self._base_beside(x), self.bias, residual, activation)

    def _with_dropout(
        self, x: Tensor, residual: Tensor | None, active: list[LoRAAdapter]
    ) -> Tensor:
        seen = [(F.dropout(x, adapter.dropout, self.training), adapter) for adapter in active]
        return self._one_by_one(x, residual, seen)

    def _one_by_one(
        self, x: Tensor, residual: Tensor | None, seen: list[tuple[Tensor, LoRAAdapter]]
    ) -> Tensor:
        total: Tensor | None = None
        for x_seen, adapter in seen:
            b, a = adapter()
            total = low_rank_linear(x_seen, b, a, residual=total, scale=adapter.scale)
        if self.activation == "none":  # then the residual may come in anywhere
            if residual is not None and total is not None:
                total = total + residual
            return self._frozen(x, total, "none")
        y = act.apply(self.activation, self._frozen(x, total, "none"))
        return y if residual is None else y + residual

    def _adapter(self, name: str) -> LoRAAdapter:
        adapter = self.adapters[name]
        assert isinstance(adapter, LoRAAdapter)
        return adapter

    # --- state ---------------------------------------------------------------------------------

    def train(self: Self, mode: bool = True) -> Self:
        if mode:
            self.unmerge()
        return super().train(mode)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            destination[prefix + "weight"] = self._unmerged

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight, the bias, the adapters and, while merged, the weight before."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.bias is not None}, active={list(self._active)}"
        text += ", merged" if self.merged else ""
        return text + ("" if self.activation == "none" else f", activation={self.activation}")


def check_adapter(
    in_features: int, out_features: int, rank: int, alpha: float | None, dropout: float
) -> None:
    """Raise TypeError or ValueError unless such an adapter fits such a layer."""
    check_size("rank", rank)
    check_rank(rank, in_features, out_features, least=1)
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha: expected a finite number; got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected at least 0 and below 1; got {dropout}")
