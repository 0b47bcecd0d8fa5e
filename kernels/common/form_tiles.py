"""Tile configs of kernels with forms of their own: data in configs/<op>/*.json.

The devices, and what "aligned" means, are those of tiles.py. A file holds tiles by form of the
product (`FORMS`), dtype, alignment, and up to a width: of low_rank_linear the padded rank, of
sparse_linear the side of a block. The rule: of the entries that reach the width and the rows the
one of least width, then of fewest rows. Where no entry reaches, no kernel serves.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigops.kernels.common import tiles, tuned
from bigops.kernels.common.config_file import (
    Rule,
    by_device,
    entries_of,
    expect,
    fields_of,
    hold,
    is_limit,
    is_power_of_two,
    is_tile,
    launch_rules,
    read_fields,
)
from bigops.kernels.common.tiles import CONFIG_DIR, DTYPES, TileConfig

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


def _rules(fields: dict[str, Any], forms: tuple[str, ...]) -> Iterator[Rule]:
    power = "a power of two"
    width, parts = fields["width"], fields["parts"]
    yield "form", fields["form"] in forms, f"one of {', '.join(forms)}"
    yield from launch_rules(fields, DTYPES.values(), stages=8)
    yield "max_m", is_limit(fields["max_m"]), "a positive integer or null"
    yield "width", is_power_of_two(width) and width >= 16, f"{power} from 16 on"
    yield "tile", is_tile(fields["tile"], 16), "three powers of two from 16 on"
    yield "parts", is_power_of_two(parts, 16), f"{power} up to 16"


def _entry(forms: tuple[str, ...], where: str, data: object) -> Entry:
    fields = fields_of(where, data, _ENTRY_KEYS)
    hold(where, fields, _rules(fields, forms))
    config = TileConfig(*fields["tile"], *(fields[name] for name in _LAUNCH))
    return Entry(
        form=fields["form"],
        aligned=fields["aligned"],
        dtypes=tuple(fields["dtypes"]),
        max_m=fields["max_m"],
        width=fields["width"],
        config=config,
    )


def read_table(path: Path, op: str) -> Table:
    """Read and check one config file of ``op``.

    Raises:
        ValueError: the file is not JSON, is of another format, or a field is missing or out of
            range; the message names file, place, what was expected and what came.
    """
    fields = read_fields(path, FORMAT, ("format", "device", "tiles"))
    device, known = str(fields["device"]), tiles.tables()
    expect(f"{path}: device", device in known, f"one of {', '.join(known)}", repr(device))
    entry = functools.partial(_entry, FORMS[op])
    entries = entries_of(path, "tiles", fields["tiles"], entry)
    for form in FORMS[op]:
        held = any(entry.form == form for entry in entries)
        expect(f"{path}: tiles", held, f"entries of the form {form}", "none")
    return Table(device, known[device].shared_memory, entries)


@functools.cache
def _tables(op: str) -> dict[str, Table]:
    return by_device(CONFIG_DIR / op, functools.partial(read_table, op=op))


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
