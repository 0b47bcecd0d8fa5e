"""PackedWeight: a dense weight that lies as the kernels of packed_linear read it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks
from bigops.formats.base import Format, storage

PANEL = 64  # rows of W, columns of y
SERVED = (torch.float32, torch.bfloat16, torch.float16)


@storage
class PackedWeight(Format):
    """A dense weight [N, K] in panels of 64 rows, each of them word by word along K.

    A word is one number of a row, or in bfloat16 two neighbours. A panel is one stream from
    memory, and what a step needs of it lies side by side (the panels of BLIS: Van Zee and van de
    Geijn, ACM TOMS 41, 2015). Rows and columns that fill up the last panel and word are zero.
    """

    panels: Tensor  # [ceil(N / 64), K, 64, 1]; bfloat16: [.., ceil(K / 2), 64, 2]
    n: int
    k: int

    SCHEMA = "Tensor panels, int pad, int k"  # pad: rows that fill up the last panel

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.panels, -self.n % PANEL, self.k

    @classmethod
    def of(cls, _: int, panels: Tensor, pad: int, k: int) -> PackedWeight:
        checks.dims("panels", panels, 4)
        n = panels.shape[0] * PANEL - pad
        if not (0 <= pad < PANEL and n >= 0):
            raise ValueError(
                f"pad: expected the rows that fill up the last panel of {PANEL}; got {pad}"
            )
        return cls(panels, n, k)

    @classmethod
    def from_dense(cls, w: Tensor) -> PackedWeight:
        """Lay out a matrix.

        Args:
            w: ``[N, K]``, float32, bfloat16 or float16; copied.

        Raises:
            ValueError: w is no matrix.
            TypeError: w has another dtype.
        """
        checks.tensors(w=w)
        checks.dims("w", w, 2)
        checks.floating("w", w, SERVED)
        n, k = w.shape
        per = _per_word(w.dtype)
        filled = F.pad(w.detach(), (0, -k % per, 0, -n % PANEL))
        words = filled.view(filled.shape[0] // PANEL, PANEL, filled.shape[1] // per, per)
        return cls(words.transpose(1, 2).contiguous(), n, k)

    @classmethod
    def empty(cls, n: int, k: int, dtype: torch.dtype = torch.float32) -> PackedWeight:
        """The storage of a weight [N, K] on "meta", to be loaded."""
        return cls.from_dense(torch.empty((n, k), dtype=dtype, device="meta"))

    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [N, K], in the dtype it has unless one is given."""
        count, words, _, per = self.panels.shape
        rows = self.panels.transpose(1, 2).reshape(count * PANEL, words * per)
        w = rows[: self.n, : self.k]
        return w if dtype is None else w.to(dtype)

    @property
    def x_dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.panels.dtype,)

    @classmethod
    def autocast_dtype(cls, panels: Tensor, *_: Any) -> torch.dtype:  # type: ignore[override]
        return panels.dtype  # they were laid out for this one

    def row_dims(self) -> dict[str, int]:
        return {"panels": 0}

    @property
    def row_unit(self) -> int:
        return PANEL

    def check(self) -> None:
        checks.dims("panels", self.panels, 4)
        checks.floating("panels", self.panels, SERVED)
        if self.n < 0 or self.k < 0:
            raise ValueError(f"n, k: expected at least 0; got {self.n}, {self.k}")
        per = _per_word(self.panels.dtype)
        shape = [-(-self.n // PANEL), -(-self.k // per), PANEL, per]
        checks.shape("panels", self.panels, shape)


def _per_word(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.bfloat16 else 1
