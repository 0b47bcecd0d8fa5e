"""Graphs within the graph that only set a mode (no_grad, autocast off) become part of it."""

from __future__ import annotations

import operator

from torch import fx

# Where the inner graph stands among the arguments of each; what follows are its inputs.
_SET_A_MODE = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
_AUTOCAST_ON = 2


def run(module: fx.GraphModule) -> int:
    """Inline what runs in another gradient mode, or where autocast is switched off.

    A deployed model runs without gradients and without autocast, so that both say nothing.
    """
    done = 0
    for node in list(module.graph.nodes):
        name = str(node.target)
        if node.op != "call_function" or name not in _SET_A_MODE:
            continue
        at = _SET_A_MODE[name]
        if name == "wrap_with_autocast" and node.args[_AUTOCAST_ON]:
            continue  # the casts that it stands for are in no graph
        inner = module.get_submodule(str(node.args[at].target))
        assert isinstance(inner, fx.GraphModule)
        run(inner)
        if any(n.op == "get_attr" for n in inner.graph.nodes):
            continue
        _inline(node, inner.graph, node.args[at + 1 :])
        done += 1
    return done


def _inline(node: fx.Node, inner: fx.Graph, given: tuple[fx.node.Argument, ...]) -> None:
    inputs = [n for n in inner.nodes if n.op == "placeholder"]
    places = dict(zip(inputs, given, strict=True))
    with node.graph.inserting_before(node):
        results = node.graph.graph_copy(inner, places)  # type: ignore[arg-type]
    for reader in list(node.users):  # of a call of a graph, each result is taken by its number
        assert reader.target is operator.getitem
        reader.replace_all_uses_with(results[reader.args[1]])  # type: ignore
        node.graph.erase_node(reader)
    node.graph.erase_node(node)
