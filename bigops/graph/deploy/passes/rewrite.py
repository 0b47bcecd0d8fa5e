"""What the passes share: reading nodes, the linear ops among them, and putting others there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from bigops.formats.base import Format
from bigops.ops import codes
from bigops.ops.family import LinearOp, linear_ops

aten = torch.ops.aten
Target = Callable[..., Any]

# What hands its input on, element by element, in the memory that it lies in.
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def is_call(node: Any, *targets: Target) -> TypeGuard[fx.Node]:
    """Whether ``node`` is a call of one of ``targets``."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def args(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a call, nodes or not."""
    return node.args


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of a torch op by the names in its schema, defaults filled in."""
    schema = _op(node)._schema
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found |= {a.name: given for a, given in zip(schema.arguments, node.args, strict=False)}
    return found | node.kwargs


def _op(node: fx.Node) -> Any:
    return node.target


def value(node: Any) -> Tensor | None:
    """The fake tensor of a node, or None of what is no tensor."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) else None


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a guard on those of the run."""
    return statically_known_true(a == b)


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two fake tensors are known to have one shape."""
    return a.dim() == b.dim() and all(map(same, a.shape, b.shape))


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, once, or None."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.all_input_nodes.count(node) == 1 and user.op != "output" else None


def is_mutable(node: fx.Node) -> bool:
    """Whether a node writes one of its arguments in place."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


# --- weights ---------------------------------------------------------------------------------


def owned(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor that a node reads from the module, or None of what is computed or an input."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found.detach() if isinstance(found, Tensor) else None


def written_in(module: fx.GraphModule) -> set[str]:
    """Names of the attributes that the graph writes in place: state, and no constants."""
    return {
        str(source.target)
        for node in module.graph.nodes
        if is_mutable(node)
        for source in node.all_input_nodes
        if source.op == "get_attr"
    }


def store(module: fx.GraphModule, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """Keep a tensor in the module under a name of its own; the node that reads it."""
    base = name.replace(".", "_")
    free, count = base, 0
    while hasattr(module, free):
        count += 1
        free = f"{base}_{count}"
    module.register_buffer(free, tensor.detach())
    with module.graph.inserting_before(before):
        node = module.graph.create_node("get_attr", free)
    node.meta["val"] = _fake_mode(module).from_tensor(tensor, static_shapes=True)
    return node


# --- calls -----------------------------------------------------------------------------------


def product_of(node: Any) -> LinearOp | None:
    """The linear op that a node calls, or None."""
    if not (isinstance(node, fx.Node) and node.op == "call_function"):
        return None
    return next((op for op in linear_ops() if op.forward is node.target), None)


def call(before: fx.Node, op: Any, given: dict[str, Any], like: fx.Node | None = None) -> fx.Node:
    """A new call of an op with arguments by name, in front of a node.

    ``like``: whose value it has; None: it is computed of the fake values of its arguments.
    """
    arguments = op._schema.arguments
    args = tuple(given[a.name] for a in arguments if not a.kwarg_only)
    named = {a.name: given[a.name] for a in arguments if a.kwarg_only}
    with before.graph.inserting_before(before):
        node = before.graph.call_function(op, args, named)
    if like is not None:
        node.meta["val"] = like.meta["val"]
    else:
        with torch.no_grad():
            node.meta["val"] = op(*fx.map_arg(args, _fake), **fx.map_arg(named, _fake))
    return node


def _fake(node: fx.Node) -> Any:
    return node.meta["val"]


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode:
    found = (value(node) for node in module.graph.nodes)
    return next((v.fake_mode for v in found if isinstance(v, FakeTensor)), FakeTensorMode())


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let the readers of ``old`` read ``new``; ``old`` goes."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def weight_of(op: LinearOp, given: dict[str, Any], module: fx.GraphModule | None = None) -> Format:
    """The weight of a product's call: with the tensors that a module owns, or with fake ones."""
    fixed = [
        _fake(found)
        if isinstance(found := given[name], fx.Node) and module is None
        else owned(module, found)
        if isinstance(found, fx.Node) and module is not None
        else codes.word_of(name, found)
        if name in codes.TABLES
        else found
        for name in op.fields
    ]
    return op.weight(given["x"].meta["val"], *fixed)


def store_weight(
    module: fx.GraphModule, op: LinearOp, weight: Format, name: str, before: fx.Node
) -> dict[str, Any]:
    """Keep the tensors of a weight in the module; the fields of a product's call by name."""
    fields: dict[str, Any] = {}
    for field, found in zip(op.fields, weight.arguments, strict=True):
        if isinstance(found, Tensor):
            found = store(module, f"{name}_{field}", found, before)
        elif isinstance(found, str):
            found = codes.code_of(field, found)
        fields[field] = found
    return fields
