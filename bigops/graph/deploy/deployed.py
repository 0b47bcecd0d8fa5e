"""Deployed: a model as a graph of ops and the tensors that they read, ready to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from bigops import ops  # noqa: F401  (registers the ops that a graph calls)
from bigops.graph.deploy import executor, graph_data, node_times
from bigops.graph.deploy.node_times import Times
from bigops.graph.deploy.signature import Signature
from bigops.nn import fields
from bigops.nn.fields import Field


class Deployed(nn.Module):
    """What `bigops.deploy` makes: it is called as the model was, and needs none of its code.

    Its tensors are buffers, each as the graph reads it: packed, merged, folded. It has no gradients
    and stays in eval. Several threads may call it at once, unless the model itself wrote state of
    its own (a key-value cache among its buffers). From the first call on, glibc keeps up to 256 MB
    of freed memory, which a call would else page in anew (``mallopt``; not where
    MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or GLIBC_TUNABLES is set). `bigops.save` and
    `bigops.load` keep it in a file.

    Args:
        graph: flat: an input for each leaf, a tuple of results. Of it, the buffers are taken.
        signature: how leaves and the arguments of a call go together.
        counts: how often each pass rewrote something.
    """

    FIELDS: ClassVar[dict[str, Field]] = {
        "nodes": Field("a list of nodes", lambda got: isinstance(got, list)),
        "signature": fields.TABLE,
        "buffers": fields.TABLE,
        "counts": fields.TABLE,
    }

    def __init__(
        self, graph: fx.GraphModule, signature: Signature, counts: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.graph = graph
        self.signature = signature
        self.counts = dict(counts)
        self._programs: tuple[fx.GraphModule] | None = None  # in a tuple: no submodule
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model on its arguments.

        Raises:
            TypeError, ValueError: arguments that the model was not deployed for (`Signature`).
        """
        leaves = self.signature.leaves(args, kwargs)
        run = self._ready() if _is_plain(leaves) else self.graph
        with torch.no_grad():
            if torch._C._is_any_autocast_enabled():  # the graph has its dtypes
                with torch.autocast("cpu", enabled=False):
                    results = run(*leaves)
            else:
                results = run(*leaves)
        return self.signature.result(results)

    def _ready(self) -> fx.GraphModule:
        """The graph with its programs, made in the first call."""
        if self._programs is None:
            self._programs = (executor.with_programs(self.graph),)
        return self._programs[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Deployed:
        self._programs = None  # they hold the tensors of before
        return super()._apply(fn, recurse)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module."""
        self._programs = None
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_programs": None}

    def train(self, mode: bool = True) -> Deployed:
        """In eval mode only.

        Raises:
            RuntimeError: mode is True.
        """
        if mode:
            raise RuntimeError("train: expected eval mode; a deployed model cannot be trained")
        return super().train(False)

    def calls(self) -> dict[str, int]:
        """How many calls of each function or op one forward makes, by name."""
        targets = (n.target for n in self.graph.graph.nodes if n.op == "call_function")
        return dict(Counter(map(_name, targets)))

    def explain(self, *args: Any, runs: int = 10, **kwargs: Any) -> Times:
        """Time each call of one forward; printed, it names those that no pass took.

        Args:
            *args, **kwargs: as for a call.
            runs: of which the medians are.
        """
        return node_times.measure(self.graph, self.signature.leaves(args, kwargs), runs)

    # --- in a file --------------------------------------------------------------------------

    def arguments(self) -> dict[str, Any]:
        """What `from_arguments` makes an empty module of, as plain data."""
        return {
            "nodes": graph_data.describe(self.graph.graph),
            "signature": self.signature.data,
            "buffers": {
                name: [str(b.dtype).removeprefix("torch."), list(b.shape)]
                for name, b in self.graph.named_buffers()
            },
            "counts": self.counts,
        }

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> Deployed:
        """A module whose buffers are on "meta", to be loaded.

        Raises:
            GraphError, ValueError: no such data.
        """
        root = nn.Module()
        for name, (dtype, shape) in arguments["buffers"].items():
            kind = getattr(torch, str(dtype), None)
            if not isinstance(kind, torch.dtype):
                raise graph_data.GraphError(f"buffers: expected a dtype; got {str(dtype)[:80]!r}")
            root.register_buffer(name, torch.empty(shape, dtype=kind, device="meta"))
        graph = graph_data.build(arguments["nodes"])
        for node in graph.nodes:
            if node.op == "get_attr" and str(node.target) not in arguments["buffers"]:
                raise graph_data.GraphError(f"graph: expected a buffer; got {node.target!r}")
        module = fx.GraphModule(root, graph)
        return cls(module, Signature(arguments["signature"]), arguments["counts"])


def _is_plain(leaves: list[Any]) -> bool:
    """Whether kernels may read the tensors: none is fake, of a subclass, or traced."""
    if torch.compiler.is_compiling():
        return False
    return all(not isinstance(x, Tensor) or (type(x) is Tensor and x.is_cpu) for x in leaves)


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else target.__name__
