"""Files of tiles that `bigops tune --device cuda` measured: where they lie, when they serve.

A file in the user's cache belongs to one kind of GPU, architecture, triton and torch. It holds one
tile for each op, form of the product, dtype and bucket of shapes (kernels/common/tuned.py names
these), and the measured points that the tile was chosen from. Nothing here measures anything.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

FORMAT = "bigops-gpu-tiles-1"
BLOCKS = ("block_m", "block_n", "block_k")
FIELDS = (*BLOCKS, "group_m", "num_warps", "num_stages", "parts")


@dataclass(frozen=True)
class Table:
    """Tiles of one GPU.

    Attributes:
        machine: what they were measured on, see `machine`.
        tiles: key of a product -> the fields of its tile.
        source: "committed" where there is no tuned file, else the file.
        ignored: why a tuned file was not taken, or "".
    """

    machine: dict[str, str]
    tiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    source: str = "committed"
    ignored: str = ""


def machine(device: str, arch: str, triton: str) -> dict[str, str]:
    """What a measured tile depends on: the GPU's name, "sm_90" or the like, triton and torch."""
    return {"device": device, "arch": arch, "triton": triton, "torch": str(torch.__version__)}


def tuned_file(of: Mapping[str, str]) -> Path:
    """The file in the user's cache that holds the tiles of a machine; it may not exist."""
    return _folder() / f"{_stem(of)}-triton_{_word(of['triton'])}-torch_{_word(of['torch'])}.json"


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "bigops" / "tuned"


def _stem(of: Mapping[str, str]) -> str:
    return f"gpu-{_word(of['device'])}-{_word(of['arch'])}"


def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "_", text.lower()).strip("_")


def current(of: Mapping[str, str]) -> Table:
    """What `bigops tune` measured on this machine; no tiles where it did not.

    A file that cannot be read, is corrupt, or is of another machine or version gives no tiles; the
    table's ``ignored`` names it and says why.
    """
    try:
        path = tuned_file(of)
        data = read(path, of)
    except FileNotFoundError:
        return Table(dict(of), ignored=_of_other_versions(of))
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder
        return Table(dict(of), ignored=str(error))
    return Table(dict(of), data["tiles"], str(path))


def _of_other_versions(of: Mapping[str, str]) -> str:
    """Which files of the same GPU were measured with another triton or torch, or ""."""
    others = sorted(path.name for path in _folder().glob(f"{_stem(of)}-triton_*.json"))
    if not others:
        return ""
    return (
        f"{_folder()}: expected a file of triton {of['triton']} and torch {of['torch']}; got only "
        f"{', '.join(others)}"
    )


def read(path: Path, of: Mapping[str, str]) -> dict[str, Any]:
    """A tuned file as it stands.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is corrupt, of another format, machine or version; the message says what.
    """
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        said = "expected JSON written by `bigops tune`"
        raise ValueError(f"{path}: {said}; got {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: format: expected {FORMAT!r}; got {got!r}")
    if data.get("machine") != dict(of):
        raise ValueError(
            f"{path}: machine: expected {dict(of)}; got {data.get('machine')}; another GPU, triton "
            "or torch"
        )
    for name in ("points", "tiles"):
        if not isinstance(data.get(name), dict):
            got = type(data.get(name)).__name__
            raise ValueError(f"{path}: {name}: expected a mapping; got {got}")
    for key, tile in data["tiles"].items():
        check_tile(f"{path}: tiles[{key!r}]", tile)
    for key, shapes in data["points"].items():
        _check_points(f"{path}: points[{key!r}]", shapes)
    return data


def check_tile(where: str, tile: object) -> None:
    """Raise ValueError unless ``tile`` has the fields of a tile, each in its range.

    Of further fields, those of a kernel with more to choose, only the kind is looked at.
    """
    if not isinstance(tile, dict) or not set(tile) >= set(FIELDS):
        raise ValueError(f"{where}: expected the fields {', '.join(FIELDS)}; got {tile!r}")
    for name, value in tile.items():
        power = type(value) is int and value > 0 and value & (value - 1) == 0
        good = {
            "group_m": type(value) is int and 1 <= value <= 64,
            "num_stages": type(value) is int and 1 <= value <= 64,
            "num_warps": power and value <= 32,
            "parts": power and value <= 64,
            **dict.fromkeys(BLOCKS, power and 16 <= value <= 1024),
        }.get(name, type(value) in (bool, int) and value >= 0)
        if not good:
            raise ValueError(f"{where}: {name}: expected a size in its range; got {value!r}")


def _check_points(where: str, shapes: object) -> None:
    good = isinstance(shapes, dict) and all(
        isinstance(point, dict)
        and set(point) == {"seconds", "failed"}
        and isinstance(point["seconds"], dict)
        and isinstance(point["failed"], dict)
        and all(type(s) in (int, float) and s > 0 for s in point["seconds"].values())
        for point in shapes.values()
    )
    if not good:
        raise ValueError(
            f"{where}: expected seconds above 0 and failures by shape; got {shapes!r:.99}"
        )
