"""The safetensors file of `bigops.save`: what its header says.

The metadata of the file has three entries:

    bigops          JSON: format, tree (see `structure`), training, checksums (that there are some),
                    and by the names of tensors fixed (parameters that are not trained), tied (the
                    same object as ..), views (of the memory of another tensor), strides (where they
                    are not those of rows); versions (of modules, as `state_dict` has them, not 1)
    bigops.receipt  JSON, where there is one
    bigops.crc32    the checksums of `bigops.files.tensors`

Files that were written before there were views, strides, versions or checksums have none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops.files import FormatError
from bigops.files import tensors as tensors_file
from bigops.files.tensors import CHECKSUMS

FORMAT = 2  # 1: sparse weights as 1x4 blocks, quantised ones as plain rows
_HEADER, _RECEIPT = "bigops", "bigops.receipt"

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
    tensors_file.write(path, tensors, entries)


def _number(value: Any) -> Any:
    """Sizes that came as numbers of numpy, or as tensors of one element."""
    if not hasattr(value, "item"):
        raise TypeError(f"{type(value).__name__} {str(value)[:80]!r}")
    return value.item()


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
    metadata, tensors = tensors_file.read(path, _HEADER, "bigops.save", device, mapped)
    return _parse(path, metadata), tensors


def _parse(path: Path, metadata: Mapping[str, str]) -> Header:
    header = tensors_file.parse(path, metadata, _HEADER)
    if not isinstance(header, dict) or "format" not in header:
        raise FormatError(
            f"{path}: expected a header with a format version; got {str(header)[:80]}"
        )
    if header["format"] != FORMAT or type(header["format"]) is not int:
        raise FormatError(
            f"{path}: expected format version {FORMAT}; got {header['format']!r} (written by "
            "another version of bigops)"
        )
    if header.get("checksums", False) is not False and CHECKSUMS not in metadata:
        raise FormatError(
            f"{path}: expected the entry {CHECKSUMS!r} in the header, which the file was written "
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
