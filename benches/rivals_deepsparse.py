"""DeepSparse 1.8 as a side of a sparse case: a worker process that times what it is told.

`benches/deepsparse/install.py` makes its environment, `benches/deepsparse/worker.py` says the
protocol. Rounds alternate between this process and the worker, so drift slows both alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigops.benches import harness
from bigops.benches.harness import LeftOut, Side
from bigops.benches.limits import Cost
from bigops.benches.rivals import Layer

FOLDER = Path(__file__).resolve().parent / "deepsparse"
PYTHON = FOLDER.parents[1] / "build" / "deepsparse-env" / "bin" / "python"


class Worker:
    """A process that answers one JSON line to each JSON line.

    Raises:
        LeftOut: it ended before it was ready.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
        )
        try:
            self._answer()
        except RuntimeError as error:
            raise LeftOut(f"deepsparse: {error}") from None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the worker has ended; the message holds the end of its stderr.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; the missing answer says so
            self._process.stdin.write(json.dumps(request) + "\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["it said nothing"]
            self.close()
            raise RuntimeError(f"the worker ended: {last[0]:.200}")
        return dict(json.loads(line))

    def close(self) -> None:
        """End the process; a second call does nothing."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a line that it never read
                    pipe.close()  # the end of its stdin is its sign to leave
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def deepsparse(layer: Layer) -> Side:
    """The product ``x W^T`` in fp32 on a pruned weight.

    Bias and activation are not in its clock, only in the output that is checked: ours does them
    within its time.

    Raises:
        LeftOut: its environment was not made, or the engine does not start.
    """
    if not PYTHON.exists():
        raise LeftOut("deepsparse: no environment (python3.11 benches/deepsparse/install.py)")
    kept = int(layer.weight.count_nonzero())
    copies = math.ceil(harness.PAST_CACHE / max(1, 4 * kept)) if layer.case.rotate else 1
    command = [str(PYTHON), str(FOLDER / "worker.py")]
    return side(layer, command, copies)


def side(layer: Layer, command: Sequence[str], copies: int) -> Side:
    """A worker on a folder with the case's tensors, and the side that asks it."""
    folder = tempfile.TemporaryDirectory(prefix="bigops-deepsparse-")
    path = Path(folder.name)
    np.save(path / "x.npy", layer.x.float().numpy())
    np.save(path / "weight.npy", layer.weight.float().numpy())
    try:
        worker = Worker([*command, str(path), str(copies), str(torch.get_num_threads())])
    except LeftOut:
        folder.cleanup()
        raise

    def call() -> Tensor:
        worker.ask(save=str(path / "y.npy"))
        y = torch.from_numpy(np.load(path / "y.npy"))
        return layer.finish(y if layer.bias is None else y + layer.bias)

    def close() -> None:
        worker.close()
        folder.cleanup()

    kept = int(layer.weight.count_nonzero())
    dense = layer.cost("fp32", 4.0 * kept)
    return Side(
        "deepsparse",
        call,
        # the useful work only, that of the weights kept
        Cost("fp32", dense.flops * kept / layer.weight.numel(), dense.nbytes),
        "deepsparse 1.8.0",
        own_pool=True,
        seconds=lambda count: float(worker.ask(go=count)["seconds"]),
        close=close,
    )
