"""What does nothing in inference goes: dropout, casts to what it is, copies that nobody needs."""

from __future__ import annotations

import sys

from torch import fx

from bigops.graph.deploy.passes.rewrite import (
    args,
    arguments,
    aten,
    is_call,
    is_mutable,
    same,
    value,
)

_CASTS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
)
_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_async.default,
)
_DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default)
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten._unsafe_view.default,
)


def run(module: fx.GraphModule) -> int:
    """Take out the nodes that hand on what they were given."""
    done = _out_of_place(module)
    written = any(map(is_mutable, module.graph.nodes))
    for node in list(module.graph.nodes):
        if is_call(node, *_ASSERTS):
            module.graph.erase_node(node)
            done += 1
        elif node.op == "call_function" and (source := _source(node, written)) is not None:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            done += 1
    return done


def _out_of_place(module: fx.GraphModule) -> int:
    """Let ``x.add_(y)`` on a result that nothing else holds be ``x.add(y)``, which passes know."""
    done = 0
    place = {node: at for at, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not is_mutable(node) or not args(node) or not isinstance(args(node)[0], fx.Node):
            continue
        name, _, overload = node.target.__name__.partition(".")
        packet = getattr(aten, name.removesuffix("_"), None)
        plain = getattr(packet, overload, None)
        x = args(node)[0]
        if not name.endswith("_") or plain is None or x.op != "call_function":
            continue
        if _views(x) or not node.users:
            continue  # it may lie in the memory of another
        readers = [user for user in x.users if user is not node]
        if any(place[user] > place[node] or _views(user) for user in readers):
            continue
        node.target = plain
        done += 1
    return done


def _views(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def _source(node: fx.Node, written: bool) -> fx.Node | None:
    """What a node hands on as it is, or None."""
    if is_call(node, *_DROPOUTS):
        given = arguments(node)
        return given["input"] if not given["train"] else None
    source = args(node)[0] if args(node) else None
    out, given_value = value(node), value(source)
    if out is None or given_value is None or not isinstance(source, fx.Node):
        return None
    if is_call(node, *_CASTS):
        kept = out.dtype == given_value.dtype and out.device == given_value.device
        if is_call(node, aten.contiguous.default) and not given_value.is_contiguous():
            return None
        if arguments(node).get("copy") and written:
            return None
        return source if kept else None
    if is_call(node, aten.clone.default):
        # a copy is for who writes in place; without such a node it only costs
        return source if not written and given_value.is_contiguous() else None
    if is_call(node, *_RESHAPES) and out.dim() == given_value.dim():
        # -1 of expand and view are sizes of the value here
        return source if all(map(same, out.shape, given_value.shape)) else None
    if is_call(node, aten.slice.Tensor):
        given = arguments(node)
        whole = given["step"] == 1 and given["start"] in (None, 0)
        whole = whole and (given["end"] is None or given["end"] == sys.maxsize)
        return source if whole else None
    if is_call(node, aten.add.Tensor) and args(node)[1] == 0 and out.dtype == given_value.dtype:
        # of whole numbers: -0.0 + 0 is another float
        return None if out.is_floating_point() else source
    return None
