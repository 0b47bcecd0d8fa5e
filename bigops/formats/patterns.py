"""Patterns of pruning: what is pruned together, and which of it stays, by magnitude."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats import quantize


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


Criterion = Callable[[Tensor, Pattern, float], Tensor]
"""``criterion(weight, pattern, sparsity)``: the mask, bool, True for each block that is kept."""


def magnitude(weight: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
    """The criterion that keeps the largest: `Pattern.mask`."""
    return pattern.mask(weight, sparsity)


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
    rows, columns = check_block(block)
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


def check_block(block: Any) -> tuple[int, int]:
    """Rows and columns of a block; raise ValueError for one of no size."""
    rows, columns = block
    if rows < 1 or columns < 1:
        raise ValueError(f"block: expected two sizes of at least 1; got {block}")
    return int(rows), int(columns)
