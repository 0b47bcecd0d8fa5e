"""``torch.compile(model, backend="bigops")``: the passes that own no weights, then Inductor."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from bigops import backend as record
from bigops.graph.deploy import passes

_log = logging.getLogger(__name__)


def bigops(module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
    """A backend of `torch.compile` for inference on the CPU (entry point torch_dynamo_backends).

    Activations and sums move into the products of compressed and dense layers, attention and norms
    become ops of this package; Inductor compiles the rest. Weights are inputs of the graph here:
    what packs, merges or folds them belongs to `bigops.deploy`. Sizes may be those of the run.

    A graph that needs gradients, or that cannot be traced so, goes to Inductor as it is: the reason
    is logged (``bigops.graph.deploy.compile_backend``, INFO), and `bigops.backend.record` has a
    ``backend.left``.

    Args:
        module: dynamo's graph.
        example_inputs: fake tensors and sizes.
        options: as for Inductor.

    Source: https://docs.pytorch.org/docs/stable/torch.compiler_custom_backends.html
    """
    from torch._inductor.compile_fx import compile_fx

    graph = _rewritten(module, example_inputs)
    patches = options.get("options") or {}
    return compile_fx(graph, list(example_inputs), config_patches=patches)


def _rewritten(module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph after the passes, or as it is where they cannot be run."""
    tensors = [x for x in example_inputs if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _left(module, "it needs gradients")
    if any(x.device.type != "cpu" for x in tensors):
        return _left(module, "it is not on the CPU alone")
    try:
        traced = _traced(module, example_inputs)
        counts = passes.run(traced, owns=False)
    except Exception as error:
        return _left(module, f"{type(error).__name__}: {error}")
    if not any(counts.get(name) for name in passes.GIVE_OPS):
        return _left(module, "no pass found anything")
    _log.info("rewrote %s", {name: n for name, n in counts.items() if n})
    return traced


def _traced(module: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph of torch functions as one of ATen's, before any decomposition."""
    module = _with_plain_numbers(module)
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    # dynamo's own fake tensors, with the sizes of the run; the example is of one size
    fakes = [
        node.meta.get("example_value", x) for node, x in zip(given, example_inputs, strict=True)
    ]
    # and their mode: that of the context is another, for who makes fake tensors anew
    mode = next((x.fake_mode for x in fakes if isinstance(x, FakeTensor)), None)
    trace = make_fx(module, pre_dispatch=True, _allow_non_fake_inputs=True)
    if mode is None:
        traced = trace(*fakes)
    else:
        with mode, _real_buffers_too(mode):
            traced = trace(*fakes)
    made = [node for node in traced.graph.nodes if node.op == "placeholder"]
    for old, new in zip(given, made, strict=True):  # Inductor reads which inputs are parameters
        new.meta = {**old.meta, **new.meta}
    return traced


def _with_plain_numbers(module: fx.GraphModule) -> fx.GraphModule:
    """A copy where numbers of the model's own (an eps) are what they are, with a guard of dynamo's.

    For ``dynamic=True`` dynamo hands them over as tensors, of which the graph takes the item.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target == "item":
            number = node.meta.get("example_value")
            if isinstance(number, torch.SymFloat):
                node.replace_all_uses_with(float(number))
                graph.erase_node(node)
    return fx.GraphModule(module, graph)


@contextlib.contextmanager
def _real_buffers_too(mode: FakeTensorMode) -> Iterator[None]:
    """Dynamo leaves buffers in the module, as they are."""
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


def _left(module: fx.GraphModule, reason: str) -> fx.GraphModule:
    record.note("backend.left")
    _log.info("left to Inductor: %s", reason)
    return module
