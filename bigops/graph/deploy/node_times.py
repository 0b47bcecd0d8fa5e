"""What each call of a deployed graph takes, and which of them no pass took."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

# What makes another view of a tensor, or a number of it: there is nothing to compute.
_VIEWS = (
    "alias",
    "expand",
    "permute",
    "reshape",
    "select",
    "slice",
    "split",
    "squeeze",
    "sym_size",
    "t",
    "transpose",
    "unsqueeze",
    "view",
    "getitem",
)


@dataclass(frozen=True)
class NodeTime:
    """One call of a graph: its median time in microseconds over several runs."""

    name: str
    op: str
    shape: list[int] | None  # of its result
    us: float
    ours: bool  # an op of this package
    view: bool

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" {self.shape}"
        return f"{self.us:8.1f} us  {self.op}{shape} ({self.name})"


@dataclass(frozen=True)
class Times:
    """The calls of a graph in their order; print it for those that no pass took, slowest first."""

    calls: list[NodeTime]

    @property
    def us(self) -> float:
        """All calls, one by one: without what Python does between them."""
        return sum(call.us for call in self.calls)

    def left(self) -> list[NodeTime]:
        """Calls that compute something and are no op of this package, the slowest first."""
        found = [call for call in self.calls if not (call.ours or call.view)]
        return sorted(found, key=lambda call: -call.us)

    def by_op(self) -> dict[str, float]:
        """Microseconds of all calls of each op, the slowest first."""
        found: dict[str, float] = {}
        for call in self.calls:
            found[call.op] = found.get(call.op, 0.0) + call.us
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        left = self.left()
        share = sum(call.us for call in left) / (self.us or 1.0)
        lines = [
            f"{len(self.calls)} calls, {self.us:.0f} us; {len(left)} of them compute and are left "
            f"to torch, {share:.1%} of the time"
        ]
        return "\n  ".join([*lines, *map(str, left)])


def measure(graph: fx.GraphModule, leaves: list[Any], runs: int) -> Times:
    """Run a graph call by call."""
    clock = _Clock(graph)
    with torch.no_grad():
        clock.run(*leaves)  # what is made in a first call is no part of it
        clock.seconds.clear()
        for _ in range(runs):
            clock.run(*leaves)
    calls = []
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        op = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.name
        short = getattr(node.target, "_opname", None) or node.target.__name__
        calls.append(
            NodeTime(
                node.name,
                op,
                clock.shapes.get(node.name),
                statistics.median(clock.seconds[node.name]) * 1e6,
                op.startswith("bigops."),
                short in _VIEWS,
            )
        )
    return Times(calls)


class _Clock(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seconds: dict[str, list[float]] = {}
        self.shapes: dict[str, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        start = time.perf_counter()
        result = getattr(self, n.op)(n.target, args, kwargs)
        self.seconds.setdefault(n.name, []).append(time.perf_counter() - start)
        if isinstance(result, Tensor):
            self.shapes[n.name] = list(result.shape)
        return result
