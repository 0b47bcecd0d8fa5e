"""GatedMLP: the feed-forward block of Llama-type models, gate and up projection in one op."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bigops.nn import fields
from bigops.nn.computed_weight import is_dense
from bigops.nn.layer import Layer, layer_of
from bigops.nn.linear import Linear, check_size
from bigops.ops import activation as act
from bigops.ops.choice import Choice
from bigops.ops.fused_linear import fused_linear

HALVES = ("gate_proj", "up_proj")


class GatedMLP(Layer):
    """``down(act(x @ gate.T) * (x @ up.T)) + residual`` (GLU variants, arXiv 2002.05202).

    Gate and up projection are one parameter of [2H, K], rows ``0:H`` the gate, so that x is read
    once. The `state_dict` has the keys of Llama-type blocks (``gate_proj.weight``,
    ``up_proj.weight``, ``down_proj.weight`` and, where there are any, the biases) in both
    directions; their values are views of the stacked parameter.

    Args:
        in_features: K.
        hidden_features: H.
        out_features: N, by default K.
        activation: swiglu (silu gate), geglu (erf gelu), geglu_tanh or reglu.
        bias: whether all three projections have a bias.

    Shapes: x [.., K], residual [.., N] or None, result [.., N].

    Raises:
        ValueError: an activation that is no gated pair, or a size below 0.
    """

    FIELDS = fields.GATED_MLP
    parts: ClassVar = {"down_proj": "bigops.Linear"}
    stacked = HALVES
    closed_to_compress = "its gate and up projection: gated pairs have no compressed kernel"
    closed_to_pack = None

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_gated(activation)
        in_features = check_size("in_features", in_features)
        hidden_features = check_size("hidden_features", hidden_features)
        self.in_features = in_features
        self.hidden_features = hidden_features
        self.out_features = in_features if out_features is None else out_features
        self.activation = activation
        shape = (2 * hidden_features, in_features)
        self.gate_up_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.gate_up_bias: nn.Parameter | None
        self.register_parameter("gate_up_bias", None)
        if bias:
            self.gate_up_bias = nn.Parameter(torch.empty(shape[0], device=device, dtype=dtype))
        self.down_proj = Linear(
            hidden_features, self.out_features, bias, device=device, dtype=dtype
        )
        self._reset_gate_up()

    def _reset_gate_up(self) -> None:
        nn.init.kaiming_uniform_(self.gate_up_weight, a=5**0.5)  # as nn.Linear does
        if self.gate_up_bias is not None:
            limit = self.in_features**-0.5 if self.in_features > 0 else 0
            nn.init.uniform_(self.gate_up_bias, -limit, limit)

    def reset_parameters(self) -> None:
        """Initialise all three projections as `nn.Linear` does."""
        self._reset_gate_up()
        self.down_proj.reset_parameters()

    @classmethod
    def from_modules(
        cls, gate: nn.Linear, up: nn.Linear, down: nn.Linear, activation: str = "swiglu"
    ) -> GatedMLP:
        """Build the block from three `nn.Linear`: gate and up are copied, down is shared.

        Raises:
            TypeError: one of the three is no `nn.Linear`.
            ValueError: shapes, biases, dtypes or devices that do not fit together.
        """
        for name, module in (("gate", gate), ("up", up), ("down", down)):
            if not is_dense(module):
                raise TypeError(f"{name}: expected a torch.nn.Linear; got {type(module).__name__}")
        check_gated(activation)
        if up.weight.shape != gate.weight.shape:
            raise ValueError(
                f"up: expected a weight of {list(gate.weight.shape)}, that of gate; "
                f"got {list(up.weight.shape)}"
            )
        if down.in_features != gate.out_features:
            raise ValueError(
                f"down: expected in_features {gate.out_features}, the rows of gate; "
                f"got {down.in_features}"
            )
        biases = [module.bias is not None for module in (gate, up, down)]
        if len(set(biases)) != 1:
            raise ValueError(f"bias: expected all three or none to have one; got {biases}")
        for name, module in (("up", up), ("down", down)):
            got = (module.weight.dtype, module.weight.device)
            expected = (gate.weight.dtype, gate.weight.device)
            if got != expected:
                raise ValueError(f"{name}: expected {expected}, those of gate; got {got}")
        new = cls(
            gate.in_features,
            gate.out_features,
            down.out_features,
            activation,
            biases[0],
            device="meta",
        )
        with torch.no_grad():
            new.gate_up_weight = nn.Parameter(
                torch.cat([gate.weight, up.weight]), gate.weight.requires_grad
            )
            if gate.bias is not None and up.bias is not None:
                new.gate_up_bias = nn.Parameter(
                    torch.cat([gate.bias, up.bias]), gate.bias.requires_grad
                )
        new.down_proj = Linear.from_linear(down)
        return new.train(gate.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        hidden = fused_linear(x, self.gate_up_weight, self.gate_up_bias, None, self.activation)
        return self.down_proj(hidden, residual)

    def explain(self, x: Tensor) -> Choice | None:
        """Which kernel serves the down projection of the block on x."""
        down = layer_of(self.down_proj)  # a verb may have put another module there
        inner = x.new_empty((*x.shape[:-1], self.hidden_features))
        return None if down is None else down.explain(inner)

    def packed(self) -> Layer:
        from bigops.nn.packed_gated_mlp import PackedGatedMLP  # which is made of this one

        return PackedGatedMLP.from_mlp(self)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, hidden_features={self.hidden_features}, "
            f"out_features={self.out_features}, activation={self.activation}, "
            f"bias={self.gate_up_bias is not None}"
        )

    def arguments(self) -> dict[str, Any]:
        """What the constructor needs to make this block again, as plain data."""
        return {
            "in_features": self.in_features,
            "hidden_features": self.hidden_features,
            "out_features": self.out_features,
            "activation": self.activation,
            "bias": self.gate_up_bias is not None,
        }

    # --- the keys of Llama-type blocks ------------------------------------------------------

    def _stacked(self) -> list[tuple[str, nn.Parameter]]:
        pairs = [("weight", self.gate_up_weight)]
        if self.gate_up_bias is not None:
            pairs.append(("bias", self.gate_up_bias))
        return pairs

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for leaf, parameter in self._stacked():
            value = parameter if keep_vars else parameter.detach()
            for name, half in zip(HALVES, value.chunk(2), strict=True):
                destination[f"{prefix}{name}.{leaf}"] = half

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        local = dict(state_dict)
        absent: list[str] = []
        for leaf, parameter in self._stacked():
            shape = parameter[: self.hidden_features].shape
            halves = []
            for name in HALVES:
                key = f"{prefix}{name}.{leaf}"
                value = local.pop(key, None)
                if value is None:
                    absent.append(key)
                elif value.shape != shape:
                    error_msgs.append(
                        f"size mismatch for {key}: copying a param with shape {value.shape} from "
                        f"checkpoint, the shape in current model is {shape}."
                    )
                else:
                    halves.append(value)
            stacked = f"{prefix}gate_up_{leaf}"
            if stacked in local and strict:
                unexpected_keys.append(stacked)
            local.pop(stacked, None)
            if len(halves) == 2:
                local[stacked] = torch.cat(halves)
        missing: list[str] = []
        super()._load_from_state_dict(
            local, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        ours = {f"{prefix}gate_up_{leaf}" for leaf, _ in self._stacked()}
        missing_keys.extend(key for key in missing if key not in ours)
        if strict:
            missing_keys.extend(absent)


def check_gated(activation: str) -> None:
    """Raise ValueError unless ``activation`` names a gated pair."""
    if activation not in act.GATED:
        raise ValueError(
            f"activation: expected a gated pair, one of {', '.join(act.GATED)}; got {activation!r}"
        )
