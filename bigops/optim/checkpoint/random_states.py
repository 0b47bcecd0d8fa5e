"""The random states of a process: torch's on the CPU and on each GPU, numpy's and Python's."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bigops.files import FormatError


def capture(*, gpus: bool = True) -> dict[str, Any]:
    """All of them, as they are now."""
    # get_rng_state_all initialises CUDA, which a CPU run must not pay for.
    cuda = torch.cuda.get_rng_state_all() if gpus and torch.cuda.is_initialized() else []
    return {
        "cpu": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def restore(states: dict[str, Any]) -> None:
    """Set what `check` found right; GPUs only where there are as many as there were."""
    torch.set_rng_state(states["cpu"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    if "numpy" in states:  # older files have torch's alone
        np.random.set_state(states["numpy"])
    if "python" in states:
        random.setstate(states["python"])


@contextlib.contextmanager
def kept(*, gpus: bool = True) -> Iterator[None]:
    """What is drawn in the block is not missing behind it."""
    before = capture(gpus=gpus)
    try:
        yield
    finally:
        restore(before)


def check(where: str, states: Any) -> None:
    """Raise FormatError unless generators take these states, which they would keep half of."""
    try:
        torch.Generator().set_state(states["cpu"].cpu())
        for state in states["cuda"]:
            if not isinstance(state, torch.Tensor):
                raise TypeError(f"cuda: {type(state).__name__}")
            if torch.cuda.is_available():
                torch.Generator("cuda").set_state(state.cpu())
        if "numpy" in states:
            np.random.RandomState().set_state(states["numpy"])
        if "python" in states:
            random.Random().setstate(states["python"])
    except Exception as error:
        raise FormatError(
            f"{where}: expected random states of torch, numpy and Python; got others ({error})"
        ) from None


def derived(states: dict[str, Any], rank: int) -> dict[str, Any]:
    """States for a rank that has none of its own, out of those of another one."""
    seed = zlib.crc32(states["cpu"].numpy().tobytes(), rank)
    cuda = [torch.Generator("cuda").manual_seed(seed).get_state() for _ in states["cuda"]]
    return {
        "cpu": torch.Generator().manual_seed(seed).get_state(),
        "cuda": cuda if torch.cuda.is_available() else [],
        "numpy": np.random.RandomState(seed).get_state(legacy=False),
        "python": random.Random(seed).getstate(),
    }
