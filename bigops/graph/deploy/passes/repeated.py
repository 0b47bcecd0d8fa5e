"""The same call of the same arguments is made once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from bigops.graph.deploy.passes.rewrite import args, is_mutable


def run(module: fx.GraphModule) -> int:
    """Let readers of a repeated call read the first one, where nothing is written in place.

    Each block of a transformer of another package makes its masks and sizes anew.
    """
    if any(map(is_mutable, module.graph.nodes)):
        return 0
    done = 0
    seen: dict[Any, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = (node.op, node.target, _frozen(args(node)), _frozen(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
            done += 1
    return done


def _frozen(value: Any) -> Any:
    """Arguments as a key; numbers with their type, for 1 and 1.0 and True are equal."""
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    if isinstance(value, fx.Node):
        return value
    return (type(value).__name__, str(value))
