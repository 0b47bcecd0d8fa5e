"""Tile configs of the Triton kernels: data in configs/*.json, and the rule that picks from it.

One file serves one family of devices. The rule, which reads nothing but the call's shape:

1. File: the one whose ``serves`` names the device. An NVIDIA device of capability 8.0 or later
   that no file names gets ``sm_86`` (least shared memory); an AMD device gets ``gfx942``.
2. Candidates: the entries of the form (plain or gated), dtype and alignment. Those whose kernel is
   persistent count only where a and b have tensor descriptors (gemm_persistent.py).
3. Of these, the one for which tile_model.py says the least time, at the largest shape of the
   call's bucket and with the figures that ``serves`` gives for the device.

A product is aligned where N, the strides between rows and the addresses divide by 16: only then
does the compiler load and store in wide words. Otherwise the addresses of a large tile alone would
overflow the registers, so smaller tiles serve.

Before them comes what `bigops tune` measured on the user's device (tuned.py), where it did.

Nothing is timed here or on any call. The same call gives the same config on every machine that has
no tuned file, so a machine without the device can say what the device would run.
"""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigops.kernels.common import tile_model, tuned
from bigops.kernels.common.config_file import (
    Rule,
    by_device,
    entries_of,
    expect,
    fields_of,
    hold,
    is_power_of_two,
    is_tile,
    is_whole,
    launch_rules,
    powers_of,
    read_fields,
)

CONFIG_DIR = Path(__file__).parent.parent / "configs"
FORMAT = "bigops-tiles-2"
DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
FORMS = ("plain", "gated")

_LAUNCH = ("group_m", "num_warps", "num_stages", "parts")
_ENTRY_KEYS = ("form", "aligned", "dtypes", "tile", *_LAUNCH, "persistent", "programs")


class TileConfig(NamedTuple):
    """Tile of one program of the GEMM kernel, and how it is launched."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    parts: int  # column groups that the epilogue takes in turn, to save registers
    persistent: bool = False  # the form of gemm_persistent.py
    programs: int = 1  # that a multiprocessor holds at a time; from tests/golden/gpu_report.csv

    def of_one_form(self) -> dict[str, int]:
        """The fields that mean something where a kernel has no persistent form."""
        fields = self._asdict()
        del fields["persistent"], fields["programs"]
        return fields

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k} group {self.group_m} "
            f"warps {self.num_warps} stages {self.num_stages} parts {self.parts}"
            + (" persistent" if self.persistent else "")
        )


class PointwiseConfig(NamedTuple):
    """Tile of one program of the elementwise and column-sum kernels."""

    block_m: int
    block_n: int
    max_chunks: int
    num_warps: int


class Entry(NamedTuple):
    """One line of a config file: a candidate for products of that form, alignment and dtype."""

    form: str
    aligned: bool
    dtypes: tuple[str, ...]
    config: TileConfig


class Table(NamedTuple):
    """One config file."""

    device: str
    serves: dict[str, tile_model.Device]  # by architecture
    shared_memory: int  # bytes a program may use
    entries: tuple[Entry, ...]
    pointwise: PointwiseConfig


def device_arch(device: torch.device) -> str:
    """Name the architecture of a torch device: "sm_90", "gfx942", or "interpreter" for the CPU."""
    return "interpreter" if device.type == "cpu" else _gpu_arch(device.index)


def arch_of(target: str) -> str:
    """``target``, or where it is "cuda" the architecture of the present GPU.

    Raises:
        ValueError: "cuda" where torch sees no GPU.
    """
    if target != "cuda":
        return target
    if not torch.cuda.is_available():
        raise ValueError(
            "device: torch sees no GPU here; expected an architecture such as sm_90; got 'cuda'"
        )
    return device_arch(torch.device("cuda", torch.cuda.current_device()))


@functools.cache
def _gpu_arch(index: int | None) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _rules(fields: dict[str, Any]) -> Iterator[Rule]:
    yield "form", fields["form"] in FORMS, f"one of {FORMS}"
    yield from launch_rules(fields, DTYPES.values())
    yield "tile", is_tile(fields["tile"]), "three powers of two"
    persistent = fields["persistent"]
    known = type(persistent) is bool and persistent <= fields["aligned"]
    yield "persistent", known, "true or false, true only where aligned"
    yield "programs", is_whole(fields["programs"], 64), "1 to 64"
    most = max(1, fields["tile"][1] // 16)
    left = is_power_of_two(fields["parts"], most)
    yield "parts", left, "a power of two that leaves 16 columns each"


def _entry(where: str, data: object) -> Entry:
    fields = fields_of(where, data, _ENTRY_KEYS)
    hold(where, fields, _rules(fields))
    launched = (fields[name] for name in (*_LAUNCH, "persistent", "programs"))
    config = TileConfig(*fields["tile"], *launched)
    return Entry(fields["form"], fields["aligned"], tuple(fields["dtypes"]), config)


def _device(where: str, data: object) -> tile_model.Device:
    fields = fields_of(where, data, tile_model.Device._fields)
    positive = all(type(value) is int and value > 0 for value in fields.values())
    expect(where, positive, "positive integers", fields)
    return tile_model.Device(**fields)


def _check_coverage(path: Path, entries: tuple[Entry, ...]) -> None:
    for form, aligned, dtype in itertools.product(FORMS, (True, False), DTYPES.values()):
        kind = f"{form} {'aligned' if aligned else 'unaligned'} {dtype}"
        found = _candidates(entries, form, aligned, dtype, described=False)
        expect(f"{path}: {kind}", found, "a tile that is not persistent", "none")


def _candidates(
    entries: tuple[Entry, ...], form: str, aligned: bool, dtype: str, described: bool
) -> list[TileConfig]:
    return [
        e.config
        for e in entries
        if (e.form, e.aligned) == (form, aligned)
        and dtype in e.dtypes
        and described >= e.config.persistent
    ]


def read_table(path: Path) -> Table:
    """Read and check one config file.

    Raises:
        ValueError: the file is not JSON, is of another format, or a field is missing or out of
            range; the message names file, place, what was expected and what came.
    """
    keys = ("format", "device", "serves", "shared_memory", "gemm", "pointwise")
    fields = read_fields(path, FORMAT, keys)
    serves, memory = fields["serves"], fields["shared_memory"]
    named = isinstance(serves, dict) and serves
    expect(f"{path}: serves", named, "figures by device name", repr(serves))
    known = type(memory) is int and memory > 0
    expect(f"{path}: shared_memory", known, "bytes", repr(memory))
    entries = entries_of(path, "gemm", fields["gemm"], _entry)
    _check_coverage(path, entries)
    pointwise = powers_of(f"{path}: pointwise", fields["pointwise"], PointwiseConfig._fields)
    return Table(
        str(fields["device"]),
        {name: _device(f"{path}: serves: {name}", figures) for name, figures in serves.items()},
        memory,
        entries,
        PointwiseConfig(**pointwise),
    )


@functools.cache
def tables() -> dict[str, Table]:
    """All shipped config files, by device name."""
    return by_device(CONFIG_DIR, read_table)


@functools.cache
def table_for(arch: str) -> Table:
    """The config file that serves ``arch`` ("sm_90", "gfx942", "interpreter").

    Raises:
        ValueError: an NVIDIA device below capability 8.0, or a name of no known kind.
    """
    for table in tables().values():
        if arch in table.serves:
            return table
    capability = re.fullmatch(r"sm_(\d+)[a-z]?", arch)
    if capability and int(capability[1]) >= 80:
        return table_for(arch.rstrip("abcdef")) if arch[-1].isalpha() else tables()["sm_86"]
    if arch.startswith("gfx"):
        return tables()["gfx942"]
    raise ValueError(
        f"arch: expected sm_80 or later, gfx942, gfx90a, gfx950 or the like; got {arch!r}"
    )


def device_figures(arch: str) -> tile_model.Device:
    """Figures of ``arch``; of the first device of its file where the file does not name it."""
    serves = table_for(arch).serves
    name = arch.rstrip("abcdef") if arch.startswith("sm_") else arch
    return serves.get(name) or next(iter(serves.values()))


def multiprocessors(device: torch.device) -> int:
    """Of a torch device; for the CPU, those of the interpreter's file."""
    if device.type == "cpu":
        return device_figures("interpreter").multiprocessors
    return _gpu_multiprocessors(device.index)


@functools.cache
def _gpu_multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@tuned.cached
def choose_config(
    arch: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    gated: bool = False,
    aligned: bool = True,
    described: bool = True,
) -> TileConfig:
    """Pick the tile for a product of [m, k] and [k, n] ([k, 2n] gated) on ``arch``.

    Args:
        arch: "sm_80", "sm_90", "gfx942" and so on, see `device_arch`; need not be present.
        dtype: torch.float32, torch.bfloat16 or torch.float16.
        m, n, k: sizes; all shapes of a bucket (tile_model.py) get the same tile.
        gated: whether the weight holds gate and up rows.
        aligned: as defined at the head of this file; for contiguous tensors, whether n and k
            divide by 16.
        described: whether both factors have tensor descriptors, which aligned ones have.

    Raises:
        TypeError: another dtype.
        ValueError: an arch that no config file serves, or a corrupt config file.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected one of {', '.join(map(str, DTYPES))}; got {dtype}")
    form = tuned.form_of(FORMS[gated], aligned)
    measured = tuned.lookup("fused_linear", arch, form, DTYPES[dtype], tuned.bucket(m, n, k))
    if measured is not None and (described or not measured.get("persistent")):
        return TileConfig(**measured)
    sizes = tile_model.rounded(m, n, k)
    return _choose(arch, DTYPES[dtype], sizes, gated, aligned, described and aligned)


@functools.lru_cache(maxsize=4096)
def _choose(
    arch: str, dtype: str, sizes: tuple[int, int, int], gated: bool, aligned: bool, described: bool
) -> TileConfig:
    entries = table_for(arch).entries
    candidates = _candidates(entries, FORMS[gated], aligned, dtype, described)
    return tile_model.best(candidates, device_figures(arch), dtype, *sizes, gated)


def pointwise_config(arch: str) -> PointwiseConfig:
    """The tile of the elementwise kernels on ``arch``; raises ValueError as `table_for` does."""
    return table_for(arch).pointwise
