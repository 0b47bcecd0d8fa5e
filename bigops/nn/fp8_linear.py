"""Fp8Linear: float8_e4m3fn weight, x in floating point or in e4m3fn."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigops.formats.fp8 import Fp8Weight
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.fields import COMPRESSED, TEXT


class Fp8Linear(CompressedLinear):
    """A `CompressedLinear` with the weight in float8_e4m3fn (`Fp8Weight`).

    Args:
        in_features, out_features, bias, activation: as for `CompressedLinear`.
        scales, activations: the form of the weight and of x, as `Fp8Weight.from_dense` takes them;
            activations "none" or "dynamic".

    Shapes: x [.., K] float32, bfloat16 or float16; residual [.., N] or None; result [.., N].

    Raises:
        ValueError: unknown activation, a size below 0, or a form that is not there.
    """

    FIELDS = COMPRESSED | {"scales": TEXT, "activations": TEXT}

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
        sizes = (in_features, out_features, bias, activation, device, dtype)
        super().__init__(Fp8Weight, *sizes, scales=scales, activations=activations)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Module, activation: str | None = None, **form: Any
    ) -> Fp8Linear:
        """`CompressedLinear.from_linear` in this format."""
        return cls._beside(linear, activation, **form)
