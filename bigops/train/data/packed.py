"""Documents packed into rows of one length, and what attention has to know of them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORED = -100
"""Target of a token without one, as torch's cross_entropy has it by default."""


class _Piece(NamedTuple):
    document: int
    begin: int
    end: int


class Packed(Dataset):
    """Documents packed into rows of ``length`` tokens, several to a row.

    Longest first, each goes where it leaves the least room (best fit decreasing); one that is
    longer than a row is cut. A row is a dict of int64 [length] tensors:

    - ``input_ids``: the documents one after the other, then ``pad_id``;
    - ``targets``: the next token of the same document, `IGNORED` where there is none;
    - ``position_ids``: from 0 in each document;
    - ``document_ids``: 0, 1, .. in the row, -1 for padding: see `block_mask` and `cu_seqlens`.

    Args:
        documents: whole numbers [tokens] each: lists, arrays, maps. Empty ones are left out.
        length: tokens of a row.
        pad_id: token of padding.

    Raises:
        ValueError: ``length`` below 1, no document with tokens.
    """

    def __init__(self, documents: Sequence[Any], length: int, *, pad_id: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1; got {length}")
        self.length, self.pad_id, self._documents = length, pad_id, documents
        self._rows = _best_fit([len(document) for document in documents], length)
        if not self._rows:
            raise ValueError(f"documents: expected tokens; got none in {len(documents)} documents")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def filled(self) -> float:
        """Share of the rows' places that hold a token."""
        tokens = sum(piece.end - piece.begin for row in self._rows for piece in row)
        return tokens / (len(self) * self.length)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        ids = np.full(self.length, self.pad_id, np.int64)
        targets, owners = np.full(self.length, IGNORED), np.full(self.length, -1)
        positions = np.zeros(self.length, np.int64)
        at = 0
        for number, (document, begin, end) in enumerate(self._rows[row]):
            tokens = np.asarray(self._documents[document][begin : end + 1], np.int64)
            size = end - begin
            ids[at : at + size] = tokens[:size]
            targets[at : at + len(tokens) - 1] = tokens[1:]
            positions[at : at + size] = np.arange(size)
            owners[at : at + size] = number
            at += size
        columns = {
            "input_ids": ids,
            "targets": targets,
            "position_ids": positions,
            "document_ids": owners,
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def _best_fit(sizes: Sequence[int], length: int) -> list[list[_Piece]]:
    pieces = [
        _Piece(document, begin, min(begin + length, size))
        for document, size in enumerate(sizes)
        for begin in range(0, size, length)
    ]
    pieces.sort(key=lambda piece: piece.begin - piece.end)  # of equal ones, the first stays first
    rows: list[list[_Piece]] = []
    open_rows: dict[int, list[int]] = {}  # by the room that they have
    rooms: list[int] = []  # that some row has, rising
    for piece in pieces:
        size = piece.end - piece.begin
        at = bisect.bisect_left(rooms, size)
        if at == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room]
                rooms.pop(at)
        rows[row].append(piece)
        left = room - size
        if left:
            if left not in open_rows:
                bisect.insort(rooms, left)
            open_rows.setdefault(left, []).append(row)
    return rows


def block_mask(document_ids: Tensor, *, causal: bool = True) -> Tensor:
    """Who sees whom: bool [batch, 1, length, length], as scaled_dot_product_attention takes it.

    A token sees those of its document, of which ``causal`` leaves those up to it. Padding sees
    padding, so that no row of the mask is empty.

    Args:
        document_ids: [batch, length] of `Packed`.
    """
    mask = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return mask.tril() if causal else mask


def cu_seqlens(document_ids: Tensor) -> tuple[Tensor, int]:
    """Where documents begin in the flattened batch, for attention over sequences of many lengths.

    Args:
        document_ids: [batch, length] of `Packed`; the padding of a row counts as a document.

    Returns:
        int32 [documents + 1] on the same device, from 0 to batch * length, and the longest length.
    """
    changes = torch.ones_like(document_ids, dtype=torch.bool)
    changes[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    end = torch.tensor([document_ids.numel()], device=document_ids.device)
    begins = torch.cat([changes.flatten().nonzero().flatten(), end])
    return begins.to(torch.int32), int(begins.diff().max())
