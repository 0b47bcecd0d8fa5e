"""A fresh process that loads a model and gives one answer, and what several of them hold.

    python -m bigops.benches.models.serve_process eager MODEL
    python -m bigops.benches.models.serve_process bigops MODEL FILE
    python -m bigops.benches.models.serve_process deployed FILE TOKENS
    python -m bigops.benches.models.serve_process openvino|onnxruntime FILE TOKENS

It prints ``ready`` behind its first answer and leaves when its stdin ends. Each kind imports what
it needs and no more: a rival's process has no torch.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

READY = "ready"


def main() -> None:
    """Answer once, say so, wait."""
    kind, *rest = sys.argv[1:]
    KINDS[kind](*rest)
    print(READY, flush=True)
    sys.stdin.read()


def _eager(model: str) -> None:
    import torch

    from bigops.benches.models import zoo

    subject = zoo.makers(model)[0]()
    with torch.inference_mode():
        subject.model(*subject.inputs)


def _bigops(model: str, file: str) -> None:
    import torch

    import bigops
    from bigops.benches.models import zoo

    subject = zoo.makers(model)[0]()
    loaded = bigops.load(file, subject.model)
    with torch.inference_mode():
        loaded(*subject.inputs)


def _deployed(file: str, tokens: str) -> None:
    import torch

    import bigops

    load: Any = bigops.load
    if "mapped" in inspect.signature(load).parameters:  # then the workers share the weights
        load = functools.partial(load, mapped=True)
    loaded = load(file)
    ids = torch.ones(1, int(tokens), dtype=torch.int64)
    with torch.inference_mode():
        try:
            loaded(ids, ids)
        except TypeError:  # a model of ids alone
            loaded(ids)


def _openvino(file: str, tokens: str) -> None:
    import openvino

    ready = openvino.Core().compile_model(file, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    ready(_ids([one.any_name for one in ready.inputs], int(tokens)))


def _onnxruntime(file: str, tokens: str) -> None:
    import onnxruntime

    ready = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    ready.run(None, _ids([one.name for one in ready.get_inputs()], int(tokens)))


def _ids(names: Sequence[str], tokens: int) -> dict[str, Any]:
    import numpy

    return {name: numpy.ones((1, tokens), dtype=numpy.int64) for name in names}


KINDS: dict[str, Callable[..., None]] = {
    "eager": _eager,
    "bigops": _bigops,
    "deployed": _deployed,
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}


# --- the parent's part -------------------------------------------------------------------------


def fresh(arguments: Sequence[str], workers: int) -> tuple[float, float | None] | None:
    """Seconds to the first answer of one fresh process, and MB of so many that have answered.

    The first start fills the page cache and is not the one that is timed. The memory is None where
    Linux does not tell a process's share of its pages; all is None where a process fails.
    """
    command = [sys.executable, "-m", __name__, *arguments]
    print(f"bench: fresh processes: {' '.join(arguments)}", file=sys.stderr, flush=True)
    running: list[subprocess.Popen[str]] = []
    seconds = 0.0
    try:
        for place in range(max(2, workers)):
            begin = time.perf_counter()
            running.append(_started(command))
            if place == 1:
                seconds = time.perf_counter() - begin
        shares = [_pss(one.pid) for one in running]
    except RuntimeError as failure:
        print(f"bench: {' '.join(arguments)}: {failure}", file=sys.stderr)
        return None
    finally:
        for one in running:
            _ended(one)
    return seconds, None if None in shares else sum(filter(None, shares)) / 1e6


def _started(command: Sequence[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if line.strip() == READY:
            return process
    last = process.stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
    _ended(process)
    raise RuntimeError(f"its process ended: {last[0]:.200}")


def _ended(process: subprocess.Popen[str]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        pipe.close()
    process.wait()


def _pss(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("Pss:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024


if __name__ == "__main__":
    main()
