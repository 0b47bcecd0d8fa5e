"""What follows from weights alone is computed once."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from bigops.graph.deploy.passes.rewrite import (
    is_mutable,
    owned,
    product_of,
    store,
    value,
    written_in,
)

_MOST = 1 << 20  # elements of a result that may take more memory than what it is made of


def run(module: fx.GraphModule) -> int:
    """Replace calls whose arguments are all constants by their results."""
    written = written_in(module)
    known: dict[fx.Node, Tensor] = {}
    for node in module.graph.nodes:
        tensor = owned(module, node)
        if tensor is not None and node.target not in written:
            known[node] = tensor
    constants = dict(known)
    for node in module.graph.nodes:
        if _is_constant(node, constants):
            with torch.no_grad():
                found = node.target(
                    *fx.map_arg(node.args, constants.__getitem__),
                    **fx.map_arg(node.kwargs, constants.__getitem__),
                )
            if isinstance(found, Tensor) and _is_worth(node, found, constants):
                constants[node] = found
    done = 0
    for node, tensor in constants.items():
        readers = [n for n in node.users if n not in constants]
        if node in known or not readers:
            continue
        name = "folded_" + node.name
        new = store(module, name, tensor.contiguous(), before=node)
        node.replace_all_uses_with(new)
        done += 1
    module.graph.eliminate_dead_code()
    return done


def _is_constant(node: fx.Node, constants: dict[fx.Node, Tensor]) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    target = node.target
    if torch.Tag.nondeterministic_seeded in target.tags or is_mutable(node):
        return False
    if product_of(node) is not None or value(node) is None:
        return False
    if not all(n in constants for n in node.all_input_nodes):
        return False
    # what is written in place later on has to be made anew in each run
    return not any(is_mutable(user) for user in node.users)


def _is_worth(node: fx.Node, found: Tensor, constants: dict[fx.Node, Tensor]) -> bool:
    made_of = sum(constants[n].nbytes for n in node.all_input_nodes)
    return found.nbytes <= made_of or found.numel() <= _MOST
