"""Tile configs of the kernels of `fp8_linear`: data in configs/fp8_linear/*.json, and the rule.

Both are those of quantized_linear/tiles.py. Kinds: "f8" multiplies x in floating point by the
widened weight, "f8a8" the codes of both, "f8_gradient" gz by the widened weight. What takes codes
is the device's (`units_of`), not the table's.
"""

import functools
import re
from pathlib import Path

import torch

from bigops.kernels.common import tiles
from bigops.kernels.common.config_file import by_device, expect
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from bigops.kernels.quantized_linear.tiles import RowConfig, Table

CONFIG_DIR = tiles.CONFIG_DIR / "fp8_linear"
FORMAT = "bigops-fp8-tiles-1"
KINDS = ("f8", "f8a8", "f8_gradient")
BLOCK = 128  # rows and columns of W, and columns of x, that share a scale in blocks

# What multiplies e4m3 codes: nothing does, a unit for e4m3fn, a unit for e4m3fnuz.
UNITS = ("none", "e4m3fn", "e4m3fnuz")


def units_of(arch: str) -> str:
    """The name in `UNITS` of what multiplies e4m3 on ``arch``.

    NVIDIA: capability 8.9 and later (PTX ISA, `mma` and `wgmma`). AMD: CDNA3 (gfx940 to gfx942)
    has the fnuz form alone, CDNA4 (gfx950) and RDNA4 (gfx12) that of OCP.
    """
    capability = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    if capability:
        return "e4m3fn" if int(capability[1]) >= 89 else "none"
    if arch.startswith("gfx94"):
        return "e4m3fnuz"
    return "e4m3fn" if arch.startswith(("gfx95", "gfx12", "interpreter")) else "none"


def read_table(path: Path) -> Table:
    """Read and check one config file.

    Raises:
        ValueError: as `quantized_tiles.read_table`, or a tile wider than a block of W.
    """
    table = quantized_tiles.read_table(path, FORMAT, KINDS)
    most = f"at most {BLOCK} columns of y, which share a scale in blocks"
    for i, (*_, config) in enumerate(table.entries):
        tile = [config.block_m, config.block_n, config.block_k]
        expect(f"{path}: gemm[{i}]: tile", config.block_n <= BLOCK, most, tile)
    return table


@functools.cache
def _tables() -> dict[str, Table]:
    return by_device(CONFIG_DIR, read_table)


def table_for(arch: str) -> Table:
    """The config file that serves ``arch``; raises ValueError as `tiles.table_for` does."""
    return _tables()[tiles.table_for(arch).device]


@functools.lru_cache(maxsize=4096)
def choose_config(
    arch: str, kind: str, dtype: torch.dtype, m: int, aligned: bool = True
) -> TileConfig:
    """Pick the tile; arguments and errors as in `quantized_tiles.choose_config`."""
    return quantized_tiles.pick(table_for(arch), kind, dtype, m, aligned)


def row_config(arch: str) -> RowConfig:
    """The tile of the kernel that quantises rows on ``arch``."""
    return table_for(arch).rows
