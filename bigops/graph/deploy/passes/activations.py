"""Which calls are an activation that a product takes into its epilogue."""

from __future__ import annotations

from torch import fx

from bigops.graph.deploy.passes.rewrite import arguments, aten, is_call

_NAMES = {
    str(aten.relu.default): "relu",
    str(aten.silu.default): "silu",
    str(aten.sigmoid.default): "sigmoid",
    str(aten.tanh.default): "tanh",
    str(aten.relu_.default): "relu",
    str(aten.silu_.default): "silu",
}


def name_of(node: fx.Node) -> str | None:
    """The word of an activation for what a node computes of its first argument, or None."""
    if node.op != "call_function":
        return None
    if is_call(node, aten.gelu.default):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(arguments(node)["approximate"])
    return _NAMES.get(str(node.target))
