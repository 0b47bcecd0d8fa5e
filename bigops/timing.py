"""Timing that survives a noisy machine: sides interleaved in one process, judged by their ratio.

Absolute times drift from minute to minute on a shared host; the ratio of two calls made right
after each other does not. So every side is sampled once a round, in an order that rotates, and a
ratio is the median over rounds with a bootstrap interval. Benchmarks and receipts share this file.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

MIN_PAIRS = 30
FLUSH = 256 << 20  # bytes: past the largest L2 cache (126 MB on sm_100), 80 us at 3 TB/s
Samples = np.ndarray[Any, np.dtype[np.float64]]


class Ratio(NamedTuple):
    """A speed-up with its 95% interval: above 1 the candidate is the faster one."""

    value: float
    low: float
    high: float


def wait_idle(limit: float = 0.25, window: float = 0.005) -> bool:
    """Sleep until this process burns no CPU time, at most ``limit`` seconds.

    Thread pools go on spinning after a call (libgomp about 10 ms, onnxruntime 20-35 ms) and would
    steal cores from the next side, so a comparison across pools waits for them.

    Returns:
        True once two windows in a row were quiet, False if the limit came first.
    """
    end = time.perf_counter() + limit
    quiet = 0
    while time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(window)
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        quiet = quiet + 1 if busy < 0.2 else 0
        if quiet == 2:
            return True
    return False


def _timer(call: Callable[[], object], sync: Callable[[], object]) -> Callable[[int], float]:
    """A function that gives the seconds of so many calls in this process."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        sync()
        return time.perf_counter() - start

    return seconds


def _calls_per_sample(seconds: Callable[[int], float], floor: float) -> int:
    """How many calls one sample needs to last ``floor`` seconds."""
    calls = 1
    while calls < 1 << 16:
        took = seconds(calls)
        if took >= floor:
            break
        calls = max(calls * 2, min(calls * 16, int(calls * floor / max(took, 1e-9))))
    return calls


def interleave(
    sides: Mapping[str, Callable[[], object]],
    *,
    pairs: int = MIN_PAIRS,
    sample_seconds: float = 2e-3,
    warmup: int = 3,
    idle: bool = False,
    sync: Callable[[], object] = lambda: None,
    remote: Mapping[str, Callable[[int], float]] | None = None,
) -> dict[str, Samples]:
    """Time every side once per round, in rotating order.

    Args:
        sides: name -> call without arguments. At least one.
        pairs: rounds; every round gives one sample of every side.
        sample_seconds: a sample repeats its call until it lasts at least about this long.
        warmup: untimed calls of each side before the first round.
        idle: wait for spinning thread pools before each sample; for sides that own other pools.
        sync: called before the clock is read (``torch.cuda.synchronize`` for a GPU).
        remote: sides that run in another process: name -> function that has so many calls made
            there and gives the seconds they took by that process's clock. Their call in ``sides``
            is not used.

    Returns:
        name -> float64 array of shape ``[pairs]``, seconds per call; equal positions are the same
        round, so ratios are taken element by element.

    Raises:
        ValueError: no side, or fewer than one round.
    """
    if not sides:
        raise ValueError("sides: expected at least one call to time, got none")
    if pairs < 1:
        raise ValueError(f"pairs: expected at least 1, got {pairs}")
    remote = remote or {}
    calls: dict[str, int] = {}
    timers: dict[str, Callable[[int], float]] = {}
    for name, call in sides.items():
        timers[name] = seconds = remote.get(name) or _timer(call, sync)
        if warmup:
            seconds(warmup)
        calls[name] = _calls_per_sample(seconds, sample_seconds)
    names = list(sides)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(pairs):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                if idle:
                    wait_idle()
                    # An untimed sample: for its first 2 ms after a sleep a call takes up to 0.7 ms
                    # more, until pools are awake and the clock is up, which is no part of it.
                    timers[name](calls[name])
                elif name not in remote:
                    sides[name]()  # wakes this side's own pool and warms what it may keep in cache
                    sync()
                samples[name].append(timers[name](calls[name]) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return {name: np.asarray(values) for name, values in samples.items()}


class Event(Protocol):
    """A point in the work of a device, as `torch.cuda.Event(enable_timing=True)`."""

    def record(self) -> object:
        """Stand behind the work that was queued so far."""

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from here to ``end``, once the device has passed both."""


def interleave_events(
    sides: Mapping[str, Callable[[], object]],
    *,
    pairs: int = MIN_PAIRS,
    warmup: int = 3,
    flush: Callable[[], object] | None = None,
    event: Callable[[], Event] | None = None,
    sync: Callable[[], object] | None = None,
    device: torch.device | str = "cuda",
) -> dict[str, Samples]:
    """`interleave` by a GPU's own clock: each side once per round, in rotating order.

    A call stands between two events, behind a write past the L2 cache: that makes every call start
    from memory, and lasts long enough for the call to be queued before the device comes to it, so
    that the time of a launch on the CPU is not in the sample unless it exceeds the write.

    Args:
        sides: name -> call without arguments. At least one.
        pairs: rounds; every round gives one sample of every side.
        warmup: untimed calls of each side before the first round.
        flush: the write; by default zeros into `FLUSH` bytes.
        event: makes a timing event; by default CUDA's.
        sync: waits for the device; by default CUDA's.
        device: where the default flush writes; it must be the current one.

    Returns:
        name -> float64 array of shape ``[pairs]``, seconds of one call, as of `interleave`.

    Raises:
        ValueError: no side, or fewer than one round.
    """
    if not sides:
        raise ValueError("sides: expected at least one call to time, got none")
    if pairs < 1:
        raise ValueError(f"pairs: expected at least 1, got {pairs}")
    event = event or functools.partial(torch.cuda.Event, enable_timing=True)
    sync = sync or torch.cuda.synchronize
    if flush is None:
        flush = torch.empty(FLUSH, dtype=torch.int8, device=device).zero_
    for call in sides.values():
        for _ in range(warmup):
            call()
    names = list(sides)
    marks: dict[str, list[tuple[Event, Event]]] = {name: [] for name in names}
    sync()
    for turn in range(pairs):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start, end = event(), event()
            flush()
            start.record()
            sides[name]()
            end.record()
            marks[name].append((start, end))
    sync()
    return {
        name: np.asarray([start.elapsed_time(end) * 1e-3 for start, end in of])
        for name, of in marks.items()
    }


def median(samples: Samples) -> float:
    """Median in seconds."""
    return float(np.median(samples))


def spread(samples: Samples) -> float:
    """Interquartile range as a fraction of the median."""
    low, high = np.percentile(samples, [25, 75])
    return float((high - low) / np.median(samples))


def speedup(reference: Samples, candidate: Samples, resamples: int = 2000) -> Ratio:
    """reference time / candidate time over paired samples, with its 95% bootstrap interval.

    The median of the per-round ratios; the interval is the percentile bootstrap over rounds, from
    a fixed seed, so one set of samples always gives one answer.

    Raises:
        ValueError: the two were not sampled in the same rounds.
    """
    if reference.shape != candidate.shape or reference.ndim != 1 or not reference.size:
        raise ValueError(
            f"speedup: expected paired samples of one length, got {reference.shape} and "
            f"{candidate.shape}"
        )
    ratios = reference / candidate
    draws = np.random.default_rng(0).integers(0, ratios.size, (resamples, ratios.size))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))
