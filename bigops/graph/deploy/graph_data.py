"""An FX graph as plain data and back: what a deployed module says of itself in a file.

A node is ``[op, name, target, args, kwargs]``; in the arguments ``{"node": name}`` stands for the
result of another, and what JSON has no word for is a dictionary of one entry. Calls are of ops of
torch by name and of a closed table of functions, so that loading a file runs no foreign code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

_LIBRARIES = ("aten", "bigops", "prims")
_REFUSED = ("from_file", "_from_file")  # ops that reach outside of their tensors
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            "add",
            "sub",
            "mul",
            "floordiv",
            "truediv",
            "mod",
            "neg",
            "pow",
            "getitem",
            "eq",
            "ne",
            "lt",
            "le",
            "gt",
            "ge",
            "and_",
            "or_",
            "not_",
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite")
    },
}
_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_WORDS: dict[str, type | tuple[type, ...]] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}
_OPS = ("placeholder", "get_attr", "call_function", "output")


class GraphError(ValueError):
    """A graph that cannot be written or read; the message says what was expected and what came."""


def describe(graph: fx.Graph) -> list[list[Any]]:
    """The nodes of a graph as plain data.

    Raises:
        GraphError: a call that has no name in a file: a graph within the graph, an op of a library
            of another package.
    """
    return [
        [node.op, node.name, _target_name(node), _plain(node.args), _plain(dict(node.kwargs))]
        for node in graph.nodes
    ]


def build(nodes: list[Any]) -> fx.Graph:
    """The graph of `describe`.

    Raises:
        GraphError: no such data.
    """
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in nodes:
        if not (isinstance(entry, list) and len(entry) == 5 and entry[0] in _OPS):
            raise GraphError(f"graph: expected nodes of five entries; got {str(entry)[:80]}")
        op, name, target, args, kwargs = entry
        if not isinstance(name, str) or not name.isidentifier() or name in made:
            raise GraphError(f"graph: expected a name of its own for each node; got {name!r}")
        given, named = _built(args, made), _built(kwargs, made)
        if not isinstance(given, tuple) or not isinstance(named, dict):
            raise GraphError(f"graph: expected arguments of {name!r}; got {str(args)[:80]}")
        if op == "output":
            made[name] = graph.output(*given)
            continue
        made[name] = graph.create_node(op, _target(op, target), given, named, name)
        made[name].name = name
    return graph


def _target_name(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in _LIBRARIES:
        return str(node.target)
    if node.target in _NAMES:
        return _NAMES[node.target]
    raise GraphError(f"{node.name}: expected an op of torch or of bigops; got {node.target}")


def _target(op: str, name: Any) -> Any:
    if not isinstance(name, str):
        raise GraphError(f"graph: expected the name of a target; got {str(name)[:80]}")
    if op != "call_function":
        if not name.isidentifier():
            raise GraphError(f"graph: expected a name; got {name[:80]!r}")
        return name
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    library, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    if library in _LIBRARIES and packet not in _REFUSED:
        found = getattr(getattr(torch.ops, library), packet, None)
        found = getattr(found, overload, None)
        if isinstance(found, torch._ops.OpOverload):
            return found
    raise GraphError(f"graph: expected an op that this torch and bigops have; got {name[:80]!r}")


def _plain(value: Any) -> Any:
    """An argument as plain data."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return {"device": value.type}
    for word, kind in _WORDS.items():
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    raise GraphError(f"graph: expected plain arguments; got a {type(value).__name__}")


def _built(value: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_built(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise GraphError(f"graph: expected one entry; got {str(value)[:80]}")
    ((word, inner),) = value.items()
    if word == "node" and isinstance(inner, str) and inner in made:
        return made[inner]
    if word == "tuple" and isinstance(inner, list):
        return tuple(_built(item, made) for item in inner)
    if word == "dict" and isinstance(inner, dict):
        return {key: _built(item, made) for key, item in inner.items()}
    if word == "float" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    if word == "device" and isinstance(inner, str):
        return torch.device(inner)
    if word in _WORDS and isinstance(found := getattr(torch, str(inner), None), _WORDS[word]):
        return found
    raise GraphError(f"graph: expected an argument; got {str(value)[:80]}")
