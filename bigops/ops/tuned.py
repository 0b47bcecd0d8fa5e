"""From a GPU to its measured tiles: which files serve here, and which of their tiles may.

A tuned file can only choose among the tiles of the committed config files, which were compiled and
read for their devices; an entry that names another tile is left out, and `bigops doctor` says so.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch

from bigops.backend import gpu_tiles, machine
from bigops.kernels.common import tiles, tuned
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.fp8_linear import tiles as fp8_tiles
from bigops.kernels.quantized_linear import tiles as quantized_tiles

OPS = ("fused_linear", "low_rank_linear", "sparse_linear", "quantized_linear")
"""Ops whose kernels take tiles from config files."""


def machine_of(index: int) -> dict[str, str]:
    """The present GPU ``index`` as tuned files name it."""
    name = torch.cuda.get_device_name(index)
    arch = tiles.device_arch(torch.device("cuda", index))
    return gpu_tiles.machine(name, arch, machine.triton_version() or "none")


def entries(op: str, arch: str) -> list[tuple[str, tuple[str, ...], TileConfig]]:
    """(form as `tuned.form_of` names it, dtypes, tile) of every line of the op's config file.

    Raises:
        ValueError: an arch that no config file serves, or a corrupt config file.
    """
    if op == "fused_linear":
        return [
            (tuned.form_of(e.form, e.aligned), e.dtypes, e.config)
            for e in tiles.table_for(arch).entries
        ]
    if op in ("quantized_linear", "fp8_linear"):
        of = quantized_tiles if op == "quantized_linear" else fp8_tiles
        return [
            (tuned.form_of(kind, e.aligned), e.dtypes, e.config)
            for e in of.table_for(arch).entries
            for kind in e.kinds
        ]
    from bigops.kernels.common import form_tiles

    return [
        (tuned.form_of(e.form, e.aligned, e.width), e.dtypes, e.config)
        for e in form_tiles.table_for(op, arch).entries
    ]


def candidates(op: str, arch: str, form: str, dtype: str) -> list[TileConfig]:
    """The committed tiles that may serve a form in a dtype, each once.

    Of forms with a width those of that width and of every larger one, which reach it too.
    """
    name, width = _split(form)
    found = []
    for other, dtypes, config in entries(op, arch):
        other_name, reach = _split(other)
        if other_name == name and dtype in dtypes and reach >= width:
            found.append(config)
    return list(dict.fromkeys(found))


def _split(form: str) -> tuple[str, int]:
    """("gated aligned", 0) or ("lora aligned", 64)."""
    name, _, last = form.rpartition(" ")
    return (name, int(last)) if last.isdigit() else (form, 0)


@functools.cache
def tables() -> dict[str, gpu_tiles.Table]:
    """arch -> table of the present GPUs; those of one arch share the table of the first."""
    found: dict[str, gpu_tiles.Table] = {}
    if torch.cuda.is_available() and machine.has_triton():
        for index in range(torch.cuda.device_count()):
            of = machine_of(index)
            if of["arch"] not in found:
                found[of["arch"]] = checked(gpu_tiles.current(of))
    return found


def checked(table: gpu_tiles.Table) -> gpu_tiles.Table:
    """The table without the entries whose tile stands in no committed file for such products."""
    kept, odd = {}, []
    for key, tile in table.tiles.items():
        if _serves(key, tile, table.machine["arch"]):
            kept[key] = tile
        else:
            odd.append(key)
    if not odd:
        return table
    ignored = f"{table.source}: no tile of the config files, left out: {', '.join(odd)}"
    return gpu_tiles.Table(table.machine, kept, table.source, ignored)


def _serves(key: str, tile: dict[str, Any], arch: str) -> bool:
    op, _, rest = key.partition(": ")
    form, dtype, _ = rest.rsplit(" ", 2) if rest.count(" ") >= 3 else ("", "", "")
    if op not in OPS:
        return False
    try:
        return TileConfig(**tile) in candidates(op, arch, form, dtype)
    except TypeError:  # a field that tiles do not have
        return False
    except ValueError:  # the config file itself is broken; `_triton.why_not` says so
        return False


@functools.cache
def hand_over(arch: str) -> None:
    """Give the kernels what was measured on a present GPU of ``arch``; once, before they serve."""
    table = tables().get(arch)
    if table is not None and table.ignored:
        warnings.warn(f"tuned tiles are ignored: {table.ignored}", stacklevel=2)
    if table is not None and table.tiles:
        tuned.use(arch, table.tiles, table.source)


def status() -> list[dict[str, Any]]:
    """The tuned file of each present GPU, for `bigops doctor`."""
    return [
        {
            "device": table.machine["device"],
            "source": table.source,
            "tiles": len(table.tiles),
            "ignored": table.ignored,
        }
        for table in tables().values()
    ]
