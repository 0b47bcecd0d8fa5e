"""A sparse weight as a bitmap and packed values: the fewest bytes at a moderate sparsity.

Of W [N, K], filled up to rows of 4 and columns of 256, a tile is 4 rows of 256 columns; tiles lie
in the order of the groups of 4 rows, in a group from left to right:

    values  [total]                 bfloat16, float16 or float32: what is kept, tile by tile, in a
                                    tile row by row; each tile is filled up to 16 bytes with 0
    bits    int32 [N' / 4, K' / 256, 32]   word 8 r + w of a tile: bit j says whether row r keeps
                                    column 32 w + j
    ptr     int32 [tiles + 1]       where the values of each tile begin, in units of 16 bytes

A bit for each entry is what a position costs, whatever is kept. Of single entries at 50% that is
0.57 of the bytes of dense bfloat16 and 0.53 of float32, where `SparseWeight` takes 0.99 (its words
hold two neighbours) and 0.68; beyond about 93% of zeros an index costs less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format, storage
from bigops.formats.sparse import SparseWeight

ROWS, COLUMNS = 4, 256  # of a tile
UNIT = 16  # bytes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def tiles_of(n: int, k: int) -> tuple[int, int]:
    """(groups of rows, panels of columns) of a weight [n, k]."""
    return -(-n // ROWS), -(-k // COLUMNS)


@storage
class BitmapWeight(Format):
    """A sparse weight as a bitmap and packed values (layout: the head of this file)."""

    values: Tensor
    bits: Tensor
    ptr: Tensor
    n: int
    k: int

    SCHEMA = "Tensor values, Tensor bits, Tensor ptr, SymInt n"
    K_OF_X = True

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.values, self.bits, self.ptr, self.n

    @classmethod
    def of(cls, k: int, values: Tensor, bits: Tensor, ptr: Tensor, n: int) -> BitmapWeight:
        return cls(values, bits, ptr, n, k)

    @classmethod
    def from_mask(
        cls, w: Tensor, mask: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> BitmapWeight:
        """Store the entries of a matrix that a mask keeps; plain torch, on any device.

        Args:
            w: ``[N, K]``, any floating dtype.
            mask: bool ``[N, K]``, True where an entry is kept; None keeps what is not exactly 0.
            dtype: of the stored values: bfloat16, float16 or float32; None keeps w's, or float32.

        Raises:
            ValueError: mask of another shape, w no matrix, or NaN or inf in it.
            TypeError: w is no floating tensor, mask no bool, or a dtype that is not stored.
        """
        quantize.check_weight(w)
        if dtype is None:
            dtype = w.dtype if w.dtype in DTYPES else torch.float32
        if dtype not in DTYPES:
            raise TypeError(f"dtype: expected bfloat16, float16 or float32; got {dtype}")
        if mask is None:
            mask = w != 0
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a torch.Tensor; got {type(mask).__name__}")
        checks.dtype("mask", mask, torch.bool)
        checks.shape("mask", mask, list(w.shape))
        tiled = _tiled(mask)  # [tiles, 1024]
        counts = tiled.sum(1)
        per = UNIT // dtype.itemsize
        ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=w.device)
        ptr[1:] = torch.cumsum((counts + per - 1) // per, 0)
        if int(ptr[-1]) >= 2**31:
            raise ValueError(
                f"w: expected less than 2^35 bytes of values; got {int(ptr[-1]) * UNIT}"
            )
        values = torch.zeros(int(ptr[-1]) * per, dtype=dtype, device=w.device)
        values[_places(counts, ptr, per)] = _tiled(w.detach())[tiled].to(dtype)
        words = tiled.view(-1, 32, 32).long() << torch.arange(32, device=w.device)
        bits = words.sum(2).to(torch.int32).view(*tiles_of(*w.shape), 32)
        return cls(values, bits, ptr.to(torch.int32), w.shape[0], w.shape[1])

    @classmethod
    def from_sparse(cls, weight: SparseWeight, dtype: torch.dtype | None = None) -> BitmapWeight:
        """Store a weight with floating values as a bitmap; zeros in it are dropped.

        Args:
            weight: the general storage.
            dtype: of the stored values: bfloat16, float16 or float32; None keeps the weight's.

        Raises:
            TypeError: int8 values, or a dtype that is not stored.
        """
        stored = weight.values.dtype
        if stored not in DTYPES:
            raise TypeError(f"weight: expected floating values; got {checks.short(stored)}")
        return cls.from_mask(weight.to_dense().detach(), None, stored if dtype is None else dtype)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for."""
        return to_dense(self.values, self.bits, self.ptr, self.n, self.k).to(dtype)

    def pattern(self) -> Tensor:
        """bool [N, K]: which entries are kept."""
        return _whole(_marks(self.bits), self.n, self.k)

    @property
    def density(self) -> float:
        """Share of the entries that are kept."""
        return float(_marks(self.bits).sum()) / (self.n * self.k) if self.n * self.k else 1.0

    @property
    def x_dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.values.dtype,)

    def check(self) -> None:
        checks.floating("values", self.values, DTYPES)
        per = UNIT // self.values.element_size()
        if self.values.dim() != 1 or self.values.shape[0] % per:
            raise ValueError(
                f"values: expected shape [a multiple of {per}]; got {list(self.values.shape)}"
            )
        groups, panels = tiles_of(self.n, self.k)
        checks.dtype("bits", self.bits, torch.int32)
        checks.shape("bits", self.bits, [groups, panels, 32])
        checks.dtype("ptr", self.ptr, torch.int32)
        checks.shape("ptr", self.ptr, [groups * panels + 1])

    def check_structure(self) -> None:
        values, bits, ptr, n, k = self.values, self.bits, self.ptr, self.n, self.k
        per = UNIT // values.element_size()
        marks = _marks(bits)
        expected = torch.zeros(ptr.shape, dtype=torch.int64, device=ptr.device)
        expected[1:] = torch.cumsum((marks.sum(1) + per - 1) // per, 0)
        if not torch.equal(ptr.long(), expected) or int(expected[-1]) * per != values.shape[0]:
            raise ValueError(
                "ptr: expected the sums of what the bits keep of each tile, in units of 16 bytes, "
                f"to the end of the values; got others, for {values.shape[0]} values"
            )
        inside = _tiled(torch.ones((n, k), dtype=torch.bool, device=bits.device))
        if bool((marks & ~inside).any()):
            raise ValueError(f"bits: expected none outside the shape [{n}, {k}]; got some")

    def validate(self) -> None:
        if self.n < 0 or self.k < 0:
            raise ValueError(f"n, k: expected at least 0; got {self.n}, {self.k}")
        super().validate()


def _tiled(t: Tensor) -> Tensor:
    """[tiles, 1024] of a matrix [N, K]."""
    (n, k), (groups, panels) = t.shape, tiles_of(*t.shape)
    full = F.pad(t, (0, panels * COLUMNS - k, 0, groups * ROWS - n))
    split = full.view(groups, ROWS, panels, COLUMNS).transpose(1, 2)
    return split.reshape(groups * panels, ROWS * COLUMNS)


def _whole(tiled: Tensor, n: int, k: int) -> Tensor:
    """The matrix [n, k] of `_tiled`."""
    groups, panels = tiles_of(n, k)
    split = tiled.view(groups, panels, ROWS, COLUMNS).transpose(1, 2)
    return split.reshape(groups * ROWS, panels * COLUMNS)[:n, :k]


def _marks(bits: Tensor) -> Tensor:
    """bool [tiles, 1024]: the bits of each tile."""
    places = torch.arange(32, device=bits.device, dtype=torch.int32)
    return (bits.reshape(-1, 32, 1) >> places & 1).bool().flatten(1)


def _places(counts: Tensor, ptr: Tensor, per: int) -> Tensor:
    """Where in the values each entry that is kept lies, tile by tile."""
    before = torch.cumsum(counts, 0) - counts
    total = int(counts.sum())
    first = torch.repeat_interleave(ptr[:-1] * per - before, counts, output_size=total)
    return first + torch.arange(total, device=counts.device)


def to_dense(values: Tensor, bits: Tensor, ptr: Tensor, n: int, k: int) -> Tensor:
    """The matrix [n, k] of the storage, float32."""
    marks = _marks(bits)
    # An index for every entry, kept or not: no size depends on the contents, so that this is traced
    places = (ptr[:-1].long() * (UNIT // values.element_size())).unsqueeze(1) + marks.cumsum(1) - 1
    held = F.pad(values, (0, 1))  # for where nothing is stored
    dense = torch.where(marks, held[places.clamp(0, values.shape[0])].float(), 0)
    return _whole(dense, n, k)
