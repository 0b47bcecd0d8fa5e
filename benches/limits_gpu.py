"""What a GPU can do at most, measured by torch's own products and copies at the start of a run.

A product of `SIZE` cubed is past what tiles and waves can spoil, and cuBLAS is what a peak in
practice means; the data sheet's number is not reached under power limits. Random inputs: zeros
switch fewer transistors and clock higher.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from bigops import timing
from bigops.kernels.common.tiles import device_arch

SIZE = 8192
COPIED = 1 << 30  # bytes, past every L2 cache
ROUNDS = 20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Timer = Callable[[Mapping[str, Callable[[], object]]], Mapping[str, float]]


def name(device: torch.device) -> str:
    """The device as the rows have it: its name and architecture, without commas."""
    return f"{torch.cuda.get_device_name(device)} {device_arch(device)}".replace(",", " ")


def measure(
    device: torch.device, timer: Timer | None = None, size: int = SIZE, copied: int = COPIED
) -> tuple[dict[str, float], float]:
    """(peak of each unit in operations per second, bandwidth in byte/s).

    A limit is of the fastest of `ROUNDS` calls: what disturbs a call can only make it look lower.
    A unit that this GPU or torch does not have is left out.
    """
    peaks: dict[str, float] = {}
    for unit in (*DTYPES, "int8"):
        try:
            call = _product(unit, device, size)
            call()
        except RuntimeError:  # no such unit, or no kernel of torch for it
            continue
        peaks[unit] = 2.0 * size**3 / (timer or _fastest)({unit: call})[unit]
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    seconds = (timer or _fastest)({"copy": lambda: target.copy_(source)})["copy"]
    return peaks, 2.0 * copied / seconds


def _product(unit: str, device: torch.device, size: int) -> Callable[[], Tensor]:
    if unit == "int8":
        a, b = (
            torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in "ab"
        )
        return lambda: torch._int_mm(a, b.t())
    x, y = (torch.randn(size, size, device=device).to(DTYPES[unit]) for _ in "xy")
    return lambda: x @ y.t()


def _fastest(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    samples = timing.interleave_events(calls, pairs=ROUNDS)
    return {name: float(of.min()) for name, of in samples.items()}
