"""Tensors of the module that are equal become one: what shares a weight does so packed.

Each use of a weight is packed, merged or folded by itself; those of a model that runs one block
several times (ALBERT) come out equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from bigops.graph.deploy.passes.rewrite import owned, written_in


def run(module: fx.GraphModule) -> int:
    """Let readers of a tensor read the first one that is equal, where neither is written."""
    written = written_in(module)
    seen: dict[Any, list[tuple[fx.Node, Tensor]]] = {}
    done = 0
    for node in list(module.graph.nodes):
        tensor = owned(module, node)
        if tensor is None or node.target in written:
            continue
        alike = seen.setdefault(_key(tensor), [])
        first = next((kept for kept, other in alike if _same(tensor, other)), None)
        if first is None:
            alike.append((node, tensor))
        elif first.target != node.target:
            node.replace_all_uses_with(first)
            module.graph.erase_node(node)
            done += 1
    return done


def _key(tensor: Tensor) -> Any:
    few = tensor.reshape(-1)[:64].tolist()  # of weights that differ, these do as a rule
    return tensor.dtype, tensor.shape, tensor.stride(), str(few)


def _same(a: Tensor, b: Tensor) -> bool:
    """By their bytes: -0.0 is not 0.0, and NaN is itself."""
    return a.data_ptr() == b.data_ptr() or torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
