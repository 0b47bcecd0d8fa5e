"""Weights of torch's own tensors, in x's dtype: a matrix, and two factors of one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks
from bigops.formats.base import Format, rows, storage


class Plain(Format):
    """What both are: nothing is stored anew, and every tensor may be trained."""

    PLAIN = True

    def check_beside(self, x: Tensor) -> None:
        checks.floating("x", x)
        for name, t in self.tensors().items():
            if t is not None:
                checks.like(name, t, x)

    def kept_sizes(self) -> dict[str, int]:
        return {"preact": self.n}


@storage
class DenseWeight(Plain):
    """A matrix [N, K]; of a gated pair the rows of the gate, then those of up."""

    weight: Tensor

    SCHEMA = "Tensor weight"
    TRAINED = ("weight",)
    GATED = True
    KEPT = "Tensor? preact"

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.weight,)

    @classmethod
    def of(cls, _: int, weight: Tensor) -> DenseWeight:
        return cls(weight)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)

    def check(self) -> None:
        checks.matrix("weight", self.weight)

    def row_dims(self) -> dict[str, int]:
        return {"weight": 0}

    def sum_dims(self) -> dict[str, int]:
        return {"x": -1, "weight": 1}

    def sample(self, grad: Tensor) -> Tensor:
        return grad

    def kept(self, x: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        return {"preact": F.linear(x, self.weight, bias)}


@storage
class Factors(Plain):
    """``base + scale * u @ v``: a weight [N, K] of rank r, alone or beside a dense one (LoRA)."""

    u: Tensor  # [N, r]
    v: Tensor  # [r, K]
    base: Tensor | None  # [N, K]
    scale: float

    SCHEMA = "Tensor u, Tensor v, Tensor? base, float scale"
    TRAINED = ("u", "v", "base")
    KEPT = "Tensor t, Tensor? preact"  # t: scale x v^T

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.u.shape[0]

    @property
    def k(self) -> int:  # type: ignore[override]
        return self.v.shape[1]

    @property
    def rank(self) -> int:
        """r, the rows of v."""
        return self.v.shape[0]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.u, self.v, self.base, self.scale

    @classmethod
    def of(cls, _: int, u: Tensor, v: Tensor, base: Tensor | None, scale: float) -> Factors:
        return cls(u, v, base, scale)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        low = self._scaled(self.u.to(dtype)) @ self.v.to(dtype)
        return low if self.base is None else low + self.base.to(dtype)

    def _scaled(self, t: Tensor) -> Tensor:
        return t if self.scale == 1.0 else t * self.scale

    def check(self) -> None:
        checks.matrix("u", self.u)
        checks.matrix("v", self.v)
        n, k, rank = self.n, self.k, self.u.shape[1]
        checks.shape("v", self.v, [rank, k])
        if rank > min(n, k):
            raise ValueError(
                f"u, v: expected a rank of at most {min(n, k)}, the smaller side of [{n}, {k}]; "
                f"got {rank}"
            )
        if self.base is not None:
            checks.shape("base", self.base, [n, k])

    def row_dims(self) -> dict[str, int]:
        return {"u": 0, "base": 0}

    def sum_dims(self) -> dict[str, int]:
        return {"u": 1, "v": 0, "t": -1} if self.base is None else {}

    @property
    def row_unit(self) -> int:
        return max(self.rank, 1)  # a part of fewer rows than the rank would be refused

    def kept_sizes(self) -> dict[str, int]:
        return {"t": self.rank, **super().kept_sizes()}

    def kept(self, x: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        t = self._scaled(F.linear(x, self.v))
        z = F.linear(t, self.u, bias)
        return {"t": t, "preact": z if self.base is None else z + F.linear(x, self.base)}

    def backward(
        self, gz: Tensor, x: Tensor, wanted: Collection[str], kept: Mapping[str, Tensor | None]
    ) -> dict[str, Tensor]:
        found = {}
        gz_t, x2, t = rows(gz).transpose(0, 1), rows(x), kept.get("t")
        if "u" in wanted:
            assert t is not None
            found["u"] = gz_t @ rows(t)
        if "base" in wanted:
            found["base"] = gz_t @ x2
        if "x" in wanted or "v" in wanted:
            gt = self._scaled(gz @ self.u)
            if "v" in wanted:
                found["v"] = rows(gt).transpose(0, 1) @ x2
            if "x" in wanted:
                gx = gt @ self.v
                found["x"] = gx if self.base is None else gx + gz @ self.base
        return found
