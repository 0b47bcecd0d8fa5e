"""Which activation module consumes the output of which linear layer, and nothing else does.

Proven by torch.fx where the model can be traced as a whole. Where it cannot, its parts are traced,
and of an `nn.Sequential` the forward is known; the proof then needs besides that no code outside of
the part can reach into it, which `bigops.graph.callers` reads from the source.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bigops.graph.atomic import is_ours
from bigops.graph.callers import Callers
from bigops.graph.carry import hook_reason
from bigops.graph.looking import looking, storage_of, written
from bigops.graph.record import class_name
from bigops.graph.sites import Sites
from bigops.nn.computed_weight import is_dense

_MOST_OPTIONAL = 4  # optional arguments whose combinations are traced: 2^4 in two modes
_GIVEN = object()

_NAMES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}


def activation_name(module: nn.Module | None) -> str | None:
    """The epilogue that does what ``module`` does, or None; subclasses are not trusted."""
    if type(module) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
    return _NAMES.get(type(module))  # type: ignore[arg-type]


def passes(module: nn.Module) -> bool:
    """Whether a module between a layer and its activation gives on what it is given, in any mode.

    An `nn.Dropout` that is idle in `eval` alone has to act before the activation when the model is
    trained again, so only one without anything to drop passes.
    """
    idle = type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
    return idle and hook_reason(module) is None


@dataclass
class Pair:
    """A linear layer and the activation that alone reads it."""

    linear: str
    activation: str  # name of the epilogue
    paths: list[str]  # where the activation module sits: all of these become Identity
    how: str


@dataclass
class Dataflow:
    """Proven pairs by the linear layer's path, and what could not be traced or proven."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def find(sites: Sites) -> Dataflow:
    """Look for pairs in the whole model; where it cannot be traced, in its parts.

    The model is as before afterwards, and so are the random states.
    """
    flow = Dataflow()
    with looking():
        _search(sites, _tree(_twin(sites.model, flow)), "", Callers(sites), flow)
    return flow


def _twin(model: nn.Module, flow: Dataflow) -> nn.Module | None:
    """A copy whose Python code may run: it keeps state, buffers too. Parameters share storage."""
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = parameter
        if type(parameter) is nn.Parameter:  # another object: ``p.data = ..`` is without effect
            twin = nn.Parameter(parameter.detach(), parameter.requires_grad)
        shared[id(parameter)] = twin
    for module in model.modules():
        if is_ours(module):  # compressed storage, which no forward writes
            shared.update((id(b), b) for b in module.buffers() if b is not None)
    try:
        return copy.deepcopy(model, shared)
    except Exception as error:
        flow.notes.append(f"cannot be copied for tracing ({type(error).__name__}: {error})")
        return None


def _tree(model: nn.Module | None) -> dict[str, nn.Module]:
    """The modules of a model by path; nothing where there is none."""
    return {} if model is None else dict(model.named_modules(remove_duplicate=False))


def _search(
    sites: Sites, twin: dict[str, nn.Module], path: str, callers: Callers, flow: Dataflow
) -> None:
    """Look for pairs in the part at ``path``, tracing the modules of a twin."""
    module = sites.modules[path]
    if isinstance(module, nn.Linear) or not any(map(is_dense, module.modules())):
        return
    graphs: list[fx.Graph] | str = _trace(twin[path]) if twin else ""
    if twin and _tree(twin[""]) != twin:
        graphs = "its forward exchanges modules"
        twin.clear()  # what else is traced in it says nothing about the model
    if isinstance(graphs, list):
        _take(sites, path, list(_pairs_of_graphs(sites, path, graphs)), callers, flow)
        return
    if graphs and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        flow.notes.append(f"{path or 'the model'} cannot be traced as a whole: {graphs}")
    if type(module).forward is nn.Sequential.forward:
        _take(sites, path, list(_pairs_of_neighbours(sites, path)), callers, flow)
    for name, child in module._modules.items():
        if child is not None:
            _search(sites, twin, f"{path}.{name}" if path else name, callers, flow)


def _take(sites: Sites, root: str, pairs: list[Pair], callers: Callers, flow: Dataflow) -> None:
    """Keep the pairs of a part that no code outside of it can reach; say which are left."""
    for pair in pairs:
        why = callers.reason(root, [pair.linear, *pair.paths])
        if why is None:
            flow.pairs[pair.linear] = pair
        else:
            flow.notes.append(
                f"{', '.join(pair.paths)}: {pair.activation} is not taken into {pair.linear}: {why}"
            )


# --- traced ----------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_ours(m) or super().is_leaf_module(m, module_qualified_name)

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        # fx patches nn.Module meanwhile; Ctrl-C pressed while it undoes that would leave every
        # module of the process calling this tracer
        call, find = nn.Module.__call__, nn.Module.__getattr__
        try:
            return super().trace(*args, **kwargs)
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = call, find  # type: ignore[method-assign]


class _ReadOnly(TorchDispatchMode):
    """Raises where a real tensor that shares the storage of one of ``tensors`` is written."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages = {storage_of(t) for t in tensors} - {None}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if any(storage_of(t) in self._storages for t in written(func, args, kwargs or {})):
            raise RuntimeError("its forward writes to a Parameter")
        return func(*args, **(kwargs or {}))


def _trace(module: nn.Module) -> list[fx.Graph] | str:
    """Graphs for each combination of optional arguments, in both modes, with and without gradients.

    Or why there are none.
    """
    if _Tracer().is_leaf_module(module, ""):
        return f"a {class_name(module)} is a whole of its own"
    # A flag has two values; anything else is its default or something that fx cannot look into.
    values = {
        name: (True, False) if isinstance(p.default, bool) else (_GIVEN, p.default)
        for name, p in inspect.signature(module.forward).parameters.items()
        if p.default is not inspect.Parameter.empty
    }
    if len(values) > _MOST_OPTIONAL:
        return f"{len(values)} optional arguments have more combinations than are traced"
    calls = [
        {name: v for name, v in zip(values, chosen, strict=True) if v is not _GIVEN}
        for chosen in itertools.product(*values.values())
    ]
    graphs = []
    try:
        with _ReadOnly(module.parameters()):
            for training, gradients in itertools.product((True, False), (True, False)):
                module.train(training)
                with torch.set_grad_enabled(gradients):
                    graphs += [_Tracer().trace(module, concrete or None) for concrete in calls]
    except Exception as error:  # whatever the model's own code makes of a proxy
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return graphs


def _pairs_of_graphs(sites: Sites, root: str, graphs: list[fx.Graph]) -> Iterator[Pair]:
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
            if is_dense(module):
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
        yield Pair(path, name, paths, "traced: nothing else reads it")


def _readers(sites: Sites, node: fx.Node, full: Any) -> Iterator[int]:
    """Ids of the activation modules that read a node; 0 stands for any other use."""
    if len(node.users) != 1:
        yield 0
    for user in node.users:
        module = sites.modules[full(user.target)] if user.op == "call_module" else None
        simple = user.args == (node,) and not user.kwargs
        if module is not None and simple and passes(module):
            yield from _readers(sites, user, full)
        else:
            yield id(module) if simple and activation_name(module) else 0


def _producer(sites: Sites, node: fx.Node, full: Any) -> str:
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if isinstance(source, fx.Node) and source.op == "call_module":
        path = full(source.target)
        if isinstance(sites.modules[path], nn.Linear):
            return path
        if passes(sites.modules[path]):
            return _producer(sites, source, full)
    return ""


# --- neighbours ------------------------------------------------------------------------------


def _pairs_of_neighbours(sites: Sites, path: str) -> Iterator[Pair]:
    children = [
        (n, m) for n, m in sites.modules[path]._modules.items() if m is not None and not passes(m)
    ]
    prefix = f"{path}." if path else ""
    for (first, linear), (second, module) in itertools.pairwise(children):
        name = activation_name(module)
        if is_dense(linear) and name and not hook_reason(module):
            yield Pair(prefix + first, name, [prefix + second], "neighbours in nn.Sequential")
