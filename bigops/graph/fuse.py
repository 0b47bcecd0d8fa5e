"""fuse_: swap nn.Linear, and the activations that alone read them, for fused layers in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigops.formats import checks
from bigops.graph import dataflow
from bigops.graph.atomic import atomic
from bigops.graph.carry import hook_reason, without_hooks
from bigops.graph.record import Done, Record, Skipped, account
from bigops.graph.sites import Contest, Sites, capture, contest
from bigops.nn.computed_weight import is_dense
from bigops.nn.layer import layer_of
from bigops.nn.linear import Linear

_UNTIMED = "not timed: the crossover table of the op decides per call"


@atomic
def fuse_(model: nn.Module, example_inputs: Any = None) -> Record:
    """Swap what can be swapped for fused layers, in place, and say what was left and why.

    An `nn.Linear`, or one of a class that adds nothing to it, becomes a `bigops.nn.Linear` with the
    same Parameter objects, so an optimiser goes on working. What was set on it goes along:
    attributes, buffers, children and hooks. An activation module is taken into the layer before it,
    and an `nn.Identity` takes its place, only where it is proven that nothing else reads that
    layer's output whenever the model is called:

    - torch.fx traces the model as a whole, in both modes, with gradients and without, and with each
      combination of its optional arguments, up to 4 of them: flags True and False, others given and
      left out. What a trace does not run (hooks of the model and of torch's layers, a ``__call__``
      of its own) is read as the next point says.
    - Of a model that cannot be traced so (the record says why), a part that can be, or an
      `nn.Sequential`, is taken where the rest of the model only ever calls it. That is read from
      the source of each forward, of the hooks, and of the methods, functions and objects that these
      name: the part's own name is only called (``self.head(x)``), or no such code says the name of
      the layer, of the activation, or of another method of the part. Indexing, slicing, iterating,
      ``children()`` and computed names that lead there, a list or a closure that holds the module,
      too, and code without source leave the activation where it is. The record's notes name it.

    Between the two there may be an `nn.Identity`, and an `nn.Dropout` with p = 0: any other acts
    before the activation when the model is trained again.

    What no proof covers: code outside of the model that calls its children or methods other than
    forward (``model[0](x)``), and a forward that decides by its own attributes, by random numbers,
    by the type of an argument, by other modes of torch (autocast, compiling) or by what tracing
    raises: it is traced as it decides at that moment.

    Looking at the model changes nothing in it, nor a random state (`bigops.graph.looking`).

    Args:
        model: any module.
        example_inputs: what the model is called with: x, a tuple of positions or a mapping of
            keywords; a list is an x. Old and new are then timed against each other, interleaved,
            on the input that each layer sees (forward and backward where the model is in training
            mode); where the original wins by more than noise, it stays and the record says so.

    Returns:
        What was done and what was left, each with the reason, and what was not looked at; print
        it, or take `to_dict()`.

    Raises:
        TypeError: ``model`` is no module.
        Exception: whatever the model raises on ``example_inputs``.

    On any exception, KeyboardInterrupt too, the model is unchanged.
    """
    sites = Sites(model)
    left: dict[str, str] = {}
    layers: dict[str, nn.Linear] = {}
    for path, module in sites.unique():
        if not is_dense(module):
            continue
        reason = sites.reason_to_leave(path, (nn.Linear, Linear), weight_goes=False, keys_stay=True)
        if reason is None and module.weight.dtype not in checks.FLOATING:
            reason = f"no kernel takes {module.weight.dtype}"
        if reason is None:
            layers[path] = module
        else:
            left[path] = reason
    flow = dataflow.find(sites)
    pairs = _usable(flow, layers)
    for path, layer in list(layers.items()):
        if layer_of(layer) is not None and path not in pairs:
            left[path] = "it is a bigops.nn.Linear already"
            del layers[path]

    whole = account(model, [*layers, *left])
    new = {}
    for path, layer in layers.items():
        activation = pairs[path].activation if path in pairs else None
        new[path] = Linear.from_linear(layer, activation)
    timed: dict[str, Contest] = {}
    if example_inputs is not None:
        seen = capture(model, layers, example_inputs)
        timed = _contests(sites, layers, new, pairs, seen, model.training)
        for path in _losers(timed, pairs):
            why = f"the original is faster: {timed[path]}"
            if not timed[path].lost:
                why = "it shares its activation with a layer whose original is faster"
            left[path] = why
            del new[path]
            pairs.pop(path, None)

    replaced: dict[str, nn.Module] = dict(new)
    for pair in pairs.values():
        for path in pair.paths:
            replaced[path] = nn.Identity().train(sites.modules[path].training)
    done = [
        _done(path, whole.layers[path], pairs.get(path), timed.get(path), example_inputs)
        for path in new
    ]
    skipped = [Skipped(n, why, whole.layers[n]) for n, why in left.items()]
    sites.swap(replaced)
    return Record("fuse_", done, skipped, flow.notes, whole.unseen, whole.total)


def _usable(flow: dataflow.Dataflow, layers: dict[str, nn.Linear]) -> dict[str, dataflow.Pair]:
    """Pairs whose layer is swapped; an activation is taken only if all that feed it are."""
    barred: set[str] = set()
    for path, pair in flow.pairs.items():
        layer = layers.get(path)
        # a hook would see the output of the activation
        if layer is None or hook_reason(layer) or _activation(layer) != "none":
            barred.update(pair.paths)
    return {
        path: pair
        for path, pair in flow.pairs.items()
        if path in layers and barred.isdisjoint(pair.paths)
    }


def _activation(layer: nn.Linear) -> str:
    return str(getattr(layer_of(layer), "activation", "none"))


def _contests(
    sites: Sites,
    layers: dict[str, nn.Linear],
    new: dict[str, Linear],
    pairs: dict[str, dataflow.Pair],
    seen: dict[str, Tensor],
    training: bool,
) -> dict[str, Contest]:
    timed: dict[str, Contest] = {}
    cache: dict[Any, Contest] = {}
    for path, layer in layers.items():
        if path not in seen:
            continue
        x, fused = seen[path], new[path]
        old = without_hooks(layer)
        if path in pairs:
            old = nn.Sequential(old, sites.modules[pairs[path].paths[0]])
        key = (
            x.shape,
            x.dtype,
            layer.weight.shape,
            layer.weight.dtype,
            layer.bias is None,
            fused.activation,
            layer.weight.requires_grad,
        )
        if key not in cache:
            backward = training and (layer.weight.requires_grad or x.is_floating_point())
            cache[key] = contest(old, fused, x, training=backward)
        timed[path] = cache[key]
    return timed


def _losers(timed: dict[str, Contest], pairs: dict[str, dataflow.Pair]) -> list[str]:
    """Layers that stay: slower ones, and those that share an activation with one."""
    lost = [path for path, result in timed.items() if result.lost]
    kept = {p for path in lost if path in pairs for p in pairs[path].paths}
    together = [
        path for path, pair in pairs.items() if path not in lost and not kept.isdisjoint(pair.paths)
    ]
    return lost + [path for path in together if path in timed]


def _done(
    path: str,
    size: int,
    pair: dataflow.Pair | None,
    timed: Contest | None,
    example_inputs: Any,
) -> Done:
    what = "bigops.nn.Linear"
    why = str(timed) if timed else _UNTIMED
    if timed is None and example_inputs is not None:
        why = "not timed: the example inputs never call it"
    if pair is not None:
        what += f" with {pair.activation} of {', '.join(pair.paths)}"
        why = f"{pair.how}; {why}"
    return Done(
        path,
        what,
        why,
        size,
        size,
        1.0,
        timed.us_before if timed else None,
        timed.us_after if timed else None,
        timed.speedup if timed else None,
    )
