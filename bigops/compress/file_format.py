"""The safetensors file of `bigops.save`: its header, its checksums, which tensors fit into it.

The metadata of the file has three entries:

    bigops          JSON: format, tree (see `structure`), training, checksums (that there are some),
                    and by the names of tensors fixed (parameters that are not trained), tied (the
                    same object as ..), views (of the memory of another tensor), strides (where they
                    are not those of rows); versions (of modules, as `state_dict` has them, not 1)
    bigops.receipt  JSON, where there is one
    bigops.crc32    JSON: CRC-32 of the other entries and of each tensor (dtype, shape and bytes)

Files that were written before there were views, strides, versions or checksums have none.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from bigops.files import FormatError, replacing

FORMAT = 2  # 1: sparse weights as 1x4 blocks, quantised ones as plain rows
_HEADER, _RECEIPT, _CHECKSUMS = "bigops", "bigops.receipt", "bigops.crc32"
_RESERVED = "__metadata__"  # where safetensors keeps the entries above

View = tuple[str, int, list[int], list[int]]  # name, offset, shape, strides


class Header(NamedTuple):
    """What a file says beside its tensors."""

    tree: dict[str, Any]
    training: bool
    fixed: list[str]
    tied: dict[str, str]
    views: dict[str, View]
    strides: dict[str, list[int]]
    versions: dict[str, dict[str, Any]] | None  # None: the file does not say
    receipt: str | None


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
    if value.is_quantized or not _holds(value.dtype):
        raise ValueError(
            f"{name}: expected a dtype that a safetensors file holds; got {value.dtype}"
        )


@functools.cache
def _holds(dtype: torch.dtype) -> bool:
    """Whether this version of safetensors gives a tensor of the dtype back: it is asked."""
    try:
        one = torch.zeros(2, dtype=torch.uint8, device="cpu").repeat(8).view(dtype)
        again = load_bytes(save_bytes({"x": one}))["x"]
    except Exception:  # several kinds, by version
        return False
    return again.dtype == dtype and again.shape == one.shape


def plain_strides(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a tensor that lies row by row."""
    return torch.empty(shape, device="meta").stride()


# --- writing --------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    receipt: str | None,
) -> None:
    """Write contiguous tensors on the CPU and a header, whole or not at all."""
    try:
        text = json.dumps({"format": FORMAT, "checksums": True, **header}, default=_number)
    except (TypeError, ValueError) as error:
        raise ValueError(f"header: expected plain data; got other ({error})") from None
    entries = {_HEADER: text} if receipt is None else {_HEADER: text, _RECEIPT: receipt}
    sums = {
        "entries": {name: zlib.crc32(entry.encode()) for name, entry in entries.items()},
        "tensors": {name: _crc32(t) for name, t in tensors.items()},
    }
    with replacing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={**entries, _CHECKSUMS: json.dumps(sums)})


def _number(value: Any) -> Any:
    """Sizes that came as numbers of numpy, or as tensors of one element."""
    if not hasattr(value, "item"):
        raise TypeError(f"{type(value).__name__} {str(value)[:80]!r}")
    return value.item()


def _crc32(t: Tensor) -> int:
    """Of dtype, shape and bytes of a contiguous tensor on the CPU."""
    start = zlib.crc32(f"{t.dtype} {list(t.shape)}".encode())
    if not t.numel():
        return start
    return zlib.crc32((ctypes.c_char * t.nbytes).from_address(t.data_ptr()), start)


# --- reading --------------------------------------------------------------------------------


def read(
    path: str | os.PathLike[str], device: torch.device | None, mapped: bool = False
) -> tuple[Header, dict[str, Tensor]]:
    """Header and tensors (none without a device), checked as far as the file alone goes.

    ``mapped``: the tensors lie in the mapped file; writing to one leaves the file as it is.

    Raises:
        FormatError: it is truncated or damaged, no such file, or of another version.
        FileNotFoundError, IsADirectoryError: no such file.
    """
    path = Path(path)
    _check_regular(path)
    tensors: dict[str, Tensor] = {}
    sums: dict[str, Any] | None = None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if _HEADER in metadata:
                sums = _read_checksums(path, metadata)
            if device is not None and _HEADER in metadata:
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
            f"{path}: expected a whole safetensors file written by bigops.save; it is truncated, "
            f"damaged or of another format ({error})"
        ) from None
    if _HEADER not in metadata:
        raise FormatError(
            f"{path}: expected a header {_HEADER!r} as bigops.save writes it; this safetensors "
            f"file has {sorted(metadata) or 'none'}"
        )
    return _parse(path, metadata), tensors


def _check_regular(path: Path) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: expected a file written by bigops.save; it is not there"
        ) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: expected a file written by bigops.save; it is a folder")
    if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
        raise FormatError(f"{path}: expected a file written by bigops.save; it is a device or FIFO")


def _read_checksums(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The checksums, those of the other entries compared; None in an older file."""
    if _CHECKSUMS not in metadata:
        return None
    sums = _json(path, _CHECKSUMS, metadata[_CHECKSUMS])
    for part in ("entries", "tensors"):
        if not isinstance(sums, dict) or not isinstance(sums.get(part), dict):
            raise FormatError(f"{path}: expected checksums of {part}; got {str(sums)[:80]}")
    entries = {name: text for name, text in metadata.items() if name != _CHECKSUMS}
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


def _json(path: Path, entry: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            f"{path}: the entry {entry!r} of the header is no JSON ({error})"
        ) from None


def _parse(path: Path, metadata: Mapping[str, str]) -> Header:
    header = _json(path, _HEADER, metadata[_HEADER])
    if not isinstance(header, dict) or "format" not in header:
        raise FormatError(
            f"{path}: expected a header with a format version; got {str(header)[:80]}"
        )
    if header["format"] != FORMAT or type(header["format"]) is not int:
        raise FormatError(
            f"{path}: expected format version {FORMAT}; got {header['format']!r} (written by "
            "another version of bigops)"
        )
    if header.get("checksums", False) is not False and _CHECKSUMS not in metadata:
        raise FormatError(
            f"{path}: expected the entry {_CHECKSUMS!r} in the header, which the file was written "
            f"with; got {sorted(metadata)}: the file is damaged"
        )
    fields: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "tree": ("a dict", lambda v: isinstance(v, dict)),
        "training": ("a bool", lambda v: isinstance(v, bool)),
        "fixed": ("a list of names", lambda v: isinstance(v, list) and all(map(_is_name, v))),
        "tied": ("names by name", lambda v: _is_table(v, _is_name)),
        "views": ("parts of tensors by name", lambda v: _is_table(v, _is_view)),
        "strides": ("lists of whole numbers by name", lambda v: _is_table(v, _are_sizes)),
        "versions": ("dicts by name", lambda v: _is_table(v, lambda one: isinstance(one, dict))),
    }
    for name, (words, takes) in fields.items():
        given = name in header or name in ("tree", "training", "fixed", "tied")
        if given and not takes(header.get(name)):
            raise FormatError(
                f"{path}: expected {name!r} in the header to be {words}; got "
                f"{str(header.get(name))[:80]}"
            )
    return Header(
        header["tree"],
        header["training"],
        header["fixed"],
        header["tied"],
        {name: tuple(view) for name, view in header.get("views", {}).items()},
        header.get("strides", {}),
        header.get("versions"),
        metadata.get(_RECEIPT),
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**62 for n in value)


def _is_table(value: Any, takes: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(takes, value.values()))


def _is_view(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 4 and _is_name(value[0])):
        return False
    _, offset, shape, strides = value
    return _are_sizes([offset]) and _are_sizes(shape) and _are_sizes(strides)
