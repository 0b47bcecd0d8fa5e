"""Benchmark cases: every provider side by side, its error, and how far it is from the limit.

A bench file (`bench_<op>.py`) names its cases and builds their sides; this file times the sides in
interleaved rounds (`bigops.timing`), holds their results against float64, and makes one row per
provider. `pytest benches` and `bigops bench` are two doors to the same `run_case`.

`ratio_to_eager` is eager time / provider time: a speed-up, above 1 the provider is the faster one.
`ratio_to_best_rival` is the time of the fastest provider that is not ours / provider time. Ours
are those whose name starts with `bigops`; a case may hold several.
"""

from __future__ import annotations

import importlib
import itertools
import math
import pkgutil
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import bigops
from bigops import backend, timing
from bigops.backend import machine
from bigops.benches.limits import Cost, Limits
from bigops.benches.rows import OWN as OWN  # bench files take it from here
from bigops.benches.rows import Row, is_own

EAGER = "eager"
PAST_CACHE = 128 << 20  # bytes that a rotation must cover so that every call reads from DRAM
WRONG = 0.1  # relative error past which a rival computes something else; int8 stays below 0.02
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Case:
    """One shape of one op, the same for all providers."""

    op: str
    name: str
    m: int
    k: int
    n: int
    dtype: str = "fp32"
    direction: str = "forward"  # "forward", "forward+graph", "forward+backward"
    params: dict[str, Any] = field(default_factory=dict)
    rotate: bool = False  # weights rotate past the cache: the case means memory
    quick: bool = False  # part of `--quick`
    gpu: bool = False  # of kernels that a CPU has not

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}-{self.m}x{self.k}x{self.n}-{self.dtype}-{self.direction}"


@dataclass(frozen=True)
class Side:
    """One provider of a case.

    ``call`` runs it once and returns what is compared with the reference: the output, or the
    gradients; ``reference`` is there where that is not the case's own, such as of a pruned model. A
    side in another process gives ``seconds(n)``, the time that n calls take there, and
    is ended by ``close``.
    """

    provider: str
    call: Callable[[], Tensor | Sequence[Tensor]]
    cost: Cost
    kernel: str = ""
    own_pool: bool = False  # runs threads that are not torch's
    shown: Callable[[Any], Tensor] | None = None  # what of the result is compared, if not all
    seconds: Callable[[int], float] | None = None
    close: Callable[[], None] = lambda: None
    reference: list[Tensor] | None = None


class LeftOut(Exception):
    """A provider cannot take part in a case; the message says why."""


Build = Callable[[Case, str], tuple[list[Tensor], list[Side]]]


def clones(case: Case, tensor: Tensor) -> list[Tensor]:
    """The tensor, and in a memory case as many copies as it takes to pass the cache."""
    return copies(case, tensor, tensor.numel() * tensor.element_size(), Tensor.clone)


def copies(case: Case, item: Any, nbytes: int, clone: Callable[[Any], Any]) -> list[Any]:
    """The same for a weight that is no plain tensor, such as a pack of ``nbytes``."""
    count = math.ceil(PAST_CACHE / nbytes) if case.rotate else 1
    return [item] + [clone(item) for _ in range(count - 1)]


def in_turn(items: Sequence[Any]) -> Callable[[], Any]:
    """A function that gives the items in turn, for ever."""
    return itertools.cycle(items).__next__


_said: set[str] = set()


def say_once(message: str) -> None:
    """Print a line on stderr, the first time only: many cases leave out the same provider."""
    if message not in _said:
        _said.add(message)
        print(f"bench: {message}", file=sys.stderr)


def optional_side(sides: list[Side], make: Callable[..., Side], *args: Any) -> None:
    """Append ``make(*args)``, or say on stderr why this provider is left out."""
    try:
        sides.append(make(*args))
    except LeftOut as reason:
        say_once(str(reason))


def compiled(function: Callable[..., Any], backend_name: str = "inductor") -> Callable[..., Any]:
    """``torch.compile`` of a function of tensors, at the shapes of its first call."""
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend_name)


# --- one case --------------------------------------------------------------------------------


def run_case(
    case: Case,
    build: Build,
    limits: Limits,
    *,
    device: str = "cpu",
    pairs: int = timing.MIN_PAIRS,
) -> list[Row]:
    """Time all sides of a case in one process and return one row per provider."""
    torch.manual_seed(0)
    torch.compiler.reset()  # else the compiled code of all earlier cases is kept and guarded
    with torch.inference_mode(case.direction == "forward"):
        reference, sides = build(case, device)
        try:
            ready, errors, kernels = _tried(case, sides, reference)
            calls = {side.provider: side.call for side in ready}
            if device == "cpu":
                samples = timing.interleave(
                    calls,
                    pairs=pairs,
                    idle=any(side.own_pool for side in ready),
                    remote={side.provider: side.seconds for side in ready if side.seconds},
                )
            else:
                samples = timing.interleave_events(calls, pairs=pairs, device=device)
        finally:
            for side in sides:
                side.close()
    rivals = [s.provider for s in ready if not is_own(s.provider)]
    best = min(rivals, key=lambda name: timing.median(samples[name]))
    rows = []
    for side in ready:
        mine = samples[side.provider]
        ratio = timing.speedup(samples[EAGER], mine)
        to_best = timing.speedup(samples[best], mine)
        seconds = timing.median(mine)
        # on a GPU every call starts behind a flush of its cache
        floor = limits.floor_seconds(side.cost, case.rotate or device != "cpu", device)
        rows.append(
            Row(
                op=case.op,
                case=case.name,
                direction=case.direction,
                dtype=case.dtype,
                m=case.m,
                k=case.k,
                n=case.n,
                params=" ".join(f"{key}={value}" for key, value in case.params.items()),
                provider=side.provider,
                kernel=kernels[side.provider],
                isa=limits.isa,
                threads=torch.get_num_threads(),
                median_us=seconds * 1e6,
                spread=timing.spread(mine),
                ratio_to_eager=ratio.value,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
                best_rival=best,
                ratio_to_best_rival=to_best.value,
                best_low=to_best.low,
                best_high=to_best.high,
                fraction_of_limit=None if floor is None else floor / seconds,
                rel_error=errors[side.provider],
                versions=versions(device),
            )
        )
    return rows


def _tried(
    case: Case, sides: list[Side], reference: list[Tensor]
) -> tuple[list[Side], dict[str, float], dict[str, str]]:
    """Call each side once: its error against float64, the kernels that ran, or why it is out."""
    ready: list[Side] = []
    errors: dict[str, float] = {}
    kernels: dict[str, str] = {}
    for side in sides:
        ours_or_eager = is_own(side.provider) or side.provider == EAGER
        try:
            with backend.record() as names:
                out = side.call()
            if side.shown is not None:
                out = side.shown(out)
        except Exception as failure:
            if ours_or_eager:
                raise
            say_once(f"{case.id}: {side.provider} left out: {failure!s:.200}")
            continue
        error = relative_error(out, side.reference or reference)
        if error > WRONG and not ours_or_eager:
            say_once(f"{case.id}: {side.provider} left out: wrong by {error:.2g} of the result")
            continue
        ready.append(side)
        errors[side.provider] = error
        kernels[side.provider] = "+".join(dict.fromkeys(names)) or side.kernel
    return ready, errors, kernels


def relative_error(out: Tensor | Sequence[Tensor], reference: list[Tensor]) -> float:
    """Largest ``|out - ref64| / |ref64|`` in the Frobenius norm over the outputs of a call.

    Raises:
        ValueError: another number of outputs, or another shape, than the reference has.
    """
    outs = [out] if isinstance(out, Tensor) else list(out)
    if [o.shape for o in outs] != [r.shape for r in reference]:
        raise ValueError(
            f"out: expected shapes {[tuple(r.shape) for r in reference]}, got "
            f"{[tuple(o.shape) for o in outs]}"
        )
    worst = 0.0
    for mine, truth in zip(outs, reference, strict=True):
        error = (mine.detach().double().cpu() - truth).norm() / truth.norm().clamp_min(1e-300)
        worst = max(worst, float(error))
    return worst


def versions(device: str = "cpu") -> str:
    """What ran, in one field without commas."""
    text = (
        f"bigops={bigops.__version__} torch={torch.__version__} python={platform.python_version()}"
    )
    if device == "cpu":
        return text
    runtime = f"hip={torch.version.hip}" if torch.version.hip else f"cuda={torch.version.cuda}"
    return f"{text} triton={machine.triton_version()} {runtime}"


# --- all cases ---------------------------------------------------------------------------------


def op_names() -> list[str]:
    """Ops that have a bench file."""
    package = importlib.import_module("bigops.benches")
    found = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name.removeprefix("bench_") for name in found if name.startswith("bench_"))


def bench_module(op: str) -> ModuleType:
    """The bench file of an op.

    Raises:
        ValueError: no such op.
    """
    if op not in op_names():
        raise ValueError(f"op: expected one of {', '.join(op_names())}; got {op!r}")
    return importlib.import_module(f"bigops.benches.bench_{op}")


def _runs_on(case: Case, device: str) -> bool:
    """Whether a case can run there; said once where not."""
    if case.gpu and device == "cpu":
        say_once(f"{case.op}: {case.params.get('pattern', case.name)} left out: it needs a GPU")
        return False
    return True


def check_device(device: str) -> None:
    """Raise ValueError unless ``device`` is cpu, or a GPU that torch sees."""
    if device == "cpu":
        return
    if not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"device: expected cpu, cuda or cuda:N; got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, since torch sees no GPU here; got {device!r}")
    count, index = torch.cuda.device_count(), torch.device(device).index
    if index is not None and index >= count:
        raise ValueError(f"device: expected an index below {count}; got {device!r}")
    if index is not None:
        torch.cuda.set_device(index)  # timing events belong to the current device


def _takes_part(module: ModuleType, device: str) -> bool:
    """Whether the op of a bench file has a kernel on the device; says so where it has none."""
    why = "" if device == "cpu" else getattr(module, "CPU_ONLY", "")
    if why:
        say_once(why)
    return not why


def run(
    ops: Sequence[str],
    *,
    quick: bool = False,
    match: str = "",
    device: str = "cpu",
    pairs: int = timing.MIN_PAIRS,
) -> Iterator[Row]:
    """Measure the limits, then every case of the ops; rows come as they are ready.

    Raises:
        ValueError: unknown op or device, or no case left by ``quick`` and ``match``.
    """
    check_device(device)
    chosen = [
        (module, case)
        for module in map(bench_module, ops)
        if _takes_part(module, device)
        for case in module.cases()
        if (case.quick or not quick) and match in case.id and _runs_on(case, device)
    ]
    if not chosen:
        raise ValueError(f"match: no case of {', '.join(ops)} has {match!r} in its name")
    limits = Limits.measure(device)
    print(limits, file=sys.stderr)
    for module, case in chosen:
        yield from run_case(case, module.build, limits, device=device, pairs=pairs)
