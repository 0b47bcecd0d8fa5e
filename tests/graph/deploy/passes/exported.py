"""Small modules as graphs, one pass over them, and what the graph calls before and after."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tests.support import tolerance


class Rewritten(NamedTuple):
    """A graph before and after a pass."""

    before: Counter[str]  # how often each op is called, by its short name
    after: Counter[str]
    count: int  # what the pass said
    graph: fx.GraphModule


def graph_of(module: nn.Module, *args: Any) -> fx.GraphModule:
    """The ATen graph of a module; the first dimension of each input is of the run's size."""
    shapes = tuple({0: torch.export.Dim.AUTO} if torch.is_tensor(a) else None for a in args)
    with torch.no_grad():
        graph = torch.export.export(module.eval(), args, dynamic_shapes=shapes).module()
    assert isinstance(graph, fx.GraphModule)
    return graph


def calls(module: fx.GraphModule) -> Counter[str]:
    """How often each op is called, by its short name."""
    ops = (n.target for n in module.graph.nodes if n.op == "call_function")
    return Counter(getattr(op, "_opname", None) or op.__name__ for op in ops)


def rewritten(
    run: Callable[[fx.GraphModule], int], module: nn.Module, *args: Tensor, exact: bool = False
) -> Rewritten:
    """What a pass makes of the graph of a module.

    It is run before and after, on ``args`` and on a row less, and held to float64 by the numerics
    rule; ``exact``: to equal numbers, where the same kernels run.
    """
    graph = graph_of(module, *args)
    before = calls(graph)
    inputs = [args, tuple(a[:-1] for a in args)]
    with torch.no_grad():
        plain = [_list(graph(*given)) for given in inputs]
        count = run(graph)
        graph.graph.eliminate_dead_code()
        graph.graph.lint()
        graph.recompile()
        wide = copy.deepcopy(module).double()
        for given, was in zip(inputs, plain, strict=True):
            truth = wide(*(a.double() if a.is_floating_point() else a for a in given))
            for out, ref, old in zip(_list(graph(*given)), _list(truth), was, strict=True):
                if exact:
                    assert torch.equal(out, old)
                else:
                    tolerance.check(out, ref.double(), old, ref.double().abs().max() + 1)
    return Rewritten(before, calls(graph), count, graph)


def _list(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]
