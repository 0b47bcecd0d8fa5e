"""Tile configs of the kernels of `quantized_linear`: data in configs/quantized_linear/*.json.

The rule is that of common/tiles.py, and so are the devices and what "aligned" means; a file holds
tiles by kind of product instead of form. Kinds: "w8a8" and "w4a8" multiply whole numbers, "w8" and
"w4" x in floating point; BLOCK_K is cut to the columns that share a scale where those are fewer.
"w8_gradient" and "w4_gradient" are gz W, whose columns are those of W: there BLOCK_N is cut so.
"""

import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from bigops.kernels.common import tiles, tuned
from bigops.kernels.common.tiles import DTYPES, TileConfig, _fields, _power_of_two

CONFIG_DIR = tiles.CONFIG_DIR / "quantized_linear"
FORMAT = "bigops-quantized-tiles-1"
KINDS = ("w8a8", "w4a8", "w8", "w4", "w8_gradient", "w4_gradient")

_LAUNCH = ("group_m", "num_warps", "num_stages", "parts")
_ENTRY_KEYS = ("kinds", "aligned", "dtypes", "max_m", "tile", *_LAUNCH)
_ROW_KEYS = ("block_m", "block_n", "num_warps")


class RowConfig(NamedTuple):
    """Tile of one program of the kernel that quantises rows of x."""

    block_m: int
    block_n: int
    num_warps: int


class Entry(NamedTuple):
    """One line of a config file: ``config`` serves products of at most ``max_m`` rows."""

    kinds: tuple[str, ...]
    aligned: bool
    dtypes: tuple[str, ...]
    max_m: int | None
    config: TileConfig


class Table(NamedTuple):
    """One config file."""

    device: str
    entries: tuple[Entry, ...]
    rows: RowConfig


def _some(path: Path, where: str, name: str, value: object, known: set[str]) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not known.issuperset(map(str, value)):
        raise ValueError(f"{path}: {where}: {name}: expected some of {sorted(known)}; got {value}")
    return tuple(value)


def _entry(path: Path, where: str, data: object, known: tuple[str, ...]) -> Entry:
    fields = _fields(path, where, data, _ENTRY_KEYS)
    kinds = _some(path, where, "kinds", fields["kinds"], set(known))
    dtypes = _some(path, where, "dtypes", fields["dtypes"], set(DTYPES.values()))
    tile, max_m = fields["tile"], fields["max_m"]
    if type(fields["aligned"]) is not bool:
        raise ValueError(
            f"{path}: {where}: aligned: expected true or false; got {fields['aligned']!r}"
        )
    if not (
        isinstance(tile, list)
        and len(tile) == 3
        and all(_power_of_two(size) and size >= 16 for size in tile)
        and 32 <= tile[2] <= 128
    ):
        raise ValueError(
            f"{path}: {where}: tile: expected three powers of two from 16 on, the last 32 to 128; "
            f"got {tile}"
        )
    if max_m is not None and not (type(max_m) is int and max_m > 0):
        raise ValueError(
            f"{path}: {where}: max_m: expected a positive integer or null; got {max_m}"
        )
    for name in ("group_m", "num_stages"):
        if type(fields[name]) is not int or not 1 <= fields[name] <= 64:
            raise ValueError(f"{path}: {where}: {name}: expected 1 to 64; got {fields[name]}")
    for name, most in (("num_warps", 32), ("parts", tile[1] // 16)):
        if not _power_of_two(fields[name]) or fields[name] > most:
            raise ValueError(
                f"{path}: {where}: {name}: expected a power of two up to {most}; got {fields[name]}"
            )
    config = TileConfig(*tile, *(fields[name] for name in _LAUNCH))
    return Entry(kinds, fields["aligned"], dtypes, max_m, config)


def _fitting(entries: tuple[Entry, ...], kind: str, aligned: bool, dtype: str) -> list[Entry]:
    return [e for e in entries if kind in e.kinds and e.aligned == aligned and dtype in e.dtypes]


def read_table(path: Path, form: str = FORMAT, kinds: tuple[str, ...] = KINDS) -> Table:
    """Read and check one config file of format ``form``, which holds tiles of all ``kinds``.

    Raises:
        ValueError: the file is not JSON, is of another format, or a field is missing or out of
            range; the message names file, place, what was expected and what came.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a readable JSON file; got {error}") from error
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if found != form:
        raise ValueError(f"{path}: format: expected {form!r}; got {found!r}")
    fields = _fields(path, "top level", data, ("format", "device", "gemm", "rows"))
    if not isinstance(fields["gemm"], list):
        raise ValueError(f"{path}: gemm: expected a list; got {type(fields['gemm']).__name__}")
    entries = tuple(
        _entry(path, f"gemm[{i}]", item, kinds) for i, item in enumerate(fields["gemm"])
    )
    for kind, aligned, dtype in itertools.product(kinds, (True, False), DTYPES.values()):
        limits = [e.max_m for e in _fitting(entries, kind, aligned, dtype)]
        if limits.count(None) != 1 or len(set(limits)) != len(limits):
            what = f"{kind} {'aligned' if aligned else 'unaligned'} {dtype}"
            raise ValueError(
                f"{path}: {what}: expected different max_m, one of them null; got {limits}"
            )
    rows = _fields(path, "rows", fields["rows"], _ROW_KEYS)
    if not all(map(_power_of_two, rows.values())):
        raise ValueError(f"{path}: rows: expected powers of two; got {rows}")
    return Table(str(fields["device"]), entries, RowConfig(**rows))


@functools.cache
def _tables() -> dict[str, Table]:
    found = (read_table(path) for path in sorted(CONFIG_DIR.glob("*.json")))
    return {table.device: table for table in found}


def table_for(arch: str) -> Table:
    """The config file that serves ``arch``; raises ValueError as `tiles.table_for` does."""
    return _tables()[tiles.table_for(arch).device]


@tuned.cached
def choose_config(
    arch: str, kind: str, dtype: torch.dtype, m: int, aligned: bool = True
) -> TileConfig:
    """Pick the tile for a product of ``m`` rows on ``arch``.

    Args:
        arch: "sm_80", "sm_90", "gfx942" and so on; need not be present.
        kind: one of `KINDS`.
        dtype: of x, torch.float32, torch.bfloat16 or torch.float16.
        m: rows of x.
        aligned: as defined at the head of common/tiles.py.

    Raises:
        TypeError: another dtype.
        ValueError: an arch that no config file serves, or a corrupt config file.
    """
    if dtype in DTYPES:
        form = tuned.form_of(kind, aligned)
        measured = tuned.lookup("quantized_linear", arch, form, DTYPES[dtype], tuned.bucket(m))
        if measured is not None:
            return TileConfig(**measured)
    return pick(table_for(arch), kind, dtype, m, aligned)


def pick(table: Table, kind: str, dtype: torch.dtype, m: int, aligned: bool) -> TileConfig:
    """The rule of `choose_config` on one table."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
    entries = _fitting(table.entries, kind, aligned, DTYPES[dtype])
    fitting = [e for e in entries if e.max_m is None or m <= e.max_m]
    return min(fitting, key=lambda e: float("inf") if e.max_m is None else e.max_m).config


def row_config(arch: str) -> RowConfig:
    """The tile of the kernel that quantises rows on ``arch``."""
    return table_for(arch).rows
