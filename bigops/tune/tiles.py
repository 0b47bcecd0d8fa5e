"""Measure which tiles of the config files are fastest on this GPU, and keep them.

One step is one shape of one op in one form and dtype: all its candidate tiles side by side, written
as soon as they are measured. Of the shapes that share an entry the tile with the least geometric
mean of time serves, from the next start of Python on (`bigops.backend.gpu_tiles`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bigops import timing
from bigops.backend import gpu_tiles
from bigops.kernels.common import tuned
from bigops.kernels.common.tiles import DTYPES, TileConfig
from bigops.ops import targets
from bigops.ops import tuned as committed
from bigops.tune.measured import Calls, Report, Timer, TunedFile, check_dtypes
from bigops.tune.problems import PROBLEMS, Call

OPS = committed.OPS
SHAPES = tuple((m, n, k) for n, k in ((4096, 4096), (14336, 4096)) for m in (1, 16, 64, 256, 2048))
"""(M, N, K) of a transformer's layers: decode, small batches and a training step."""
ROUNDS = 25
SECTIONS = ("tiles", "points")  # of the file, each by entry


class Target(NamedTuple):
    """Where to measure: a device, and what its tiles depend on (`gpu_tiles.machine`)."""

    device: torch.device
    machine: dict[str, str]

    @property
    def arch(self) -> str:
        return self.machine["arch"]


class Step(NamedTuple):
    """One shape of one op in one form and dtype."""

    op: str
    form: str  # as kernels/common/tuned.py names it
    dtype: str
    bucket: str
    shape: tuple[int, int, int]  # M, N, K
    make: Callable[[], Call]  # data, and the call of a tile on it

    @property
    def key(self) -> str:
        """The entry that the step belongs to."""
        return tuned.key_of(self.op, self.form, self.dtype, self.bucket)

    @property
    def size(self) -> str:
        """The shape, as the file names it."""
        return "x".join(map(str, self.shape))


def target_of(device: str) -> Target:
    """The GPU "cuda" or "cuda:1".

    Raises:
        ValueError: torch sees no such GPU, or no Triton kernel serves it; the message says why.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {device!r}") from None
    if found.type != "cuda":
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ValueError(f"device: expected cpu, since torch sees no GPU here; got {device!r}")
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise ValueError(f"device: expected an index below {count}; got {device!r}")
    why = targets.why_not(torch.float32, torch.device("cuda", index), "fused_linear")
    if why:
        raise ValueError(f"device: nothing to tune on {device!r}: {why}")
    return Target(torch.device("cuda", index), committed.machine_of(index))


def tune(
    target: Target,
    ops: Sequence[str] = OPS,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    dtypes: Sequence[str] = ("bf16", "f16", "f32"),
    *,
    again: bool = False,
    report: Report = lambda line: None,
    timer: Timer | None = None,
) -> Path:
    """Measure what is missing in the tuned file of ``target``; give its path.

    Args:
        target: see `target_of`.
        ops: of `OPS`.
        shapes: (M, N, K) of x [M, K] and W [N, K].
        dtypes: of x: "f32", "bf16", "f16".
        again: measure what the file already has, too.
        report: called with a line for each step.
        timer: seconds by name for calls by name; by default medians of interleaved rounds.

    Raises:
        ValueError: an unknown op or dtype, a shape below 1, or a corrupt config file.
        OSError: the cache folder cannot be written.
    """
    _check(ops, shapes, dtypes)
    timer = timer or (lambda calls: _medians(calls, target.device))
    file = TunedFile(gpu_tiles, target.machine, SECTIONS)
    file.prepare()
    for step in steps(target, ops, shapes, dtypes):
        label = f"{step.key} at {step.size}"
        known = file.content()["points"].get(step.key, {}).get(step.size)
        if known is not None and not again:
            report(f"{label}: already measured")
            continue
        configs = committed.candidates(step.op, target.arch, step.form, step.dtype)
        if not configs:
            report(f"{label}: no tile of the config files reaches it")
            continue
        with torch.inference_mode():
            point = measure(step.make(), configs, timer)
        keep(file, step.key, step.size, point)
        report(f"{label}: {_said(point)}")
    return file.path


def _check(
    ops: Sequence[str], shapes: Sequence[tuple[int, int, int]], dtypes: Sequence[str]
) -> None:
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}; got {op!r}")
    for shape in shapes:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shapes: expected M,N,K of at least 1 each; got {shape}")
    check_dtypes(dtypes, tuple(DTYPES.values()))


def steps(
    target: Target,
    ops: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    dtypes: Sequence[str],
) -> Iterator[Step]:
    """What is to be measured, in the order in which it is."""
    named = {name: dtype for dtype, name in DTYPES.items()}
    for op in ops:
        for shape in shapes:
            for dtype in dtypes:
                for form, bucket, make in PROBLEMS[op](target.device, named[dtype], *shape):
                    yield Step(op, form, dtype, bucket, shape, make)


def keep(file: TunedFile, key: str, size: str, point: Mapping[str, Any]) -> None:
    """Write what one shape of an entry took, and choose the entry's tile anew."""
    with file.editing() as data:
        points = data["points"].setdefault(key, {})
        points[size] = point
        data["tiles"].pop(key, None)
        tile = choose(points)
        if tile is not None:
            data["tiles"][key] = tile


def measure(call: Call, configs: Sequence[TileConfig], timer: Timer) -> dict[str, Any]:
    """Seconds of each tile, and why the others have none: they do not compile, or do not fit."""
    calls: dict[str, Callable[[], object]] = {}
    failed: dict[str, str] = {}
    for config in configs:
        name = json.dumps(list(config))
        try:
            call(config)
        except Exception as error:  # triton raises what it likes for a tile that does not fit
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
        else:
            calls[name] = lambda config=config: call(config)  # type: ignore[misc]
    seconds = dict(timer(calls)) if calls else {}
    return {"seconds": seconds, "failed": failed}


def choose(points: Mapping[str, Mapping[str, Any]]) -> dict[str, int] | None:
    """The tile that serves best over shapes: least mean of log(time / least time at the shape).

    Args:
        points: shape -> {"seconds": {tile: seconds}}.

    Returns:
        The fields of the tile; of equals the first. None where no tile ran at every shape.
    """
    measured = [point["seconds"] for point in points.values() if point["seconds"]]
    everywhere = [t for t in (measured[0] if measured else ()) if all(t in m for m in measured)]
    if not everywhere:
        return None

    def cost(tile: str) -> float:
        return sum(math.log(m[tile] / min(m.values())) for m in measured)

    best = min(everywhere, key=lambda tile: round(cost(tile), 9))
    return TileConfig(*json.loads(best))._asdict()


def _said(point: Mapping[str, Any]) -> str:
    seconds, failed = point["seconds"], point["failed"]
    text = f"{len(failed)} of {len(failed) + len(seconds)} tiles do not run"
    if not seconds:
        return text
    best = min(seconds, key=seconds.__getitem__)
    tile = TileConfig(*json.loads(best))
    return f"{tile}, {seconds[best] * 1e6:.1f} us of {len(seconds)} tiles" + (
        f"; {text}" if failed else ""
    )


def _medians(calls: Calls, device: torch.device) -> dict[str, float]:
    with torch.cuda.device(device):
        samples = timing.interleave_events(calls, pairs=ROUNDS, device=device)
    return {name: timing.median(of) for name, of in samples.items()}
