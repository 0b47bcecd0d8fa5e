"""Fp8Linear: float8_e4m3fn weight, x in floating point or in e4m3fn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bigops.formats import fp8
from bigops.formats.fp8 import Fp8Weight
from bigops.nn.compressed_linear import STATES, CompressedLinear, check_source
from bigops.ops.fp8_linear import fp8_linear


class Fp8Linear(CompressedLinear):
    """``act(x @ weight.T + bias) + residual`` with the weight in float8_e4m3fn.

    Recovery state: a float ``weight`` [N, K], rounded in the forward pass with a straight-through
    gradient (arXiv 1308.3432); in eval with gradients off the real kernel runs, on storage
    that each call makes anew: for its numbers. The speed comes with `freeze()`, which leaves the
    tensors of `Fp8Weight` as buffers.

    Args:
        in_features: K.
        out_features: N.
        bias: whether the layer has a bias [N].
        activation: none, relu, relu2, gelu, gelu_tanh, silu, sigmoid or tanh.
        scales, activations: the form of the weight and of x, as `quantize_fp8` takes them;
            activations "none" or "dynamic".

    Shapes: x [.., K] float32, bfloat16 or float16; residual [.., N] or None; result [.., N].

    Raises:
        ValueError: unknown activation, a size below 0, or a form that is not there.
    """

    storage_names = ("values", "scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        scales: str = "row",
        activations: str = "dynamic",
    ) -> None:
        super().__init__(in_features, out_features, activation)
        check_layer_form(scales, activations)
        self.scales, self.activations = scales, activations
        source = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = source.weight, source.bias
        self.register_buffer("x_grid", None)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, activation: str | None = None, **form: Any
    ) -> Fp8Linear:
        """A layer in recovery state that shares the Parameter objects of ``linear``.

        Args:
            linear: an `nn.Linear` or a compressed layer that is not frozen.
            activation: None: that of ``linear``.
            form: scales and activations.

        Raises:
            TypeError: ``linear`` is no `nn.Linear` and no compressed layer.
            ValueError: ``linear`` is frozen.
        """
        source = check_source(linear)
        name = source.activation if activation is None else activation
        new = cls(source.in_features, source.out_features, False, name, device="meta", **form)
        new.weight, new.bias = source.weight, source.bias
        return new.train(linear.training)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Fp8Linear:
        """An empty layer on "meta" as `arguments()` describes it, to be loaded."""
        frozen = arguments["frozen"]
        new = cls(**{k: v for k, v in arguments.items() if k not in STATES}, device="meta")
        if frozen:
            form = (new.scales, new.activations)
            new.set_storage(Fp8Weight.empty(new.out_features, new.in_features, *form))
        return new

    def make_storage(self) -> Fp8Weight:
        return Fp8Weight.from_dense(self.weight, self.scales, self.activations)

    def make_frozen(self, tensors: dict[str, Any]) -> Fp8Weight:
        form = (self.in_features, self.scales, self.activations)
        return Fp8Weight(tensors["values"], tensors["scale"], None, *form)

    def check_storage(self, storage: Any) -> None:
        super().check_storage(storage)
        if storage.n != self.out_features:
            raise ValueError(
                f"values: expected {self.out_features} rows, the layer's out_features; got "
                f"{storage.n}"
            )

    def trained_weight(self) -> Tensor:
        with torch.no_grad():
            codes, scale = fp8.round_weight(self.weight, self.scales)
            rounded = self.make_frozen({"values": codes, "scale": scale}).to_dense()
            rounded = rounded.to(self.weight.dtype)
        # weight - weight is 0 exactly, so the value is that of `rounded` to the last bit.
        return rounded + (self.weight - self.weight.detach())

    def run(self, x: Tensor, storage: Any, residual: Tensor | None) -> Tensor:
        return fp8_linear(x, storage, self.bias, residual, self.activation)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "scales": self.scales, "activations": self.activations}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scales={self.scales}, activations={self.activations}"


def check_layer_form(scales: str, activations: str) -> None:
    """Raise ValueError for a form that no layer has: a static scale of x is for the op alone."""
    if activations not in ("none", "dynamic"):
        raise ValueError(
            f"activations: expected 'none' or 'dynamic' for a layer in fp8; got {activations!r}"
        )
    fp8.check_form(scales, activations)
