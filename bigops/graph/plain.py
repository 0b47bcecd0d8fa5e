"""Back to plain torch: a copy of a model whose layers are torch's own."""

from __future__ import annotations

import copy

from torch import nn

from bigops.graph.sites import Sites
from bigops.nn.linear import Linear

# Activation modules that a fused linear layer takes over, by the name the op knows them by.
MODULES: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "gelu_tanh": nn.GELU,
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def plain(model: nn.Module) -> nn.Module:
    """A deep copy in which every `bigops.nn.Linear` is an `nn.Linear`, with equal weights.

    A fused activation becomes a module of its own: ``Sequential(nn.Linear, activation)`` at the
    layer's path, so paths stay and layers can be compared one by one. Layers that are called with
    a residual have no such form.

    Raises:
        ValueError: a layer whose activation torch has no module for (relu2).
    """
    twin = copy.deepcopy(model)
    sites = Sites(twin)
    replaced: dict[str, nn.Module] = {}
    for path, module in sites.unique():
        if type(module) is Linear:
            new = _plain(path, module)
            replaced.update(dict.fromkeys(sites.paths[id(module)], new))
    if "" in replaced:
        return replaced[""]
    sites.swap(replaced)
    return twin


def _plain(path: str, layer: Linear) -> nn.Module:
    bias = layer.bias is not None
    linear = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
    linear.weight, linear.bias = layer.weight, layer.bias
    linear.train(layer.training)
    if layer.activation == "none":
        return linear
    if layer.activation not in MODULES:
        raise ValueError(
            f"{path or 'model'}: torch has no module for the activation {layer.activation!r}"
        )
    kind = MODULES[layer.activation]
    activation = kind(approximate="tanh") if layer.activation == "gelu_tanh" else kind()
    return nn.Sequential(linear, activation).train(layer.training)
