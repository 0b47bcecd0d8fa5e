"""A safetensors file with entries of text and checksums, written whole or not at all.

The metadata of the file holds the entries, and `CHECKSUMS`: JSON, the CRC-32 of each entry and of
each tensor (dtype, shape and bytes).
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bigops.files import FormatError, replacing

CHECKSUMS = "bigops.crc32"
_RESERVED = "__metadata__"  # where safetensors keeps the entries


# --- what fits ------------------------------------------------------------------------------


def check_storable(name: str, value: Any) -> None:
    """Raise ValueError, naming the entry, unless the file can hold it and give it back."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor to save; got {type(value).__name__}")
    if name == _RESERVED:
        raise ValueError(f"{name}: expected another name; safetensors keeps its header there")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r}: expected a name that UTF-8 can hold") from None
    if torch.nn.parameter.is_lazy(value):
        raise ValueError(f"{name}: expected a dense tensor with content; got one uninitialised")
    dispatches = type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if dispatches or isinstance(value, FakeTensor) or value.is_nested:
        got = "a nested one" if value.is_nested else f"a {type(value).__name__}"
        raise ValueError(f"{name}: expected a plain dense tensor; got {got}")
    if value.is_meta or value.layout != torch.strided:
        place = "on meta" if value.is_meta else str(value.layout)
        raise ValueError(f"{name}: expected a dense tensor with content; got one {place}")
    if value.is_quantized or _word(value.dtype) is None:
        raise ValueError(
            f"{name}: expected a dtype that a safetensors file holds; got {value.dtype}"
        )


@functools.cache
def _word(dtype: torch.dtype) -> str | None:
    """What a dtype is called in a file, None where this safetensors would not give it back."""
    try:
        one = torch.zeros(2, dtype=torch.uint8, device="cpu").repeat(8).view(dtype)
        data = save_bytes({"x": one})
        again = load_bytes(data)["x"]
    except Exception:  # several kinds, by version
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    same = again.dtype == dtype and again.shape == one.shape
    return header["x"]["dtype"] if same else None


def plain_strides(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a tensor that lies row by row."""
    return torch.empty(shape, device="meta").stride()


# --- writing --------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    mark: str = "",
) -> None:
    """Write contiguous tensors on the CPU, which may share memory, and entries of text.

    safetensors' own writer makes a file beside the one that it is given, which a killed process
    leaves under a name that nobody knows, and turns every OSError into another class.

    Raises:
        OSError: as `replacing`, which gets ``mark``, or a full disk; ``path`` is as it was.
    """
    sums = {
        "entries": {name: zlib.crc32(entry.encode()) for name, entry in entries.items()},
        "tensors": {name: _crc32(t) for name, t in tensors.items()},
    }
    header: dict[str, Any] = {_RESERVED: {**entries, CHECKSUMS: json.dumps(sums)}}
    # The widest first, so that each lies at a multiple of its width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in names:
        t = tensors[name]
        begin, end = end, end + t.nbytes
        shape = {"dtype": _word(t.dtype), "shape": list(t.shape)}
        header[name] = {**shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, mark) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _put(file, tensors[name])


def _put(file: BinaryIO, t: Tensor) -> None:
    if t.numel():
        file.write(_bytes(t))


def _bytes(t: Tensor) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * t.nbytes).from_address(t.data_ptr())


def _crc32(t: Tensor) -> int:
    """Of dtype, shape and bytes of a contiguous tensor on the CPU."""
    start = zlib.crc32(f"{t.dtype} {list(t.shape)}".encode())
    return zlib.crc32(_bytes(t), start) if t.numel() else start


# --- reading --------------------------------------------------------------------------------


def read(
    path: str | os.PathLike[str],
    entry: str,
    writer: str,
    device: torch.device | str | None = "cpu",
    mapped: bool = False,
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Entries and tensors (none without a device), their checksums compared where there are some.

    Args:
        path: the file.
        entry: one that it has to have.
        writer: what writes such files, for the messages.
        device: where the tensors go.
        mapped: the tensors lie in the mapped file; writing to one leaves the file as it is.

    Raises:
        FormatError: it is truncated or damaged, or has no such entry.
        FileNotFoundError, IsADirectoryError: no such file.
    """
    path = Path(path)
    _check_regular(path, writer)
    tensors: dict[str, Tensor] = {}
    sums: dict[str, Any] | None = None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if entry in metadata:
                sums = _read_checksums(path, metadata)
            if device is not None and entry in metadata:
                names = list(file.keys())
                if sums is not None and set(names) != set(sums["tensors"]):
                    wrong = sorted(set(names) ^ set(sums["tensors"]))[0]
                    raise FormatError(
                        f"{path}: expected the tensors of its checksums; {wrong!r} "
                        "is without tensor or without checksum"
                    )
                for name in names:
                    own = file.get_tensor(name)
                    if not mapped:  # a file that changes would change or crash the model
                        own = own.clone()
                    if sums is not None:
                        _compare(path, f"tensor {name!r}", sums["tensors"][name], _crc32(own))
                    tensors[name] = own.to(device)
    except (FormatError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # SafetensorError and others, by what is broken
        raise FormatError(
            f"{path}: expected a whole safetensors file written by {writer}; it is truncated, "
            f"damaged or of another format ({error})"
        ) from None
    if entry not in metadata:
        raise FormatError(
            f"{path}: expected a header {entry!r} as {writer} writes it; this safetensors "
            f"file has {sorted(metadata) or 'none'}"
        )
    return metadata, tensors


def parse(path: str | os.PathLike[str], metadata: Mapping[str, str], entry: str) -> Any:
    """What the JSON of an entry says.

    Raises:
        FormatError: it is none.
    """
    try:
        return json.loads(metadata[entry])
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the entry {entry!r} of the header is no JSON ({error})"
        ) from None


def _check_regular(path: Path, writer: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected a file written by {writer}; it is not there"
        ) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: expected a file written by {writer}; it is a folder")
    if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
        raise FormatError(f"{path}: expected a file written by {writer}; it is a device or FIFO")


def _read_checksums(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The checksums, those of the other entries compared; None in an older file."""
    if CHECKSUMS not in metadata:
        return None
    sums = parse(path, metadata, CHECKSUMS)
    for part in ("entries", "tensors"):
        if not isinstance(sums, dict) or not isinstance(sums.get(part), dict):
            raise FormatError(f"{path}: expected checksums of {part}; got {str(sums)[:80]}")
    entries = {name: text for name, text in metadata.items() if name != CHECKSUMS}
    if set(entries) != set(sums["entries"]):
        raise FormatError(
            f"{path}: expected the entries {sorted(sums['entries'])} in the header; got "
            f"{sorted(entries)}"
        )
    for name, text in entries.items():
        _compare(
            path, f"the header's entry {name!r}", sums["entries"][name], zlib.crc32(text.encode())
        )
    return sums


def _compare(path: Path, what: str, expected: Any, got: int) -> None:
    if expected != got or isinstance(expected, bool | float):
        raise FormatError(
            f"{path}: expected CRC-32 {str(expected)[:20]} of {what}; got {got}: the file is "
            "damaged"
        )
