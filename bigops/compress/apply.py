"""compress_ and freeze_: real storage and real kernels for the layers of a model, in place."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bigops.compress.config import (
    BESIDE_SPARSE,
    Config,
    Fp8,
    Int4,
    Int8,
    LowRank,
    LowRankInt8,
    Plan,
    Sparse,
    activations_of,
    check_config,
)
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.fp8_linear import Fp8Linear
from bigops.nn.gated_mlp import GatedMLP
from bigops.nn.linear import Linear
from bigops.nn.low_rank_linear import LowRankLinear
from bigops.nn.quant_linear import QuantLinear
from bigops.nn.quant_low_rank_linear import QuantLowRankLinear
from bigops.nn.record import Done, Record, Skipped
from bigops.nn.sites import Contest, Sites, capture, contest
from bigops.nn.sparse_linear import SparseLinear

_EXACT = (
    nn.Linear, Linear, LowRankLinear, Fp8Linear, QuantLinear, QuantLowRankLinear, SparseLinear
)  # fmt: skip
_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def compress_(
    model: nn.Module, config: Plan, example_inputs: Any = None, freeze: bool = True
) -> Record:
    """Compress the linear layers of ``model`` in place.

    Args:
        model: any module; its `nn.Linear`, `bigops.nn.Linear` (the activation is kept),
            `LowRankLinear` (by `Int8()`) and compressed layers that are not frozen are compressed.
        config: `Sparse(0.8)`, `LowRank(energy=0.9)`, `Int8()`, `Sparse(0.8) + Int8()`,
            `LowRank(64) + Int8()`, `Int4()`, `W4A8` or `Fp8()` for every layer, or a mapping of
            name patterns (`fnmatch`) to configs. The first that matches wins; layers that none
            matches stay as they are, as do those whose factors would have no fewer entries.
        example_inputs: what the model is called with: x, a tuple of positions or a mapping of
            keywords. Each layer is then timed against what it replaces, interleaved, on the input
            that it sees; where the original wins, the original stays and the record says so.
            Without them nothing is timed. Static activations take their range from them.
        freeze: True: only the compressed storage is kept. False: the layers stay trainable in
            floating point, with their pattern kept, until `freeze_`; they share the Parameter
            objects of the old layers, so an optimiser goes on working. `LowRank` makes new
            Parameters, the factors, which need an optimiser of their own; alone it leaves them
            trainable with either.

    Returns:
        What was done, layer by layer, and what was left with the reason.

    Raises:
        ValueError: a pattern or config that matches no layer, NaN or inf in a layer's weight or
            bias, a config that a sparse or low-rank layer does not take, or static activations
            without example_inputs. The model is unchanged.
        TypeError: a config of another type. The model is unchanged.
    """
    sites = Sites(model)
    patterns: dict[str, Config] = {}
    if isinstance(config, Mapping):
        for pattern, value in config.items():
            if not isinstance(pattern, str):
                raise TypeError(f"config: expected name patterns (str) as keys; got {pattern!r}")
            check_config(f"config[{pattern!r}]", value)
            patterns[pattern] = value
    else:
        check_config("config", config)
        patterns["*"] = config
    layers, left = _layers(sites)
    chosen = _choose(layers, left, patterns)
    skipped = [Skipped(name, reason) for name, reason in left.items()]
    skipped += [Skipped(n, "no pattern matches it") for n in layers if n not in chosen]
    for name in chosen:
        _check_finite(name, layers[name])

    timed: dict[str, Contest] = {}
    built: dict[str, CompressedLinear | LowRankLinear] = {}
    static = [n for n, c in chosen.items() if activations_of(c) == "static"]
    if example_inputs is None and static:
        raise ValueError(
            f"example_inputs: expected inputs to calibrate the static activations of "
            f"{', '.join(static)}; got None"
        )
    if example_inputs is not None:
        seen = capture(model, {name: layers[name] for name in chosen}, example_inputs)
    cache: dict[Any, Contest] = {}
    for name, value in chosen.items():
        old = layers[name]
        if example_inputs is not None and name not in seen:
            uncalled = "the example inputs never call it, so its weight may be used elsewhere"
            skipped.append(Skipped(name, uncalled))
            continue
        x = None if example_inputs is None else seen[name]
        reason = _saves_nothing(old, _rank_of(value))  # before the singular values are computed
        if reason is None:
            new = build(old, value, x)
            reason = _saves_nothing(old, getattr(new, "rank", None))
        if reason is not None:
            skipped.append(Skipped(name, reason))
            continue
        if freeze and isinstance(new, CompressedLinear):
            new.freeze()
        if x is not None:
            frozen = new if freeze else _frozen_twin(new, old, value, x)
            key = (x.shape, x.dtype, str(value), getattr(new, "rank", None), _entries(old),
                   next(old.parameters()).dtype, type(old), old.bias is None,
                   frozen.activation)  # fmt: skip
            if key not in cache:
                cache[key] = contest(old, frozen, x, training=False)
            timed[name] = cache[key]
            if cache[key].lost:
                skipped.append(Skipped(name, f"the original is faster: {cache[key]}"))
                continue
        built[name] = new
    before = {name: sum(p.nbytes for p in layers[name].parameters()) for name in built}
    sites.swap(built)
    done = [
        _done(n, chosen[n], layers[n], new, timed.get(n), before[n]) for n, new in built.items()
    ]
    notes = [] if example_inputs is not None else ["nothing was timed: no example_inputs"]
    return Record("compress_", done, skipped, notes)


def build(
    layer: nn.Module, config: Config, x: Tensor | None = None
) -> CompressedLinear | LowRankLinear:
    """A compressed layer in recovery state beside ``layer``, which is not changed.

    Args:
        x: an input of the layer, from which static activations take their range.
    """
    if isinstance(layer, LowRankLinear | QuantLowRankLinear):
        if config != Int8():
            raise ValueError(
                f"config: expected Int8() for a low-rank layer, whose rank stays; got {config}"
            )
        return QuantLowRankLinear.from_low_rank(layer)
    if isinstance(config, LowRank | LowRankInt8):
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"config: expected a dense layer for {config}; got a {type(layer).__name__}"
            )
        form = config if isinstance(config, LowRank) else config.low_rank
        # Factors made under inference_mode could not be trained later.
        with torch.inference_mode(False), torch.no_grad():
            factors = LowRankLinear.from_linear(layer, form.rank, form.energy, exact=form.exact)
        if isinstance(config, LowRank):
            return factors
        return QuantLowRankLinear.from_low_rank(factors)
    if isinstance(config, Int8) and isinstance(layer, SparseLinear):
        if config not in BESIDE_SPARSE:
            raise ValueError(
                f"config: expected Int8() or Int8(activations='static') for a sparse layer; got "
                f"{config}"
            )
        # the pattern there is stays
        kept = SparseLinear.from_linear(
            layer, pattern=str(layer.pattern), mask=layer.mask, activations=config.activations
        )
        return _calibrated(kept, x)
    if isinstance(config, Fp8):
        return Fp8Linear.from_linear(layer, scales=config.scales, activations=config.activations)
    if isinstance(config, Int8 | Int4):
        quantised = QuantLinear.from_linear(
            layer,
            bits=8 if isinstance(config, Int8) else 4,
            group=config.group,
            symmetric=config.symmetric,
            activations=config.activations,
        )
        return _calibrated(quantised, x)
    if isinstance(config, Sparse):
        return SparseLinear.from_linear(layer, config.sparsity, config.pattern, config.values)
    sparse = SparseLinear.from_linear(
        layer, config.sparse.sparsity, config.sparse.pattern, activations=config.int8.activations
    )
    return _calibrated(sparse, x)


def _rank_of(config: Config) -> int | None:
    """The rank that a config names."""
    if isinstance(config, LowRankInt8):
        config = config.low_rank
    return config.rank if isinstance(config, LowRank) else None


def _saves_nothing(layer: nn.Module, rank: int | None) -> str | None:
    """Why factors of this rank would be no smaller than the layer, or None."""
    if rank is None or not isinstance(layer, nn.Linear):
        return None
    n, k = layer.out_features, layer.in_features
    if rank * (k + n) < n * k:
        return None
    return (
        f"rank {rank} saves nothing: {rank} x ({k} + {n}) entries of the factors for {k} x {n} of "
        "the weight"
    )


def _entries(layer: nn.Module) -> tuple[torch.Size, ...]:
    return tuple(p.shape for p in layer.parameters())


def _frozen_twin(
    new: CompressedLinear | LowRankLinear, old: nn.Module, config: Config, x: Tensor
) -> CompressedLinear | LowRankLinear:
    """What ``new`` is once frozen; it shares no storage with it."""
    if isinstance(new, LowRankLinear):
        return new
    if isinstance(new, QuantLowRankLinear):
        return copy.deepcopy(new).freeze()  # not built again: singular values take long
    twin = build(old, config, x)
    assert isinstance(twin, CompressedLinear)
    return twin.freeze()


def _calibrated(layer: CompressedLinear, x: Tensor | None) -> CompressedLinear:
    if x is not None and layer.x_grid is not None:
        layer.calibrate(x)
    return layer


def freeze_(model: nn.Module) -> Record:
    """Freeze every compressed layer of ``model`` in place: the float weights go.

    Of a thawed layer the stored values become a buffer again; a `LowRankLinear` is left.

    Raises:
        ValueError: no compressed layer, or NaN or inf in a weight. The model is unchanged.
    """
    modules = list(Sites(model).unique())
    found = [(n, m) for n, m in modules if isinstance(m, CompressedLinear)]
    factors = [n for n, m in modules if isinstance(m, LowRankLinear)]
    if not found and not factors:
        raise ValueError("model: expected compressed layers (compress_ makes them); found none")
    skipped = [Skipped(n, "it is frozen already") for n, m in found if m.frozen and not m.thawed]
    skipped += [Skipped(n, "its factors are all it has; Int8() makes them int8") for n in factors]
    storages = []
    for name, layer in found:
        if not layer.frozen or layer.thawed:
            _check_finite(name, layer)
            storages.append((name, layer, layer._convert()))
    before = [layer.nbytes for _, layer, _ in storages]
    for _, layer, storage in storages:
        layer.set_storage(storage)
    done = [
        Done(
            name,
            f"{type(layer).__name__} frozen",
            "asked for",
            size,
            layer.nbytes,
            getattr(layer, "density", 1.0),
        )
        for (name, layer, _), size in zip(storages, before, strict=True)
    ]
    return Record("freeze_", done, skipped)


def _layers(sites: Sites) -> tuple[dict[str, Any], dict[str, str]]:
    """The layers that can be compressed by path, and the others with the reason."""
    layers: dict[str, Any] = {}
    left: dict[str, str] = {}
    for path, module in sites.unique():
        if isinstance(module, GatedMLP):
            left[path] = "its gate and up projection: gated pairs have no compressed kernel"
        if isinstance(module, CompressedLinear) and module.frozen:
            left[path] = "it is thawed" if module.thawed else "it is frozen already"
        elif isinstance(module, nn.Linear | LowRankLinear | CompressedLinear):
            reason = sites.reason_to_leave(path, _EXACT, weight_goes=True)
            dtype = next((p.dtype for p in module.parameters()), torch.float32)
            if reason is None and dtype not in _SERVED:
                reason = f"no compressed kernel takes {dtype}"
            if reason is None:
                layers[path] = module
            else:
                left[path] = reason
    return layers, left


def _choose(
    layers: Mapping[str, Any], left: Mapping[str, str], patterns: Mapping[str, Config]
) -> dict[str, Config]:
    chosen: dict[str, Config] = {}
    for name in layers:
        for pattern, value in patterns.items():
            if fnmatch.fnmatchcase(name, pattern):
                chosen[name] = value
                break
    empty = [p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in layers)]
    if empty:
        there = ", ".join(layers) or "none"
        barred = [
            f"{name} ({reason})"
            for name, reason in left.items()
            if any(fnmatch.fnmatchcase(name, p) for p in empty)
        ]
        raise ValueError(
            f"config: no layer to compress matches {', '.join(map(repr, empty))}; layers that can "
            f"be compressed: {there}" + (f"; matched, but left: {'; '.join(barred)}" * bool(barred))
        )
    return chosen


def _check_finite(name: str, layer: Any) -> None:
    for leaf in ("weight", "u", "v", "values", "bias"):
        value = getattr(layer, leaf, None)
        if value is not None and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"{name}.{leaf}: expected finite values; got {bad} NaN or inf of {value.numel()}"
            )


def _done(
    name: str,
    config: Config,
    old: Any,
    new: CompressedLinear | LowRankLinear,
    timed: Contest | None,
    before: int,
) -> Done:
    why = str(timed) if timed is not None else "asked for"
    if isinstance(new, LowRankLinear):
        why += "; trainable at this rank"
    elif not new.frozen:
        why += "; trainable, in floating point until freeze_"
    rank = f", rank {new.rank}" if isinstance(new, LowRankLinear | QuantLowRankLinear) else ""
    return Done(
        name,
        f"{type(old).__name__} -> {type(new).__name__} by {config}{rank}",
        why,
        before,
        new.nbytes,
        getattr(new, "density", 1.0),
        timed.us_before if timed else None,
        timed.us_after if timed else None,
        timed.speedup if timed else None,
    )
