"""save and load: one safetensors file, the structure of the model as JSON in its header."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bigops.compress import file_format, structure
from bigops.compress.file_format import Header
from bigops.files import FormatError
from bigops.files.tensors import check_storable, plain_strides
from bigops.graph.atomic import atomic
from bigops.graph.sites import Sites
from bigops.nn.layer import Layer
from bigops.nn.stored_parameter import StoredParameter

if TYPE_CHECKING:
    from bigops.compress.receipt import Receipt


def save(model: nn.Module, path: str | os.PathLike[str], receipt: Receipt | None = None) -> None:
    """Write ``model`` to one safetensors file, whole or not at all.

    The file holds the tensors of `state_dict` and, in its header, the structure: the kind and
    the arguments of every module, which parameters are one object or lie in the memory of another,
    strides, the versions of the modules' states, and a CRC-32 of all of it. Compressed layers are
    stored as they are, packed; nothing is pickled.

    Args:
        model: on any device; it is not changed.
        path: the file; an existing one is replaced at the end (`bigops.files.replacing`: links are
            followed, the mode is kept).
        receipt: stored in the header, so that it travels with the model.

    Raises:
        ValueError: a state that has no place in the format, which the message names: on "meta", a
            sparse, nested or quantised tensor, a dtype that safetensors does not hold, extra state
            that is no tensor, a part of memory that two tensors share. Nothing was written then.
        OSError: the folder is missing or cannot be written, or ``path`` is no file; nothing is left
            behind.
    """
    with torch.no_grad():
        state = model.state_dict(keep_vars=True)
        for name, value in state.items():
            check_storable(name, value)
        tied, views = _shared(state)
        tensors: dict[str, Tensor] = {}
        strides: dict[str, list[int]] = {}
        for name, value in state.items():
            if name in tied or name in views:
                continue
            # A copy of its own: safetensors refuses tensors that share memory.
            own = value.detach().resolve_neg().to("cpu", copy=True)
            if own.stride() != plain_strides(own.shape):
                strides[name] = list(own.stride())
            tensors[name] = own.contiguous()
    tree = structure.describe(model)
    versions = getattr(state, "_metadata", {})
    header = {
        "tree": tree,
        "tied": tied,
        "views": views,
        "strides": strides,
        "fixed": [
            name
            for name, p in model.named_parameters()
            if not (p.requires_grad or isinstance(p, StoredParameter))
        ],
        "training": model.training,
        "versions": {name: of for name, of in versions.items() if of != {"version": 1}},
    }
    file_format.write(path, tensors, header, None if receipt is None else receipt.to_json())


@atomic
def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
    mapped: bool = False,
) -> nn.Module:
    """Read what `save` wrote, without pickle and without the original weights.

    No random number is drawn. At its peak the memory is about twice that of the file's tensors,
    the model included.

    Args:
        path: the file.
        model: None when the model consists of known modules (`structure.KINDS`: Sequential,
            Linear, activations, the bigops layers ..). Else a model of the original class and
            sizes, as it was before compression or after; it may be on the meta device. Compressed
            layers are swapped in and all tensors replaced; its mode stays, and so does its memory
            format where the file has rows.
        device: where the tensors go.
        mapped: let the tensors lie in the file, mapped into memory, which processes that do so
            share: the file then must not be written in place while they live (`save` puts a new one
            in its place). On the CPU only.

    Returns:
        ``model``, or a new one in the mode that the saved one was in.

    Raises:
        FormatError: the file is truncated or damaged (its checksums are compared), no bigops file,
            of another version, or does not fit ``model``; the message names the file. ``model`` is
            unchanged.
        FileNotFoundError, IsADirectoryError: no such file.
        ValueError: ``mapped`` with another device than the CPU.
    """
    device = torch.device(device)
    if mapped and device.type != "cpu":
        raise ValueError(f"mapped: expected False with device {device}; got True")
    sites = None if model is None else Sites(model)
    header, tensors = file_format.read(path, device, mapped)
    with _refusing(path):
        if sites is None:
            made = structure.build(header.tree)
            _fill(made, header, tensors)
            return made.train(header.training).to(device)
        _swap_in(sites, header.tree)
        _fill(sites.model, header, tensors)
        return sites.model.to(device)


def load_compressed(path: str | os.PathLike[str]) -> dict[str, Layer]:
    """The compressed layers in a saved file by name, whatever the classes around them.

    Raises:
        FormatError, FileNotFoundError, IsADirectoryError: as `load`.
    """
    header, tensors = file_format.read(path, torch.device("cpu"))
    with _refusing(path):
        tensors = _all_tensors(header, tensors)
        found = dict(structure.compressed(header.tree))
        for name, layer in found.items():
            prefix = f"{name}." if name else ""
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            own = structure.in_todays_names(layer, own)
            versions = {"": (header.versions or {}).get(name, {"version": 1})}
            _check_state(layer, own, f"module {name!r}: " if name else "")
            _load_state(layer, own, versions)
        return found


def read_header(path: str | os.PathLike[str]) -> Header:
    """The structure and the receipt (JSON text or None) in the header of a saved file.

    Raises:
        FormatError: as `load`.
    """
    header, _ = file_format.read(path, None)
    return header


# --- refusing -------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever a file makes modules raise becomes a FormatError that names it."""
    try:
        yield
    except structure.StructureError as error:
        raise FormatError(f"{path}: {error}") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise FormatError(f"{path}: {type(error).__name__}: {error}") from error


# --- filling --------------------------------------------------------------------------------


def _swap_in(sites: Sites, tree: Any) -> None:
    """Put the layers of the file into a caller's model, still empty."""
    new = dict(structure.replacements(tree, sites.model))
    if "" in new:
        raise structure.StructureError(
            "the model is a single layer, which cannot be swapped in place: load without model="
        )
    for path, module in new.items():
        module.train(sites.modules[path].training)
    sites.swap(new)


def _fill(model: nn.Module, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Give a model its tensors, ties and flags; every check comes before the first of them."""
    tensors = structure.in_todays_names(model, _all_tensors(header, tensors))
    state = _check_state(model, tensors, "")
    hollow = [n for n, b in model.named_buffers() if b.is_meta and n not in tensors]
    if hollow:
        raise structure.StructureError(
            f"the buffers {hollow} are on the meta device and no part of the state_dict: build "
            "the model on a real device"
        )
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = sorted({*header.fixed} - names)
    if unknown:
        raise structure.StructureError(
            f"fixed: expected parameters of the model; got {unknown[0]!r}"
        )
    placed = {*header.strides, *header.views, *(of for of, *_ in header.views.values())}
    for name, own in state.items():
        if name not in placed and own.shape == tensors[name].shape:
            tensors[name] = _in_format_of(own, tensors[name])
    versions = {
        path: {"version": module._version} if header.versions is None else {"version": 1}
        for path, module in model.named_modules(remove_duplicate=False)
    }
    _load_state(model, tensors, {**versions, **(header.versions or {})})
    _tie(model, header.tied)
    fixed = set(header.fixed)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in fixed:
            parameter.requires_grad_(False)


def _load_state(
    module: nn.Module, tensors: Mapping[str, Tensor], versions: Mapping[str, dict[str, Any]]
) -> None:
    state = OrderedDict(tensors)
    state._metadata = dict(versions)  # type: ignore[attr-defined]  # where torch keeps them
    try:
        module.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:  # broken storage, what a module of the caller's refuses: a list
        raise structure.StructureError(f"the tensors do not fit: {error}") from None


def _check_state(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The model's own state; StructureError unless the tensors are just those that it has."""
    state: dict[str, Tensor] = model.state_dict()
    missing = sorted(state.keys() - tensors.keys())
    extra = sorted(tensors.keys() - state.keys())
    if missing or extra:
        raise structure.StructureError(
            f"{where}the model needs {missing or 'nothing'} that the file lacks, and the file has "
            f"{extra or 'nothing'} that the model lacks"
        )
    free = structure.storage_keys(model)  # the layers check these
    for name, value in state.items():
        got = tensors[name]
        if name in free:
            continue
        if not isinstance(value, Tensor):
            raise structure.StructureError(
                f"{where}{name}: the model expects a {type(value).__name__}; the file has a tensor"
            )
        if value.shape != got.shape:
            raise structure.StructureError(
                f"{where}{name}: the model expects shape {list(value.shape)}; the file has "
                f"{list(got.shape)}"
            )
        both = value.is_floating_point() and got.is_floating_point()
        if value.dtype != got.dtype and not both:
            raise structure.StructureError(
                f"{where}{name}: the model expects {value.dtype}; the file has {got.dtype}"
            )
    return state


# --- memory: ties, views, strides -----------------------------------------------------------


def _shared(state: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, list[Any]]]:
    """Which entries are the same object as another, and which lie in the memory of another."""
    tied: dict[str, str] = {}
    views: dict[str, list[Any]] = {}
    objects: dict[int, str] = {}
    places: dict[Any, list[str]] = {}
    for name, value in state.items():
        if objects.setdefault(id(value), name) != name:
            tied[name] = objects[id(value)]
        elif value.numel():
            places.setdefault((value.device, value.untyped_storage().data_ptr()), []).append(name)
    for names in places.values():
        bases: list[str] = []
        # The widest first: what the others lie in. The first of equal ones, as they are named.
        for name in sorted(names, key=lambda n: -_extent(state[n])[1]):
            value = state[name]
            first, length = _extent(value)
            for base in bases:
                whole = state[base]
                start, width = _extent(whole)
                if first >= start + width or start >= first + length:
                    continue
                offset, rest = divmod(first - start, value.element_size())
                inside = start <= first and first + length <= start + width
                if inside and not rest and value.dtype == whole.dtype and _is_dense(whole):
                    views[name] = [base, offset, list(value.shape), list(value.stride())]
                    break
                if _is_dense(whole) and _is_dense(value):
                    raise ValueError(
                        f"{name}: expected memory of its own, or within that of one other entry of "
                        f"its dtype; got some that it shares with {base} in part"
                    )
            else:
                bases.append(name)
    return tied, views


def _extent(t: Tensor) -> tuple[int, int]:
    """First byte and bytes from there to the last, of a tensor that is not empty."""
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), (last + 1) * t.element_size()


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill their memory, each place once, in whatever order."""
    return _fills(list(t.shape), list(t.stride()))


def _fills(shape: list[int], strides: list[int]) -> bool:
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(strides, shape, strict=True)):
        if size == 1:
            continue
        if step != expected:
            return False
        expected *= size
    return True


def _all_tensors(header: Header, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in their strides, with those that are stored as another one or a part of it."""
    found = dict(tensors)
    for name, strides in header.strides.items():
        t = found.get(name)
        if (
            t is None
            or len(strides) != t.dim()
            or not (_fills(list(t.shape), strides) or not t.numel())
        ):
            raise structure.StructureError(
                f"strides: expected an order of the dimensions of {name!r}; got {strides}"
            )
        found[name] = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
    for name, (of, offset, shape, strides) in header.views.items():
        base = tensors.get(of)
        fits = base is not None and len(shape) == len(strides) and name not in tensors
        last = sum((size - 1) * step for size, step in zip(shape, strides, strict=False))
        if base is None or not fits or 0 in shape or offset + last >= base.numel():
            raise structure.StructureError(
                f"views: expected {name!r} to lie within a tensor; got {offset}, {shape} and "
                f"{strides} of {of!r}"
            )
        found[name] = found[of].as_strided(shape, strides, offset)
    for name, of in header.tied.items():
        if of not in found or name in found:
            raise structure.StructureError(f"a tied tensor refers to {of!r}, which is not there")
        found[name] = found[of]
    return found


def _in_format_of(own: Tensor, got: Tensor) -> Tensor:
    """``got``, which lies row by row, in the memory format of the model's tensor."""
    if own.stride() == got.stride() or not got.numel():
        return got
    new = torch.empty_like(own, dtype=got.dtype, device=got.device)
    return new.copy_(got) if new.stride() == own.stride() else got


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Make parameters and buffers that were one object one object again."""
    for alias, name in tied.items():
        owner, _, leaf = alias.rpartition(".")
        source, _, source_leaf = name.rpartition(".")
        try:
            target, origin = model.get_submodule(owner), model.get_submodule(source)
        except AttributeError:
            continue  # a stacked parameter has no such name: the values were copied
        if leaf in target._parameters and source_leaf in origin._parameters:
            target._parameters[leaf] = origin._parameters[source_leaf]
        if leaf in target._buffers and source_leaf in origin._buffers:
            target._buffers[leaf] = origin._buffers[source_leaf]
