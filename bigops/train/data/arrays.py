"""Rows of arrays in memory, or of .npy files that are mapped into it."""

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


class Arrays(Dataset):
    """Row i of each of some arrays; a `Loader` takes the rows of a batch at once.

    Args:
        *arrays: tensors, numpy arrays or paths of .npy files, which stay on the disk and are read
            where a row is asked for. All have as many rows.
        validation_split, subset: as `ImageDataGenerator` of Keras has them: the validation part is
            the first rows.

    Raises:
        ValueError: no array, arrays of other lengths, one without rows, or a file that is no array
            of numbers; it is named.
    """

    def __init__(
        self,
        *arrays: Tensor | np.ndarray | str | os.PathLike[str],
        validation_split: float = 0.0,
        subset: str | None = None,
    ) -> None:
        if not arrays:
            raise ValueError("arrays: expected at least one; got none")
        self._arrays = [_opened(f"arrays[{i}]", array) for i, array in enumerate(arrays)]
        lengths = [len(array) for array in self._arrays]
        if len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(f"arrays: expected as many rows of each, at least 1; got {lengths}")
        self._rows = part(lengths[0], validation_split, subset)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Any:
        (*taken,) = (value[0] for value in self._take([row]))
        return taken[0] if len(taken) == 1 else tuple(taken)

    def take(self, rows: Sequence[int]) -> Any:
        """Rows of each array, a tensor [rows, ..] of its dtype; of one array that tensor itself."""
        taken = self._take(rows)
        return taken[0] if len(taken) == 1 else tuple(taken)

    def _take(self, rows: Sequence[int]) -> list[Tensor]:
        chosen = np.asarray([self._rows[row] for row in rows], dtype=np.int64)
        return [
            array[torch.from_numpy(chosen)]
            if isinstance(array, Tensor)
            else torch.from_numpy(np.ascontiguousarray(array[chosen]))
            for array in self._arrays
        ]


def _opened(name: str, array: Any) -> Tensor | np.ndarray | _Mapped:
    if isinstance(array, str | os.PathLike):
        return _Mapped(Path(array))
    if isinstance(array, Tensor):
        if array.dim() < 1:
            raise ValueError(f"{name}: expected rows; got one number")
        return array
    array = np.asarray(array)
    check_numbers(name, array)
    return array


def check_numbers(name: str, array: np.ndarray) -> None:
    """Raise ValueError unless torch has the array's numbers and there are rows of them."""
    try:
        torch.from_numpy(np.empty(1, array.dtype))
    except TypeError:
        raise ValueError(f"{name}: expected numbers that torch has; got {array.dtype}") from None
    if array.ndim < 1:
        raise ValueError(f"{name}: expected rows; got one number")


class _Mapped:
    """A .npy file, mapped anew in each process: a pickle of a map would hold all of the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: np.ndarray | None = None
        try:
            check_numbers(str(path), self._array)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path}: expected a .npy file of numbers; got {error}") from None

    @property
    def _array(self) -> np.ndarray:
        if self._map is None:
            self._map = np.load(self._path, mmap_mode="r", allow_pickle=False)
        return self._map

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._array[rows]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_map": None}
