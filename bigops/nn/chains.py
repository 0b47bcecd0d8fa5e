"""u8 from layer to layer: which frozen layer's result one static layer alone reads.

Such a layer stores its result as u8 on the grid of its reader, which takes it as it lies: no float
is written and nothing quantised again. Proven as `fuse_` proves its pairs: by torch.fx where a
module can be traced, else by neighbourhood in `nn.Sequential`. An `nn.Identity` between the two,
which `fuse_` leaves where an activation was, passes u8 on. NaN and inf have no u8: a call in which
they come up between the two raises, where floats would have carried them on.
"""

from __future__ import annotations

import itertools
from collections.abc import Container

from torch import fx, nn

from bigops.nn import dataflow
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.sites import Sites, hook_reason

_TRACED, _NEIGHBOURS = "traced: nothing else reads it", "neighbours in nn.Sequential"
_UNPROVEN = "nothing proves that a single layer alone reads it"


def link(model: nn.Module, paths: Container[str]) -> dict[str, str]:
    """Let the layers at ``paths`` pass u8 on, in place, where it is proven that they can.

    Returns:
        What was done or why it was not, by path, of the layers that can give u8; empty where no
        layer of the model can take it.
    """
    sites = Sites(model)
    if not any(isinstance(m, CompressedLinear) and _static(m) for m in sites.modules.values()):
        return {}
    readers = find(sites)
    said = {}
    for path, module in sites.unique():
        if path not in paths or not isinstance(module, CompressedLinear) or not module.gives_u8:
            continue
        reader, how = readers.get(path, ("", _UNPROVEN))
        reason = how if not reader else _reason(module, sites.modules[reader])
        if reason:
            said[path] = f"gives floats: {reason}"
            continue
        module.give_u8(sites.modules[reader].x_grid)  # type: ignore[arg-type]
        said[path] = f"gives u8 to {reader} ({how})"
    return said


def find(sites: Sites) -> dict[str, tuple[str, str]]:
    """The only reader of a compressed layer's result and how that is known, by path."""
    found: dict[str, tuple[str, str]] = {}

    def of_graphs(root: str, graphs: list[fx.Graph]) -> None:
        for path, readers in _readers(sites, root, graphs).items():
            (only,) = readers if len(readers) == 1 else ("",)
            if only and len(sites.paths[id(sites.modules[path])]) == 1:
                found[path] = (only, _TRACED)

    def of_neighbours(root: str) -> None:
        for first, second in _neighbours(sites.modules[root]):
            paths = [f"{root}.{name}" if root else name for name in (first, second)]
            if len(sites.paths[id(sites.modules[paths[0]])]) == 1:
                found[paths[0]] = (paths[1], _NEIGHBOURS)

    dataflow.walk(sites, CompressedLinear, of_graphs, of_neighbours)
    return found


def _static(module: nn.Module) -> bool:
    """Whether a layer takes u8: frozen, with a grid of x."""
    return isinstance(module, CompressedLinear) and module.frozen and module.x_grid is not None


def _reason(module: nn.Module, reader: nn.Module) -> str:
    """Why ``reader``, the only one of ``module``'s result, cannot take u8 from it, or ""."""
    if not _static(reader):
        return "its reader is no frozen layer with static activations"
    if reader.bias is None:
        return "its reader has no bias, which says in what dtype the result of u8 is"
    return hook_reason(module) or hook_reason(reader) or ""


def _passes(module: nn.Module | None) -> bool:
    return type(module) is nn.Identity and hook_reason(module) is None


def _readers(sites: Sites, root: str, graphs: list[fx.Graph]) -> dict[str, set[str]]:
    """Paths of what reads each compressed layer's result; "" for anything that is no such layer."""

    def full(target: object) -> str:
        return f"{root}.{target}" if root else str(target)

    def reader(node: fx.Node) -> str:
        while len(node.users) == 1:
            (user,) = node.users
            if user.op != "call_module" or not user.args or user.args[0] is not node:
                return ""
            if _uses(user, node) != 1:
                return ""
            path = full(user.target)
            if isinstance(sites.modules[path], CompressedLinear):
                return sites.paths[id(sites.modules[path])][0]
            if not _passes(sites.modules[path]):
                return ""
            node = user
        return ""

    found: dict[str, set[str]] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.op == "call_module" and isinstance(
                sites.modules[full(node.target)], CompressedLinear
            ):
                found.setdefault(full(node.target), set()).add(reader(node))
    return found


def _uses(user: fx.Node, node: fx.Node) -> int:
    """How often ``node`` stands among the arguments of ``user``."""
    found: list[fx.Node] = []

    def visit(n: fx.Node) -> fx.Node:
        found.append(n)
        return n

    fx.map_arg((user.args, user.kwargs), visit)
    return sum(n is node for n in found)


def _neighbours(sequential: nn.Module) -> list[tuple[str, str]]:
    """Names of compressed layers that follow each other."""
    children = [(n, m) for n, m in sequential._modules.items() if m is not None and not _passes(m)]
    return [
        (first, second)
        for (first, one), (second, two) in itertools.pairwise(children)
        if isinstance(one, CompressedLinear) and isinstance(two, CompressedLinear)
    ]
