"""Where own CPU kernels hand over to torch's product: data, committed or written by `bigops tune`.

The committed table was measured on the machines that it names. `bigops tune` measures this one and
keeps the result in the user's cache: a file for each CPU, instruction set, thread count and torch,
so that of another machine is never read. Nothing here measures anything.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FORMAT = 1  # of a tuned file
DTYPES = ("f32", "bf16", "f16", "f64")  # as the extension names them
LIBRARIES = ("aten", "onednn")  # whose product of float32 matrices serves besides our kernel
_COMMITTED = Path(__file__).parent / "configs" / "crossover_cpu.json"


@dataclass(frozen=True)
class Limits:
    """Own kernel up to ``max_rows`` rows of x or ``max_flops`` operations (2 M N K)."""

    max_rows: int
    max_flops: int


@dataclass(frozen=True)
class Table:
    """Crossovers of one machine.

    Attributes:
        fused_linear: dtype -> limits of the own kernel.
        packs: dtype -> whether packed_linear pays, so that `pack_` packs a dense layer.
        float_product: "aten" or "onednn".
        bf16_dot: whether packed and weight-only products of bf16 use vdpbf16ps, not float fmas.
        attention: dtype -> limits of the own kernel, in queries of a head.
        source: "committed", or the tuned file.
        ignored: why a tuned file was not taken, or "".
    """

    fused_linear: dict[str, Limits]
    packs: dict[str, bool]
    float_product: str
    bf16_dot: bool = True
    attention: dict[str, Limits] = field(default_factory=dict)
    source: str = "committed"
    ignored: str = field(default="", compare=False)

    def limits(self) -> Iterator[tuple[str, str, Limits]]:
        """(op, dtype, limits) as the extension takes them."""
        for op, of in (("fused_linear", self.fused_linear), ("attention", self.attention)):
            yield from ((op, dtype, limits) for dtype, limits in of.items())


def machine(extension: ModuleType) -> dict[str, str | int]:
    """What a measured crossover depends on, as plain data."""
    return {
        "cpu": cpu_name(),
        "isa": str(extension.isa()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def tuned_file(of: Mapping[str, str | int]) -> Path:
    """The file in the user's cache that holds the crossovers of a machine; it may not exist."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    words = (of["cpu"], of["isa"], f"{of['threads']} threads", f"torch {of['torch']}")
    name = "-".join(re.sub(r"[^a-z0-9.]+", "_", str(word).lower()).strip("_") for word in words)
    return Path(cache) / "bigops" / "tuned" / f"cpu-{name}.json"


def committed(extension: ModuleType) -> Table:
    """The table that the package ships, for this CPU's maker and features."""
    data = json.loads(_COMMITTED.read_text())
    limits = {op: _limits(of) for op, of in data["crossover"].items()}
    packs = dict.fromkeys(("f32", "bf16", "f16"), True)
    for feature, changes in data["features"].items():
        if feature in extension.features():
            for op in limits:
                limits[op] |= _limits(changes[op])
    maker = extension.vendor()
    library = data["float_product"].get(maker, "aten")
    bf16_dot = data["bf16_dot"].get(maker, True)
    return Table(limits["fused_linear"], packs, library, bf16_dot, limits["attention"])


def _limits(of: Mapping[str, Mapping[str, int]]) -> dict[str, Limits]:
    return {dtype: Limits(**limits) for dtype, limits in of.items()}


def current(extension: ModuleType) -> Table:
    """The committed table with what `bigops tune` measured on this machine in its place.

    A tuned file that cannot be read, is corrupt, or is another machine's changes nothing; the
    table's ``ignored`` says why.
    """
    table = committed(extension)
    of = machine(extension)
    try:
        path = tuned_file(of)
        tuned = read(path, of)
    except FileNotFoundError:
        return table
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home folder
        return replace(table, ignored=str(error))
    return Table(
        table.fused_linear | _limits(tuned.get("fused_linear", {})),
        table.packs | tuned.get("packs", {}),
        tuned.get("float_product", table.float_product),
        table.bf16_dot,
        table.attention,
        str(path),
    )


def read(path: Path, of: Mapping[str, str | int]) -> dict[str, Any]:
    """A tuned file as it stands.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is corrupt, of another format or of another machine; the message says what.
    """
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON written by `bigops tune`; got {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: expected format {FORMAT}; got {got!r}")
    if data.get("machine") != dict(of):
        raise ValueError(f"{path}: expected the machine {dict(of)}; got {data.get('machine')}")
    for dtype, limits in _mapping(path, data, "fused_linear").items():
        sound = isinstance(limits, dict) and set(limits) == {"max_rows", "max_flops"}
        if not sound or not all(type(n) is int and 0 <= n < 1 << 62 for n in limits.values()):
            raise ValueError(
                f"{path}: fused_linear.{dtype}: expected whole numbers max_rows and max_flops of "
                f"at least 0; got {limits!r}"
            )
    for dtype, packs in _mapping(path, data, "packs").items():
        if not isinstance(packs, bool):
            raise ValueError(f"{path}: packs.{dtype}: expected true or false; got {packs!r}")
    library = data.get("float_product", LIBRARIES[0])
    if library not in LIBRARIES:
        raise ValueError(
            f"{path}: float_product: expected one of {', '.join(LIBRARIES)}; got {library!r}"
        )
    return data


def _mapping(path: Path, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = data.get(name, {})
    if not isinstance(found, dict) or not set(found) <= set(DTYPES):
        raise ValueError(f"{path}: {name}: expected keys among {', '.join(DTYPES)}; got {found!r}")
    return found


def cpu_name() -> str:
    """The model of the CPU, such as "AMD EPYC 9654 96-Core Processor, family 25, model 17"."""
    try:
        with open("/proc/cpuinfo") as file:  # the first CPU's part: a large machine has hundreds
            text = "".join(itertools.takewhile(str.strip, file))
    except OSError:  # no Linux
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^([a-z ]+?)\s*: (.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.machine()
    # virtual machines give many CPUs one name; the numbers tell them apart
    return f"{fields['model name']}, family {fields['cpu family']}, model {fields['model']}"
