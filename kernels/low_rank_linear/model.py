"""Which rank `low_rank_linear` keeps on chip, and how columns are split: nothing is timed.

- A program holds `num_stages` blocks of x and v in the first loop, and t (one tile) with as many
  tiles of u in the second; with a base also blocks of x and base. The larger of the two loops
  must fit in the device's shared memory, beside which a program has no other.
- The ranks of the config files are those for which this holds and nothing spills (see
  tests/kernels/gpu_report). Past a rank of `LOOSE` they ask for factors whose strides divide by 16
  and which load in wide words: the addresses of others alone would overflow the registers.
- Where no config reaches, two launches of the dense kernel serve (three with a base).

Rows of x are split among programs first. Only where these leave multiprocessors idle
(`FILL` programs are wanted) are the columns split too, and t made anew by each of them: while a
multiprocessor is idle, this costs no time.
"""

import torch
import triton

from bigops.kernels.common import tuned
from bigops.kernels.common.form_tiles import Table, choose_config, table_for
from bigops.kernels.common.tiles import DTYPES, TileConfig

OP = "low_rank_linear"
FUSED, COMPOSED = "fused", "composed"
LOOSE = 64
FILL = 128  # programs wanted, about the multiprocessors of a large GPU (sm_80: 108, sm_90: 132)


def padded_rank(rank: int) -> int:
    """Columns that t has on chip: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(rank))


def shared_bytes(config: TileConfig, rank: int, based: bool, itemsize: int) -> int:
    """Shared memory of a program by the model at the head of this file, in bytes."""
    width = padded_rank(rank)
    first = config.num_stages * (config.block_m + width) * config.block_k
    tiles = 1 if based else config.num_stages
    second = config.block_m * width + tiles * config.block_n * width
    if based:
        second += config.num_stages * (config.block_m + config.block_n) * config.block_k
    epilogue = config.block_m * config.block_n // config.parts  # through which a tile is stored
    return itemsize * max(first, second) + 4 * epilogue


def form_of(based: bool) -> str:
    """The form, as the config files name it."""
    return "lora" if based else "factors"


def fits(
    arch: str,
    dtype: torch.dtype,
    m: int,
    rank: int,
    based: bool,
    aligned: bool,
    even: bool = True,
) -> TileConfig | None:
    """The tile that serves on ``arch``, or None where t of such a rank does not fit on chip.

    Args:
        arch: "sm_90", "gfx942" and so on.
        dtype: of x.
        m: rows of x.
        rank: of the factors.
        based: whether there is a base.
        aligned: whether x, base and residual are, as defined at the head of common/tiles.py.
        even: whether the factors are.
    """
    if padded_rank(rank) > LOOSE and not even:
        return None
    config = choose_config(OP, arch, form_of(based), dtype, m, padded_rank(rank), aligned)
    if config is None:
        return None
    room = _table(arch).shared_memory
    return config if shared_bytes(config, rank, based, dtype.itemsize) <= room else None


def _table(arch: str) -> Table:
    return table_for(OP, arch)


def span_of(m: int, n: int, config: TileConfig) -> int:
    """Column tiles of a program: all, or fewer where the rows alone make too few programs."""
    tiles_m, tiles_n = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    return triton.cdiv(tiles_n, min(tiles_n, triton.cdiv(FILL, tiles_m)))


def explain(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, rank: int, based: bool
) -> tuple[str, dict[str, int | str], str]:
    """Say what serves on ``target``, which need not be present.

    Contiguous tensors are assumed; others may take the tile for unaligned products.

    Args:
        target: "sm_90", "gfx942" and so on.
        dtype: of x.
        m, n, k, rank: x is [m, k], u [n, rank].
        based: whether there is a base.

    Returns:
        ("fused" or "composed", config fields and the file they come from, the reason).

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unknown target.
    """
    aligned = n % 16 == 0 and k % 16 == 0
    config = fits(target, dtype, m, rank, based, aligned, rank % 16 == 0 and k % 16 == 0)
    table = _table(target)
    name = f"{OP}/{table.device}.json"
    kind = f"{'' if aligned else 'un'}aligned {form_of(based)} {DTYPES[dtype]}"
    if config is None:
        launches = "three" if based else "two"
        return (
            COMPOSED,
            {},
            (
                f"a rank of {rank} does not fit on chip ({kind}, kernels/configs/{name}): "
                f"{launches} launches of the dense kernel"
            ),
        )
    form = tuned.form_of(form_of(based), aligned, padded_rank(rank))
    file, where = tuned.cite(OP, target, form, DTYPES[dtype], tuned.bucket(m), name)
    used = shared_bytes(config, rank, based, dtype.itemsize)
    reason = (
        f"{kind} tile for {m} rows and a rank of {rank} {where}, at most "
        f"{used} of {table.shared_memory} bytes of shared memory"
    )
    return FUSED, {**config.of_one_form(), "file": file}, reason
