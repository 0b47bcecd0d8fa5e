"""Checkpoints: written whole or not at all, loaded whole or not at all, read without running code.

A checkpoint is an archive of `torch.save`; the CRC-32 of each record is compared when it is read.
"""

from __future__ import annotations

import contextlib
import copy
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.serialization import config

from bigops.files import FormatError, replacing
from bigops.optim.saved_states import restorer

_FORMAT = "bigops.checkpoint.1"


def save_checkpoint(path: str | os.PathLike[str], **parts: Any) -> None:
    """Write a checkpoint; a crash or a full disk leaves the old file as it was.

    Args:
        path: the file. It is written beside itself and renamed (`bigops.files.replacing`), so
            several threads, processes and machines may write it at once: the last one stays.
        **parts: what to save, by name: objects with ``state_dict`` (model, optimizer,
            MixedPrecision, scheduler) or plain values (numbers, strings, tensors, lists and dicts
            of them). torch's random states (CPU and every GPU) are saved in any case.

    Raises:
        TypeError: a plain value that ``load_checkpoint`` could not read back.
        OSError: the folder is missing or cannot be written, or ``path`` is no file.
    """
    content = {
        "format": _FORMAT,
        "states": {k: v.state_dict() for k, v in parts.items() if hasattr(v, "state_dict")},
        "values": {k: v for k, v in parts.items() if not hasattr(v, "state_dict")},
        "rng": {"cpu": torch.get_rng_state(), "cuda": _cuda_rng()},
    }
    for name, value in content["values"].items():  # type: ignore[attr-defined]
        _check_plain(name, value)
    with replacing(path) as temporary, open(temporary, "wb") as file, _checksums():
        torch.save(content, file)


def load_checkpoint(
    path: str | os.PathLike[str], *, rng: bool = True, map_location: str = "cpu", **parts: Any
) -> dict[str, Any]:
    """Read a checkpoint into the objects given; the counterpart of ``save_checkpoint``.

    Everything is checked before the first object is changed, and where one still refuses its
    state, those before it are set back: all is loaded or nothing. That takes a copy of each model
    given, on the CPU, while it loads.

    Args:
        path: the file.
        rng: whether to restore torch's random states.
        map_location: device on which tensors are read before they are copied into place.
        **parts: the objects to load into, under the names they were saved with.

    Returns:
        The plain values that were saved, by name.

    Raises:
        FormatError: no such checkpoint, a damaged or foreign file, a part that it does not hold, or
            one that refuses its state: a model with other parameters, an optimiser with other
            groups, another precision. It is a ValueError; nothing is loaded then.
    """
    content = _read(path, map_location)
    states = content["states"]
    missing = sorted(set(parts) - set(states))
    if missing:
        raise FormatError(f"parts: {path} holds {sorted(states)}, not {missing}")
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            _check_module(f"{path}: {name}", part, states[name])
    cuda = content["rng"]["cuda"] if rng else []
    cuda = cuda if len(cuda) == torch.cuda.device_count() else []
    if rng:
        _check_rng(path, content["rng"]["cpu"], cuda)
    with contextlib.ExitStack() as undo:
        for name, part in parts.items():
            undo.callback(_undo(part))
            try:
                part.load_state_dict(states[name])
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # what a part refuses may raise nearly anything
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise FormatError(f"{path}: {name}: {kind}{error}") from error
        if rng:
            undo.callback(torch.set_rng_state, torch.get_rng_state())
            torch.set_rng_state(content["rng"]["cpu"].cpu())
            if cuda:
                torch.cuda.set_rng_state_all([state.cpu() for state in cuda])
        undo.pop_all()
    return content["values"]  # type: ignore[no-any-return]


# --- the file -------------------------------------------------------------------------------


@contextlib.contextmanager
def _checksums() -> Iterator[None]:
    """torch.save writes checksums inside, also where they were switched off for the process."""
    with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
        yield


def _read(path: str | os.PathLike[str], map_location: str) -> dict[str, Any]:
    """The content of a checkpoint, its form checked."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
            raise FormatError(f"path: {path} is no readable checkpoint (it is no file)")
        with open(path, "rb") as file:  # one file from here on, whoever replaces it meanwhile
            _check_archive(file)
            # weights_only: an unpickler that builds tensors and plain containers only.
            content = torch.load(file, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise FormatError(f"path: expected a checkpoint, {path} does not exist") from None
    except (FormatError, PermissionError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged archive may raise nearly anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"path: {path} is no readable checkpoint ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise FormatError(f"path: expected a file of format {_FORMAT}, {path} is something else")
    rng = content.get("rng")
    random = isinstance(rng, dict) and isinstance(rng.get("cuda"), list)
    tables = (content.get("states"), content.get("values"))
    if not random or not all(isinstance(table, dict) for table in tables):
        raise FormatError(f"path: expected states, values and random states; {path} lacks some")
    return content


def _check_archive(file: BinaryIO) -> None:
    """Raise unless every record has the CRC-32 that the archive says; the file is rewound."""
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"the CRC-32 of {broken} is another: the file is damaged")
    file.seek(0)


def _cuda_rng() -> list[Tensor]:
    # get_rng_state_all initialises CUDA, which a CPU run must not pay for.
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _check_rng(path: str | os.PathLike[str], cpu: Any, cuda: list[Any]) -> None:
    """Raise FormatError unless generators take these states, which they would keep half of."""
    try:
        torch.Generator().set_state(cpu.cpu())
        for state in cuda:
            torch.Generator("cuda").set_state(state.cpu())
    except Exception as error:
        raise FormatError(
            f"{path}: expected random states of torch; got others ({error})"
        ) from None


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(name, key)
            _check_plain(name, item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(name, item)
    elif not (value is None or type(value) in (bool, int, float, str, torch.Tensor)):
        raise TypeError(
            f"{name}: expected an object with state_dict, or numbers, strings, tensors and "
            f"lists or dicts of them; got {type(value).__name__}"
        )


def _check_module(name: str, module: nn.Module, state: Any) -> None:
    """``load_state_dict`` copies before it complains: compare first."""
    own = module.state_dict()
    if not isinstance(state, Mapping):
        raise FormatError(f"{name}: expected a state by names; got {type(state).__name__}")
    for key in sorted(set(own) ^ set(state)):
        where = "the file" if key in state else "the model"
        raise FormatError(f"{name}: only {where} has {key!r}")
    for key, value in own.items():
        if not isinstance(value, Tensor):
            continue
        got = state[key]
        if not isinstance(got, Tensor):
            raise FormatError(f"{name}: {key} expected a tensor; got {type(got).__name__}")
        if value.shape != got.shape:
            raise FormatError(
                f"{name}: {key} expected shape {tuple(value.shape)}; got {tuple(got.shape)}"
            )
        if value.dtype != got.dtype and not (value.is_floating_point() and got.is_floating_point()):
            raise FormatError(f"{name}: {key} expected {value.dtype}; got {got.dtype}")


# --- setting back ---------------------------------------------------------------------------


def _undo(part: Any) -> Callable[[], None]:
    """A function that sets an object back to what it is now."""
    if isinstance(part, nn.Module):
        return _undo_module(part)
    if isinstance(part, Optimizer):  # they take new states and groups, and write into no old one
        return _undo_optimizer(part)
    own = getattr(part, "__dict__", {})  # not of a class with __slots__
    state, kept = copy.deepcopy(part.state_dict()), dict(own)

    def undo() -> None:
        part.load_state_dict(state)  # what lies deeper
        own.clear()
        own.update(kept)

    return undo


def _undo_optimizer(optimizer: Optimizer) -> Callable[[], None]:
    kept, restore = dict(vars(optimizer)), restorer(optimizer)

    def undo() -> None:
        vars(optimizer).clear()
        vars(optimizer).update(kept)
        restore()

    return undo


def _undo_module(module: nn.Module) -> Callable[[], None]:
    tables = [
        (table, dict(table)) for m in module.modules() for table in (m._parameters, m._buffers)
    ]
    tensors = {id(t): t for _, table in tables for t in table.values() if t is not None}
    # On the CPU, since a GPU that holds a model in training has no room for two.
    values = [(t, t.data, t.detach().to("cpu", copy=True)) for t in tensors.values()]
    extra = [
        (m, copy.deepcopy(m.get_extra_state()))
        for m in module.modules()
        if type(m).get_extra_state is not nn.Module.get_extra_state
    ]

    def undo() -> None:
        for table, old in tables:
            table.clear()
            table.update(old)  # type: ignore[arg-type]
        with torch.no_grad():
            for t, data, value in values:
                if t.data_ptr() != data.data_ptr():
                    t.data = data
                if not torch.equal(t.cpu(), value):
                    t.copy_(value)
        for m, state in extra:
            m.set_extra_state(state)

    return undo
