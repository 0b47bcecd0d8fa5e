"""What the rows of the GPU report have in common, whichever op they are of; see report.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from bigops.kernels.common.activation import NAMES, split_code
from bigops.kernels.common.tiles import Entry, TileConfig

TRITON_TYPE = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


def pointer(job: Any) -> str:
    """The type of a tensor in the row's dtype."""
    return "*" + TRITON_TYPE[job.dtype]


def words(job: Any) -> list[str]:
    """Of a form, as in "w4_g64_zero_odd"."""
    parts: list[str] = job.form.split("_")
    return parts


def other_activations(gated: bool, worst: str) -> Iterator[str]:
    """Names of all pairs, or of all that are none, but for ``worst``."""
    for code, name in enumerate(NAMES):
        if split_code(code)[1] == gated and name != worst:
            yield name


def launched(tile: Any) -> tuple[int, ...]:
    """The fields of a tile that make the compiled code of one kernel."""
    return tuple(tile.of_one_form().values()) if isinstance(tile, TileConfig) else tuple(tile)


def largest(entries: Sequence[Entry], form: str, dtype: str) -> Entry:
    """Of the aligned entries of a form and dtype the one of largest area; it serves large calls."""
    fitting = [e for e in entries if e.aligned and e.form == form and dtype in e.dtypes]
    return max(fitting, key=lambda e: e.config.block_m * e.config.block_n)


def constants_of(fn: Any, job: Any, **own: Any) -> dict[str, Any]:
    """Constants of the compilation that the kernel names: ``own``, and those of any product."""
    tile = job.tile
    shared = {
        "ACT": split_code(NAMES.index(job.activation))[0],
        "PRECISION": job.precision,
        "WIDE": "wide" in words(job),
        "EVEN_K": "even" in words(job),
        "EVEN_N": "even" in words(job),
        "GROUP_M": getattr(tile, "group_m", None),
        "PARTS": getattr(tile, "parts", None),
        "BLOCK_M": getattr(tile, "block_m", None),
        "BLOCK_N": getattr(tile, "block_n", None),
        "BLOCK_K": getattr(tile, "block_k", None),
    }
    return {name: value for name, value in (shared | own).items() if name in fn.arg_names}
