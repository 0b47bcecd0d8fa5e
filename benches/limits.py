"""What this machine can do at most, measured at the start of a bench run.

The peak of each arithmetic unit and the bandwidth come from the extension's meters, those of a GPU
from torch's products (limits_gpu.py); where they are missing (a pure Python install, a unit that a
device lacks) a limit is unknown and the rows say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from bigops.backend import machine
from bigops.benches import limits_gpu

UNITS = {"fp32": "f32", "bf16": "bf16", "int8": "s8"}  # our name -> the meter's
DRAM_BYTES = 128 << 20  # per thread
TRIES = 5


@dataclass(frozen=True)
class Cost:
    """What a provider cannot avoid in one call: the limit is computed from it."""

    unit: str  # arithmetic unit it uses: fp32, bf16, fp16, int8
    flops: float
    nbytes: float


@dataclass(frozen=True)
class Limits:
    """Peaks in FLOP/s (int8: operations per second) and DRAM bandwidth in byte/s, all threads."""

    isa: str = "none"
    threads: int = 1
    peaks: dict[str, float] = field(default_factory=dict)
    dram: float | None = None
    device: str = "cpu"  # what they are of; ``isa`` is its name and architecture for a GPU

    @classmethod
    def measure(cls, device: str = "cpu") -> Limits:
        """Run the meters (about two seconds) with as many threads as torch uses.

        A limit is the best of a few tries: a neighbour on the machine can only make it look lower.
        """
        extension = machine.extension
        threads = torch.get_num_threads()
        if device != "cpu":
            there = torch.device(device)
            return cls(limits_gpu.name(there), threads, *limits_gpu.measure(there), device)
        if extension is None:
            return cls(threads=threads)
        peaks: dict[str, float] = {}
        for unit, kind in UNITS.items():
            try:
                peaks[unit] = max(extension.peak(kind, threads) for _ in range(TRIES))
            except ValueError:  # this CPU, or the forced instruction set, has no such unit
                continue
        dram = max(extension.bandwidth(DRAM_BYTES, threads) for _ in range(TRIES))
        return cls(extension.isa(), threads, peaks, dram)

    def floor_seconds(self, cost: Cost, from_dram: bool, device: str = "cpu") -> float | None:
        """The least time that a call can take: its arithmetic or its bytes, whichever binds.

        Bytes count only where the case reads them from DRAM. None where the limit that it takes
        was not measured.
        """
        if device != self.device or cost.unit not in self.peaks:
            return None
        compute = cost.flops / self.peaks[cost.unit]
        if not from_dram:
            return compute
        return None if self.dram is None else max(compute, cost.nbytes / self.dram)

    def __str__(self) -> str:
        units = " ".join(f"{u} {self.peaks[u] / 1e9:.0f} G/s" for u in self.peaks)
        dram = f"DRAM {self.dram / 1e9:.1f} GB/s" if self.dram else "DRAM unknown"
        return f"limits ({self.isa}, {self.threads} threads): {units or 'peaks unknown'}; {dram}"
