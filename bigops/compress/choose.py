"""Which layers of a model can be compressed, and which of them gets which config."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from bigops.compress.config import Config, check_config
from bigops.graph import attention
from bigops.graph.sites import Sites
from bigops.graph.transposed import is_transposed
from bigops.nn import LAYERS, embedding
from bigops.nn.layer import layer_of

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Layers(NamedTuple):
    """The linear layers and the embeddings of a model by path."""

    open: dict[str, Any]  # linear layers that can be compressed
    left: dict[str, str]  # the others, with the reason
    frozen: list[str]  # of those, what is compressed already
    tables: dict[str, Any]  # embeddings that can be compressed
    barred: dict[str, str]  # the others, with the reason
    ties: dict[str, list[str]]  # who else has the weight of an open layer or of such an embedding

    def at(self, name: str) -> Any:
        """The layer or embedding of that name."""
        return self.open[name] if name in self.open else self.tables[name]


def find(sites: Sites) -> Layers:
    """The layers that can be compressed, and the others with the reason."""
    found = Layers({}, {}, [], {}, {}, {})
    for path, module in sites.unique():
        layer, around = layer_of(module), layer_of(sites.parent(path))
        table = isinstance(module, nn.Embedding)
        if layer is not None:
            if layer.inside is not None:
                continue
            if layer.frozen and not layer.unpacks:
                found.frozen.append(path)
        elif not (table or isinstance(module, nn.Linear) or is_transposed(module)):
            continue
        reason = layer and layer.closed_to_compress
        reason = reason or (around and around.inside) or _unfit(sites, path, module)
        if reason is not None:
            # one that is frozen was asked for once, so that it is spoken of
            (found.barred if table and layer is None else found.left)[path] = reason
            continue
        (found.tables if table else found.open)[path] = module
        if users := sites.tied(path):
            found.ties[path] = users
    return found


def _unfit(sites: Sites, path: str, module: nn.Module) -> str | None:
    """Why a linear layer or an embedding of whatever class is left, or None."""
    kinds: tuple[type, ...] = (nn.Linear, *LAYERS)
    if isinstance(module, nn.Embedding):
        kinds = (nn.Embedding, *LAYERS)
    elif is_transposed(module):
        kinds = (type(module),)
    if reason := sites.reason_to_leave(path, kinds, weight_goes=True, ties=True):
        around = sites.parent(path) if path else None
        if type(around) is nn.MultiheadAttention:  # which was not opened
            why = attention.reason_to_leave(sites, path.rpartition(".")[0])
            reason += f" ({why})" if why else ""
        return reason
    if isinstance(module, nn.Embedding) and (reason := embedding.why_not(module)):
        return reason
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    if dtype not in _SERVED:
        return f"no compressed kernel takes {dtype}"
    if any(p.is_meta for p in module.parameters()):
        return "it is on meta, without numbers to compress"
    return None


def check_patterns(config: Config | Mapping[str, Config | None]) -> dict[str, Config | None]:
    """The patterns of a mapping, or ``*`` for one config; raise TypeError for another type."""
    if not isinstance(config, Mapping):
        check_config("config", config)
        return {"*": config}
    patterns: dict[str, Config | None] = {}
    for pattern, value in config.items():
        if not isinstance(pattern, str):
            raise TypeError(f"config: expected name patterns (str) as keys; got {pattern!r}")
        if value is not None:
            check_config(f"config[{pattern!r}]", value)
        patterns[pattern] = value
    return patterns


def assign(
    layers: Layers, patterns: Mapping[str, Config | None], again: bool = False
) -> tuple[dict[str, Config], dict[str, str]]:
    """Give each layer its config: that of its exact name, else of the first pattern that matches.

    Args:
        layers: of `find`.
        patterns: names and `fnmatch` patterns; None leaves a layer.
        again: whether a pattern may match layers alone that are compressed already.

    Returns:
        The configs by path, and why each of the other open layers is left.

    Raises:
        ValueError: a pattern that no layer gets, because none matches or because exact names and
            earlier patterns take all that do.
    """
    chosen: dict[str, Config] = {}
    left: dict[str, str] = {}
    taken: dict[str, str] = {}  # which pattern each layer goes by
    for name in layers.open:
        pattern = _key_of(name, patterns, layers)
        if pattern is None:
            left[name] = "no pattern matches it"
            continue
        taken[name] = pattern
        config = patterns[pattern]
        if config is None:
            left[name] = f"config[{pattern!r}] is None"
        else:
            chosen[name] = config
    # leaving what is left anyhow is no mistake, and a second call may find its work done
    silent = {p for n in layers.left if (p := _key_of(n, patterns, layers)) and patterns[p] is None}
    if again:
        silent |= {p for n in layers.frozen if (p := _key_of(n, patterns, layers))}
    for name in (*layers.tables, *layers.barred):
        pattern = _key_of_table(name, patterns, layers)
        if pattern is None:
            continue  # which is not looked at
        config = patterns[pattern]
        if config is None:
            silent.add(pattern)
        elif config.of_embedding is None:
            raise ValueError(
                f"config[{pattern!r}]: expected Int8(..) or Int4(..) for an embedding; got {config}"
            )
        elif name in layers.barred:
            left[name] = layers.barred[name]
        else:
            taken[name], chosen[name] = pattern, config.of_embedding
    loose = untie(layers, chosen)
    loose.update({n: _shared(layers, n) for n in layers.ties if n in left})
    for name in loose:
        chosen.pop(name, None)
        pattern = taken.pop(name, "")
        silent |= {p for p in (pattern,) if p and patterns[p] is None}
    left.update(loose)
    empty = [p for p in patterns if p not in taken.values() and p not in silent]
    if empty:
        raise ValueError(_nobody(layers, empty, taken, loose))
    return chosen, left


def untie(layers: Layers, chosen: Mapping[str, Config]) -> dict[str, str]:
    """Why layers stay that share their weight with what does not become the same storage."""
    left: dict[str, str] = {}
    while True:
        found = {
            name: reason
            for name in chosen
            if name not in left and (reason := _tied_to_what_stays(layers, chosen, left, name))
        }
        if not found:
            return left
        left.update(found)


def _tied_to_what_stays(
    layers: Layers, chosen: Mapping[str, Config], left: Mapping[str, str], name: str
) -> str | None:
    users = layers.ties.get(name)
    if not users:
        return None
    shared = _shared(layers, name)
    form = _form_of(layers, chosen, name)
    for user in users:
        path, _, leaf = user.rpartition(".")
        if leaf != "weight" or path not in chosen or path in left or form is None:
            return shared
        if _form_of(layers, chosen, path) != form:
            return f"{shared}, which {chosen[path]} would store in another form"
    return None


def _shared(layers: Layers, name: str) -> str:
    return f"its weight is shared with {', '.join(layers.ties[name])}"


def _form_of(layers: Layers, chosen: Mapping[str, Config], name: str) -> Any:
    """What says whether layers with one weight have one storage; None: they have not."""
    ours = layer_of(layers.at(name))
    own = ours is not None and (ours.pattern is not None or ours.rank is not None)
    return None if own or is_transposed(layers.at(name)) else chosen[name].tied


def together(sites: Sites, layers: Layers, chosen: Collection[str]) -> list[list[str]]:
    """The chosen layers in the order of the model, those with one weight side by side."""
    groups: dict[int, list[str]] = {}
    for name in (path for path in sites.modules if path in chosen):
        key = layers.at(name) if name not in layers.ties else layers.at(name).weight
        groups.setdefault(id(key), []).append(name)
    return list(groups.values())


def _key_of(name: str, keys: Iterable[str], layers: Layers) -> str | None:
    """What names a layer: its own name, else the first pattern that is no layer's name."""
    if name in keys:
        return name
    names = (layers.open, layers.left, layers.tables, layers.barred)
    patterns = (k for k in keys if not any(k in of for of in names))
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


def _key_of_table(name: str, patterns: Mapping[str, Config | None], layers: Layers) -> str | None:
    """The same of an embedding: of patterns those alone whose config is for embeddings."""
    if name in patterns:
        return name
    asked = {p: c for p, c in patterns.items() if c is None or c.embeddings}
    return _key_of(name, asked, layers)


def _nobody(
    layers: Layers, empty: list[str], taken: Mapping[str, str], loose: Mapping[str, str]
) -> str:
    """The error for patterns that no layer gets; ``loose``: open layers that stay, and why."""
    said = []
    for pattern in empty:
        others = {p for n, p in taken.items() if fnmatch.fnmatchcase(n, pattern)}
        if others:
            by = ", ".join(map(repr, sorted(others)))
            said.append(f"no layer is left for {pattern!r}: all that match it go by {by}")
        else:
            said.append(f"no layer to compress matches {pattern!r}")
    barred = [
        f"{name} ({reason})"
        for name, reason in {**layers.left, **layers.barred, **loose}.items()
        if any(name == p or fnmatch.fnmatchcase(name, p) for p in empty)
    ]
    there = ", ".join(n for n in layers.open if n not in loose) or "none"
    if tables := ", ".join(n for n in layers.tables if n not in loose):
        there += f"; embeddings, by their names or with embeddings=True: {tables}"
    return f"config: {'; '.join(said)}; layers that can be compressed: {there}" + (
        f"; matched, but left: {'; '.join(barred)}" * bool(barred)
    )


def has_factors(layer: nn.Module, config: Config) -> bool:
    """Whether a layer is in factors, as ``config`` would have it."""
    ours = layer_of(layer)
    return config.factors and ours is not None and ours.rank is not None


def check_finite(name: str, layer: Any) -> None:
    """Raise ValueError where a weight or bias holds NaN or inf."""
    for leaf in ("weight", "u", "v", "values", "bias"):
        value = layer._parameters.get(leaf)
        if value is not None and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"{name}.{leaf}: expected finite values; got {bad} NaN or inf of {value.numel()}"
            )
