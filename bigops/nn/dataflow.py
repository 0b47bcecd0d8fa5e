"""Which activation module consumes the output of which linear layer, and nothing else does.

Proven by torch.fx where a module can be traced; otherwise by neighbourhood in `nn.Sequential`.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from bigops.nn.sites import Sites, hook_reason

_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}


def activation_name(module: nn.Module | None) -> str | None:
    """The epilogue that does what ``module`` does, or None; subclasses are not trusted."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _NAMES.get(type(module))  # type: ignore[arg-type]


@dataclass
class Pair:
    """A linear layer and the activation that alone reads it."""

    linear: str
    activation: str  # name of the epilogue
    paths: list[str]  # where the activation module sits: all of these become Identity
    how: str


@dataclass
class Dataflow:
    """Proven pairs by the linear layer's path, and what could not be traced."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find(sites: Sites) -> Dataflow:
    """Look for pairs in the whole model; where it cannot be traced, in its parts."""
    flow = Dataflow()
    flow.notes = walk(
        sites,
        nn.Linear,
        lambda path, graphs: _pairs_of_graphs(sites, path, graphs, flow),
        lambda path: _pairs_of_neighbours(sites, path, flow),
    )
    return flow


def walk(
    sites: Sites,
    kind: type[nn.Module],
    visit_graphs: Callable[[str, list[fx.Graph]], None],
    visit_neighbours: Callable[[str], None],
) -> list[str]:
    """Visit the graphs of a model, or of those of its parts that can be traced and hold ``kind``.

    Args:
        sites: of the model.
        kind: what is looked for, no part by itself.
        visit_graphs: called with the path of a part and its graphs.
        visit_neighbours: called with the path of an `nn.Sequential` that cannot be traced.

    Returns:
        Notes on what could not be traced.
    """
    search = _Search(sites, kind, visit_graphs, visit_neighbours, [])
    shared: dict[int, Any] = {id(t): t for t in sites.model.parameters()}
    shared.update((id(t), t) for t in sites.model.buffers())
    try:
        # Tracing runs Python code of the model, which may keep state: it gets a twin that shares
        # the tensors.
        twin = copy.deepcopy(sites.model, shared)
    except Exception as error:
        search.notes.append(f"cannot be copied for tracing ({type(error).__name__}: {error})")
        twin = None
    _search(search, twin, "")
    return search.notes


class _Search(NamedTuple):
    sites: Sites
    kind: type[nn.Module]
    visit_graphs: Callable[[str, list[fx.Graph]], None]
    visit_neighbours: Callable[[str], None]
    notes: list[str]


def _search(search: _Search, twin: nn.Module | None, path: str) -> None:
    module, kind = search.sites.modules[path], search.kind
    if not any(isinstance(m, kind) for m in module.modules()) or isinstance(module, kind):
        return
    graphs: list[fx.Graph] | str = "" if twin is None else _trace(twin.get_submodule(path))
    if isinstance(graphs, list):
        search.visit_graphs(path, graphs)
        return
    if graphs and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        search.notes.append(f"{path or 'the model'} cannot be traced as a whole: {graphs}")
    if type(module).forward is nn.Sequential.forward:
        search.visit_neighbours(path)
    for name, child in module._modules.items():
        if child is not None:
            _search(search, twin, f"{path}.{name}" if path else name)


# --- traced ----------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("bigops.nn")
        return ours or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> list[fx.Graph] | str:
    """Graphs in both modes, with optional arguments given and left out; or why there are none."""
    if _Tracer().is_leaf_module(module, ""):
        return f"a {type(module).__name__} is a whole of its own"
    defaults = {
        name: p.default
        for name, p in inspect.signature(module.forward).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    graphs = []
    flags = [(m, m.training) for m in module.modules()]
    try:
        for mode in (True, False):
            module.train(mode)
            for concrete in [{}, defaults] if defaults else [{}]:
                graphs.append(_Tracer().trace(module, concrete or None))
    except Exception as error:  # whatever the model's own code makes of a proxy
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        for m, flag in flags:
            m.training = flag
    return graphs


def _pairs_of_graphs(sites: Sites, root: str, graphs: list[fx.Graph], flow: Dataflow) -> None:
    def full(target: object) -> str:
        return f"{root}.{target}" if root else str(target)

    consumers: dict[str, set[int]] = {}  # linear path -> ids of the modules that read it
    producers: dict[int, set[str]] = {}  # activation id -> linear paths; "" for anything else
    for graph in graphs:
        for node in graph.nodes:
            if node.op != "call_module":
                continue
            path = full(node.target)
            module = sites.modules[path]
            if isinstance(module, nn.Linear):
                consumers.setdefault(path, set()).update(_readers(sites, node, full))
            elif activation_name(module):
                producers.setdefault(id(module), set()).add(_producer(sites, node, full))
    for path, readers in consumers.items():
        if len(readers) != 1:
            continue
        (reader,) = readers
        if not reader or "" in producers.get(reader, {""}):
            continue
        paths = sites.paths[reader]
        if root and not all(p.startswith(f"{root}.") for p in paths):
            continue  # the activation is also used outside of what was traced
        module = sites.modules[paths[0]]
        # Every layer that feeds this activation must be one that only it reads.
        if any(consumers.get(p) != {reader} for p in producers[reader]) or hook_reason(module):
            continue
        name = activation_name(module)
        assert name is not None
        flow.pairs[path] = Pair(path, name, paths, "traced: nothing else reads it")


def _readers(sites: Sites, node: fx.Node, full: Any) -> Iterator[int]:
    """Ids of the activation modules that read a node; 0 stands for any other use."""
    if len(node.users) != 1:
        yield 0
    for user in node.users:
        module = sites.modules[full(user.target)] if user.op == "call_module" else None
        simple = module is not None and user.args == (node,) and not user.kwargs
        yield id(module) if simple and activation_name(module) else 0


def _producer(sites: Sites, node: fx.Node, full: Any) -> str:
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if isinstance(source, fx.Node) and source.op == "call_module":
        path = full(source.target)
        if isinstance(sites.modules[path], nn.Linear):
            return path
    return ""


# --- neighbours ------------------------------------------------------------------------------


def _pairs_of_neighbours(sites: Sites, path: str, flow: Dataflow) -> None:
    children = [(n, m) for n, m in sites.modules[path]._modules.items() if m is not None]
    for (first, linear), (second, module) in itertools.pairwise(children):
        name = activation_name(module)
        if isinstance(linear, nn.Linear) and name and not hook_reason(module):
            prefix = f"{path}." if path else ""
            pair = Pair(prefix + first, name, [prefix + second], "neighbours in nn.Sequential")
            flow.pairs[pair.linear] = pair
