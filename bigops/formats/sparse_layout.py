"""The layout of a sparse weight: where its words lie, and how they get there.

A weight [N, K] is stored in *words* of 4 bytes: 1 float32, 2 bfloat16 or 4 int8 neighbours of one
row (columns past K are zeros). Words of x and of W meet in one instruction, so whatever the shape
of the pattern, it is stored as the words that it touches; what else lies in such a word is zero.

The layout is SELL-C-sigma (Kreutzer et al. 2014, SIAM J. Sci. Comput. 36(5), arXiv 1307.6209)
with C = 16, cut into panels of 64 words of columns so that a panel of x stays in the L1 cache:

    chunk    64, 128 or 256 rows (sigma); rows are sorted by length inside it, panel by panel
    panel    64 words of columns
    slice    16 rows of a chunk that follow each other in that order, padded to the longest
    step     one word of each of the 16 rows of a slice: 64 bytes side by side

    values   [steps, 16, columns]    columns of a word: 1, 2 or 4
    index    uint8 [steps, 16 / G]   word within the panel, 0..63; padding repeats word 0 (value 0)
    rows     uint8 [slices, 16 / G]  which G rows of the chunk: r stands for G * r .. G * r + G - 1
    length   uint8 [slices, 16 / G]  words that are no padding
    ptr      int32 [slices + 1]      first step of each slice
    scale    float32 [N]             with int8 values: row n is scale[n] * values
    sums     int32 [N]               with int8 values: sum of row n's values

Slices lie chunk by chunk, in a chunk panel by panel. G rows that share their pattern share an
index: G is 16 or 4 where the blocks of the pattern are that tall, else 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SLICE = 16
PANEL = 64  # words
COLUMNS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # of a word
GROUPS = (16, 4, 1)
CHUNKS = (256, 128, 64)
BLOCK = 1 << 12  # steps that a check looks at together: about a MB, whatever the weight


def chunk_rows(n: int) -> int:
    """Rows of a chunk for a weight of ``n`` rows.

    Longer chunks pad less (at 90% 7% against 12% for 128) and read x less often; shorter ones give
    threads more tasks.
    """
    return 256 if n >= 2048 else 128 if n >= 1024 else 64


class Sizes(NamedTuple):
    """How many of each there are."""

    columns: int  # of a word
    words: int  # of a row
    panels: int
    chunks: int
    slices: int  # of one panel of a chunk

    @property
    def total(self) -> int:
        """Slices of the whole weight."""
        return self.chunks * self.panels * self.slices


def sizes(n: int, k: int, chunk: int, dtype: torch.dtype) -> Sizes:
    """Sizes of the storage of a weight [n, k] with values of ``dtype``."""
    columns = COLUMNS[dtype]
    words = (k + columns - 1) // columns
    return Sizes(columns, words, -(-words // PANEL), -(-n // chunk), chunk // SLICE)


class Positions(NamedTuple):
    """Where each word of the storage belongs; all [steps, 16]."""

    row: Tensor  # int64, below chunks * chunk
    word: Tensor  # int64, below panels * 64
    stored: Tensor  # bool, False where the word is padding


def positions(
    values: Tensor, index: Tensor, rows: Tensor, length: Tensor, ptr: Tensor, k: int, chunk: int
) -> Positions:
    """Rows and words of stored values; `values` gives the number of steps and the dtype only."""
    steps = values.shape[0]
    words = -(-k // COLUMNS[values.dtype])
    panels = -(-words // PANEL)
    per, slices = chunk // SLICE, ptr.shape[0] - 1
    group = SLICE // index.shape[1]
    device = index.device
    number = torch.arange(slices, device=device)
    owner = torch.repeat_interleave(number, ptr.diff().long(), output_size=steps)
    inside = torch.arange(group, device=device).repeat(index.shape[1])
    first = owner // max(per * panels, 1) * chunk

    def spread(t: Tensor) -> Tensor:
        return t.long().repeat_interleave(group, dim=1)

    row = first.unsqueeze(1) + spread(rows)[owner] * group + inside
    panel = owner // per % max(panels, 1)
    place = torch.arange(steps, device=device) - ptr.long()[owner]
    return Positions(
        row,
        panel.unsqueeze(1) * PANEL + spread(index),
        place.unsqueeze(1) < spread(length)[owner],
    )


def to_dense(values: Tensor, at: Positions, n: int, k: int, chunk: int) -> Tensor:
    """The matrix [n, k] of stored values, float32, differentiable for floating values."""
    size = sizes(n, k, chunk, values.dtype)
    shape = (size.chunks * chunk, size.panels * PANEL, size.columns)
    padded = torch.zeros(shape, dtype=torch.float32, device=values.device)
    # Padding lies at words that others store: its gradient is 0, not that of the matrix there.
    stored = torch.where(at.stored.unsqueeze(-1), values.float(), 0)
    dense = padded.index_put((at.row, at.word), stored, accumulate=True)
    return dense.flatten(1)[:n, :k]


def sample(dense: Tensor, at: Positions, chunk: int, dtype: torch.dtype) -> Tensor:
    """Entries of a matrix [N, K] at the stored positions, 0 at padding: [steps, 16, columns]."""
    n, k = dense.shape
    size = sizes(n, k, chunk, dtype)
    right, below = size.panels * PANEL * size.columns - k, size.chunks * chunk - n
    words = F.pad(dense, (0, right, 0, below)).unflatten(1, (-1, size.columns))
    return torch.where(at.stored.unsqueeze(-1), words[at.row, at.word], 0).to(dtype)


def row_sums(values: Tensor, at: Positions, n: int, chunk: int) -> Tensor:
    """int32 [N]: the sum of each row's int8 values."""
    total = torch.zeros(-(-n // chunk) * chunk, dtype=torch.int64, device=values.device)
    total.index_put_((at.row,), values.sum(-1, dtype=torch.int64), accumulate=True)
    return total[:n].to(torch.int32)


def check_structure(
    values: Tensor,
    index: Tensor,
    rows: Tensor,
    length: Tensor,
    ptr: Tensor,
    n: int,
    chunk: int,
    k: int,
) -> None:
    """Contents that memory safety rests on; the C++ kernels check the same as they go."""
    steps, size = values.shape[0], sizes(n, k, chunk, values.dtype)
    first, last = int(ptr[0]), int(ptr[-1])
    if first != 0 or last != steps or bool((ptr.diff() < 0).any()):
        raise ValueError(
            f"ptr: expected values that rise from 0 to {steps}, the number of steps; got {first} "
            f"to {last}" + ("" if (first, last) != (0, steps) else ", falling in between")
        )
    if index.numel() and int(index.max()) >= PANEL:
        raise ValueError(f"index: expected words below {PANEL}; got {int(index.max())}")
    if ptr.numel() > 1 and int(ptr.diff().max()) > PANEL:
        raise ValueError(
            f"ptr: expected at most {PANEL} steps in a slice, the words of a panel; got "
            f"{int(ptr.diff().max())}"
        )
    most = chunk * index.shape[1] // SLICE
    every = torch.arange(most, dtype=torch.uint8, device=rows.device)
    for part in rows.view(size.chunks * size.panels, most).split(max(1, 2 * BLOCK // most)):
        if not torch.equal(part.sort(-1).values, every.expand_as(part)):
            raise ValueError(f"rows: expected each of 0..{most - 1} once in every panel of a chunk")
    if bool((length > ptr.diff().to(torch.uint8).unsqueeze(1)).any()):
        raise ValueError("length: expected at most the steps of the slice")
    slices = torch.arange(size.total, device=ptr.device)
    panel = slices // size.slices % max(size.panels, 1)
    inside = (size.words - panel * PANEL).clamp(max=PANEL).to(torch.uint8)  # words in the columns
    for block in _blocks(ptr):
        word, owner = index[block.steps], block.owner
        stored = block.place.unsqueeze(1) < length[block.slices][owner]
        if bool((stored & (word >= inside[block.slices][owner].unsqueeze(1))).any()):
            raise ValueError(
                f"index: expected words inside the {k} columns; got one past them in the last panel"
            )
        falls = (word[1:] <= word[:-1]) & (owner[1:] == owner[:-1]).unsqueeze(1)
        if bool((falls & stored[1:]).any()):
            raise ValueError(
                "index: expected the words of a row to rise; got one twice, or out of order"
            )
        padding = ~stored.repeat_interleave(SLICE // index.shape[1], 1).unsqueeze(-1)
        if bool(((values[block.steps] != 0) & padding).any()):
            raise ValueError("values: expected 0 in the padding; got others")


class _Block(NamedTuple):
    """Some slices that follow each other, and their steps."""

    slices: slice
    steps: slice
    owner: Tensor  # int64 [steps]: the slice of each, counted from the first here
    place: Tensor  # uint8 [steps]: the number of each in its slice


def _blocks(ptr: Tensor) -> Iterator[_Block]:
    """The storage in parts of about BLOCK steps, so that looking at it takes little memory."""
    first, slices = 0, ptr.shape[0] - 1
    while first < slices:
        start = int(ptr[first])
        end = int(torch.searchsorted(ptr, start + BLOCK, right=True)) - 1
        end = min(max(end, first + 1), slices, first + BLOCK)
        here = ptr[first : end + 1].long() - start
        steps = int(here[-1])
        number = torch.arange(end - first, device=ptr.device)
        owner = torch.repeat_interleave(number, here.diff(), output_size=steps)
        place = torch.arange(steps, device=ptr.device) - here[owner]
        yield _Block(slice(first, end), slice(start, start + steps), owner, place.to(torch.uint8))
        first = end


def stored_sums(values: Tensor, rows: Tensor, ptr: Tensor, n: int, k: int, chunk: int) -> Tensor:
    """`row_sums` of the whole storage, part by part."""
    size, group = sizes(n, k, chunk, values.dtype), SLICE // rows.shape[1]
    total = torch.zeros(size.chunks * chunk, dtype=torch.int64, device=values.device)
    for block in _blocks(ptr):
        of_slices = torch.zeros(
            (block.slices.stop - block.slices.start, SLICE), dtype=torch.int64, device=ptr.device
        )
        of_slices.index_add_(0, block.owner, values[block.steps].sum(-1, dtype=torch.int64))
        slices = torch.arange(block.slices.start, block.slices.stop, device=ptr.device)
        first = slices // max(size.slices * size.panels, 1) * chunk
        inside = torch.arange(group, device=ptr.device).repeat(rows.shape[1])
        spread = rows[block.slices].long().repeat_interleave(group, 1)
        row = first.unsqueeze(1) + spread * group + inside
        total.index_add_(0, row.flatten(), of_slices.flatten())
    return total[:n].to(torch.int32)


class Stored(NamedTuple):
    """What `store` lays out."""

    values: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is not missed
    rows: Tensor
    length: Tensor
    ptr: Tensor


def store(values: Tensor, mask: Tensor, chunk: int) -> Stored:
    """Lay out the words of ``values`` [N, K] that hold an entry of ``mask``."""
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
    return Stored(
        joined(0, (0, SLICE, size.columns), values.dtype),
        joined(1, (0, per), torch.uint8),
        joined(2, (0, per), torch.uint8),
        joined(3, (0, per), torch.uint8),
        F.pad(steps.cumsum(0), (1, 0)).to(torch.int32),
    )


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
