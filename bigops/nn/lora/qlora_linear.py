"""QLoRALinear: low-rank adapters on a layer whose weight is compressed.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023; here on every
format, not on 4 bits alone.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn.computed_weight import ComputedLinear
from bigops.nn.lora.lora_linear import LoRALinear
from bigops.ops import activation as act


def beside(layer: Any) -> Any:
    """Another module with the parameters, buffers and children of ``layer``."""
    new = copy.copy(layer)
    tables = ("_parameters", "_buffers", "_modules")
    vars(new).update({name: dict(vars(layer)[name]) for name in tables})
    return new


class QLoRALinear(LoRALinear):
    """``act(base(x) + sum of scale * x @ (b @ a).T) + residual``, the compressed base frozen.

    Adapters are added, chosen and trained as those of `LoRALinear`. The base keeps its format, and
    a step moves none of its bytes; x gets its gradient through it. Merging is refused, since
    rounding the sum to the format of the base would lose most of what the adapters learned;
    `to_linear` gives the sum as a dense layer.

    The `state_dict` holds what the base has under ``base.`` and ``adapters.<name>.a`` and ``.b``.
    """

    base: Any

    def __init__(self, base: nn.Linear) -> None:
        """
        Args:
            base: a compressed layer of `bigops.nn` (quantised, sparse, low-rank, packed ..); its
                parameters stop requiring gradients, and this layer takes its activation over.

        Raises:
            TypeError: another module.
        """
        nn.Module.__init__(self)
        self._take(base)
        self._freeze()

    def _take(self, linear: nn.Linear) -> None:
        if not isinstance(linear, ComputedLinear) or isinstance(linear, LoRALinear):
            raise TypeError(
                f"base: expected a compressed layer of bigops.nn; got {type(linear).__name__} "
                "(LoRALinear takes a dense one)"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.base = beside(linear)
        # it comes behind the adapters
        self.activation, self.base.activation = self.base.activation, "none"
        self._start()

    def _freeze(self) -> None:
        self.base.requires_grad_(False)

    def to_base(self) -> nn.Module:
        """The compressed layer without adapters; it shares its tensors with this one."""
        new = beside(self.base)
        new.activation = self.activation
        return new

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """That of the base, [N] or None."""
        return self.base.bias

    @property
    def base_weight(self) -> Tensor:
        """What the base multiplies by [N, K], made for this."""
        base: Tensor = self.base.make_weight()
        return base

    @property
    def computes_weight(self) -> str | None:
        return "the base is compressed; to_linear() gives a dense layer with the adapters in it"

    def _check_settable(self, name: str) -> None:
        ComputedLinear._check_settable(self, name)

    def _weight_like(self) -> tuple[torch.dtype, torch.device, bool]:
        weight = self.base.weight
        trained = [p for name in self._active for p in self._adapter(name).parameters()]
        grad = weight.requires_grad or any(p.requires_grad for p in trained)
        return weight.dtype, weight.device, grad

    def _frozen(self, x: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        if activation == "none":
            y: Tensor = self.base(x, residual)
            return y
        y = act.apply(activation, self.base(x))
        return y if residual is None else y + residual

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self._active:
            return self._frozen(x, residual, self.activation)
        return self._with_dropout(x, residual, [self._adapter(name) for name in self._active])

    def merge(self) -> None:
        """Raise RuntimeError: the format of the base cannot hold the sum."""
        raise RuntimeError(
            f"merge: expected a dense base; got a {type(self.base).__name__}, whose format would "
            "round away what the adapters learned (to_linear() gives the sum as a dense layer)"
        )
