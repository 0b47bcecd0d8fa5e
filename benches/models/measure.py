"""All sides of a model in one process: interleaved, then in runs of their own; rows and table."""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

import bigops
from bigops import timing
from bigops.benches.harness import EAGER, LeftOut, say_once
from bigops.benches.models import kinds, own, rivals_onnx, rivals_openvino, rivals_torch, zoo
from bigops.benches.models.agreement import Agreement, wrong
from bigops.benches.models.side import Make, Side, quiet
from bigops.benches.models.subject import Subject
from bigops.benches.rows import is_own
from bigops.graph.deploy.deployed import Deployed

ALONE_SECONDS = 0.3  # of a run of calls with no other side between them
ALONE_ROUNDS = 7
WALL, CPU = "wall", "cpu"
RIVAL = "openvino int8"  # the faster of its forms that start so is what ours is held against


@dataclass(frozen=True)
class ModelRow:
    """One provider of one model. The fields, in this order, are the columns of the CSV.

    ``median_us``, ``spread`` (interquartile range over the median) and the ratios of interleaved
    rounds; ``alone_..`` the same of runs of calls with no other side between them. A ratio is the
    other's time over this provider's, with its 95% interval: above 1 this one is faster. ``rival``
    is the int8 form of OpenVINO that ``ratio_to_rival`` means, "" where it is not installed.
    ``clock``: time on the wall, or that of the CPU, for one thread on a machine that others use.
    ``cosine`` and ``argmax`` are against the float32 model (of a sparse side: the pruned one).
    ``kinds`` is the time by kind of operator where torch's profiler sees it.
    """

    op: str
    model: str
    inputs: str
    provider: str
    isa: str
    threads: int
    clock: str
    median_us: float
    spread: float
    ratio_to_eager: float
    ratio_low: float
    ratio_high: float
    rival: str
    ratio_to_rival: float | None
    rival_low: float | None
    rival_high: float | None
    alone_us: float
    alone_to_eager: float
    alone_to_rival: float | None
    alone_low: float | None
    alone_high: float | None
    best_rival: str
    cosine: float
    argmax: float | None
    accuracy: str
    accuracy_value: float | None
    nbytes: int | None
    kinds: str
    versions: str

    @property
    def case_key(self) -> str:
        """What rows of the same model and shape share, and no others."""
        return f"{self.model} {self.inputs}"


def makers(decode: bool) -> dict[str, Make]:
    """All sides by name, ours first."""
    return {
        **own.makers(decode),
        **rivals_torch.makers(),
        **rivals_onnx.makers(),
        **rivals_openvino.makers(decode),
    }


def chosen(names: Sequence[str], decode: bool) -> dict[str, Make]:
    """The sides whose name has one of ``names`` in it, and eager; no names: all.

    Raises:
        ValueError: a name that no side has.
    """
    every = makers(True)
    for name in names:
        if not any(name in side for side in every):
            raise ValueError(f"side: expected a part of {', '.join(every)}; got {name!r}")
    return {
        side: make
        for side, make in makers(decode).items()
        if side == EAGER or not names or any(name in side for name in names)
    }


def run(
    models: Sequence[str],
    *,
    sides: Sequence[str] = (),
    pairs: int = timing.MIN_PAIRS,
    accuracy: bool = True,
    clock: str = WALL,
) -> Iterator[list[ModelRow]]:
    """Measure models; the rows of a model and shape come together.

    Raises:
        ValueError: no such model, side or clock; or more threads than the clock can tell apart.
    """
    if clock not in (WALL, CPU):
        raise ValueError(f"clock: expected {WALL} or {CPU}, got {clock!r}")
    if clock == CPU and torch.get_num_threads() != 1:
        # a pool that spins while it waits burns CPU time, too
        raise ValueError(f"clock: expected one thread with cpu, got {torch.get_num_threads()}")
    for name in models:
        zoo.makers(name)
    chosen(sides, True)
    for name in models:
        for subject in zoo.subjects(name):
            yield of_subject(subject, chosen(sides, subject.decode), pairs, accuracy, clock)


def of_subject(
    subject: Subject,
    makes: Mapping[str, Make],
    pairs: int,
    accuracy: bool = True,
    clock: str = WALL,
) -> list[ModelRow]:
    """Make the sides, compare their outputs, and time them."""
    torch.compiler.reset()
    # the sides that compile share the code object of the model's forward
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        ready = dict(made(subject, makes))
        calls = {name: call_of(side, subject) for name, (side, _) in ready.items()}
        idle = any(side.own_pool for side, _ in ready.values())
        timers = {name: cpu_timer(call) for name, call in calls.items()} if clock == CPU else {}
        mixed = timing.interleave(calls, pairs=pairs, idle=idle, remote=timers)
        alone = timing.interleave(
            calls,
            pairs=min(pairs, ALONE_ROUNDS),
            sample_seconds=ALONE_SECONDS,
            warmup=0,
            idle=idle,
            remote=timers,
        )
        worth = {
            name: subject.accuracy.of(side.call) if subject.accuracy and accuracy else None
            for name, (side, _) in ready.items()
        }
        by_kind = {
            name: kinds.text(kinds.shares(seen)) if (seen := profiled(side, subject)) else ""
            for name, (side, _) in ready.items()
        }
    return [
        _row(subject, *ready[name], mixed, alone, worth[name], by_kind[name], clock)
        for name in ready
    ]


def call_of(side: Side, subject: Subject) -> Callable[[], object]:
    """The side on the subject's own inputs."""
    return lambda: side.call(*subject.inputs)


def profiled(side: Side, subject: Subject) -> Callable[[], object] | None:
    """A call whose operators the profiler sees: of a deployed model, its graph run by Python."""
    if isinstance(side.module, Deployed):
        graph, leaves = side.module.graph, side.module.signature.leaves(subject.inputs, {})
        return lambda: graph(*leaves)
    return None if side.module is None else call_of(side, subject)


def cpu_timer(call: Callable[[], object]) -> Callable[[int], float]:
    """What gives the CPU seconds of so many calls: what other processes take is not in them."""

    def seconds(calls: int) -> float:
        start = time.process_time()
        for _ in range(calls):
            call()
        return time.process_time() - start

    return seconds


def made(
    subject: Subject, makes: Mapping[str, Make]
) -> Iterator[tuple[str, tuple[Side, Agreement]]]:
    """The sides that can be made and compute the model; the others are left out by name.

    A side that fails, ours too, is said and left out: the minutes that the others took count.
    """
    expected = subject.model(*subject.inputs).float()
    for name, make in makes.items():
        print(f"bench: {subject.title}: {name}", file=sys.stderr, flush=True)
        try:
            with quiet():
                side = make(subject)
                out = side.call(*subject.inputs).float().clone()
        except LeftOut as reason:
            say_once(str(reason))
            continue
        except Exception as failure:
            if name == EAGER:
                raise
            say_once(f"{subject.title}: {name} FAILED: {type(failure).__name__}: {failure!s:.200}")
            continue
        truth = expected if side.reference is None else side.reference(*subject.inputs).float()
        agreement = Agreement.of(out, truth, subject.classes)
        if wrong(agreement) and not (is_own(name) or name == EAGER):
            say_once(f"{subject.title}: {name} left out: cosine {agreement.cosine:.2f}")
            continue
        yield name, (side, agreement)
        gc.collect()


def _row(
    subject: Subject,
    side: Side,
    agreement: Agreement,
    mixed: Mapping[str, timing.Samples],
    alone: Mapping[str, timing.Samples],
    worth: float | None,
    by_kind: str,
    clock: str,
) -> ModelRow:
    name = side.provider
    rivals = [other for other in mixed if not is_own(other)]
    best = min(rivals, key=lambda other: timing.median(mixed[other]))
    int8 = [other for other in rivals if other.startswith(RIVAL)]
    rival = min(int8, key=lambda other: timing.median(mixed[other])) if int8 else ""
    to_eager = timing.speedup(mixed[EAGER], mixed[name])
    to_rival = timing.speedup(mixed[rival], mixed[name]) if rival else None
    alone_rival = timing.speedup(alone[rival], alone[name]) if rival else None
    return ModelRow(
        op="models",
        model=subject.name,
        inputs=subject.shape,
        provider=name,
        isa=side.isa,
        threads=torch.get_num_threads(),
        clock=clock,
        median_us=timing.median(mixed[name]) * 1e6,
        spread=timing.spread(mixed[name]),
        ratio_to_eager=to_eager.value,
        ratio_low=to_eager.low,
        ratio_high=to_eager.high,
        rival=rival,
        ratio_to_rival=to_rival and to_rival.value,
        rival_low=to_rival and to_rival.low,
        rival_high=to_rival and to_rival.high,
        alone_us=timing.median(alone[name]) * 1e6,
        alone_to_eager=timing.speedup(alone[EAGER], alone[name]).value,
        alone_to_rival=alone_rival and alone_rival.value,
        alone_low=alone_rival and alone_rival.low,
        alone_high=alone_rival and alone_rival.high,
        best_rival=best,
        cosine=agreement.cosine,
        argmax=agreement.argmax,
        accuracy=subject.accuracy.what if subject.accuracy and worth is not None else "",
        accuracy_value=worth,
        nbytes=side.nbytes,
        kinds=by_kind,
        versions=versions(),
    )


def versions() -> str:
    """What ran, in one field without commas."""
    from importlib import metadata

    found = [f"bigops={bigops.__version__}", f"torch={torch.__version__}"]
    for package in ("openvino", "nncf", "onnxruntime", "torchao", "transformers"):
        try:
            found.append(f"{package}={metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return " ".join([*found, f"python={platform.python_version()}"])


def table(rows: Sequence[ModelRow]) -> str:
    """The rows of one model as text for a terminal."""
    first = rows[0]
    lines = [
        f"\n{first.case_key} ({first.threads} threads, {first.clock} time; "
        f"vs ov: {first.rival or 'not installed'})",
        f"  {'provider':<28}{'ms':>9}{'vs eager (95%)':>20}{'vs ov (95%)':>20}{'alone ms':>10}"
        f"{'vs ov (95%)':>20}{'cosine':>8}{'argmax':>8}{'MB':>8}  isa",
    ]
    for row in rows:
        size = "" if row.nbytes is None else f"{row.nbytes / 1e6:.1f}"
        same = "" if row.argmax is None else f"{row.argmax:.1%}"
        lines.append(
            f"  {row.provider:<28}{row.median_us / 1e3:>9.2f}"
            f"{_ratio(row.ratio_to_eager, row.ratio_low, row.ratio_high):>20}"
            f"{_ratio(row.ratio_to_rival, row.rival_low, row.rival_high):>20}"
            f"{row.alone_us / 1e3:>10.2f}"
            f"{_ratio(row.alone_to_rival, row.alone_low, row.alone_high):>20}"
            f"{row.cosine:>8.4f}{same:>8}{size:>8}  {row.isa}"
            + (f"  {row.accuracy} {row.accuracy_value:.2f}" if row.accuracy else "")
        )
    lines += [f"  {row.provider}: {row.kinds}" for row in rows if row.kinds]
    return "\n".join(lines)


def _ratio(value: float | None, low: float | None, high: float | None) -> str:
    return "" if value is None else f"{value:.2f} ({low:.2f}-{high:.2f})"
