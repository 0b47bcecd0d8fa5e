"""Tiles that were measured on this device, asked for before those of configs/*.json.

`bigops tune --device cuda` measures them and bigops hands them over by `use`; nothing is read or
timed here. A table belongs to an architecture, and holds one tile for each op, form of the product,
dtype and bucket of shapes. Without one the committed files serve alone.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from bigops.kernels.common.tile_model import bucket

__all__ = ["bucket", "cached", "cite", "clear", "form_of", "key_of", "lookup", "use"]

F = TypeVar("F", bound=Callable[..., Any])


class _Table(NamedTuple):
    file: str
    tiles: dict[str, dict[str, Any]]


_tables: dict[str, _Table] = {}
_memos: list[Any] = []


def cached(choose: F) -> F:
    """Keep what ``choose`` answers until another table is handed over."""
    memo = functools.lru_cache(maxsize=4096)(choose)
    _memos.append(memo)
    return memo  # type: ignore[return-value]


def form_of(form: str, aligned: bool, width: int | None = None) -> str:
    """Name a form of a product: "gated unaligned", "lora aligned 64"."""
    return f"{form} {'' if aligned else 'un'}aligned" + ("" if width is None else f" {width}")


def key_of(op: str, form: str, dtype: str, bucket: str) -> str:
    """What an entry of a table is found by; dtype as the config files name it."""
    return f"{op}: {form} {dtype} {bucket}"


def use(arch: str, tiles: Mapping[str, Mapping[str, Any]], file: str) -> None:
    """Hand over the table of ``arch``: the fields of a tile by `key_of`, and where they stand."""
    _tables[arch] = _Table(file, {key: dict(fields) for key, fields in tiles.items()})
    _forget_answers()


def clear() -> None:
    """Serve by the committed files alone again."""
    _tables.clear()
    _forget_answers()


def _forget_answers() -> None:
    for memo in _memos:
        memo.cache_clear()


def lookup(op: str, arch: str, form: str, dtype: str, bucket: str) -> dict[str, Any] | None:
    """The fields of the tile that was measured for such products, or None where none was."""
    table = _tables.get(arch)
    return None if table is None else table.tiles.get(key_of(op, form, dtype, bucket))


def cite(op: str, arch: str, form: str, dtype: str, bucket: str, committed: str) -> tuple[str, str]:
    """(file, words for a reason) of where a tile comes from; ``committed`` under configs/."""
    if lookup(op, arch, form, dtype, bucket) is None:
        return committed, f"from kernels/configs/{committed}"
    return _tables[arch].file, f"tuned on this device, from {_tables[arch].file}"
