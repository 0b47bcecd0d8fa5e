"""QuantLinear: int8 or int4 weight, activations in floating point or in u8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.formats import quantize
from bigops.formats.quantized import QuantizedWeight, check_form
from bigops.nn.compressed_linear import STATES, CompressedLinear, check_source
from bigops.ops.quantized_linear import quantized_linear


class QuantLinear(CompressedLinear):
    """``act(x @ weight.T + bias) + residual`` with the weight in int8 or int4.

    Recovery state: a float ``weight`` [N, K], rounded to its grid in the forward pass with a
    straight-through gradient (arXiv 1308.3432); in eval with gradients off the real kernel runs, on
    storage that each call makes anew: for its numbers. The speed comes with `freeze()`, which
    leaves the fields of `QuantizedWeight` as buffers.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.
        bits, group, symmetric, activations: the form of the weight and of x, as `quantize_weight`
            takes them. With "static" the layer has a buffer ``x_grid`` that `calibrate` fills.

    Shapes: x [.., K] float32, bfloat16 or float16, or uint8 on ``x_grid``; residual [.., N] or
    None; result [.., N] in x's dtype, of a uint8 x in that of bias, else of residual, else float32.

    Raises:
        ValueError: unknown activation, a size below 0, or a form that is not there.
    """

    storage_names = ("values", "scale", "zero_point", "row_sum", "x_grid")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 8,
        group: int | None = None,
        symmetric: bool = True,
        activations: str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, activation)
        if activations is None:
            activations = "dynamic" if bits == 8 and group is None else "none"
        check_form(bits, group or 0, activations)
        self.bits, self.group, self.symmetric = bits, group, symmetric
        self.activations = activations
        source = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = source.weight, source.bias
        # A scale of 0 says that nothing was seen yet; make_storage refuses it.
        empty = torch.zeros(2, device=device) if activations == "static" else None
        self.register_buffer("x_grid", empty)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, activation: str | None = None, **form: Any
    ) -> QuantLinear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        Args:
            linear: an `nn.Linear` or a compressed layer that is not frozen.
            activation: None: that of ``linear``.
            form: bits, group, symmetric and activations.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen.
        """
        source = check_source(linear)
        name = source.activation if activation is None else activation
        new = cls(source.in_features, source.out_features, False, name, device="meta", **form)
        new.weight, new.bias = source.weight, source.bias
        if new.x_grid is not None:
            new.x_grid = torch.zeros(2, device=source.weight.device)
        return new.train(linear.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> QuantLinear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        frozen = arguments["frozen"]
        new = cls(**{k: v for k, v in arguments.items() if k not in STATES}, device="meta")
        if frozen:
            form = (new.bits, new.group, new.symmetric, new.activations)
            new.set_storage(QuantizedWeight.empty(new.out_features, new.in_features, *form))
        return new

    def make_storage(self) -> QuantizedWeight:
        self.check_calibrated()
        return QuantizedWeight.from_dense(
            self.weight, self.bits, self.group, self.symmetric, self.activations, self.x_grid
        )

    def make_frozen(self, tensors: dict[str, Any]) -> QuantizedWeight:
        return QuantizedWeight(
            **tensors,
            n=self.out_features,
            k=self.in_features,
            bits=self.bits,
            group=self.group or 0,
            activations=self.activations,
        )

    def trained_weight(self) -> Tensor:
        return straight_through(self.weight, self.bits, self.group, self.symmetric)

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        return quantized_linear(x, storage, self.bias, residual, self.activation)

    def arguments(self) -> dict[str, Any]:
        return {
            **super().arguments(),
            "bits": self.bits,
            "group": self.group,
            "symmetric": self.symmetric,
            "activations": self.activations,
        }

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, bits={self.bits}"
        if self.group is not None:
            text += f", group={self.group}"
        if not self.symmetric:
            text += ", symmetric=False"
        return f"{text}, activations={self.activations}"


def straight_through(
    weight: Tensor, bits: int = 8, group: int | None = None, symmetric: bool = True
) -> Tensor:
    """``weight`` [N, K] rounded to its grid; the gradient passes as if it were not."""
    columns = group or 0
    with torch.no_grad():
        grid = quantize.round_weight(weight, bits, columns, symmetric)
        rounded = grid.dense(columns).to(weight.dtype)
    # weight - weight is 0 exactly, so the value is that of `rounded` to the last bit.
    return rounded + (weight - weight.detach())
