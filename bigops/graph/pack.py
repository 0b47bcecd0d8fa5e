"""pack_ and unpack_: dense layers of a model to panels for inference and back, in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bigops.backend import machine
from bigops.formats.packed import PANEL, SERVED
from bigops.graph.atomic import atomic
from bigops.graph.carry import extras, lost_reason, swap_reason, without_hooks
from bigops.graph.record import Done, Record, Skipped, account
from bigops.graph.sites import Contest, Sites, capture, contest
from bigops.nn import LAYERS
from bigops.nn.layer import Layer, layer_of
from bigops.nn.linear import Linear

_LEAST = 64 * 64  # entries of a weight whose panels pay: a smaller one lies in the nearest cache
_UNTIMED = "not timed: the crossover table says that panels pay for {dtype} on this CPU"


@atomic
def pack_(model: nn.Module, example_inputs: Any = None) -> Record:
    """Replace the dense layers of ``model`` by packed ones for inference on the CPU, in place.

    `nn.Linear` and `bigops.nn.Linear` become a `PackedLinear` (the activation is kept), `GatedMLP`
    a `PackedGatedMLP`, `LowRankLinear` a `PackedLowRankLinear`, where the packed kernel pays. Their
    float weights go: the packed model has no ``weight`` to read, write or train. What holds an old
    Parameter besides (an optimiser) keeps it alive and no longer reaches the model. `state_dict`
    has the unpacked weights under the old names and `load_state_dict` packs what it is given;
    `unpack_` is the way back. While this runs, both forms are in memory.

    Args:
        model: any module.
        example_inputs: what the model is called with: x, a tuple of positions or a mapping of
            keywords; a list is an x. Each layer is then timed against what it replaces,
            interleaved, on the input that it sees; where the original wins, the original stays.
            Without them nothing is timed.

    Returns:
        What was done, layer by layer, what was left with the reason, and what was not looked at.

    Raises:
        TypeError: ``model`` is no module.
        Exception: whatever the model raises on ``example_inputs``.

    On any exception, KeyboardInterrupt too, the model is unchanged.
    """
    sites = Sites(model)
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    inside: set[int] = set()
    for path, module in sites.unique():
        layer = layer_of(module)
        if id(module) in inside or not (layer or isinstance(module, nn.Linear)):
            continue
        if layer is not None:
            if layer.inside is not None:
                continue
            inside.update(id(layer._modules[part]) for part in layer.parts)
        reason = _reason_to_leave(sites, path, module)
        if reason is None:
            layers[path] = module
        else:
            left[path] = reason
    whole = account(model, [*layers, *left])
    seen = {} if example_inputs is None else capture(model, layers, example_inputs)
    new: dict[str, Layer] = {}
    timed: dict[str, Contest] = {}
    cache: dict[Any, Contest] = {}
    for path, old in layers.items():
        if example_inputs is not None and path not in seen:
            left[path] = "the example inputs never call it, so its weight may be used elsewhere"
            continue
        packed = _drop_in(old).packed()
        if path in seen:
            x = seen[path]
            shapes = tuple((p.shape, p.dtype) for p in old.parameters())
            key = (x.shape, x.dtype, type(old), getattr(old, "activation", "none"), shapes)
            if key not in cache:
                cache[key] = contest(without_hooks(old), packed, x, training=False)
            timed[path] = cache[key]
            if cache[key].lost:
                left[path] = f"the original is faster: {cache[key]}"
                continue
        new[path] = packed
    done = [
        _done(path, layers[path], packed, whole.layers[path], timed.get(path))
        for path, packed in new.items()
    ]
    skipped = [Skipped(n, why, whole.layers[n]) for n, why in left.items()]
    sites.swap(new)
    notes = [] if example_inputs is not None else ["nothing was timed: no example_inputs"]
    return Record("pack_", done, skipped, notes, whole.unseen, whole.total)


@atomic
def unpack_(model: nn.Module) -> Record:
    """Replace the packed layers of ``model`` by the drop-in layers that they stand for, in place.

    Weights come back bit for bit, as new Parameters; biases stay the objects that they were, but
    for those that a `GatedMLP` stacks. A `PackedLinear` becomes a `bigops.nn.Linear`.

    Returns:
        What was done, and what was left with the reason; empty where nothing is packed.

    Raises:
        TypeError: ``model`` is no module.

    On any exception, KeyboardInterrupt too, the model is unchanged.
    """
    sites = Sites(model)
    new: dict[str, nn.Module] = {}
    done: list[Done] = []
    left: list[Skipped] = []
    inside: set[int] = set()
    for path, module in sites.unique():
        layer = layer_of(module)
        if id(module) in inside or layer is None or not layer.unpacks:
            continue
        inside.update(map(id, module.children()))
        reason = "it is the model itself; thaw() unpacks it in place" if path == "" else None
        reason = reason or sites.fixed(path) or swap_reason(module, False, keys_stay=True)
        for part in module.modules():
            if part is not module:
                reason = reason or lost_reason(part)
        if reason is not None:
            left.append(Skipped(path, reason))
            continue
        unpacked = layer.unpacked()
        new.update(dict.fromkeys(sites.paths[id(module)], unpacked))
        what = f"{type(module).__name__} -> {type(unpacked).__name__}"
        size = sum(p.nbytes for p in unpacked.parameters()) + extras(module).nbytes
        done.append(Done(path, what, "asked for", layer.nbytes, size))
    sites.swap(new)
    return Record("unpack_", done, left)


def _drop_in(module: nn.Module) -> Layer:
    """The layer of this package that stands for ``module``, an `nn.Linear` or one itself."""
    return layer_of(module) or Linear.from_linear(module)  # type: ignore[arg-type]


def _reason_to_leave(sites: Sites, path: str, module: nn.Module) -> str | None:
    layer = layer_of(module)
    reason = layer and layer.closed_to_pack
    reason = reason or sites.reason_to_leave(path, (nn.Linear, *LAYERS), weight_goes=True)
    for part in layer.parts if layer else ():
        if reason is None:
            reason = sites.reason_to_leave(f"{path}.{part}", (Linear,), weight_goes=True)
            reason = reason or lost_reason(sites.modules[f"{path}.{part}"])
            reason = reason and f"{part}: {reason}"
    if reason is not None:
        return reason
    for name, weight in module.named_parameters():
        if weight.dim() == 2:
            halves = 2 if name == "gate_up_weight" else 1
            if type(weight) is not nn.Parameter:
                kind = type(weight).__name__
                return f"{name}: it is a {kind}, not laid out on one device alone"
            if reason := costs_more(weight, weight.shape[0] // halves):
                return f"{name}: {reason}"
    return None


def costs_more(weight: Tensor, rows: int) -> str | None:
    """Why panels of ``rows`` rows of a weight would not be served, or not pay; None: they do."""
    if weight.device.type != "cpu":
        return f"it is on {weight.device}; panels are for the CPU"
    if weight.dtype not in SERVED:
        return f"no packed kernel takes {weight.dtype}"
    if machine.extension is None:
        return machine.extension_error
    if not machine.packs(weight.dtype):
        return f"panels do not pay for {weight.dtype} on this CPU, by the crossover table"
    if rows * weight.shape[1] < _LEAST or rows < PANEL:
        return (
            f"{rows} x {weight.shape[1]} is too small for panels of {PANEL} rows to pay, which "
            f"begins at {PANEL} rows and {_LEAST} entries"
        )
    return None


def _done(path: str, old: nn.Module, new: Layer, before: int, timed: Contest | None) -> Done:
    dtype = next(old.parameters()).dtype
    return Done(
        path,
        f"{type(old).__name__} -> {type(new).__name__}",
        str(timed) if timed else _UNTIMED.format(dtype=dtype),
        before,
        new.nbytes + extras(old).nbytes,
        new.density,
        timed.us_before if timed else None,
        timed.us_after if timed else None,
        timed.speedup if timed else None,
    )
