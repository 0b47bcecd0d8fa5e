"""Where the time of a call goes, by kind of operator, as torch's profiler counts it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# The first that matches an operator's name; what none matches is "other".
KINDS = {
    "attention": r"scaled_dot_product|attention|softmax|flash",
    "product": r"linear|addmm|\bmm\b|\bbmm\b|baddbmm|matmul|convolution|conv\d?d|mkldnn|onednn",
    "norm": r"norm|\bmean\b|\brsqrt\b|\bpow\b|\bvar",
    "activation": r"gelu|silu|relu|tanh|sigmoid|\berf",
    "add": r"::(add|sub|mul|div|neg|sum|where|masked_fill)",
    "copy": r"copy|clone|::_?to\b|contiguous|::cat|index|embedding|slice|expand|quantize",
}
PYTHON = "python"
OTHER = "other"


def kind(name: str) -> str:
    """The kind of an operator, such as ``aten::addmm`` or ``bigops::quantized_linear``."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)


def shares(call: Callable[[], object], calls: int = 5) -> dict[str, float]:
    """The share of a call's time by kind; ``python`` is what no operator accounts for.

    The profiler's own cost of about a microsecond an operator counts as the operator's or as
    python's, so small models look more like python than they are.
    """
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wall = time.perf_counter() - start
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in profiler.key_averages():
        found[kind(event.key)] += event.self_cpu_time_total * 1e-6 / wall
    found[PYTHON] = max(0.0, 1.0 - sum(found.values()))
    return {name: share for name, share in found.items() if share >= 0.0005}


def text(found: dict[str, float]) -> str:
    """The shares in one field, the largest first: ``product=61% attention=12%``."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return " ".join(f"{name}={share:.0%}" for name, share in ordered)
