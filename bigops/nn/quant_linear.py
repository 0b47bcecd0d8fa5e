"""QuantLinear: int8 or int4 weight, activations in floating point or in u8."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigops.formats.quantized import QuantizedWeight
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.fields import COMPRESSED, FLAG, SIZE, TEXT, optional


class QuantLinear(CompressedLinear):
    """A `CompressedLinear` with the weight in int8 or int4 (`QuantizedWeight`).

    Args:
        in_features, out_features, bias, activation: as for `CompressedLinear`.
        bits, group, symmetric, activations: the form of the weight and of x, as
            `QuantizedWeight.from_dense` takes them. With "static" the layer has a buffer
            ``x_qparams`` that `calibrate` fills.

    Shapes: x [.., K] float32, bfloat16 or float16, or uint8 on ``x_qparams``; residual [.., N] or
    None; result [.., N] in x's dtype, of a uint8 x in that of bias, else of residual, else float32.

    Raises:
        ValueError: unknown activation, a size below 0, or a form that is not there.
    """

    FIELDS = COMPRESSED | {
        "bits": SIZE,
        "group": optional(SIZE),
        "symmetric": FLAG,
        "activations": TEXT,
    }

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
        form = QuantizedWeight.form(bits, group, symmetric, activations)
        sizes = (in_features, out_features, bias, activation, device, dtype)
        super().__init__(QuantizedWeight, *sizes, **form)

    @classmethod
    def from_linear(  # type: ignore[override]
        cls, linear: nn.Module, activation: str | None = None, **form: Any
    ) -> QuantLinear:
        """`CompressedLinear.from_linear` in this format."""
        return cls._beside(linear, activation, **form)
