"""The compressed form of a 2:4 sparse weight, as NVIDIA's sparse tensor cores read it.

Of each four neighbours in a row of W [N, K] at most two are kept (`n_m_mask` chooses the largest).
K is filled up with zeros to K', a multiple of 64 columns (of 128 with int8 values), N to rows of 16
in the metadata:

    values  [N, K' / 2]                the two numbers of each four, in the order of their columns;
                                       bfloat16, float16 or int8; 0 where a four keeps fewer
    meta    int32 [N' / 16, K' / 64, 32]   for a tile of 16 rows and 64 columns a word for each lane
                                       of a warp: the places 0..3 of the two numbers in their four,
                                       two bits each, rising, four bits a four
    scale   float32 [N]                with int8 values: row n is scale[n] * values
    sums    int32 [N]                  with int8 values: the sum of row n's values
    meta_t  int32 [K'' / 16, N'' / 64, 32]   of a transposable weight: the metadata of W^T [K, N]

Lane 4 g + t of a tile holds, with 16-bit values, columns 16 t .. 16 t + 15 of row g in its low half
and of row g + 8 in its high half: two instructions of 32 columns take the words of lanes t < 2 and
t >= 2 (their sparsity selector). With int8 values it holds columns 32 (t // 2) .. + 31 of row
g + 8 (t % 2), all for one instruction. The layouts are those of the PTX ISA, "Sparse matrix
storage" and the figures of the metadata of sparse mma.m16n8k32 (.bf16) and mma.m16n8k64 (.s8).

For bfloat16, values and metadata are 9/16 of the bytes of the dense matrix.

A transposable weight keeps just two of four along its columns too, so that W^T is 2:4 and the
gradient of x can be made on sparse tensor cores (Hubara et al. 2021, "Accelerated Sparse Neural
Training", arXiv 2102.08124). N and K divide by 4 then, and each 4 x 4 block keeps two entries in
every row and every column: no place only fills up, so that training the values cannot leave the
pattern. Where entries are kept does not change in training, so meta_t is stored; the values of W^T
are made of those of W where they are needed (`transpose`), so that they cannot be stale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats import sparse_layout as layout
from bigops.formats.base import FLOATS, Format, storage
from bigops.formats.sparse import SparseWeight

TILE = 16  # rows of an instruction
COLUMNS = 64  # of a tile of metadata
STEP = {torch.bfloat16: 64, torch.float16: 64, torch.int8: 128}  # what K is filled up to


def padded(k: int, dtype: torch.dtype) -> int:
    """K': the columns that are stored."""
    return -(-k // STEP[dtype]) * STEP[dtype]


def meta_shape(n: int, k: int, dtype: torch.dtype) -> list[int]:
    """Shape of the metadata of a weight [n, k]."""
    return [-(-n // TILE), padded(k, dtype) // COLUMNS, 32]


@storage
class Sparse24Weight(Format):
    """A 2:4 sparse weight, compressed (layout: the head of this file)."""

    values: Tensor
    meta: Tensor
    scale: Tensor | None
    sums: Tensor | None
    meta_t: Tensor | None  # of a transposable weight
    k: int

    SCHEMA = "Tensor values, Tensor meta, Tensor? scale, Tensor? sums, Tensor? meta_t"
    TRAINED = ("values",)
    K_OF_X = True

    @property
    def n(self) -> int:  # type: ignore[override]
        return self.values.shape[0]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.values, self.meta, self.scale, self.sums, self.meta_t

    @classmethod
    def of(
        cls,
        k: int,
        values: Tensor,
        meta: Tensor,
        scale: Tensor | None,
        sums: Tensor | None,
        meta_t: Tensor | None,
    ) -> Sparse24Weight:
        return cls(values, meta, scale, sums, meta_t, k)

    @property
    def rounds(self) -> bool:
        return self.scale is not None

    @classmethod
    def from_mask(
        cls, w: Tensor, mask: Tensor, dtype: torch.dtype, transposable: bool = False
    ) -> Sparse24Weight:
        """Keep the entries of ``w`` at which ``mask`` is True; no more than two of each four."""
        kept = torch.where(mask, w.detach(), 0)
        scale = sums = meta_t = None
        if transposable:
            check_blocks(mask)
            _, meta_t = _compress(kept.to(dtype).t(), mask.t())
        if dtype == torch.int8:
            scale = quantize.row_scales(kept.float())
            kept = quantize.to_int8(kept.float(), scale.unsqueeze(1))
            sums = kept.sum(1, dtype=torch.int32)
        values, meta = _compress(kept.to(dtype), mask)
        return cls(values, meta, scale, sums, meta_t, w.shape[1])

    @classmethod
    def from_sparse(cls, weight: SparseWeight, dtype: torch.dtype | None = None) -> Sparse24Weight:
        """Compress a weight of `sparse_linear` whose pattern is 2:4.

        Args:
            weight: the general storage. Its int8 values stay as they are.
            dtype: bfloat16 or float16 for floating values; None takes bfloat16.

        Raises:
            ValueError: more than two of four neighbours are not 0.
            TypeError: a dtype that does not fit the values.
        """
        whole = weight.values.dtype == torch.int8
        if dtype is None:
            dtype = torch.int8 if whole else torch.bfloat16
        if dtype not in STEP or whole != (dtype == torch.int8):
            raise TypeError(
                f"dtype: expected {'int8' if whole else 'bfloat16 or float16'} for values of "
                f"{checks.short(weight.values.dtype)}; got {dtype}"
            )
        w = layout.to_dense(
            weight.values.detach(), weight.positions(), weight.n, weight.k, weight.chunk
        )
        values, meta = _compress(w.to(dtype), w != 0)
        return cls(values, meta, weight.scale, weight.sums, None, weight.k)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K] that this weight stands for."""
        w = to_dense(self.values, self.meta, self.k)
        return (w if self.scale is None else w * self.scale.unsqueeze(1)).to(dtype)

    @property
    def density(self) -> float:
        return 0.5

    @property
    def x_dtypes(self) -> tuple[torch.dtype, ...]:
        return FLOATS if self.rounds else (self.values.dtype,)

    def sample(self, grad: Tensor) -> Tensor:
        if self.values.dtype == torch.int8:
            raise TypeError("values: expected a floating-point dtype to have a gradient; got int8")
        return sample(grad, self.meta, self.values.dtype).to(self.values.dtype)

    def check(self) -> None:
        values, k, meta_t = self.values, self.k, self.meta_t
        if values.dtype not in STEP:
            raise TypeError(
                "values: expected dtype bfloat16, float16 or int8; got "
                f"{checks.short_name(values.dtype)}"
            )
        if k < 0:
            raise ValueError(f"k: expected at least 0; got {k}")
        half = padded(k, values.dtype) // 2
        if values.dim() != 2 or values.shape[1] != half:
            raise ValueError(f"values: expected shape [N, {half}]; got {list(values.shape)}")
        n = values.shape[0]
        checks.dtype("meta", self.meta, torch.int32)
        checks.shape("meta", self.meta, meta_shape(n, k, values.dtype))
        checks.beside_int8("scale", self.scale, values, torch.float32, n)
        checks.beside_int8("sums", self.sums, values, torch.int32, n)
        if meta_t is not None:
            if values.dtype == torch.int8 or n % 4 or k % 4:
                raise ValueError(
                    "meta_t: expected None unless values are bfloat16 or float16 and N and K "
                    f"divide by 4; got a tensor with {checks.short(values.dtype)} for [{n}, {k}]"
                )
            checks.dtype("meta_t", meta_t, torch.int32)
            checks.shape("meta_t", meta_t, meta_shape(k, n, values.dtype))

    def validate(self) -> None:
        super().validate()
        values, meta_t = self.values, self.meta_t
        for name, meta in (("meta", self.meta), ("meta_t", meta_t)):
            if meta is not None:
                bits = _bits(meta, values.dtype)
                if not bool(((bits & 3) < (bits >> 2)).all()):  # else mma.sp is undefined
                    raise ValueError(f"{name}: expected places that rise in every four; got others")
        if self.scale is None and not bool(torch.isfinite(values).all()):
            raise ValueError("values: expected finite values; got NaN or inf")
        if self.scale is not None:
            if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
                raise ValueError("scale: expected finite values above 0")
            if self.sums is None or not torch.equal(values.sum(1, dtype=torch.int32), self.sums):
                raise ValueError("sums: expected the sum of the values of each row; got others")
        if meta_t is not None:
            kept = to_dense(torch.ones_like(values), self.meta, self.k)
            found = sample(kept.t(), meta_t, values.dtype)
            if int(found.count_nonzero()) != int(kept.count_nonzero()):
                raise ValueError("meta_t: expected the places of meta, transposed; got others")


def check_pack(w: Tensor, dtype: torch.dtype | None, transposable: bool) -> torch.dtype:
    """The dtype of the stored values."""
    quantize.check_weight(w)
    if dtype is None:
        dtype = w.dtype if w.dtype in STEP else torch.bfloat16
    if dtype not in STEP:
        raise TypeError(f"dtype: expected bfloat16, float16 or int8; got {dtype}")
    if transposable and dtype == torch.int8:
        raise TypeError("dtype: expected bfloat16 or float16 for the transposable form; got int8")
    return dtype


def uneven(w: Tensor) -> bool:
    """Whether 4 x 4 blocks do not tile a matrix."""
    return w.shape[0] % 4 != 0 or w.shape[1] % 4 != 0


def check_blocks(mask: Tensor) -> None:
    """Raise ValueError unless each 4 x 4 block keeps two entries in every row and column."""
    n, k = mask.shape
    if n % 4 or k % 4:
        raise ValueError(
            f"w: expected N and K that divide by 4 for the transposable form; got [{n}, {k}]"
        )
    for of, fours in (("row", mask), ("column", mask.t())):
        counts = fours.unflatten(1, (-1, 4)).sum(-1)
        wrong = counts != 2
        if bool(wrong.any()):
            line, four = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"mask: expected 2 of each 4 neighbours of rows and columns for the transposable "
                f"form; got {int(counts[line, four])} in {of} {line} from {4 * four} on"
            )


def _compress(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """values and meta of w [N, K], 0 outside mask."""
    n, k = w.shape
    right, below = padded(k, w.dtype) - k, -n % TILE
    fours = F.pad(mask, (0, right, 0, below)).unflatten(1, (-1, 4))  # [N', K' / 4, 4]
    many = fours.sum(-1) > 2
    if bool(many.any()):
        row, four = (int(i) for i in many.nonzero()[0])
        raise ValueError(
            f"mask: expected at most 2 of each 4 neighbours of a row; got "
            f"{int(fours[row, four].sum())} in row {row}, columns {4 * four} to {4 * four + 3}"
        )
    # The kept ones first, in order; a four with fewer takes places of zeros.
    places = (~fours).byte().argsort(dim=-1, stable=True)[..., :2].sort(-1).values
    numbers = F.pad(w, (0, right)).unflatten(1, (-1, 4)).gather(-1, places[:n])
    return numbers.flatten(1), _words(places[..., 0] | places[..., 1] << 2, w.dtype)


def _words(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The metadata of the four bits of each four [N', K' / 4], int64."""
    shift = torch.arange(0, 32, 4, device=bits.device)
    if dtype == torch.int8:  # tile, row half, g, columns, t // 2, four
        parts = bits.view(bits.shape[0] // TILE, 2, 8, bits.shape[1] // 16, 2, 8)
        words = (parts << shift).sum(-1).permute(0, 3, 2, 4, 1)
    else:  # tile, row half, g, columns, t, four
        parts = bits.view(bits.shape[0] // TILE, 2, 8, bits.shape[1] // 16, 4, 4)
        words = (parts << shift.view(2, 1, 1, 1, 4)).sum((1, -1)).transpose(1, 2)
    return ((words ^ 2**31) - 2**31).to(torch.int32).flatten(2)


def _bits(meta: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_words`: [N', K' / 4]."""
    shift = torch.arange(0, 32, 4, device=meta.device)
    words = meta.long().unflatten(2, (8, 2, 2) if dtype == torch.int8 else (8, 4))
    if dtype == torch.int8:  # [tile, columns, g, t // 2, row half]
        parts = words.permute(0, 4, 2, 1, 3).unsqueeze(-1) >> shift
    else:
        both = words.transpose(1, 2).unsqueeze(1).unsqueeze(-1)  # [tile, 1, g, columns, t, 1]
        parts = both >> shift.view(2, 1, 1, 1, 4)
    return (parts & 15).flatten(3).flatten(0, 2)


def to_dense(values: Tensor, meta: Tensor, k: int) -> Tensor:
    """The matrix [N, k] of stored values, float32; of int8 values without their scale."""
    n = values.shape[0]
    bits = _bits(meta, values.dtype)[:n]
    places = torch.stack([bits & 3, bits >> 2], -1)  # [N, K' / 4, 2]
    dense = torch.zeros((*bits.shape, 4), dtype=torch.float32, device=values.device)
    return dense.scatter(-1, places, values.float().unflatten(1, (-1, 2))).flatten(1)[:, :k]


def sample(g: Tensor, meta: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of a matrix g [N, K] where a weight of values in ``dtype`` stores its own."""
    n, k = g.shape
    bits = _bits(meta, dtype)[:n]
    places = torch.stack([bits & 3, bits >> 2], -1)
    fours = F.pad(g, (0, padded(k, dtype) - k)).unflatten(1, (-1, 4))
    return fours.gather(-1, places).flatten(1)


def transpose(values: Tensor, meta: Tensor, meta_t: Tensor, k: int) -> Tensor:
    """The values [K, N' / 2] of the transpose of a transposable weight [N, k]."""
    return sample(to_dense(values, meta, k).t(), meta_t, values.dtype).to(values.dtype)
