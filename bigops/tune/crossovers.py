"""Measure where own CPU kernels hand over to torch's product on this machine, and keep it.

Each dtype is one step, written as soon as it is measured. The result serves from the next start of
Python on (`bigops.backend.crossover`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import timing
from bigops.backend import crossover, machine
from bigops.formats.packed import PackedWeight
from bigops.ops.fused_linear import fused_linear
from bigops.ops.packed_linear import packed_linear
from bigops.tune.measured import Calls, Report, Timer, TunedFile, check_dtypes

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LAYERS = ((256, 256), (1024, 1024), (768, 3072), (4096, 4096))  # (K, N)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
MOST_FLOPS = 2 * 256 * 4096 * 4096  # of one call: what is larger adds minutes and no information
ROUNDS = 9
SECTIONS = ("fused_linear", "packs", "points")  # of the file, each by dtype
_EVERY, _NONE = crossover.Limits(1 << 40, 1 << 60), crossover.Limits(0, 0)


@dataclass(frozen=True)
class Point:
    """Seconds of one product x [m, k] times W [n, k] by each kernel that could serve it."""

    m: int
    k: int
    n: int
    own: float
    library: float
    packed: float

    @property
    def flops(self) -> int:
        """Operations, as the crossover counts them."""
        return 2 * self.m * self.n * self.k


def tune(
    dtypes: Sequence[str] = tuple(DTYPES),
    *,
    again: bool = False,
    report: Report = lambda line: None,
    timer: Timer | None = None,
) -> Path:
    """Measure what is missing in this machine's tuned file; give its path.

    Args:
        dtypes: of "f32", "bf16", "f16"; float64 is portable code and is not tuned.
        again: measure what the file already has, too.
        report: called with a line for each step.
        timer: seconds by name for calls by name; by default medians of interleaved rounds.

    Raises:
        ValueError: an unknown dtype.
        RuntimeError: no C++ extension, so nothing to hand over to.
        OSError: the cache folder cannot be written.
    """
    check_dtypes(dtypes, tuple(DTYPES))
    extension = machine.extension
    if extension is None:
        raise RuntimeError(f"nothing to tune: {machine.extension_error}")
    timer = timer or _medians
    file = TunedFile(crossover, crossover.machine(extension), SECTIONS)
    file.prepare()
    if again or "float_product" not in file.content():
        library = _float_product(timer)
        with file.editing() as data:
            data["float_product"] = library
        report(f"float32 products of a library: {library}")
    library = file.content()["float_product"]
    for dtype in dtypes:
        if not again and dtype in file.content()["fused_linear"]:
            report(f"{dtype}: already measured")
            continue
        points = list(_measure(extension, dtype, library, timer))
        limits = choose(points)
        packs = packing_wins(points, limits)
        step = asdict(limits), packs, [asdict(point) for point in points]
        with file.editing() as data:
            for name, value in zip(SECTIONS, step, strict=True):
                data[name][dtype] = value
        report(
            f"{dtype}: own kernel up to {limits.max_rows} rows or {limits.max_flops} operations, "
            f"pack_ {'packs' if packs else 'leaves it'}; at most "
            f"{worst(points, limits):.2f}x the faster side's time"
        )
    return file.path


def choose(points: Sequence[Point]) -> crossover.Limits:
    """The limits that cost least against always taking the faster side.

    Cost is the sum of log(time taken / least time), so a small call counts as much as a large one.
    Of equals the fewest operations win, then the fewest rows.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("points: expected at least one; got none")
    rows = sorted({0, *(p.m for p in points)})
    flops = sorted({0, *(p.flops for p in points)})
    return min(
        (crossover.Limits(m, f) for m in rows for f in flops),
        key=lambda limits: (round(_cost(points, limits), 9), limits.max_flops, limits.max_rows),
    )


def packing_wins(points: Sequence[Point], limits: crossover.Limits) -> bool:
    """Whether packed_linear takes less time than fused_linear, in the geometric mean of points."""
    return sum(math.log(_taken(p, limits) / p.packed) for p in points) > 0


def worst(points: Sequence[Point], limits: crossover.Limits) -> float:
    """The most that the limits cost at one point: time taken / time of the faster side."""
    return max(_taken(p, limits) / min(p.own, p.library) for p in points)


def _taken(point: Point, limits: crossover.Limits) -> float:
    own = point.m <= limits.max_rows or point.flops <= limits.max_flops
    return point.own if own else point.library


def _cost(points: Sequence[Point], limits: crossover.Limits) -> float:
    return sum(math.log(_taken(p, limits) / min(p.own, p.library)) for p in points)


def _medians(sides: Calls) -> dict[str, float]:
    with torch.inference_mode():
        samples = timing.interleave(sides, pairs=ROUNDS, sample_seconds=1e-3, warmup=1)
    return {name: timing.median(of) for name, of in samples.items()}


def _float_product(timer: Timer) -> str:
    """Which library multiplies float32 matrices faster, over a layer's forward and gradients."""
    if machine.usable("onednn") != "onednn":
        return "aten"
    onednn = torch.ops.mkldnn._linear_pointwise
    ratio = 0.0
    for k, n in LAYERS[2:]:
        x, weight, grad = (
            torch.randn(shape, device="cpu") for shape in ((256, k), (n, k), (256, n))
        )
        for a, b in ((x, weight), (grad, weight.t()), (grad.t(), x.t())):
            took = timer(
                {
                    "aten": lambda a=a, b=b: F.linear(a, b),  # type: ignore[misc]
                    "onednn": lambda a=a, b=b: onednn(a, b, None, "none", [], ""),  # type: ignore[misc]
                }
            )
            ratio += math.log(took["aten"] / took["onednn"])
    return "onednn" if ratio > 0 else "aten"


def _measure(extension: ModuleType, dtype: str, library: str, timer: Timer) -> Iterator[Point]:
    for k, n in LAYERS:
        weight = (torch.randn(n, k, device="cpu") * k**-0.5).to(DTYPES[dtype])
        pack, bias = PackedWeight.from_dense(weight), torch.randn(n, device="cpu").to(DTYPES[dtype])
        for m in ROWS:
            if 2 * m * k * n > MOST_FLOPS:
                continue
            x = torch.randn(m, k, device="cpu").to(DTYPES[dtype])

            with _restored(extension, library):
                took = timer(_sides(extension, dtype, x, weight, pack, bias))
            yield Point(m, k, n, took["own"], took["library"], took["packed"])


def _sides(
    extension: ModuleType, dtype: str, x: Tensor, weight: Tensor, pack: PackedWeight, bias: Tensor
) -> dict[str, Callable[[], object]]:
    def within(limits: crossover.Limits, op: Callable[..., object], w: object) -> None:
        # every side pays for this call, so the small ones stay comparable
        extension.set_crossover("fused_linear", dtype, limits.max_rows, limits.max_flops)
        op(x, w, bias, None, "relu")

    return {
        "own": lambda: within(_EVERY, fused_linear, weight),
        "library": lambda: within(_NONE, fused_linear, weight),
        "packed": lambda: within(_NONE, packed_linear, pack),
    }


@contextlib.contextmanager
def _restored(extension: ModuleType, library: str) -> Iterator[None]:
    """Inside, the library's float32 products are ``library``'s; after, all is as it was."""
    extension.set_float_product(library)
    try:
        yield
    finally:
        machine.apply_crossovers()
