"""One file of a run's state: what it looks like, written and read.

A safetensors file whose entry ``bigops.state`` is JSON by `tree`: format, states by the names of
parts, values, and of each rank its random states and the states of the parts that it has for
itself. Up to version 1 a file was an archive of `torch.save`; such files are read.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bigops.files import FormatError
from bigops.files import tensors as tensors_file
from bigops.optim.checkpoint import random_states, trainer_folder
from bigops.optim.checkpoint.parts import load_all, state_of
from bigops.optim.checkpoint.tree import Writer, decode

_ENTRY = "bigops.state"
_FORMAT, _ARCHIVE = "bigops.state.2", "bigops.checkpoint.1"
_WRITER = "bigops.train.TrainState or save_checkpoint"


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write a checkpoint; a crash or a full disk leaves the old file as it was.

    For a run of several steps or ranks `TrainState` keeps the last few of such files.

    Args:
        path: the file. It is written beside itself and renamed (`bigops.files.replacing`), so
            several threads, processes and machines may write it at once: the last one stays.
        **parts: what to save, by name: objects with ``state_dict`` (model, optimizer,
            MixedPrecision, scheduler) or plain values (numbers, strings, tensors, lists and dicts
            of them). The random states of torch (CPU and every GPU), numpy and Python are saved in
            any case.

    Raises:
        TypeError, ValueError: a value that ``load_checkpoint`` could not read back; it is named.
        OSError: the folder is missing or cannot be written, the disk is full, or ``path`` is no
            file.
    """
    writer = Writer()
    objects = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
    values = {name: part for name, part in parts.items() if name not in objects}
    content = encoded(writer, objects, values)
    write(path, content, [encoded_rank(writer)], writer.tensors)


def load_checkpoint(
    path: str | os.PathLike[str], *, rng: bool = True, map_location: str = "cpu", **parts: Any
) -> dict[str, Any]:
    """Read a checkpoint into the objects given; the counterpart of ``save_checkpoint``.

    Everything is checked before the first object is changed, and where one still refuses its
    state, those before it are set back: all is loaded or nothing. That takes a copy of each model
    given, on the CPU, while it loads.

    Args:
        path: the file; also one that `TrainState` wrote.
        rng: whether to restore the random states (of a file of several ranks, those of the first).
        map_location: device on which tensors are read before they are copied into place.
        **parts: the objects to load into, under the names they were saved with.

    Returns:
        The plain values that were saved, by name.

    Raises:
        FormatError: no such checkpoint, a damaged or foreign file, a part that it does not hold, or
            one that refuses its state: a model with other parameters, an optimiser with other
            groups, another precision. It is a ValueError; nothing is loaded then.
    """
    content = read(path, map_location)
    with contextlib.ExitStack() as undo:
        load(path, content, parts, 0 if rng else None, undo)
        undo.pop_all()
    return content["values"]  # type: ignore[no-any-return]


# --- writing --------------------------------------------------------------------------------


def encoded(writer: Writer, parts: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """States of parts and plain values as JSON; their tensors are with the writer."""
    with torch.no_grad():
        return {
            "states": {name: writer.encode(state_of(part), name) for name, part in parts.items()},
            "values": {name: writer.encode(value, name) for name, value in values.items()},
        }


def encoded_rank(
    writer: Writer, parts: Mapping[str, Any] | None = None, rank: int = 0
) -> dict[str, Any]:
    """Random states of this process and the parts that it has for itself."""
    states = {n: writer.encode(state_of(p), f"rank{rank}", n) for n, p in (parts or {}).items()}
    rng = writer.encode(random_states.capture(), f"rank{rank}", "rng")
    return {"rng": rng, "states": states}


def write(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    ranks: list[dict[str, Any]],
    tensors: Mapping[str, Tensor],
    mark: str = "",
) -> None:
    """Write what `encoded` and `encoded_rank` made, whole or not at all."""
    text = json.dumps({"format": _FORMAT, **content, "ranks": ranks})
    tensors_file.write(path, tensors, {_ENTRY: text}, mark)


# --- reading --------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Content of a file, its form checked: states, values, ranks.

    Raises:
        FormatError: as `load_checkpoint`.
    """
    try:
        content = _read(path, map_location)
    except FileNotFoundError:
        raise FormatError(f"path: expected a checkpoint, {path} does not exist") from None
    except (FormatError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged archive may raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"path: {path} is no readable checkpoint ({reason})") from error
    tables = [content.get("states"), content.get("values")]
    ranks = content.get("ranks")
    if not isinstance(ranks, list) or not ranks:
        raise FormatError(f"path: expected the states of ranks; {path} lacks some")
    for rank in ranks:
        rank = rank if isinstance(rank, dict) else {}
        random = rank.get("rng")
        given = isinstance(random, dict) and isinstance(random.get("cuda"), list)
        tables += [rank.get("states"), random if given else None]
    if not all(isinstance(table, dict) for table in tables):
        raise FormatError(f"path: expected states, values and random states; {path} lacks some")
    return content


def _read(path: str | os.PathLike[str], map_location: str) -> dict[str, Any]:
    if trainer_folder.is_one(Path(path)):
        return trainer_folder.read(Path(path), map_location)
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
        raise FormatError(f"path: {path} is no readable checkpoint (it is no file)")
    with open(path, "rb") as file:  # one file from here on, whoever replaces it meanwhile
        if file.read(4) == b"PK\3\4":
            file.seek(0)
            return _read_archive(path, file, map_location)
    try:
        entries, tensors = tensors_file.read(path, _ENTRY, _WRITER, map_location)
    except FormatError as error:
        raise FormatError(f"path: {path} is no readable checkpoint ({error})") from error
    content = tensors_file.parse(path, entries, _ENTRY)
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        got = content.get("format") if isinstance(content, dict) else str(content)[:80]
        raise FormatError(f"path: expected a file of format {_FORMAT}, {path} has {got!r}")
    if tensors_file.CHECKSUMS not in entries:
        raise FormatError(f"path: expected checksums; {path} has none: it is damaged")
    try:
        return decode(content, tensors)  # type: ignore[no-any-return]
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error


def _read_archive(
    path: str | os.PathLike[str], file: BinaryIO, map_location: str
) -> dict[str, Any]:
    """A file of version 1 as those of today are."""
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"the CRC-32 of {broken} is another: the file is damaged")
    file.seek(0)
    # weights_only: an unpickler that builds tensors and plain containers only.
    content = torch.load(file, map_location=map_location, weights_only=True)
    if not isinstance(content, dict) or content.get("format") != _ARCHIVE:
        raise FormatError(f"path: expected a file of format {_ARCHIVE}, {path} is something else")
    return {**content, "ranks": [{"rng": content.get("rng"), "states": {}}]}


# --- loading --------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str],
    content: Mapping[str, Any],
    parts: Mapping[str, Any],
    rank: int | None,
    undo: contextlib.ExitStack,
    own: Iterable[str] = (),
) -> None:
    """Load parts and random states; ``undo`` gets what sets them back, also where this raises.

    Args:
        rank: whose random states and own parts; None leaves the random states.
        own: which of the parts a rank has for itself.
    """
    held = content["ranks"][rank or 0]
    if rank is not None:
        random_states.check(str(path), held["rng"])
    mine = {name: state for name, state in held["states"].items() if name in set(own)}
    load_all(path, parts, {**content["states"], **mine}, undo)
    if rank is not None:
        undo.callback(random_states.restore, random_states.capture())
        random_states.restore(held["rng"])
