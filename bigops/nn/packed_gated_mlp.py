"""PackedGatedMLP: the feed-forward block of Llama-type models in panels, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.nn import fields
from bigops.nn.compressed_linear import wants_gradient
from bigops.nn.gated_mlp import GatedMLP, check_gated
from bigops.nn.layer import Layer
from bigops.nn.packed_linear import PackedLinear
from bigops.ops import activation as act
from bigops.ops.choice import Choice


class PackedGatedMLP(Layer):
    """``down(act(x @ gate.T) * (x @ up.T)) + residual`` by three `PackedLinear`.

    The packed form of `GatedMLP`, for inference on the CPU: two products from panels and a pass
    over [M, H] take less time than the pair by rows. Its `state_dict` is that of `GatedMLP`.

    Args:
        in_features: K.
        hidden_features: H.
        out_features: N, by default K.
        activation: swiglu, geglu, geglu_tanh or reglu.
        bias: whether all three projections have a bias.
        frozen: whether the three are packed.

    Shapes: x [.., K] in the weights' dtype, residual [.., N] or None, result [.., N].

    Raises:
        ValueError: an activation that is no gated pair, or a size below 0.
    """

    FIELDS = fields.GATED_MLP | {"frozen": fields.FLAG}
    inside = "a part of a PackedGatedMLP; unpack_ makes a GatedMLP of it"
    unpacks = True

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        frozen: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_gated(activation)
        self.in_features, self.hidden_features = in_features, hidden_features
        self.out_features = in_features if out_features is None else out_features
        self.activation = activation
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        gate = act.GATED[activation]
        self.gate_proj = PackedLinear(in_features, hidden_features, bias, gate, **where)
        self.up_proj = PackedLinear(in_features, hidden_features, bias, **where)
        self.down_proj = PackedLinear(hidden_features, self.out_features, bias, **where)
        if frozen:
            self.freeze()

    @classmethod
    def from_mlp(cls, mlp: GatedMLP) -> PackedGatedMLP:
        """A packed block with the values of ``mlp``, which is not changed.

        The bias of the down projection is shared, those of the others are copied: in `GatedMLP`
        they are one Parameter.

        Raises:
            TypeError: ``mlp`` is no `GatedMLP`, or of a dtype that no packed kernel takes.
        """
        if not isinstance(mlp, GatedMLP):
            raise TypeError(f"mlp: expected a GatedMLP; got {type(mlp).__name__}")
        new = cls(**mlp.arguments(), frozen=False, device="meta")
        weight, bias = mlp.gate_up_weight, mlp.gate_up_bias
        halves = zip((new.gate_proj, new.up_proj), weight.detach().chunk(2), strict=True)
        for place, (layer, half) in enumerate(halves):
            layer.weight = nn.Parameter(half, weight.requires_grad)
            if bias is not None:
                part = bias.detach().chunk(2)[place].clone()
                layer.bias = nn.Parameter(part, bias.requires_grad)
        new.down_proj.weight, new.down_proj.bias = mlp.down_proj.weight, mlp.down_proj.bias
        return new.freeze().train(mlp.training)

    def unpacked(self) -> GatedMLP:
        """A `GatedMLP` with the values of this block; the bias of the down projection is shared."""
        gate, up, down = (layer.unpacked() for layer in self._projections())
        return GatedMLP.from_modules(gate, up, down, self.activation).train(self.training)

    def _projections(self) -> tuple[PackedLinear, PackedLinear, PackedLinear]:
        return self.gate_proj, self.up_proj, self.down_proj

    @property
    def frozen(self) -> bool:  # type: ignore[override]
        """Whether all three projections are packed."""
        return all(layer.frozen for layer in self._projections())

    def freeze(self) -> PackedGatedMLP:
        """Pack all three projections, in place; twice is once."""
        for layer in self._projections():
            layer.freeze()
        return self

    def thaw(self) -> PackedGatedMLP:
        """Unpack all three projections, in place: their float Parameters are back bit for bit."""
        for layer in self._projections():
            layer.thaw()
        return self

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = gate * up if wants_gradient(gate, up) else gate.mul_(up)
        return self.down_proj(hidden, residual)

    def explain(self, x: Tensor) -> Choice:
        """Which kernel serves the down projection of the block on x."""
        return self.down_proj.explain(x.new_empty((*x.shape[:-1], self.hidden_features)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"

    def arguments(self) -> dict[str, Any]:
        """What the constructor needs to make this block again, as plain data."""
        return {
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "out_features": self.out_features,
            "activation": self.activation,
            "bias": self.down_proj.bias is not None,
            "frozen": self.frozen,
        }
