"""A model as a server runs it: any length, several threads at once, fresh processes.

Requests are one row of 8 to 256 tokens, drawn evenly from a seed, the same for all sides. Threads
ask in a closed loop: each sends its next request when it has its answer. Latency is that of a
request; a side's pool is quiet before its round begins, and rounds of the sides alternate.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bigops import timing
from bigops.benches.harness import EAGER, OWN, LeftOut, say_once
from bigops.benches.models import own, rivals_onnx, rivals_openvino, serve_process, zoo
from bigops.benches.models.measure import versions
from bigops.benches.models.side import inference, quiet
from bigops.benches.models.subject import Call, Inputs, Subject, resized

LENGTHS = (8, 256)
THREADS = (1, 4, 16)
ROUNDS = 3
WORKERS = 4


@dataclass(frozen=True)
class ServeRow:
    """One provider at one number of threads. The fields, in this order, are the columns of the CSV.

    Latencies in milliseconds over all rounds; ``throughput`` in requests a second.
    ``cold_start_s`` is from the start of a fresh process to its first answer, ``workers_mb`` the
    memory of `WORKERS` such processes, shared pages counted once (PSS); both are None where they
    could not be taken.
    """

    op: str
    model: str
    provider: str
    isa: str
    cores: int
    threads: int
    requests: int
    p50_ms: float
    p99_ms: float
    throughput: float
    cold_start_s: float | None
    workers_mb: float | None
    versions: str


Pool = Callable[[int], Callable[[], Call]]
"""(concurrent threads) -> what gives each thread its call."""


@dataclass(frozen=True)
class Server:
    """A provider that serves any length: its calls, and how a fresh process gets at the model."""

    provider: str
    isa: str
    pool: Pool
    process: Sequence[str]  # arguments of `serve_process`
    folder: object = None  # what the process reads; goes with the server


def run(model: str, *, requests: int, rounds: int = ROUNDS) -> Iterator[list[ServeRow]]:
    """Serve the first shape of a model; the rows of a number of threads come together.

    Raises:
        ValueError: no such model, or one that takes no lengths.
    """
    first = zoo.makers(model)[0]
    try:
        subject = first()
    except LeftOut as reason:
        raise ValueError(f"serve: {model}: {reason}") from reason
    resized(subject.inputs, 8)  # raises for a model that takes no lengths
    drawn = drawn_lengths(requests)
    asked = [resized(subject.inputs, length) for length in drawn]
    with torch.no_grad():
        ready = list(servers(subject, model))
        fresh = {one.provider: serve_process.fresh(one.process, WORKERS) for one in ready}
        for threads in THREADS:
            yield list(at(ready, subject, asked, threads, rounds, fresh))


def drawn_lengths(requests: int) -> list[int]:
    """Lengths of the requests, drawn evenly from `LENGTHS` by seed 0."""
    low, high = LENGTHS
    return [int(n) for n in np.random.default_rng(0).integers(low, high + 1, requests)]


def at(
    ready: Sequence[Server],
    subject: Subject,
    asked: Sequence[Inputs],
    threads: int,
    rounds: int,
    fresh: dict[str, tuple[float, float | None] | None],
) -> Iterator[ServeRow]:
    """The servers in turn under so many threads."""
    calls = {one.provider: one.pool(threads) for one in ready}
    latencies: dict[str, list[float]] = {one.provider: [] for one in ready}
    walls = dict.fromkeys(latencies, 0.0)
    for call in calls.values():
        load(call, asked[: 2 * threads], threads)  # not timed
    for turn in range(rounds):
        names = list(calls)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timing.wait_idle()
            took, wall = load(calls[name], asked, threads)
            latencies[name] += took
            walls[name] += wall
    for one in ready:
        p50, p99 = np.percentile(latencies[one.provider], [50, 99]) * 1e3
        cold, memory = fresh[one.provider] or (None, None)
        yield ServeRow(
            op="serve",
            model=subject.name,
            provider=one.provider,
            isa=one.isa,
            cores=torch.get_num_threads(),
            threads=threads,
            requests=len(asked) * rounds,
            p50_ms=float(p50),
            p99_ms=float(p99),
            throughput=len(asked) * rounds / walls[one.provider],
            cold_start_s=cold,
            workers_mb=memory,
            versions=versions(),
        )


def load(
    make: Callable[[], Call], asked: Sequence[Inputs], threads: int
) -> tuple[list[float], float]:
    """Send all requests from so many threads: (seconds of each, seconds of all)."""
    left = iter(asked)
    lock, took, failed = threading.Lock(), [], []
    begin = threading.Barrier(threads + 1)

    def client(call: Call) -> None:
        begin.wait()
        try:
            with torch.no_grad():
                while True:
                    with lock:
                        inputs = next(left, None)
                    if inputs is None:
                        return
                    start = time.perf_counter()
                    call(*inputs)
                    took.append(time.perf_counter() - start)  # list.append is atomic
        except Exception as failure:
            failed.append(failure)

    calls = [make() for _ in range(threads)]
    clients = [threading.Thread(target=client, args=[call], daemon=True) for call in calls]
    for one in clients:
        one.start()
    begin.wait()
    start = time.perf_counter()
    for one in clients:
        one.join()
    if failed:
        raise failed[0]
    return took, time.perf_counter() - start


# --- the servers -------------------------------------------------------------------------------


def servers(subject: Subject, model: str) -> Iterator[Server]:
    """All that can serve the model at any length; the others are left out by name."""
    for make in (eager, ours, ours_deployed, openvino_int8, onnxruntime_int8):
        try:
            with quiet():
                server = make(subject, model)
                one = server.pool(1)()
                for length in (LENGTHS[0], 37, LENGTHS[1]):
                    given = resized(subject.inputs, length)
                    got, want = one(*given), subject.model(*given)
                    if got.shape != want.shape:
                        raise LeftOut(f"{server.provider}: shape {tuple(got.shape)} at {length}")
        except LeftOut as reason:
            say_once(str(reason))
            continue
        except Exception as failure:
            if make in (eager, ours):
                raise
            say_once(f"serve: {make.__name__} left out: {failure!s:.200}")
            continue
        print(f"bench: serve {subject.name}: {server.provider}", file=sys.stderr, flush=True)
        yield server


def share(threads: int) -> int:
    """Cores for each of so many concurrent calls."""
    return max(1, torch.get_num_threads() // threads)


def in_process(call: Call) -> Pool:
    """Calls of one torch module, each with its share of the cores."""

    def pool(threads: int) -> Callable[[], Call]:
        cores = share(threads)

        def client() -> Call:
            def limited(*inputs: torch.Tensor) -> torch.Tensor:
                # of OpenMP a thread's own; set where it is used
                if torch.get_num_threads() != cores:
                    torch.set_num_threads(cores)
                return call(*inputs)

            return limited if threads > 1 else call

        return client

    return pool


def eager(subject: Subject, model: str) -> Server:
    """torch as it is."""
    from bigops.benches.models import isa

    process = ("eager", model)
    return Server(EAGER, isa.onednn(), in_process(inference(subject.model)), process)


def ours(subject: Subject, model: str) -> Server:
    """`compress_(Int8())`, saved by `bigops.save`."""
    made = own.side("int8", own.Int8(), own.as_it_is, subject)
    folder, file = saved(made.module)
    process = ("bigops", model, str(file))
    return Server(f"{OWN} int8", made.isa, in_process(made.call), process, folder)


def saved(module: torch.nn.Module | None) -> tuple[object, Path]:
    """A folder that lives as long as the first result, and the file of `bigops.save` in it."""
    import bigops

    assert module is not None
    folder = tempfile.TemporaryDirectory(prefix="bigops-serve-")
    file = Path(folder.name) / "model.safetensors"
    bigops.save(module, file)
    return folder, file


def ours_deployed(subject: Subject, model: str) -> Server:
    """int8 through `bigops.deploy` at any length.

    Raises:
        LeftOut: this bigops has none.
    """
    made = own.side("deployed int8", own.Int8(), own.deployed_at_any_size, one_row(subject))
    folder, file = saved(made.module)
    process = ("deployed", str(file), str(LENGTHS[1]))
    return Server(f"{OWN} deployed int8", made.isa, in_process(made.call), process, folder)


def openvino_int8(subject: Subject, model: str) -> Server:
    """int8 by NNCF; its hint for latency with one thread, for throughput with more.

    Raises:
        LeftOut: not installed, or it does not take the model.
    """
    from bigops.benches import rivals_openvino as core_of

    single = one_row(subject)
    made = rivals_openvino.int8(single, LENGTHS)
    device, _ = core_of.core()
    import openvino

    folder = tempfile.TemporaryDirectory(prefix="bigops-serve-")
    file = Path(folder.name) / "model.xml"
    openvino.save_model(made, file, compress_to_fp16=False)
    kernels: list[str] = []

    def pool(threads: int) -> Callable[[], Call]:
        cores = {"INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        hint = {"PERFORMANCE_HINT": "THROUGHPUT", **cores} if threads > 1 else core_of.config({})
        ready = device.compile_model(made, "CPU", hint)
        kernels.append(rivals_openvino.used(ready))
        return lambda: rivals_openvino.caller(ready)  # a request of its own for each thread

    pool(1)
    process = ("openvino", str(file), str(LENGTHS[1]))
    return Server("openvino int8", kernels[0], pool, process, folder)


def onnxruntime_int8(subject: Subject, model: str) -> Server:
    """int8 by its dynamic quantiser; one session whose pool all threads share.

    Raises:
        LeftOut: not installed, or it does not take the model.
    """
    from bigops.benches.models import isa

    folder = tempfile.TemporaryDirectory(prefix="bigops-serve-")
    single = one_row(subject)
    file = rivals_onnx.int8_dynamic(rivals_onnx.graph(single, Path(folder.name), LENGTHS), single)

    def pool(threads: int) -> Callable[[], Call]:
        call = rivals_onnx.caller(rivals_onnx.session(file))
        return lambda: call

    process = ("onnxruntime", str(file), str(LENGTHS[1]))
    return Server("onnxruntime int8 dynamic", isa.onnxruntime(), pool, process, folder)


def one_row(subject: Subject) -> Subject:
    """The subject at one row of a length that no size of a model equals by chance."""
    length = 61
    return Subject(
        subject.name,
        subject.model,
        resized(subject.inputs, length),
        [resized(one, length) for one in subject.calibration],
    )


def table(rows: Sequence[ServeRow]) -> str:
    """The rows of one number of threads as text for a terminal."""
    first = rows[0]
    low, high = LENGTHS
    lines = [
        f"\n{first.model}, {low}-{high} tokens, {first.threads} concurrent on {first.cores} cores",
        f"  {'provider':<28}{'p50 ms':>9}{'p99 ms':>9}{'req/s':>9}{'cold s':>8}"
        f"{f'MB of {WORKERS}':>10}  isa",
    ]
    for row in rows:
        cold = "" if row.cold_start_s is None else f"{row.cold_start_s:.2f}"
        memory = "" if row.workers_mb is None else f"{row.workers_mb:.0f}"
        lines.append(
            f"  {row.provider:<28}{row.p50_ms:>9.2f}{row.p99_ms:>9.2f}{row.throughput:>9.1f}"
            f"{cold:>8}{memory:>10}  {row.isa}"
        )
    return "\n".join(lines)
