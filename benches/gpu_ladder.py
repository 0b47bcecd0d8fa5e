"""The dense products of a GPU, from large to one row, against cuBLAS; then every shipped tile.

    python -m bigops.benches.gpu_ladder [--csv FILE] [--seconds 110]

The first thing to time on a GPU that bigops never met: whether the products reach the ceilings that
torch's own reach on it, and whether the tile that the model (kernels/common/tile_model.py) chooses
is the fastest of those that ship. One line per case and provider, printed when it is known:
microseconds (median of `PAIRS` interleaved rounds, by events), TFLOP/s or GB/s, whichever is nearer
to its ceiling of the same run, that share, the speed-up over torch, and the distance of the result
from torch's, since garbage is made fast, too.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops import backend, timing
from bigops.benches import limits_gpu
from bigops.kernels import fused_linear as kernels
from bigops.kernels.common import tiles

PAIRS = 20
SETS = 3  # of inputs, in turn
DTYPE = torch.bfloat16
TORCH = "torch"


class Rung(NamedTuple):
    """One size: y = act(x W^T + bias) + residual, x [m, k]; W [n, k], [2n, k] for swiglu."""

    m: int
    n: int
    k: int
    activation: str = "none"
    epilogue: bool = False  # bias and residual
    candidates: bool = False  # time every shipped tile, too

    def __str__(self) -> str:
        name = "" if self.activation == "none" else f" {self.activation}"
        return f"{self.m}x{self.n}x{self.k}{name}{' bias residual' if self.epilogue else ''}"

    @property
    def rows(self) -> int:
        """Of the weight."""
        return self.n * (2 if self.activation == "swiglu" else 1)

    @property
    def flops(self) -> float:
        """Of the product."""
        return 2.0 * self.m * self.rows * self.k

    @property
    def nbytes(self) -> float:
        """Read and written once."""
        numbers = self.m * self.k + self.rows * self.k + self.m * self.n
        if self.epilogue:
            numbers += self.rows + self.m * self.n
        return float(numbers * DTYPE.itemsize)


LADDER = (
    Rung(8192, 8192, 8192, candidates=True),
    Rung(16, 4096, 4096, candidates=True),
    Rung(1, 4096, 4096),
    Rung(64, 4096, 4096),
    Rung(256, 4096, 4096),
    Rung(4096, 4096, 4096),
    Rung(4096, 14336, 4096),
    Rung(4096, 11008, 4096, "swiglu"),
    Rung(4096, 4096, 16384, "gelu", epilogue=True),
)


class Row(NamedTuple):
    """One line of the table; ``why`` in place of figures where a provider did not run."""

    case: str
    provider: str
    microseconds: float
    rate: str
    share: float
    speedup: float
    distance: float
    why: str = ""

    def __str__(self) -> str:
        head = f"{self.case:<32} {self.provider:<58}"
        if self.why:
            return f"{head} {self.why}"
        return (
            f"{head} {self.microseconds:>10.1f} us {self.rate:>14} {self.share:>6.1%} "
            f"{self.speedup:>6.2f}x  distance {self.distance:.1e}"
        )


Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, weight, bias, residual
Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


def medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of each call by the GPU's clock."""
    samples = timing.interleave_events(calls, pairs=PAIRS)
    return {name: timing.median(of) for name, of in samples.items()}


def make(rung: Rung, device: torch.device) -> Inputs:
    """Random inputs of a rung; the product's numbers are near 1."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=device).mul_(scale).to(DTYPE)

    weight = draw(rung.rows, rung.k, scale=rung.k**-0.5)
    more = (draw(rung.rows), draw(rung.m, rung.n)) if rung.epilogue else (None, None)
    return (draw(rung.m, rung.k), weight, *more)


def eager(rung: Rung, inputs: Inputs) -> Tensor:
    """What torch takes for it: cuBLAS, then a kernel for each further step."""
    x, weight, bias, residual = inputs
    y = F.linear(x, weight, bias)
    if rung.activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    elif rung.activation == "gelu":
        y = F.gelu(y)
    return y if residual is None else y + residual


def sides(rung: Rung, device: torch.device) -> dict[str, Callable[[Inputs], Tensor]]:
    """Providers of a rung: torch, bigops as it serves, and each shipped tile where asked for."""
    code = bigops.kernels.common.activation.NAMES.index(rung.activation)

    def served(inputs: Inputs) -> Tensor:
        return bigops.fused_linear(*inputs, rung.activation)

    def by(config: tiles.TileConfig) -> Callable[[Inputs], Tensor]:
        return lambda inputs: kernels.forward(*inputs, activation=code, config=config)[0]

    found: dict[str, Callable[[Inputs], Tensor]] = {
        TORCH: lambda inputs: eager(rung, inputs),
        "bigops as served": served,
    }
    if rung.candidates:
        form = tiles.FORMS[rung.activation == "swiglu"]
        for entry in tiles.table_for(tiles.device_arch(device)).entries:
            if entry.form == form and entry.aligned and tiles.DTYPES[DTYPE] in entry.dtypes:
                found[str(entry.config)] = by(entry.config)
    return found


def measure(
    rung: Rung,
    device: torch.device,
    peak: float,
    bandwidth: float,
    timer: Timer = medians,
) -> list[Row]:
    """The rows of one rung; ``peak`` in FLOP/s and ``bandwidth`` in byte/s are the ceilings.

    A provider that raises is a row with the reason and stops no other.
    """
    sets = [make(rung, device) for _ in range(SETS)]
    truth = eager(rung, sets[0]).float()
    rows, calls, distances = [], {}, {}
    for name, call in sides(rung, device).items():
        try:
            with backend.record() as ran:
                y = call(sets[0]).float()
        except Exception as error:  # a tile may not launch here: that is what is asked
            why = f"{type(error).__name__}: {str(error)[:160]}"
            rows.append(Row(str(rung), name, 0.0, "", 0.0, 0.0, 0.0, why))
            continue
        label = f"{name}: {', '.join(dict.fromkeys(ran))}" if ran else name
        distances[label] = float((y - truth).norm() / truth.norm())
        turn = itertools.cycle(sets)
        calls[label] = lambda call=call, turn=turn: call(next(turn))
    seconds = timer(calls)
    for label, took in seconds.items():
        of_peak, of_bandwidth = rung.flops / took / peak, rung.nbytes / took / bandwidth
        if of_peak >= of_bandwidth:
            rate, share = f"{rung.flops / took / 1e12:.1f} TFLOP/s", of_peak
        else:
            rate, share = f"{rung.nbytes / took / 1e9:.0f} GB/s", of_bandwidth
        speedup = seconds[TORCH] / took
        rows.append(Row(str(rung), label, took * 1e6, rate, share, speedup, distances[label]))
    return rows


def climb(
    device: torch.device,
    peak: float,
    bandwidth: float,
    until: float = math.inf,
    ladder: Sequence[Rung] = LADDER,
    timer: Timer = medians,
) -> Iterator[Row]:
    """The rows of all rungs, as `measure` gives them; what would begin after ``until`` (by
    `time.monotonic`) is left out, and that is said."""
    for rung in ladder:
        if time.monotonic() > until:
            yield Row(str(rung), "", 0.0, "", 0.0, 0.0, 0.0, "left out: the time is up")
            continue
        with torch.no_grad():
            yield from measure(rung, device, peak, bandwidth, timer)


def main(argv: list[str] | None = None) -> int:
    """Print the table for the current GPU; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, help="write the rows there, too, as they come")
    parser.add_argument("--seconds", type=float, default=110.0, help="begin no case after these")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_ladder: torch sees no GPU", file=sys.stderr)
        return 1
    until = time.monotonic() + options.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    peaks, bandwidth = limits_gpu.measure(device)
    units = ", ".join(f"{unit} {peak / 1e12:.0f}" for unit, peak in peaks.items())
    print(f"{limits_gpu.name(device)}; T(FL)OP/s: {units}; copy {bandwidth / 1e9:.0f} GB/s")
    return write(climb(device, peaks["bf16"], bandwidth, until), options.csv)


def write(rows: Iterator[Row], path: Path | None = None) -> int:
    """Print rows as they come, and write them as CSV; 1 where a provider did not run, else 0."""
    status = 0
    with (path or Path(os.devnull)).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            print(row, flush=True)
            writer.writerow(row)
            file.flush()
            status |= bool(row.why)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
