"""DeepSparse in a process of its own: builds sparse products, and times as many as it is told.

    python worker.py FOLDER COPIES THREADS

FOLDER holds ``x.npy`` [M, K] and ``weight.npy`` [N, K], both float32, the weight with its zeros;
COPIES engines are built and called in turn, so that weights come from DRAM where the parent's do.
Then one JSON object a line, on stdin and stdout:

    (start)              -> {"ready": true}
    {"go": n}            -> {"seconds": s}      n calls took s seconds; sent once threads are idle
    {"save": "y.npy"}    -> {"saved": "y.npy"}  the output [M, N] of one call
    (end of stdin)       -> the process leaves

By hand, for one table of times without bigops (sparsity in percent, M): ``worker.py --table``.
This file is run by another Python than bigops's and imports nothing of it.
"""

import itertools
import json
import os
import sys
import time

import numpy as np


def build(weight, rows, threads, folder):
    """An engine for ``x W^T`` with ``rows`` rows, from a weight [N, K]."""
    import deepsparse
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    n, k = weight.shape
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "sparse_linear",
        [value("x", TensorProto.FLOAT, [rows, k])],
        [value("y", TensorProto.FLOAT, [rows, n])],
        [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8  # what the engine of 2024 reads
    path = os.path.join(folder, "model.onnx")
    onnx.save(model, path)
    return deepsparse.Engine(model=path, batch_size=rows, num_cores=threads)


def timed(call, count):
    """Seconds of ``count`` calls, after one that wakes the engine's threads."""
    call()
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def wait_idle(limit=0.25, window=0.005):
    """Sleep until this process burns no CPU time: its threads spin on after a call."""
    end = time.perf_counter() + limit
    quiet = 0
    while quiet < 2 and time.perf_counter() < end:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(window)
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        quiet = quiet + 1 if busy < 0.2 else 0


def serve(call, replies, requests):
    """Answer each request line until there are no more."""

    def answer(message):
        print(json.dumps(message), file=replies, flush=True)

    answer({"ready": True})
    for line in requests:
        request = json.loads(line)
        if "go" in request:
            seconds = timed(call, request["go"])
            wait_idle()
            answer({"seconds": seconds})
        else:
            np.save(request["save"], call())
            wait_idle()
            answer({"saved": request["save"]})


def table(size=4096, threads=2):
    """Print median microseconds at 50, 80, 90, 95% for M = 1, 16, 128 as one JSON object."""
    import tempfile

    random, times = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        for percent in (50, 80, 90, 95):
            weight = random.standard_normal((size, size)).astype(np.float32)
            weight[random.random((size, size)) < percent / 100] = 0
            for rows in (1, 16, 128):
                x = [random.standard_normal((rows, size)).astype(np.float32)]
                count = max(2, 134217728 // int(8 * np.count_nonzero(weight)))
                engines = [build(weight, rows, threads, folder) for _ in range(count)]
                take = itertools.cycle(engines)
                samples = [timed(lambda: next(take).run(x), 1) for _ in range(30)]  # noqa: B023
                times[f"{percent}% M={rows}"] = round(float(np.median(samples)) * 1e6)
    print(json.dumps(times))


def main():
    """Serve one folder, or print the table."""
    os.environ["NM_DISABLE_ANALYTICS"] = "True"  # the engine's own switch: it sends no usage data
    if sys.argv[1:] == ["--table"]:
        return table()
    folder, copies, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine prints a banner on stdout
    x = [np.load(os.path.join(folder, "x.npy"))]
    weight = np.load(os.path.join(folder, "weight.npy"))
    engines = [build(weight, len(x[0]), threads, folder) for _ in range(copies)]
    take = itertools.cycle(engines)
    serve(lambda: next(take).run(x)[0], replies, sys.stdin)
    return None


if __name__ == "__main__":
    main()
