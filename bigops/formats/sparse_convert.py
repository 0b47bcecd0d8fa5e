"""From a dense matrix and a pattern to the storage of a sparse weight."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.sparse import (
    COLUMNS,
    GROUPS,
    PANEL,
    SLICE,
    SparseWeight,
    chunk_rows,
    row_sums,
    sizes,
)


class Pattern(NamedTuple):
    """What is pruned together: blocks of ``height`` x ``width``, or all but ``n`` of each ``m``.

    Written "1x4", "16x16" or "2:4"; "1x1" is unstructured. "2:4t" is 2:4 along rows and columns at
    once (`transposable_mask`), so that a GPU can train it on sparse tensor cores.
    """

    height: int = 1
    width: int = 4
    n: int = 0  # with m: the n largest of each m neighbours of a row stay; blocks are 1x1 then
    m: int = 0
    transposable: bool = False  # 2:4 only

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "1x4", "2:4" or "2:4t".

        Raises:
            TypeError: no string.
            ValueError: neither form, or numbers out of range.
        """
        if not isinstance(text, str):
            raise TypeError(f"pattern: expected a string such as '1x4'; got {type(text).__name__}")
        if text == "2:4t":
            return cls(1, 1, 2, 4, True)
        found = re.fullmatch(r"(\d{1,4})([x:])(\d{1,4})", text)
        if found:
            a, b = int(found[1]), int(found[3])
            if found[2] == "x" and a > 0 and b > 0:
                return cls(a, b)
            if found[2] == ":" and 0 < a < b:
                return cls(1, 1, a, b)
        raise ValueError(f"pattern: expected HxW such as '1x4', or N:M with N < M; got {text!r}")

    def __str__(self) -> str:
        if self.m:
            return f"{self.n}:{self.m}{'t' if self.transposable else ''}"
        return f"{self.height}x{self.width}"

    def mask_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the mask of a weight [n, k]: one entry a block."""
        return -(-n // self.height), -(-k // self.width)

    def mask(self, w: Tensor, sparsity: float | None) -> Tensor:
        """Choose what to keep of ``w`` [N, K]: `block_mask`; for N:M `n_m_mask`, for 2:4t
        `transposable_mask`.
        """
        if self.transposable:
            return transposable_mask(w)
        if self.m:
            return n_m_mask(w, self.n, self.m)
        if sparsity is None:
            raise ValueError(f"sparsity: expected a number for the pattern {self}; got None")
        return block_mask(w, sparsity, (self.height, self.width))

    def expand(self, mask: Tensor, n: int, k: int) -> Tensor:
        """The mask of blocks as bool [n, k]."""
        if (self.height, self.width) == (1, 1):
            return mask
        full = mask.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        return full[:n, :k]


def block_mask(w: Tensor, sparsity: float, block: tuple[int, int] = (1, 4)) -> Tensor:
    """Choose the blocks of ``w`` to keep: those of largest L2 norm over the whole matrix.

    Args:
        w: ``[N, K]``, any floating dtype.
        sparsity: share of blocks to drop, 0..1; ``round(sparsity * blocks)`` are dropped exactly.
        block: rows and columns of a block; (1, 1) prunes single entries.

    Returns:
        bool ``[ceil(N / rows), ceil(K / columns)]``, True where the block is kept. Of equal norms
        the first stays.

    Raises:
        ValueError: sparsity outside 0..1, a block of no size, w no matrix, or NaN or inf in it.
        TypeError: w is no floating tensor.
    """
    quantize.check_weight(w)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a number from 0 to 1; got {sparsity}")
    rows, columns = _check_block(block)
    n, k = w.shape
    parts = F.pad(w.detach().double(), (0, -k % columns, 0, -n % rows))
    parts = parts.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [., rows, ., columns]
    norm = parts.square().sum((1, 3))
    keep = norm.numel() - round(sparsity * norm.numel())
    order = norm.flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(norm.numel(), dtype=torch.bool, device=w.device)
    mask[order[:keep]] = True
    return mask.view(norm.shape)


def n_m_mask(w: Tensor, n: int = 2, m: int = 4) -> Tensor:
    """Keep the ``n`` largest magnitudes of each ``m`` neighbours of a row (2:4: Mishra et al. 2021,
    arXiv 2104.08378). Of equal magnitudes the first stays; a shorter last group keeps ``n`` too.

    Returns:
        bool ``[N, K]``.

    Raises:
        ValueError: not 0 < n < m, w no matrix, or NaN or inf in it.
        TypeError: w is no floating tensor.
    """
    quantize.check_weight(w)
    if not 0 < n < m:
        raise ValueError(f"n, m: expected 0 < n < m; got {n}:{m}")
    rows, k = w.shape
    size = F.pad(w.detach().abs().float(), (0, -k % m), value=-1.0).unflatten(1, (-1, m))
    order = size.argsort(dim=-1, descending=True, stable=True)[..., :n]
    mask = torch.zeros_like(size, dtype=torch.bool).scatter_(-1, order, True)
    return mask.flatten(1)[:, :k].contiguous() if k else mask.new_zeros((rows, 0))


# The pairs of columns that a row of four may keep, and the 90 choices for four rows in which each
# column is kept twice, in lexicographic order: what csrc/cuda/sparse24_pack.cu tries.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_BLOCKS = [
    rows
    for rows in itertools.product(range(6), repeat=4)
    if all(sum(column in _PAIRS[pair] for pair in rows) == 2 for column in range(4))
]


def transposable_mask(w: Tensor) -> Tensor:
    """Keep two of each four neighbours along rows and along columns at once: of each 4 x 4 block
    the 8 entries, two in every row and column, whose magnitudes have the greatest sum.

    So W and W^T are both 2:4, and training can use sparse tensor cores for the gradient of x too
    (Hubara et al. 2021, "Accelerated Sparse Neural Training", arXiv 2102.08124). All 90 choices are
    tried. Sums are of float32 pairs, ``(row 0 + row 1) + (row 2 + row 3)``; of equal ones the first
    choice in lexicographic order stays. Blocks that the edges of ``w`` cut are filled up with
    zeros, so that their lines may keep fewer.

    Returns:
        bool ``[N, K]``.

    Raises:
        ValueError: w no matrix, or NaN or inf in it.
        TypeError: w is no floating tensor.
    """
    quantize.check_weight(w)
    n, k = w.shape
    size = F.pad(w.detach().abs().float(), (0, -k % 4, 0, -n % 4))
    blocks = size.unflatten(1, (-1, 4)).unflatten(0, (-1, 4))  # [., rows, ., columns]
    sums = [[blocks[:, i, :, a] + blocks[:, i, :, b] for a, b in _PAIRS] for i in range(4)]
    best = torch.full_like(blocks[:, 0, :, 0], -1)
    choice = torch.zeros_like(best, dtype=torch.long)
    for number, (p, q, r, s) in enumerate(_BLOCKS):
        total = (sums[0][p] + sums[1][q]) + (sums[2][r] + sums[3][s])
        better = total > best
        best, choice = torch.where(better, total, best), torch.where(better, number, choice)
    kept = torch.tensor(
        [[[column in _PAIRS[pair] for column in range(4)] for pair in rows] for rows in _BLOCKS],
        device=w.device,
    )
    masks = kept[choice]  # [N' / 4, K' / 4, rows, columns]
    return masks.transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k].contiguous()


def sparsify_weight(
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
    rows, columns = _check_block(block)
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
    return _store(kept.to(dtype), full, scale, chunk_rows(n) if chunk is None else chunk)


def from_dense(w: Tensor, dtype: torch.dtype | None = None) -> SparseWeight:
    """Store a matrix by its zeros: what is exactly 0 is dropped.

    Args:
        w: ``[N, K]``, any floating dtype.
        dtype: of the stored values; None keeps bfloat16 and takes float32 for the rest.
    """
    quantize.check_weight(w)
    if dtype is None:
        dtype = torch.bfloat16 if w.dtype == torch.bfloat16 else torch.float32
    return sparsify_weight(w, w != 0, dtype, (1, 1))


def _check_block(block: Any) -> tuple[int, int]:
    rows, columns = block
    if rows < 1 or columns < 1:
        raise ValueError(f"block: expected two sizes of at least 1; got {block}")
    return int(rows), int(columns)


def _store(values: Tensor, mask: Tensor, scale: Tensor | None, chunk: int) -> SparseWeight:
    n, k = values.shape
    size = sizes(n, k, chunk, values.dtype)
    right = size.panels * PANEL * size.columns - k
    below = size.chunks * chunk - n
    word_mask = F.pad(mask, (0, right)).unflatten(1, (-1, size.columns)).any(-1)  # [N, words]
    word_mask = F.pad(word_mask, (0, 0, 0, below))
    group = _group(word_mask, n)
    padded = F.pad(values, (0, right, 0, below)).unflatten(1, (-1, size.columns))
    parts = [
        _store_chunk(
            padded[c * chunk : (c + 1) * chunk], word_mask[c * chunk : (c + 1) * chunk], group
        )
        for c in range(size.chunks)
    ]
    per = SLICE // group

    def joined(i: int, empty: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not parts:
            return torch.empty(empty, dtype=dtype, device=values.device)
        return torch.cat([p[i] for p in parts])

    steps = joined(4, (0,), torch.int64)
    if int(steps.sum()) >= 2**31:
        raise ValueError(f"mask: expected fewer than 2**31 steps of words; got {int(steps.sum())}")
    weight = SparseWeight(
        joined(0, (0, SLICE, size.columns), values.dtype),
        joined(1, (0, per), torch.uint8),
        joined(2, (0, per), torch.uint8),
        joined(3, (0, per), torch.uint8),
        F.pad(steps.cumsum(0), (1, 0)).to(torch.int32),
        scale,
        None,
        (n, k),
        chunk,
    )
    if scale is None:
        return weight
    return weight._replace(sums=row_sums(weight.values, weight.positions(), n, chunk))


def _group(word_mask: Tensor, n: int) -> int:
    """The most rows that share their pattern everywhere (rows past ``n`` go with any)."""
    for group in GROUPS:
        parts = word_mask.unflatten(0, (-1, group))
        shared = parts.any(1, keepdim=True).expand_as(parts).reshape(word_mask.shape)
        if torch.equal(shared[:n], word_mask[:n]):
            return group
    return 1


def _store_chunk(values: Tensor, mask: Tensor, group: int) -> tuple[Tensor, ...]:
    """values, index, rows, length and steps of each slice for one chunk.

    values: [chunk, words, columns]; mask: [chunk, words].
    """
    per = SLICE // group
    shared = mask.unflatten(0, (-1, group)).any(1)  # [groups, words]
    parts = shared.unflatten(1, (-1, PANEL)).transpose(0, 1)  # [panels, groups, 64]
    length, rows = parts.sum(-1).sort(dim=1, descending=True, stable=True)  # [panels, groups]
    steps = length.unflatten(1, (-1, per)).amax(-1).flatten()  # [slices]
    first = F.pad(steps.cumsum(0), (1, 0))
    ordered = parts.gather(1, rows.unsqueeze(-1).expand_as(parts))
    panel, place, word = ordered.nonzero(as_tuple=True)  # by panel, then place, words rising
    rank = (ordered.cumsum(-1) - 1)[panel, place, word]
    slices = parts.shape[1] // per
    step = first[panel * slices + place // per] + rank
    total = int(first[-1])
    index = torch.zeros((total, per), dtype=torch.uint8, device=mask.device)
    index[step, place % per] = word.to(torch.uint8)
    out = values.new_zeros((total, per, group, values.shape[-1]))
    grouped = values.unflatten(0, (-1, group)).transpose(1, 2)  # [groups, words, group, columns]
    out[step, place % per] = grouped[rows[panel, place], panel * PANEL + word]
    return (
        out.flatten(1, 2),
        index,
        rows.to(torch.uint8).reshape(-1, per),
        length.to(torch.uint8).reshape(-1, per),
        steps,
    )
