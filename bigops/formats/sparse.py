"""SparseWeight: any pattern of zeros, stored as the words of 4 bytes that it touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats import sparse_layout as layout
from bigops.formats.base import FLOATS, Format, storage
from bigops.formats.patterns import Pattern, check_block
from bigops.formats.sparse_layout import (
    BLOCK,
    CHUNKS,
    COLUMNS,
    SLICE,
    Positions,
    chunk_rows,
    positions,
    row_sums,
    sizes,
    stored_sums,
    to_dense,
)

# Words by which layers and configs name the dtypes of stored values.
VALUES = {"int8": torch.int8, "bf16": torch.bfloat16, "fp32": torch.float32}


@storage
class SparseWeight(Format):
    """A sparse weight as it is stored and saved (layout: `bigops.formats.sparse_layout`)."""

    values: Tensor
    index: Tensor
    rows: Tensor
    length: Tensor
    ptr: Tensor
    scale: Tensor | None
    sums: Tensor | None
    n: int
    k: int
    chunk: int

    # K is that of x.
    SCHEMA = (
        "Tensor values, Tensor index, Tensor rows, Tensor length, Tensor ptr, Tensor? scale, "
        "Tensor? sums, SymInt n, int chunk"
    )
    TRAINED = ("values",)
    K_OF_X = True
    _always: ClassVar = ("values", "index", "rows", "length", "ptr")

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (
            self.values,
            self.index,
            self.rows,
            self.length,
            self.ptr,
            self.scale,
            self.sums,
            self.n,
            self.chunk,
        )

    @classmethod
    def of(
        cls,
        k: int,
        values: Tensor,
        index: Tensor,
        rows: Tensor,
        length: Tensor,
        ptr: Tensor,
        scale: Tensor | None,
        sums: Tensor | None,
        n: int,
        chunk: int,
    ) -> SparseWeight:
        return cls(values, index, rows, length, ptr, scale, sums, n, k, chunk)

    @property
    def rounds(self) -> bool:
        return self.scale is not None

    @property
    def takes_rows(self) -> bool:
        return self.rounds

    @classmethod
    def form(
        cls, values: str = "int8", chunk: int | None = None, activations: str = "dynamic"
    ) -> dict[str, Any]:
        """How a layer stores the weight and, with int8 values, what the product does with x."""
        if not isinstance(values, str) or values not in VALUES:
            raise ValueError(f"values: expected {', '.join(VALUES)}; got {values!r}")
        if activations not in ("dynamic", "static"):
            raise ValueError(f"activations: expected dynamic or static; got {activations!r}")
        if activations == "static" and values != "int8":
            raise ValueError(
                f"activations: expected 'dynamic' with values {values!r}; got 'static'"
            )
        _chunk(0, chunk)
        return {"values": values, "chunk": chunk, "activations": activations}

    @classmethod
    def rounded(cls, w: Tensor, values: str = "int8", **_: Any) -> Tensor:
        if values == "int8":
            scale = quantize.row_scales(w).unsqueeze(1)
            return quantize.to_int8(w, scale).float() * scale
        return w.to(VALUES[values]).float()

    @classmethod
    def from_mask(
        cls,
        w: Tensor,
        mask: Tensor,
        dtype: torch.dtype = torch.int8,
        block: tuple[int, int] = (1, 4),
        chunk: int | None = None,
    ) -> SparseWeight:
        """Store the blocks of ``w`` that ``mask`` keeps.

        Args:
            w: ``[N, K]``, any floating dtype.
            mask: bool ``[ceil(N / rows), ceil(K / columns)]``, as `block_mask` gives it.
            dtype: of the stored values: int8 (one symmetric scale a row), bfloat16 or float32.
            block: rows and columns of a block; (1, 1) for a mask of single entries.
            chunk: rows of a chunk, 64, 128 or 256; None chooses by N.

        Raises:
            ValueError: mask of another shape, w no matrix, or NaN or inf in it.
            TypeError: w is no floating tensor, mask no bool, or a dtype that is not stored.
        """
        quantize.check_weight(w)
        if dtype not in COLUMNS:
            raise TypeError(f"dtype: expected int8, bfloat16 or float32; got {dtype}")
        n, k = w.shape
        rows, columns = check_block(block)
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: expected a torch.Tensor; got {type(mask).__name__}")
        checks.dtype("mask", mask, torch.bool)
        checks.shape("mask", mask, [-(-n // rows), -(-k // columns)])
        full = Pattern(rows, columns).expand(mask, n, k)
        kept = torch.where(full, w.detach().float(), 0)
        scale = None
        if dtype == torch.int8:
            scale = quantize.row_scales(kept)
            kept = quantize.to_int8(kept, scale.unsqueeze(1))
        return cls._store(kept.to(dtype), full, scale, chunk)

    @classmethod
    def from_codes(
        cls, q: Tensor, scale: Tensor, mask: Tensor | None = None, chunk: int | None = None
    ) -> SparseWeight:
        """Store numbers that somebody else chose, as they are: row n is ``scale[n] * q[n]``.

        Args:
            q: int8 ``[N, K]``.
            scale: float32 ``[N]``, finite and above 0.
            mask: bool ``[N, K]``, True where an entry is kept; None keeps what is not 0.
            chunk: rows of a chunk, 64, 128 or 256; None chooses by N.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, or as `validate`.
        """
        for name, given in (("q", q), ("scale", scale)):
            checks.tensor(name, given)
        checks.dims("q", q, 2)
        checks.dtype("q", q, torch.int8)
        checks.dtype("scale", scale, torch.float32)
        checks.shape("scale", scale, [q.shape[0]])
        mask = q != 0 if mask is None else mask
        checks.tensor("mask", mask)
        checks.dtype("mask", mask, torch.bool)
        checks.shape("mask", mask, list(q.shape))
        made = cls._store(torch.where(mask, q, 0), mask, scale.detach().clone(), chunk)
        made.validate()
        return made

    @classmethod
    def from_dense(cls, w: Tensor, dtype: torch.dtype | None = None) -> SparseWeight:
        """Store a matrix by its zeros: what is exactly 0 is dropped.

        Args:
            w: ``[N, K]``, any floating dtype.
            dtype: of the stored values; None keeps bfloat16 and takes float32 for the rest.
        """
        quantize.check_weight(w)
        if dtype is None:
            dtype = torch.bfloat16 if w.dtype == torch.bfloat16 else torch.float32
        return cls.from_mask(w, w != 0, dtype, (1, 1))

    @classmethod
    def can_merge(cls, parts: Sequence[SparseWeight]) -> bool:
        first = parts[0]
        return all(
            part.n % part.chunk == 0
            and (part.k, part.chunk, part.values.dtype, part.rows.shape[1])
            == (first.k, first.chunk, first.values.dtype, first.rows.shape[1])
            for part in parts
        )

    @classmethod
    def merge(cls, parts: Sequence[SparseWeight]) -> SparseWeight:
        """Whole chunks one below the other.

        Raises:
            ValueError: several parts that end amid a chunk, or are stored in different ways.
        """
        if len(parts) == 1:
            return parts[0]
        if not cls.can_merge(parts):
            raise ValueError(
                "parts: expected one, since a SparseWeight does not split but into whole chunks "
                "of one size, of the same columns, dtype and group of rows"
            )
        begin, pointers = 0, [parts[0].ptr[:1]]
        for part in parts:
            pointers.append(part.ptr[1:] + begin)
            begin += len(part.values)
        found: dict[str, Tensor | None] = {
            name: None if t is None else torch.cat([getattr(part, name) for part in parts])
            for name, t in parts[0].tensors().items()
        }
        made = parts[0].with_tensors(found | {"ptr": torch.cat(pointers)})
        return made.replace(n=sum(part.n for part in parts))

    @classmethod
    def _store(
        cls, values: Tensor, mask: Tensor, scale: Tensor | None, chunk: int | None
    ) -> SparseWeight:
        n, k = values.shape
        chunk = _chunk(n, chunk)
        stored = layout.store(values, mask, chunk)
        sums = None
        if scale is not None:
            at = positions(*stored, k, chunk)
            sums = row_sums(stored.values, at, n, chunk)
        return cls(*stored, scale, sums, n, k, chunk)

    @classmethod
    def empty(cls, n: int, k: int, dtype: torch.dtype, chunk: int | None = None) -> SparseWeight:
        """The storage of a weight [N, K] of which nothing is kept, on "meta", to be loaded."""
        chunk = _chunk(n, chunk)
        size = sizes(n, k, chunk, dtype)

        def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        return cls(
            tensor((0, SLICE, size.columns), dtype),
            tensor((0, SLICE), torch.uint8),
            tensor((size.total, SLICE), torch.uint8),
            tensor((size.total, SLICE), torch.uint8),
            tensor((size.total + 1,), torch.int32),
            tensor((n,), torch.float32) if dtype == torch.int8 else None,
            tensor((n,), torch.int32) if dtype == torch.int8 else None,
            n,
            k,
            chunk,
        )

    @property
    def group(self) -> int:
        """Rows that share an index: 16, 4 or 1."""
        return SLICE // self.index.shape[1]

    def positions(self) -> Positions:
        """Where each stored word belongs."""
        return positions(
            self.values, self.index, self.rows, self.length, self.ptr, self.k, self.chunk
        )

    def inside(self) -> Tensor:
        """bool, of the shape of ``values``: which of them stand for an entry of the matrix; the
        others pad."""
        n, k, columns = self.n, self.k, self.values.shape[2]
        at = self.positions()
        column = at.word.unsqueeze(-1) * columns + torch.arange(columns, device=at.word.device)
        return (at.stored & (at.row < n)).unsqueeze(-1) & (column < k)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for."""
        w = to_dense(self.values, self.positions(), self.n, self.k, self.chunk)
        return (w if self.scale is None else w * self.scale.unsqueeze(1)).to(dtype)

    def pattern(self) -> Tensor:
        """bool [N, K]: which entries are stored (zeros that fill a word count as stored)."""
        at = self.positions()
        marks = at.stored.unsqueeze(-1).expand(self.values.shape).to(self.values.dtype)
        return to_dense(marks, at, self.n, self.k, self.chunk) > 0

    @property
    def density(self) -> float:
        """Share of the entries that are stored, zeros that fill a word included (1.0 if empty)."""
        n, k = self.n, self.k
        size = sizes(n, k, self.chunk, self.values.dtype)
        if not n * size.words:
            return 1.0
        chunk = torch.arange(size.chunks, device=self.rows.device)
        first = chunk.repeat_interleave(size.panels * size.slices).unsqueeze(1) * self.chunk
        row = first + self.rows.long() * self.group  # the first of each group
        inside = (n - row).clamp(0, self.group)  # groups reach past N
        return int((self.length * inside).sum()) / (n * size.words)

    def to_numpy(self) -> dict[str, Any]:
        """The storage as numpy arrays (bfloat16 as its bits in uint16), ``shape`` and ``chunk``."""
        out: dict[str, Any] = {"shape": (self.n, self.k), "chunk": self.chunk}
        for name, t in self.tensors().items():
            if t is not None:
                bits = t.detach().cpu()
                out[name] = (bits.view(torch.uint16) if t.dtype == torch.bfloat16 else bits).numpy()
        return out

    @classmethod
    def from_numpy(cls, arrays: dict[str, Any]) -> SparseWeight:
        """What `to_numpy` gave; copied and validated.

        Raises:
            ValueError, TypeError: as `validate`, or an array is missing.
        """
        needed = (*cls._always, "shape", "chunk")
        missing = [n for n in needed if n not in arrays]
        if missing:
            raise ValueError(f"arrays: expected {', '.join(cls.TENSORS)}; {missing[0]} is missing")
        found: dict[str, Any] = {}
        for name in cls.TENSORS:
            given = arrays.get(name)
            t = None if given is None else torch.tensor(given, device="cpu")
            bits = name == "values" and t is not None and t.dtype == torch.uint16
            found[name] = t.view(torch.bfloat16) if bits and t is not None else t
        n, k = arrays["shape"]
        weight = cls(**found, n=int(n), k=int(k), chunk=int(arrays["chunk"]))
        weight.validate()
        return weight

    def picture(self, width: int = 64, height: int = 24) -> str:
        """The pattern as text: each character is a region, darker where more of it is stored.

        Args:
            width, height: characters at most.
        """
        n, k = self.n, self.k
        if not n or not k:
            return f"[{n} x {k}, empty]"
        share = F.adaptive_avg_pool2d(
            self.pattern().float()[None, None], (min(height, n), min(width, k))
        )[0, 0]
        tones = " .:-=+*#%@"
        lines = [
            "".join(tones[min(int(v * (len(tones) - 1) + 0.999), len(tones) - 1)] for v in row)
            for row in share.tolist()
        ]
        edge = "+" + "-" * len(lines[0]) + "+"
        head = (
            f"{n} x {k}, {self.density:.1%} stored as {checks.short(self.values.dtype)}, "
            f"{self.nbytes:,} bytes ({self.nbytes / (4 * n * k):.1%} of float32)"
        )
        return "\n".join([head, edge, *(f"|{line}|" for line in lines), edge])

    @property
    def x_dtypes(self) -> tuple[torch.dtype, ...]:
        return (torch.bfloat16,) if self.values.dtype == torch.bfloat16 else FLOATS

    def sample(self, grad: Tensor) -> Tensor:
        return layout.sample(grad, self.positions(), self.chunk, self.values.dtype)

    def check(self) -> None:
        n, k, chunk, values, index = self.n, self.k, self.chunk, self.values, self.index
        if values.dtype not in COLUMNS:
            raise TypeError(
                "values: expected dtype float32, bfloat16, int8; got "
                f"{checks.short_name(values.dtype)}"
            )
        _chunk(n, chunk)
        size = sizes(n, k, chunk, values.dtype)
        if values.dim() != 3 or list(values.shape[1:]) != [SLICE, size.columns]:
            raise ValueError(
                f"values: expected shape [steps, 16, {size.columns}]; got {list(values.shape)}"
            )
        for name, t in (("index", index), ("rows", self.rows), ("length", self.length)):
            checks.dtype(name, t, torch.uint8)
        checks.dtype("ptr", self.ptr, torch.int32)
        if (
            index.dim() != 2
            or index.shape[0] != values.shape[0]
            or index.shape[1] not in (1, 4, 16)
        ):
            raise ValueError(
                f"index: expected shape [{values.shape[0]}, 16], [.., 4] or [.., 1]; "
                f"got {list(index.shape)}"
            )
        for name, t in (("rows", self.rows), ("length", self.length)):
            checks.shape(name, t, [size.total, index.shape[1]])
        checks.shape("ptr", self.ptr, [size.total + 1])
        checks.beside_int8("scale", self.scale, values, torch.float32, n)
        checks.beside_int8("sums", self.sums, values, torch.int32, n)

    def check_structure(self) -> None:
        layout.check_structure(
            self.values,
            self.index,
            self.rows,
            self.length,
            self.ptr,
            self.n,
            self.chunk,
            self.k,
        )

    def validate(self) -> None:
        """Raise ValueError or TypeError unless the storage is whole (asked when a file loads)."""
        n, k = self.n, self.k
        if n < 0 or k < 0:
            raise ValueError(f"n, k: expected at least 0; got {n}, {k}")
        super().validate()
        if self.scale is None and not all(
            bool(torch.isfinite(part).all()) for part in self.values.split(BLOCK)
        ):
            raise ValueError("values: expected finite values; got NaN or inf")
        if self.scale is not None:
            if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
                raise ValueError("scale: expected finite values above 0")
            sums = stored_sums(self.values, self.rows, self.ptr, n, k, self.chunk)
            if self.sums is None or not torch.equal(sums, self.sums):
                raise ValueError("sums: expected the sum of the values of each row; got others")


def _chunk(n: int, chunk: int | None) -> int:
    """Rows of a chunk of a weight of ``n`` rows; raise ValueError for a number that is none."""
    if chunk is None:
        return chunk_rows(n)
    if chunk not in CHUNKS:
        raise ValueError(f"chunk: expected 64, 128 or 256; got {chunk}")
    return chunk
