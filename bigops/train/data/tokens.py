"""Windows of a file of tokens, which is mapped into memory and never read whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bigops.train.data.subset import part

_DTYPES = ("uint16", "uint32")


class TokenFile(Dataset):
    """Fixed windows of a file that is nothing but tokens: inputs, and the token behind each.

    Row i is ``(tokens[i * stride : i * stride + window], the same one further)``, int64 [window]
    each. What is left behind the last whole window is no row.

    Args:
        path: little-endian numbers, one after the other, or a .npy file of one dimension.
        window: tokens of an input.
        dtype: "uint16" or "uint32"; a .npy file says its own.
        stride: from one window to the next; None for ``window``, so that none overlap.
        vocab_size: where given, a token from it on is an error that names its place.
        validation_split, subset: the validation part is the first windows.

    Raises:
        ValueError: an argument out of range, or a file of another length or kind; it is named.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        window: int,
        *,
        dtype: str = "uint16",
        stride: int | None = None,
        vocab_size: int | None = None,
        validation_split: float = 0.0,
        subset: str | None = None,
    ) -> None:
        self.window, self.stride = window, window if stride is None else stride
        if window < 1 or self.stride < 1:
            raise ValueError(f"window, stride: expected at least 1; got {window}, {stride}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}; got {dtype!r}")
        self.path, self.dtype, self.vocab_size = Path(path), dtype, vocab_size
        self._map: np.ndarray | None = None
        windows = (len(self.tokens) - 1 - window) // self.stride + 1
        if windows < 1:
            raise ValueError(
                f"{path}: expected at least window + 1 = {window + 1} tokens; got "
                f"{len(self.tokens)}"
            )
        self._rows = part(windows, validation_split, subset)

    @property
    def tokens(self) -> np.ndarray:
        """All of the file, mapped, in this process."""
        if self._map is None:
            self._map = _mapped(self.path, self.dtype)
        return self._map

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = self.take([row])
        return x[0], y[0]

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [rows, window] each.

        Raises:
            ValueError: a token from ``vocab_size`` on.
        """
        begins = [self._rows[row] * self.stride for row in rows]
        both = np.stack([self.tokens[begin : begin + self.window + 1] for begin in begins])
        if self.vocab_size is not None and both.size and both.max() >= self.vocab_size:
            row, column = np.argwhere(both >= self.vocab_size)[0]
            raise ValueError(
                f"{self.path}: expected tokens below vocab_size, {self.vocab_size}; got "
                f"{both[row, column]} at {begins[row] + column}"
            )
        wide = torch.from_numpy(both.astype(np.int64))
        return wide[:, :-1], wide[:, 1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_map": None}  # a pickle of a map would hold all of the file


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if path.suffix == ".npy":
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (EOFError, ValueError) as error:
            raise ValueError(f"{path}: expected a .npy file of tokens; got {error}") from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            got = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{path}: expected whole numbers in one dimension; got {got}")
        return array
    width = np.dtype(dtype).itemsize
    size = os.path.getsize(path)
    if size % width or not size:
        raise ValueError(f"{path}: expected whole {dtype} numbers; got {size} bytes")
    return np.memmap(path, mode="r", dtype=np.dtype(dtype).newbyteorder("<"))


def split_documents(tokens: np.ndarray, end: int) -> list[np.ndarray]:
    """The documents of a run of tokens, each with the ``end`` token behind it.

    Args:
        tokens: whole numbers [tokens], such as `TokenFile.tokens`; the parts are views of it.
        end: the token that ends a document; what is behind the last one is a document, too.
    """
    cuts = np.flatnonzero(tokens == end) + 1
    return [document for document in np.split(tokens, cuts) if len(document)]
