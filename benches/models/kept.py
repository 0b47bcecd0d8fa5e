"""What took minutes to make is kept in the user's cache, by what it was made of."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from bigops.benches.models.subject import Subject


def folder() -> Path:
    """The folder, which is made here."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    found = Path(cache) / "bigops" / "benches"
    found.mkdir(parents=True, exist_ok=True)
    return found


def stem(subject: Subject, *versions: str) -> str:
    """A file's name that changes with any number of the model, its inputs or its calibration."""
    rows = (x for one in (subject.inputs, *subject.calibration) for x in one)
    state = subject.model.state_dict()
    number = checksum([*state.values(), *rows])
    names = zlib.crc32("\n".join([*state, type(subject.model).__name__, *versions]).encode())
    return f"{number:08x}{names:08x}-{subject.shape}"


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of tensors, in their order."""
    number = 0
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        number = zlib.crc32(flat.numpy().data, number)
    return number
