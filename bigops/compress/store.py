"""save and load: one safetensors file, the structure of the model as JSON in its header."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bigops.compress import structure
from bigops.files import replacing
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.low_rank_linear import LowRankLinear
from bigops.nn.sites import Sites

if TYPE_CHECKING:
    from bigops.compress.receipt import Receipt

FORMAT = 2  # 1: sparse weights as 1x4 blocks, quantised ones as plain rows
_HEADER, _RECEIPT = "bigops", "bigops.receipt"


class FormatError(ValueError):
    """A file that `load` refuses: it names the file, what was expected and what came."""


def save(model: nn.Module, path: str | os.PathLike[str], receipt: Receipt | None = None) -> None:
    """Write ``model`` to one safetensors file, whole or not at all.

    The file holds the tensors of `state_dict` and, in its header, the structure: the kind and
    the arguments of every module. Compressed layers are stored as they are, packed; nothing is
    pickled.

    Args:
        model: on any device; it is not changed.
        path: the file; an existing one is replaced at the end.
        receipt: stored in the header, so that it travels with the model.

    Raises:
        ValueError: a state that has no place in the format (on "meta", sparse layout, extra state
            that is no tensor).
        OSError: the folder is missing or cannot be written; nothing is left behind.
    """
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor to save; got {type(value).__name__}")
        if value.is_meta or value.layout != torch.strided:
            place = "on meta" if value.is_meta else str(value.layout)
            raise ValueError(f"{name}: expected a dense tensor with content; got one {place}")
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
        if value.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        # A copy of its own: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
    header = {
        "format": FORMAT,
        "tree": structure.describe(model),
        "tied": tied,
        "fixed": [n for n, p in model.named_parameters() if not p.requires_grad],
        "training": model.training,
    }
    metadata = {_HEADER: json.dumps(header)}
    if receipt is not None:
        metadata[_RECEIPT] = receipt.to_json()
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Read what `save` wrote, without pickle and without the original weights.

    Args:
        path: the file.
        model: None when the model consists of known modules (`structure.KINDS`: Sequential,
            Linear, activations, the bigops layers ..). Else a model of the original class and
            sizes, as it was before compression or after; it may be on the meta device. Compressed
            layers are swapped in and all tensors replaced; its mode stays.
        device: where the tensors go.

    Returns:
        ``model``, or a new one in the mode that the saved one was in.

    Raises:
        FormatError: the file is truncated, no bigops file, of another version, or does not fit
            ``model``; the message names the file. ``model`` is unchanged.
        FileNotFoundError, IsADirectoryError: no such file.
    """
    path = Path(path)
    device = torch.device(device)
    header, tensors = _read(path, device)
    try:
        for alias, name in header["tied"].items():
            tensors[alias] = tensors[name]
        if model is None:
            model = structure.build(header["tree"])
            _fill(model, tensors)
            model.train(header["training"])
        else:
            _fill_given(model, header["tree"], tensors)
    except structure.StructureError as error:
        raise FormatError(f"{path}: {error}") from None
    except KeyError as error:
        raise FormatError(f"{path}: a tied tensor refers to {error}, which is not there") from None
    _tie(model, header["tied"])
    fixed = set(header["fixed"])
    for name, parameter in model.named_parameters():
        if name in fixed:
            parameter.requires_grad_(False)
    return model.to(device)


def load_compressed(path: str | os.PathLike[str]) -> dict[str, CompressedLinear | LowRankLinear]:
    """The compressed layers in a saved file by name, whatever the classes around them.

    Raises:
        FormatError, FileNotFoundError, IsADirectoryError: as `load`.
    """
    path = Path(path)
    header, tensors = _read(path, torch.device("cpu"))
    found = {}
    try:
        for name, layer in structure.compressed(header["tree"]):
            _fill(layer, _below(name, tensors), f"module {name!r}")
            found[name] = layer
    except structure.StructureError as error:
        raise FormatError(f"{path}: {error}") from None
    return found


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The structure and the receipt (JSON text or None) in the header of a saved file.

    Raises:
        FormatError: as `load`.
    """
    header, _ = _read(Path(path), None)
    return header


def _read(path: Path, device: torch.device | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (none without a device), both checked as far as the file alone goes."""
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file written by bigops.save; it is a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file written by bigops.save; it is not there")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if device is not None and _HEADER in metadata:
                for name in file.keys():  # noqa: SIM118  this is no dict
                    # Copied: a mapped file that changes would change or crash the model.
                    tensors[name] = file.get_tensor(name).to(device, copy=True)
    except SafetensorError as error:
        raise FormatError(
            f"{path}: expected a whole safetensors file written by bigops.save; it is truncated, "
            f"damaged or of another format ({error})"
        ) from None
    if _HEADER not in metadata:
        raise FormatError(
            f"{path}: expected a header {_HEADER!r} as bigops.save writes it; this safetensors "
            f"file has {sorted(metadata) or 'none'}"
        )
    try:
        header = json.loads(metadata[_HEADER])
    except (json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path}: the header is no JSON ({error})") from None
    if not isinstance(header, dict) or "format" not in header:
        raise FormatError(
            f"{path}: expected a header with a format version; got {str(header)[:80]}"
        )
    if header["format"] != FORMAT:
        raise FormatError(
            f"{path}: expected format version {FORMAT}; got {header['format']!r} (written by "
            "another version of bigops)"
        )
    expected = {"tree": dict, "tied": dict, "fixed": list, "training": bool}
    for name, kind in expected.items():
        if not isinstance(header.get(name), kind):
            raise FormatError(
                f"{path}: expected {name!r} in the header to be a {kind.__name__}; "
                f"got {str(header.get(name))[:80]}"
            )
    header["receipt"] = metadata.get(_RECEIPT)
    return header, tensors


def _fill(model: nn.Module, tensors: dict[str, Tensor], where: str = "the model") -> None:
    """Give a module that was just built its tensors."""
    try:
        model.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:  # missing, extra, wrong size, broken storage: torch lists all
        raise structure.StructureError(f"the tensors of {where} do not fit: {error}") from None


def _below(path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the module at ``path``, by their names inside it."""
    prefix = f"{path}." if path else ""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _fill_given(model: nn.Module, tree: Any, tensors: dict[str, Tensor]) -> None:
    """Swap and fill a caller's model; every check comes before the first change."""
    sites = Sites(model)
    new = dict(structure.replacements(tree, model))
    if "" in new:
        raise structure.StructureError(
            "the model is a single layer, which cannot be swapped in place: load without model="
        )
    old: dict[str, nn.Module] = {}
    for path, module in new.items():
        _fill(module, _below(path, tensors), f"module {path!r}")
        old[path] = sites.modules[path]
        module.train(old[path].training)
    sites.swap(new)
    try:
        _check_state(model, tensors)
    except BaseException:
        sites.swap(old)
        raise
    model.load_state_dict(tensors, strict=True, assign=True)


def _check_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise StructureError unless the tensors are just those that the model's state has."""
    state = model.state_dict()
    missing = sorted(state.keys() - tensors.keys())
    extra = sorted(tensors.keys() - state.keys() - structure.retired_keys(model))
    if missing or extra:
        raise structure.StructureError(
            f"the model needs {missing or 'nothing'} that the file lacks, and the file has "
            f"{extra or 'nothing'} that the model lacks"
        )
    free = structure.storage_keys(model)
    for name, value in state.items():
        got = tensors[name]
        if name not in free and value.shape != got.shape:
            raise structure.StructureError(
                f"{name}: the model expects shape {list(value.shape)}; the file has "
                f"{list(got.shape)}"
            )
        if value.is_floating_point() != got.is_floating_point():
            raise structure.StructureError(
                f"{name}: the model expects {value.dtype}; the file has {got.dtype}"
            )
    hollow = [n for n, b in model.named_buffers() if b.is_meta and n not in tensors]
    if hollow:
        raise structure.StructureError(
            f"the buffers {hollow} are on the meta device and no part of the state_dict: build "
            "the model on a real device"
        )


def _tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Make parameters that were one object one object again."""
    for alias, name in tied.items():
        owner, _, leaf = alias.rpartition(".")
        source, _, source_leaf = name.rpartition(".")
        try:
            target = model.get_submodule(owner)._parameters
            shared = model.get_submodule(source)._parameters[source_leaf]
        except (AttributeError, KeyError):
            continue  # a stacked parameter has no such name: the values were copied
        if leaf in target:
            target[leaf] = shared
