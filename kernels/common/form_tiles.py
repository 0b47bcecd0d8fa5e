"""Tile configs of kernels with forms of their own: data in configs/<op>/*.json.

The devices, and what "aligned" means, are those of tiles.py. A file holds tiles by form of the
product (`FORMS`), dtype, alignment, and up to a width: of low_rank_linear the padded rank, of
sparse_linear the side of a block. The rule: of the entries that reach the width and the rows the
one of least width, then of fewest rows. Where no entry reaches, no kernel serves.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from bigops.kernels.common import tiles, tuned
from bigops.kernels.common.tiles import CONFIG_DIR, DTYPES, TileConfig, _fields, _power_of_two

FORMAT = "bigops-form-tiles-1"
FORMS = {
    "low_rank_linear": ("factors", "lora"),
    "sparse_linear": ("forward", "transposed", "sampled"),
}
"""Forms of an op; the files of an op hold at least one entry of each."""

_LAUNCH = ("group_m", "num_warps", "num_stages", "parts")
_ENTRY_KEYS = ("form", "aligned", "dtypes", "max_m", "width", "tile", *_LAUNCH)


class Entry(NamedTuple):
    """One line of a config file: ``config`` serves at most ``max_m`` rows and that width."""

    form: str
    aligned: bool
    dtypes: tuple[str, ...]
    max_m: int | None
    width: int
    config: TileConfig


class Table(NamedTuple):
    """One config file."""

    device: str
    shared_memory: int  # bytes a program may use
    entries: tuple[Entry, ...]


def _entry(path: Path, where: str, data: object, forms: tuple[str, ...]) -> Entry:
    fields = _fields(path, where, data, _ENTRY_KEYS)
    dtypes, tile, max_m = fields["dtypes"], fields["tile"], fields["max_m"]
    known = set(DTYPES.values())
    power = "a power of two"
    expected = {
        "form": (fields["form"] in forms, f"one of {', '.join(forms)}"),
        "aligned": (type(fields["aligned"]) is bool, "true or false"),
        "dtypes": (
            isinstance(dtypes, list) and dtypes and known.issuperset(map(str, dtypes)),
            f"some of {sorted(known)}",
        ),
        "max_m": (
            max_m is None or (type(max_m) is int and max_m > 0),
            "a positive integer or null",
        ),
        "width": (_power_of_two(fields["width"]) and fields["width"] >= 16, f"{power} from 16 on"),
        "tile": (
            isinstance(tile, list)
            and len(tile) == 3
            and all(_power_of_two(size) and size >= 16 for size in tile),
            "three powers of two from 16 on",
        ),
        "group_m": (type(fields["group_m"]) is int and 1 <= fields["group_m"] <= 64, "1 to 64"),
        "num_stages": (
            type(fields["num_stages"]) is int and 1 <= fields["num_stages"] <= 8,
            "1 to 8",
        ),
        "num_warps": (
            _power_of_two(fields["num_warps"]) and fields["num_warps"] <= 32,
            f"{power} up to 32",
        ),
        "parts": (_power_of_two(fields["parts"]) and fields["parts"] <= 16, f"{power} up to 16"),
    }
    for name, (good, what) in expected.items():
        if not good:
            raise ValueError(f"{path}: {where}: {name}: expected {what}; got {fields[name]!r}")
    config = TileConfig(*tile, *(fields[name] for name in _LAUNCH))
    return Entry(fields["form"], fields["aligned"], tuple(dtypes), max_m, fields["width"], config)


def read_table(path: Path, op: str) -> Table:
    """Read and check one config file of ``op``.

    Raises:
        ValueError: the file is not JSON, is of another format, or a field is missing or out of
            range; the message names file, place, what was expected and what came.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a readable JSON file; got {error}") from error
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: format: expected {FORMAT!r}; got {found!r}")
    fields = _fields(path, "top level", data, ("format", "device", "tiles"))
    device = str(fields["device"])
    if device not in tiles.tables():
        raise ValueError(
            f"{path}: device: expected one of {', '.join(tiles.tables())}; got {device!r}"
        )
    if not isinstance(fields["tiles"], list):
        raise ValueError(f"{path}: tiles: expected a list; got {type(fields['tiles']).__name__}")
    entries = tuple(
        _entry(path, f"tiles[{i}]", item, FORMS[op]) for i, item in enumerate(fields["tiles"])
    )
    for form in FORMS[op]:
        if not any(entry.form == form for entry in entries):
            raise ValueError(f"{path}: tiles: expected entries of the form {form}; got none")
    return Table(device, tiles.tables()[device].shared_memory, entries)


@functools.cache
def _tables(op: str) -> dict[str, Table]:
    found = (read_table(path, op) for path in sorted((CONFIG_DIR / op).glob("*.json")))
    return {table.device: table for table in found}


def table_for(op: str, arch: str) -> Table:
    """The config file of ``op`` that serves ``arch``; raises as `tiles.table_for` does."""
    return _tables(op)[tiles.table_for(arch).device]


@tuned.cached
def choose_config(
    op: str, arch: str, form: str, dtype: torch.dtype, m: int, width: int, aligned: bool = True
) -> TileConfig | None:
    """Pick the tile of a form of ``op`` on ``arch``; None where no entry reaches the width.

    Args:
        op: one of `FORMS`.
        arch: "sm_80", "sm_90", "gfx942" and so on; need not be present.
        form: one of ``FORMS[op]``.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        m: rows of x.
        width: as at the head of this file.
        aligned: as defined at the head of tiles.py.

    Raises:
        TypeError: another dtype.
        ValueError: an arch that no config file serves, or a corrupt config file.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
    measured = tuned.lookup(
        op, arch, tuned.form_of(form, aligned, width), DTYPES[dtype], tuned.bucket(m)
    )
    if measured is not None:
        return TileConfig(**measured)
    reaching = [
        (entry.width, float("inf") if entry.max_m is None else entry.max_m, entry.config)
        for entry in table_for(op, arch).entries
        if (entry.form, entry.aligned) == (form, aligned)
        and DTYPES[dtype] in entry.dtypes
        and entry.width >= width
        and (entry.max_m is None or m <= entry.max_m)
    ]
    return min(reaching)[2] if reaching else None
