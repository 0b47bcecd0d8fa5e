"""TernaryWeight: a format that no file of the package knows, as somebody else would add one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format, storage
from bigops.ops.family import LinearOp


@storage
class TernaryWeight(Format):
    """Each entry -1, 0 or 1 times the scale of its row."""

    values: Tensor  # [N, K] int8
    scale: Tensor  # [N] float32

    SCHEMA = "Tensor values, Tensor scale"

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.values.shape[1]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.values, self.scale

    @classmethod
    def of(cls, _: int, values: Tensor, scale: Tensor) -> TernaryWeight:
        return cls(values, scale)

    @classmethod
    def from_dense(cls, w: Tensor) -> TernaryWeight:
        quantize.check_weight(w)
        w = w.detach().float()
        scale = w.abs().mean(1)
        scale = torch.where(scale > 0, scale, 1)
        return cls((w / scale[:, None]).round().clamp(-1, 1).to(torch.int8), scale)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor) -> TernaryWeight:
        made = cls(codes, scale)
        made.validate()
        return made

    @classmethod
    def empty(cls, n: int, k: int) -> TernaryWeight:
        return cls(
            torch.empty((n, k), dtype=torch.int8, device="meta"), torch.empty(n, device="meta")
        )

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype) * self.scale.to(dtype)[:, None]

    def row_dims(self) -> dict[str, int]:
        return {"values": 0, "scale": 0}

    def check(self) -> None:
        checks.dims("values", self.values, 2)
        checks.dtype("values", self.values, torch.int8)
        checks.dtype("scale", self.scale, torch.float32)
        checks.shape("scale", self.scale, [self.n])
        checks.device("scale", self.scale, self.values)

    def validate(self) -> None:
        super().validate()
        if bool((self.values.abs() > 1).any()):
            raise ValueError("values: expected -1, 0 and 1 alone")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            raise ValueError("scale: expected finite values above 0")


op = LinearOp("ternary_linear", TernaryWeight)
