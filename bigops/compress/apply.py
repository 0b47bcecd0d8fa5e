"""compress_ and freeze_: real storage and real kernels for the layers of a model, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bigops.backend import machine
from bigops.compress import calibrate, choose, measure, plan
from bigops.compress.build import Built, Choice, Stays, prepare
from bigops.compress.config import Configs
from bigops.compress.observers import observer_of
from bigops.graph import attention
from bigops.graph.atomic import atomic
from bigops.graph.carry import extras, without_hooks
from bigops.graph.record import Account, Done, Record, Skipped, account
from bigops.graph.sites import Contest, Sites, capture, contest
from bigops.nn.layer import Layer, layer_of
from bigops.nn.stored_state import StoredMatrix

KEEP = ("faster", "all")


def compress_(
    model: nn.Module,
    config: Configs | Mapping[str, Any],
    example_inputs: Any = None,
    data: Iterable[Any] | None = None,
    *,
    freeze: bool = True,
    keep: str = "faster",
    low_memory: bool = False,
) -> Record:
    """Compress the linear layers of ``model``, and the embeddings that are named, in place.

    All new layers are made beside the old ones and exchanged at the end, so memory holds the dense
    model and the compressed one at once; interrupted anywhere, by Ctrl-C too, the model is as it
    was.

    Args:
        model: any module; its `nn.Linear`, `bigops.nn.Linear` (the activation is kept),
            `LowRankLinear` (by `Int8()`) and compressed layers that are not frozen are compressed.
            Packed ones stay: `unpack_` comes first. With ``freeze`` `Conv1D` of transformers, too,
            and the projections of `nn.MultiheadAttention`, which becomes
            `bigops.nn.MultiheadAttention` ("attn.in_proj", "attn.out_proj") where one of them is
            compressed. Layers with one weight become one storage where all of them are given the
            same `Int8` or `Int4` form, and stay otherwise.
        config: `Sparse(0.8)`, `LowRank(energy=0.9)`, `Int8()`, `Sparse(0.8) + Int8()`,
            `LowRank(64) + Int8()`, `Int4()`, `W4A8` or `Fp8()` for every layer; or a mapping of
            names and patterns (`fnmatch`) to configs or None, which leaves a layer: the exact name
            comes first, then the first pattern that matches, and layers that none matches stay; or
            `Record.plan()` of an earlier call, which is carried out as it is.
            An embedding gets the config of its exact name, or of the first pattern whose config
            has ``embeddings=True`` or is None; one config for all counts as the pattern "*".
            No layer takes more bytes than before: one that would stays, and `Sparse` or `LowRank`
            beside an `Int8` that is smaller alone becomes that `Int8`. The record says so; of a
            layer with ``freeze=False`` it only says what it will take.
        example_inputs: what the model is called with: x, a tuple of positions or a mapping of
            keywords; a list is an x. Each layer is then timed against what it replaces,
            interleaved, on the input that it sees first. Without them nothing is timed.
        data: batches, each as ``example_inputs``, in any iterable, which is read once: static
            activations take their range from all that a layer is given in them, by the observer of
            the config. The lists that a `DataLoader` collates out of tuples give positions. Without
            data the range is that of ``example_inputs``.
        freeze: True: only the compressed storage is kept. False: the layers stay trainable in
            floating point, with their pattern kept, until `freeze_`; they share the Parameter
            objects of the old layers, so an optimiser goes on working. `LowRank` makes new
            Parameters, the factors, which need an optimiser of their own; alone it leaves them
            trainable with either.
        keep: "faster": where the original wins by more than noise, or, where nothing is timed, no
            kernel serves the new layer on its device, the original stays. "all": what was asked for
            takes its place all the same; the record has the times. Embeddings are taken for their
            bytes with either. An installation without any kernel cannot tell, keeps all, and the
            record says that, too.
        low_memory: convert layer by layer, each dense weight freed before the next is converted.
            Interrupted, each layer is either old or new: the exception has the record so far as its
            ``record``, and a second call with the same arguments goes on (it calibrates what is
            left on the model as it is by then).

    Returns:
        What was done, layer by layer, what was left with the reason, and what was not looked at,
        with its share of the model's bytes.

    Raises:
        ValueError: a pattern that no layer gets, NaN or inf in a layer's weight or bias, a config
            that a sparse or low-rank layer does not take, static activations without data, no
            batch, NaN or inf in one, or a plan that does not fit. The model is unchanged.
        TypeError: a config or data of another type. The model is unchanged.
    """
    given = (config, example_inputs, data, freeze, keep, low_memory)
    if low_memory:
        return _begin(model, *given).one_by_one()
    return _at_once(model, *given)


@atomic
def _at_once(model: nn.Module, *given: Any) -> Record:
    return _begin(model, *given).at_once()


@atomic
def _begin(
    model: nn.Module,
    config: Configs | Mapping[str, Any],
    example_inputs: Any,
    data: Iterable[Any] | None,
    freeze: bool,
    keep: str,
    again: bool,
) -> _Work:
    """All that comes before the first new layer: what each gets, its range, its first input.

    Args:
        again: whether layers that are compressed already may be all that a pattern matches.
    """
    sites = Sites(model)
    if keep not in KEEP:
        raise ValueError(f"keep: expected one of {', '.join(KEEP)}; got {keep!r}")
    if data is not None:
        calibrate.check_data(data)
    opened = attention.open_(sites) if freeze is True or plan.is_plan(config) else {}
    sites = Sites(model) if opened else sites
    layers = choose.find(sites)
    left = dict(layers.left)
    chosen: dict[str, Choice]
    if plan.is_plan(config):
        assert isinstance(config, Mapping)
        if example_inputs is not None or data is not None:
            raise ValueError("example_inputs, data: expected None with a plan; all is decided")
        keep = "all"
        chosen, freeze = _planned(layers, plan.read(config), left, again)
    else:
        configs, others = choose.assign(layers, choose.check_patterns(config), again)
        left.update(others)
        chosen = {name: Choice(value) for name, value in configs.items()}
    if not freeze:
        _keep_fast_paths(sites, chosen, left)
    _untie(layers, chosen, left)
    for name in list(chosen) if again else ():
        if choose.has_factors(layers.at(name), chosen[name].config):
            left[name] = "it has its factors already"
            del chosen[name]
    for name in chosen:
        choose.check_finite(name, layers.at(name))
    notes = [] if example_inputs is not None else ["nothing was timed: no example_inputs"]
    _calibrate(model, layers, chosen, left, example_inputs, data, notes)
    seen: dict[str, Tensor] = {}
    if example_inputs is not None:
        seen = capture(model, {name: layers.at(name) for name in chosen}, example_inputs)
    for name in list(chosen) if example_inputs is not None else ():
        if name not in seen:
            left[name] = "the example inputs never call it, so its weight may be used elsewhere"
            del chosen[name]
    _untie(layers, chosen, left)
    whole = account(model, dict.fromkeys([*layers.open, *layers.left, *left, *chosen]))
    units = choose.together(sites, layers, chosen)
    old = {name: layers.at(name) for name in chosen}
    return _Work(sites, opened, chosen, units, old, seen, left, whole, freeze, keep, notes)


def _keep_fast_paths(sites: Sites, chosen: dict[str, Choice], left: dict[str, str]) -> None:
    """Leave layers whose float weight the fast path of `nn.TransformerEncoderLayer` would read.

    Of a frozen layer it sees a `ComputedWeight`, and takes its other path.
    """
    for name in list(chosen):
        if isinstance(sites.parent(name), nn.TransformerEncoderLayer):
            left[name] = (
                "the fast path of TransformerEncoderLayer uses its weight without calling it "
                "until it is frozen; freeze=True takes it"
            )
            del chosen[name]


def _untie(layers: choose.Layers, chosen: dict[str, Choice], left: dict[str, str]) -> None:
    """Let go of layers whose weight others have, unless they become one storage with these."""
    found = choose.untie(layers, {name: choice.config for name, choice in chosen.items()})
    left.update(found)
    for name in found:
        del chosen[name]


def _planned(
    layers: choose.Layers, decided: plan.Decided, left: dict[str, str], again: bool
) -> tuple[dict[str, Choice], bool]:
    """The choices of a plan for a model that it fits; raise ValueError for another one."""
    chosen = {name: choice for name, choice in decided.layers.items() if choice is not None}
    there = {**layers.open, **layers.tables}
    missing = [n for n in chosen if n not in there and not (again and n in layers.frozen)]
    if missing:
        reasons = {**layers.left, **layers.barred}
        why = [f"{n} ({reasons.get(n, 'no linear layer is there')})" for n in missing]
        raise ValueError(f"plan: expected a model with the layers to compress; no {'; '.join(why)}")
    for name in layers.open:
        if name not in chosen:
            left[name] = "the plan leaves it" if name in decided.layers else "not in the plan"
    return {name: chosen[name] for name in there if name in chosen}, decided.freeze


def _calibrate(
    model: nn.Module,
    layers: choose.Layers,
    chosen: dict[str, Choice],
    left: dict[str, str],
    example_inputs: Any,
    data: Iterable[Any] | None,
    notes: list[str],
) -> None:
    """Find the qparams of static activations; layers without one leave ``chosen``."""
    static = [
        name
        for name, choice in chosen.items()
        if choice.config.activations == "static" and choice.x_qparams is None
    ]
    if not static:
        if data is not None:
            notes.append("data was not read: no layer has static activations")
        return
    what = "example_inputs" if data is None else "data"
    batches = [example_inputs] if data is None else calibrate.batches_of(data)
    if data is None and example_inputs is None:
        raise ValueError(
            "data, example_inputs: expected inputs to calibrate the static activations of "
            f"{', '.join(static)}; got None"
        )
    found = calibrate.calibrate(
        model,
        {name: layers.at(name) for name in static},
        batches,
        what,
        {name: observer_of(chosen[name].config.observer) for name in static},
    )
    notes += found.notes
    for name, qparams in found.qparams.items():
        chosen[name] = chosen[name]._replace(x_qparams=qparams)
    for name, reason in found.left.items():
        left[name] = reason
        del chosen[name]


class _Work:
    """The layers of one call of `compress_`: what becomes of each, and the record."""

    def __init__(
        self,
        sites: Sites,
        opened: dict[str, nn.Module],
        chosen: dict[str, Choice],
        units: list[list[str]],
        old: dict[str, nn.Module],
        seen: dict[str, Tensor],
        left: dict[str, str],
        whole: Account,
        freeze: bool,
        keep: str,
        notes: list[str],
    ) -> None:
        self.sites, self.chosen, self.old, self.seen = sites, chosen, old, seen
        self.opened = opened  # attention that ours stands for meanwhile
        self.units = units  # of the chosen ones, those with one weight
        self.left, self.whole, self.notes = left, whole, notes
        self.freeze, self.keep = freeze, keep
        self.done: dict[str, Done] = {}
        self.choices: dict[str, Choice] = {}
        self.timed: dict[Any, Contest] = {}

    def at_once(self) -> Record:
        """Make all new layers, then exchange them."""
        new: dict[str, nn.Module] = {}
        for names in self.units:
            for name, (layer, done) in self.make_unit(names, self.old, self.seen).items():
                new[name], self.done[name] = layer, done
        record = self.record()
        self.sites.swap(new)
        attention.close(self.sites, self.opened)
        return record

    def one_by_one(self) -> Record:
        """Exchange each layer as soon as it is made, and let go of the old one."""
        gradients = torch.is_grad_enabled()
        try:
            for names in self.units:
                old = {name: self.old.pop(name) for name in names}
                self._exchange(names, old, {n: self.seen.pop(n) for n in names if n in self.seen})
                del old
            attention.close(self.sites, self.opened)
            return self.record()
        except BaseException as error:
            torch.set_grad_enabled(gradients)  # as `atomic` does
            error.record = self.record()  # type: ignore[attr-defined]
            raise

    def _exchange(
        self, names: list[str], old: dict[str, nn.Module], seen: dict[str, Tensor]
    ) -> None:
        """One layer, or those with one weight: exchanged and in the record, or neither."""
        made = self.make_unit(names, old, seen)
        try:
            self.sites.swap({name: layer for name, (layer, _) in made.items()})
            for name, (layer, done) in made.items():
                self.sites.modules[name] = layer  # or the old one would live on there
                self.done[name] = done
        except BaseException:
            for name in made:
                self.sites.put(name, old[name])
                self.done.pop(name, None)
            raise

    def make_unit(
        self, names: list[str], old: Mapping[str, nn.Module], seen: Mapping[str, Tensor]
    ) -> dict[str, tuple[Layer, Done]]:
        """The new layers of a unit, with one storage where they have one weight, or none."""
        made: dict[str, tuple[Layer, Done]] = {}
        for name in names:
            one = self.make(name, old[name], self.chosen[name], seen.get(name))
            if one is None:
                others = [other for other in names if other != name]
                why = f"its weight is shared with {name}.weight, which stays"
                self.left.update(dict.fromkeys(others, why))
                return {}
            made[name] = one
        first, *others = names
        for name in others:
            layer, done = made[name]
            own, theirs = cast(StoredMatrix, layer), cast(StoredMatrix, made[first][0])
            gone = own.share(theirs) if self.freeze else own.weight.nbytes
            why = f"{done.why}; one storage with {first}"
            made[name] = layer, replace(done, bytes_after=done.bytes_after - gone, why=why)
        return made

    def make(
        self, name: str, old: nn.Module, choice: Choice, x: Tensor | None
    ) -> tuple[Layer, Done] | None:
        """The new layer and its entry; None where the old one stays, and why is in ``left``."""
        made = prepare(old, choice, self.freeze)
        if isinstance(made, Stays):
            self.left[name] = made.reason
            return None
        timed = None if x is None else self._contest(old, made, x)
        slow = _slower(old, made, x, timed)
        # without an extension every CPU kernel is missing, whatever the layer
        blind = x is None and machine.extension is None and _device(old).type == "cpu"
        if slow and self.keep == "faster" and not (blind or made.layer.for_bytes):
            self.left[name] = slow
            return None
        self.choices[name] = made.choice
        said = made.remarks + ([slow] if slow and timed is None else [])
        return made.layer, _done(name, old, made, timed, self.whole.layers[name], said)

    def _contest(self, old: nn.Module, made: Built, x: Tensor) -> Contest:
        """The times of both; layers of one form on one shape share them."""
        entries = tuple((p.shape, p.dtype) for p in old.parameters())
        bias, rank = getattr(old, "bias", None) is None, getattr(made.layer, "rank", None)
        key = (
            x.shape,
            x.dtype,
            str(made.choice.config),
            rank,
            entries,
            type(old),
            bias,
            getattr(made.layer, "activation", None),
        )
        if key not in self.timed:
            self.timed[key] = contest(without_hooks(old), made.frozen, x, training=False)
        return self.timed[key]

    def record(self) -> Record:
        """What was done so far and what was left."""
        waiting = dict.fromkeys(self.chosen, "it was interrupted before this layer")
        left = {n: why for n, why in {**waiting, **self.left}.items() if n not in self.done}
        choices = {name: self.choices[name] for name in self.done}
        places = {path: place for place, path in enumerate(self.sites.modules)}
        return Record(
            "compress_",
            [self.done[name] for name in sorted(self.done, key=places.__getitem__)],
            [Skipped(n, why, self.whole.layers[n]) for n, why in left.items()],
            self.notes,
            self.whole.unseen,
            self.whole.total,
            plan.write({**dict.fromkeys(left), **choices}, self.freeze),
        )


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _slower(old: nn.Module, made: Built, x: Tensor | None, timed: Contest | None) -> str | None:
    """Why the new layer is the slower one, or None."""
    if timed is not None:
        return f"the original is faster: {timed}" if timed.lost else None
    if x is None and made.layer.for_bytes:
        return None
    if x is None:
        width = int(made.layer.in_features)
        x = torch.empty(1, width, dtype=next(old.parameters()).dtype, device=_device(old))
    return measure.without_kernel(made.frozen, x)


def _done(
    name: str, old: nn.Module, made: Built, timed: Contest | None, before: int, said: list[str]
) -> Done:
    new, config = made.layer, made.choice.config
    why = [str(timed) if timed is not None else "asked for"]
    if not new.freezes:
        why.append("trainable at this rank")
    elif not new.frozen:
        why.append("trainable, in floating point until freeze_")
    rank = "" if new.rank is None else f", rank {new.rank}"
    return Done(
        name,
        f"{type(old).__name__} -> {type(new).__name__} by {config}{rank}",
        "; ".join(why + said),
        before,
        new.nbytes + extras(old).nbytes,
        new.density,
        timed.us_before if timed else None,
        timed.us_after if timed else None,
        timed.speedup if timed else None,
    )


def _first_of(firsts: dict[int, Any], layer: Layer, twin: Any) -> Any:
    """The layer before it that had the same float weight, or itself."""
    weight = layer._parameters.get("weight")
    if weight is None or layer.pattern is not None:  # whose values may be trained again
        return twin
    return firsts.setdefault(id(weight), twin)


@atomic
def freeze_(model: nn.Module) -> Record:
    """Freeze every compressed layer of ``model`` in place: the float weights go.

    The stored values of a thawed layer are not trained any more; a `LowRankLinear` is left. All
    storages are made first, beside the float weights; interrupted anywhere, the model is as it was.

    Raises:
        ValueError: no compressed layer, or NaN or inf in a weight. The model is unchanged.
    """
    ours = {n: layer for n, m in Sites(model).unique() if (layer := layer_of(m)) is not None}
    found = {n: layer for n, layer in ours.items() if layer.freezes}
    factors = [n for n, layer in ours.items() if layer.compressed and not layer.freezes]
    if not found and not factors:
        raise ValueError("model: expected compressed layers (compress_ makes them); found none")
    whole = account(model, [*found, *factors])
    left = {
        n: f"it is {'packed' if m.unpacks else 'frozen'} already"
        for n, m in found.items()
        if m.frozen and not m.thawed
    }
    left.update((n, "its factors are all it has; Int8() makes them int8") for n in factors)
    done: list[Done] = []
    frozen: list[tuple[nn.Module, nn.Module]] = []
    firsts: dict[int, Any] = {}  # of the layers with one weight
    for name, layer in found.items():
        if name in left:
            continue
        choose.check_finite(name, layer)
        twin: Any = copy.copy(layer)
        twin.freeze()
        first = _first_of(firsts, layer, twin)
        gone = twin.share(first) if first is not twin else 0
        frozen.append((layer, twin))
        what, before = f"{type(layer).__name__} frozen", whole.layers[name]
        done.append(Done(name, what, "asked for", before, twin.nbytes - gone, twin.density))
    skipped = [Skipped(n, why, whole.layers[n]) for n, why in left.items()]
    record = Record("freeze_", done, skipped, [], whole.unseen, whole.total)
    for old, new in frozen:
        vars(old).update(vars(new))
    return record
