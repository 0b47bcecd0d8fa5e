"""Functions that dynamo puts into its graphs as they are, to run when a graph is lowered.

They run below the transforms of torch.func that they were traced in, and take the path that these
need: dynamo itself makes zeros of the gradients of an `autograd.Function` over a raw op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_NODES: dict[str, Callable[..., Any]] = {}


def add(name: str, node: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``node`` one of them, under a name."""
    _NODES[name] = node
    return node


def allow(name: str) -> bool:
    """Let dynamo put calls of a node into its graphs as they are.

    Dynamo runs this while it traces (`torch._dynamo.assume_constant_result`, whose mark is set
    below): to ask earlier would import dynamo with bigops, which takes as long as torch itself. The
    node goes by its name, since what dynamo has looked at before would stay as it was.
    """
    torch.compiler.allow_in_graph(_NODES[name])
    return True


allow._dynamo_marked_constant = True  # type: ignore[attr-defined]
