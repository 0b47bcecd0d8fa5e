"""Tile configs of the kernels of `quantized_linear`: data in configs/quantized_linear/*.json.

The rule is that of common/tiles.py, and so are the devices and what "aligned" means; a file holds
tiles by kind of product instead of form. Kinds: "w8a8" and "w4a8" multiply whole numbers, "w8" and
"w4" x in floating point; BLOCK_K is cut to the columns that share a scale where those are fewer.
"w8_gradient" and "w4_gradient" are gz W, whose columns are those of W: there BLOCK_N is cut so.
"""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigops.kernels.common import tiles, tuned
from bigops.kernels.common.config_file import (
    Rule,
    are_some_of,
    by_device,
    entries_of,
    expect,
    fields_of,
    hold,
    is_limit,
    is_power_of_two,
    is_tile,
    launch_rules,
    powers_of,
    read_fields,
)
from bigops.kernels.common.tiles import DTYPES, TileConfig

CONFIG_DIR = tiles.CONFIG_DIR / "quantized_linear"
FORMAT = "bigops-quantized-tiles-1"
KINDS = ("w8a8", "w4a8", "w8", "w4", "w8_gradient", "w4_gradient")

_LAUNCH = ("group_m", "num_warps", "num_stages", "parts")
_ENTRY_KEYS = ("kinds", "aligned", "dtypes", "max_m", "tile", *_LAUNCH)


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


def _rules(fields: dict[str, Any], kinds: tuple[str, ...]) -> Iterator[Rule]:
    yield "kinds", are_some_of(fields["kinds"], kinds), f"some of {sorted(kinds)}"
    yield from launch_rules(fields, DTYPES.values())
    tile = fields["tile"]
    sizes = "three powers of two from 16 on, the last 32 to 128"
    yield "tile", is_tile(tile, 16) and 32 <= tile[2] <= 128, sizes
    yield "max_m", is_limit(fields["max_m"]), "a positive integer or null"
    most = tile[1] // 16
    yield "parts", is_power_of_two(fields["parts"], most), f"a power of two up to {most}"


def _entry(kinds: tuple[str, ...], where: str, data: object) -> Entry:
    fields = fields_of(where, data, _ENTRY_KEYS)
    hold(where, fields, _rules(fields, kinds))
    config = TileConfig(*fields["tile"], *(fields[name] for name in _LAUNCH))
    return Entry(
        kinds=tuple(fields["kinds"]),
        aligned=fields["aligned"],
        dtypes=tuple(fields["dtypes"]),
        max_m=fields["max_m"],
        config=config,
    )


def _fitting(entries: tuple[Entry, ...], kind: str, aligned: bool, dtype: str) -> list[Entry]:
    return [e for e in entries if kind in e.kinds and e.aligned == aligned and dtype in e.dtypes]


def read_table(path: Path, form: str = FORMAT, kinds: tuple[str, ...] = KINDS) -> Table:
    """Read and check one config file of format ``form``, which holds tiles of all ``kinds``.

    Raises:
        ValueError: the file is not JSON, is of another format, or a field is missing or out of
            range; the message names file, place, what was expected and what came.
    """
    fields = read_fields(path, form, ("format", "device", "gemm", "rows"))
    entries = entries_of(path, "gemm", fields["gemm"], functools.partial(_entry, kinds))
    for kind, aligned, dtype in itertools.product(kinds, (True, False), DTYPES.values()):
        limits = [e.max_m for e in _fitting(entries, kind, aligned, dtype)]
        what = f"{path}: {kind} {'aligned' if aligned else 'unaligned'} {dtype}"
        distinct = limits.count(None) == 1 and len(set(limits)) == len(limits)
        expect(what, distinct, "different max_m, one of them null", limits)
    rows = powers_of(f"{path}: rows", fields["rows"], RowConfig._fields)
    return Table(str(fields["device"]), entries, RowConfig(**rows))


@functools.cache
def _tables() -> dict[str, Table]:
    return by_device(CONFIG_DIR, read_table)


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
