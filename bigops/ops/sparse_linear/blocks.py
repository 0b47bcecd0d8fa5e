"""Which blocks a sparse weight consists of, read from its storage, for the GPU kernels.

The storage does not say by which pattern it was made, and need not: a weight that is stored in
whole blocks of 32x32 or 16x16 is one, whatever the mask was, and one whose rows share their pattern
16 by 16 consists of blocks of 16 rows by a word. Finding them takes a few sorts and reads from the
device, so each weight is asked once; what is found hangs on its `index` tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from bigops.formats import sparse_layout as storage
from bigops.formats.sparse import SparseWeight

if TYPE_CHECKING:
    from bigops.kernels.sparse_linear.launch import Blocks, Lines

SIDES = (32, 16)

_found: Any = WeakIdKeyDictionary()


def _state(*tensors: Tensor) -> tuple[Any, ...]:
    """What changes with the contents: inference tensors keep no version, and do not change."""
    return tuple(0 if t.is_inference() else t._version for t in tensors)


def find(weight: SparseWeight) -> Blocks | None:
    """The blocks of a weight, or None where its rows share no pattern 16 by 16.

    Raises:
        ValueError, TypeError: storage whose structure is broken.
    """
    w = weight
    state = _state(w.index, w.rows, w.length, w.ptr)
    key = (w.values.shape, w.values.dtype, w.n, w.chunk, w.k, state)
    known = _found.get(w.index)
    if known is not None and known[0] == key:
        return known[1]  # type: ignore[no-any-return]
    w.check_structure()
    blocks = _find(w.values, w.index, w.rows, w.ptr, w.n, w.chunk, w.k)
    _found[w.index] = (key, blocks)
    return blocks


def _find(
    values: Tensor, index: Tensor, rows: Tensor, ptr: Tensor, n: int, chunk: int, k: int
) -> Blocks | None:
    if index.shape[1] != 1:  # rows that do not share their pattern 16 by 16
        return None
    size = storage.sizes(n, k, chunk, values.dtype)
    slices, steps, device = ptr.shape[0] - 1, values.shape[0], index.device
    number = torch.arange(slices, device=device)
    owner = torch.repeat_interleave(number, ptr.diff().long(), output_size=steps)
    row = owner // max(size.slices * size.panels, 1) * size.slices + rows[owner, 0].long()
    panel = owner // size.slices % max(size.panels, 1)
    word = panel * storage.PANEL + index[:, 0].long()
    step = (row * (size.panels * storage.PANEL) + word).argsort()
    row, word = row[step], word[step]
    for side in SIDES:
        found = _of_side(side, row, word, step, size, n, k)
        if found is not None:
            return found
    return _by_word(row, word, step, size, n, k)


def _by_word(
    row: Tensor, word: Tensor, step: Tensor, size: storage.Sizes, n: int, k: int
) -> Blocks:
    """Blocks of 16 rows by a word; gx takes those of 16 columns together."""
    lines, per = -(-n // 16), 16 // size.columns
    rows_of = _lines(size.columns, False, row, word, step.unsqueeze(1), lines)
    key, block = ((word // per) * max(lines, 1) + row).unique(return_inverse=True)
    steps = step.new_full((key.numel(), per), -1)
    steps[block, word % per] = step
    line, across = key // max(lines, 1), key % max(lines, 1)
    return _with_tasks(16, rows_of, _lines(16, True, line, across, steps, -(-k // 16)))


def _of_side(
    side: int, row: Tensor, word: Tensor, step: Tensor, size: storage.Sizes, n: int, k: int
) -> Blocks | None:
    """The blocks, if all are side x side; row counts 16 rows of W, both rise block by block."""
    wide = side // size.columns  # words of a block; panels hold whole blocks
    column = word // wide
    head = torch.ones_like(row, dtype=torch.bool)
    head[1:] = (row[1:] != row[:-1]) | (column[1:] != column[:-1])
    row, column, step = row[head], column[head], step[head]
    # The last block of a row may have fewer words. Steps of neighbours in a slice are neighbours.
    if int((size.words - column * wide).clamp(max=wide).sum()) != head.numel():
        return None
    steps = step.unsqueeze(1)
    if side == 32:
        upper = row % 2 == 0
        lower = step[~upper]
        blocks = -(-k // side)
        key = row // 2 * blocks + column
        alone = 0
        if (n + 15) // 16 % 2:  # the last 32 rows of W are 16: their lower half is not stored
            alone = int((row == (n - 1) // 16).sum())
        tops, bottoms = key[upper], key[~upper]
        if not torch.equal(tops[: tops.numel() - alone], bottoms):
            return None
        steps = torch.stack([step[upper], F.pad(lower, (0, alone), value=-1)], 1)
        row, column = row[upper] // 2, column[upper]
    rows_of = _lines(side, False, row, column, steps, -(-n // side))
    transposed = (column * max(-(-n // side), 1) + row).argsort()
    columns_of = _lines(
        side, False, column[transposed], row[transposed], steps[transposed], -(-k // side)
    )
    return _with_tasks(side, rows_of, columns_of)


def _with_tasks(height: int, rows_of: Lines, columns_of: Lines) -> Blocks:
    from bigops.kernels.sparse_linear.launch import TASK, Blocks

    entries = TASK // rows_of.width
    count = (rows_of.first.diff().long() + entries - 1) // entries
    line = torch.repeat_interleave(torch.arange(count.numel(), device=count.device), count)
    place = torch.arange(line.numel(), device=line.device) - (count.cumsum(0) - count)[line]
    task = rows_of.first[line].long() + place * entries
    return Blocks(height, rows_of, columns_of, line.int(), task.int())


def _lines(
    width: int, by_word: bool, line: Tensor, across: Tensor, step: Tensor, lines: int
) -> Lines:
    from bigops.kernels.sparse_linear.launch import Lines

    length = torch.bincount(line, minlength=lines)
    return Lines(
        width,
        by_word,
        across.int(),
        step.int().contiguous(),
        F.pad(length.cumsum(0), (1, 0)).int(),
        length.argsort(descending=True, stable=True).int(),
    )
