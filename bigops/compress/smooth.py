"""smooth_: scales of channels move from the activations into the weights (SmoothQuant)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bigops.compress import calibrate
from bigops.formats import quantize
from bigops.graph.atomic import atomic
from bigops.graph.channels import Channels, Group, Side
from bigops.graph.record import Done, Record, Skipped, account, class_name
from bigops.graph.sites import Sites

LEAST = 4.0  # of the largest channel over the median one: below, a scale gains under 2 bits
_ALPHAS = tuple(i / 20 for i in range(5, 20))  # that a search tries
_ROWS = 128  # of each input that are kept for it
_SPREAD = 2654435769  # 2^32 / golden ratio: multiples of it, mod 2^32, lie evenly


@atomic
def smooth_(
    model: nn.Module, data: Iterable[Any], alpha: float | str = 0.5, *, least: float = LEAST
) -> Record:
    """Divide channels with outliers by a scale, and multiply the weights that read them by it.

    SmoothQuant (arXiv 2211.10438): channel j of what linear layers are given is divided by
    ``s[j] = max|x[:, j]|^alpha / max|W[:, j]|^(1 - alpha)``, column j of their weights multiplied
    by it, so that static or dynamic int8 activations lose less; call it before `compress_`. The
    division is free: it goes into the weight and bias of the norm before, or into the rows and bias
    of the linear layer before, with nothing in between but what lets it through, such as relu or
    the product with another tensor (the gate of a gated MLP). All layers that read one norm share
    its s. The scales are powers of two, with a median of 1, so the floating-point model computes
    the same numbers as before, to the bit but where something underflows.

    Whether that is so is seen in the operators that run on ``data`` (`bigops.graph.channels`), so
    it holds for calls as those; what a forward keeps in an attribute is scaled. Anything else that
    reads the output of a norm, a residual connection too, leaves it as it is, with all its readers.
    So do hooks, shared memory, weights that are used otherwise, and a module (no `nn.Sequential`)
    around the norm that returns its output, since other calls may use it.

    Args:
        model: any module, in any mode; it runs in `eval` with gradients off. Parameters stay the
            same objects; a state that an optimiser keeps of them is not scaled.
        data: batches, each what the model is called with: x, a tuple of positions or a mapping of
            keywords, in any iterable, which is read once.
        alpha: from 0 to 1, how much of the range goes into the weights; "search": for each group of
            layers the one, if any, by which their outputs have the least squared error in int8 with
            static activations, over 128 rows of each input.
        least: the largest magnitude of a channel over that of the median channel, from which on
            there are outliers; with less a layer is left.

    Returns:
        What was scaled, and what was left with the reason.

    Raises:
        TypeError, ValueError: a wrong argument, no batch, or NaN or inf in what a layer is given.
        Exception: whatever the model raises.

    On any exception, KeyboardInterrupt too, the model is unchanged.
    """
    sites = Sites(model)
    calibrate.check_data(data)
    alphas = _check(alpha, least)
    inputs: dict[str, _Input] = {}
    seen: dict[str, nn.Parameter] = dict(model.named_parameters())

    def see(name: str, x: Tensor) -> None:
        if name not in inputs:
            inputs[name] = _Input(x.shape[-1], _ROWS if len(alphas) > 1 else 0)
        inputs[name].add(x)

    def check(batch: int) -> None:
        for name, given in inputs.items():
            if not given.finite:
                raise ValueError(
                    f"data: expected finite inputs of every layer; got NaN or inf for "
                    f"{_owner(name)} in batch {batch}"
                )

    with Channels(sites, see) as channels:
        calibrate.run_batches(model, calibrate.batches_of(data), "data", check)

    changed: dict[str, Tensor] = {}
    said: dict[str, list[tuple[str, str]]] = {}
    left: dict[str, str] = {}
    for group in channels.groups():
        found: _Scales | str = f"its input cannot be scaled: {group.fixed}"
        if group.fixed is None:
            found = _scales_of(group, seen, inputs, alphas, least)
        if not isinstance(found, str):
            found = _scale(group, found, seen, changed)
        if isinstance(found, str):
            left.update((owner, found) for owner in _owners(group.readers))
            continue
        for owner in _owners(group.readers):
            what = f"columns times scales of {', '.join(_owners(group.makers))}"
            said.setdefault(owner, []).append((what, found.why))
        for owner in _owners(group.makers):
            what = f"divided by scales for {', '.join(_owners(group.readers))}"
            said.setdefault(owner, []).append((what, found.why))
    record = _record(sites, said, left)
    for name, new in changed.items():
        seen[name].data = new
    return record


def _check(alpha: float | str, least: float) -> tuple[float, ...]:
    """The alphas to try."""
    if isinstance(least, bool) or not isinstance(least, int | float):
        raise TypeError(f"least: expected a float; got {type(least).__name__}")
    if not 1 <= least < math.inf:
        raise ValueError(f"least: expected a ratio of at least 1; got {least}")
    if alpha == "search":
        return _ALPHAS
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f'alpha: expected a float or "search"; got {alpha!r}')
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected from 0 to 1; got {alpha}")
    return (float(alpha),)


class _Input:
    """What is kept of all that one product is given: the range of each channel, some rows."""

    def __init__(self, width: int, rows: int) -> None:
        self.low, self.high = torch.zeros(2, width, dtype=torch.float64, device="cpu")
        self.finite, self._limit, self._count = True, rows, 0
        self._keys = torch.empty(0, dtype=torch.int64, device="cpu")
        self.rows = torch.empty(0, width, device="cpu")

    def add(self, x: Tensor) -> None:
        """Take in x [.., K]."""
        x = x.detach().reshape(-1, x.shape[-1])
        if not x.numel():
            return
        low, high = (edge.to("cpu", torch.float64) for edge in torch.aminmax(x, dim=0))
        self.finite &= bool(torch.isfinite(low).all() and torch.isfinite(high).all())
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        if self._limit:
            self._keep(x)

    def _keep(self, x: Tensor) -> None:
        """Keep the rows with the least keys, which go by the number of a row in the stream."""
        number = torch.arange(self._count, self._count + len(x), device="cpu")
        self._count += len(x)
        keys = (number * _SPREAD) % (1 << 32)
        mine = keys.argsort()[: self._limit]
        keys = torch.cat([self._keys, keys[mine]])
        rows = torch.cat([self.rows, x[mine.to(x.device)].to("cpu", torch.float32)])
        best = keys.argsort()[: self._limit]
        self._keys, self.rows = keys[best], rows[best]


class _Scales(NamedTuple):
    """What channels are divided by."""

    scale: Tensor  # [K] float64, powers of two
    why: str


def _scales_of(
    group: Group,
    parameters: Mapping[str, nn.Parameter],
    inputs: Mapping[str, _Input],
    alphas: tuple[float, ...],
    least: float,
) -> _Scales | str:
    """The scales of one group, or why it is left."""
    if not (group.makers and group.readers):
        return "nothing reads it"
    given = [inputs[side.name] for side in group.readers]
    low = torch.stack([i.low for i in given]).amin(0)
    high = torch.stack([i.high for i in given]).amax(0)
    magnitude = torch.maximum(-low, high)
    if not bool(magnitude.any()):
        return "the data gives it zeros alone"
    ratio = _ratio(magnitude)
    if ratio < least:
        return f"no outliers: its largest channel is {ratio:.1f}x the median one, below {least:g}x"
    weights = [parameters[name].detach().to("cpu", torch.float64) for name, _ in group.readers]
    weights = [w if side.dim else w.T for w, side in zip(weights, group.readers, strict=True)]
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    if not (bool(torch.isfinite(columns).all()) and bool((columns > 0).any())):
        return "its weight is zero, or holds NaN or inf"
    alpha, gain = alphas[0], ""
    if len(alphas) > 1:
        plain = torch.ones_like(columns)
        tried = {a: _powers(magnitude, columns, a) for a in alphas}
        errors = {
            a: sum(_error(w, i, low, high, s) for w, i in zip(weights, given, strict=True))
            for a, s in [(-1.0, plain), *tried.items()]
        }
        alpha = min(errors, key=lambda a: errors[a])
        if alpha < 0:
            return "no alpha lowers the error of its output in int8"
        less = 10 * math.log10(errors[-1.0] / errors[alpha]) if errors[alpha] else math.inf
        gain = f", by which the error in int8 falls {less:.1f} dB"
    scale = _powers(magnitude, columns, alpha)
    if not bool((scale != 1).any()):
        return "its scales are all 1"
    after = _ratio(magnitude / scale)
    why = f"its largest channel was {ratio:.0f}x the median one and is {after:.1f}x"
    return _Scales(scale, f"{why}; alpha {alpha:g}{gain}")


def _ratio(magnitude: Tensor) -> float:
    """The largest channel over the median one, of those that are not 0."""
    live = magnitude[magnitude > 0]
    return float(live.max() / live.median())


def _powers(magnitude: Tensor, columns: Tensor, alpha: float) -> Tensor:
    """s [K] of arXiv 2211.10438 as powers of two with a median of 1; 1 for channels of zeros."""
    live = magnitude > 0
    columns = columns.clamp(min=float(columns[columns > 0].min()))
    scale = magnitude.clamp(min=float(magnitude[live].min())) ** alpha / columns ** (1 - alpha)
    scale = (scale / scale[live].median()).log2().round().exp2()
    return torch.where(live, scale, 1.0)


def _error(weight: Tensor, given: _Input, low: Tensor, high: Tensor, scale: Tensor) -> float:
    """Squared error of a product in int8 with static activations, over that of its output."""
    x, weight = given.rows.double(), weight * scale
    truth = x @ (weight / scale).T
    qparams = quantize.static_qparams(float((low / scale).min()), float((high / scale).max()))
    rows = quantize.act_quant((x / scale).float(), "static", qparams)
    rounded = quantize.round_weight(weight, 8, 0, symmetric=True).dense(0).double()
    out = ((rows.q - rows.zero_point) * rows.scale).double() @ rounded.T
    return float((out - truth).square().sum() / truth.square().sum().clamp(min=1e-300))


def _scale(
    group: Group,
    found: _Scales,
    parameters: Mapping[str, nn.Parameter],
    changed: dict[str, Tensor],
) -> _Scales | str:
    """Put the scaled tensors of one group into ``changed``; or why it is left."""
    new: dict[str, Tensor] = {}
    both = [(s, found.scale) for s in group.readers]
    both += [(s, found.scale.reciprocal()) for s in group.makers]
    for (name, dim), scale in both:
        old = new.get(name, changed.get(name, parameters[name].detach()))
        by = scale.to(old.device)
        exact = old.double() * (by.unsqueeze(1) if dim < old.dim() - 1 else by)
        new[name] = exact.to(old.dtype)
        if not torch.equal(new[name].double(), exact):
            return f"{old.dtype} would not hold {name} times its scales"
    changed.update(new)
    return found


def _owner(name: str) -> str:
    """The path of the module that holds a Parameter; of the model itself, the Parameter's name."""
    return name.rpartition(".")[0] or name


def _owners(sides: list[Side]) -> list[str]:
    return list(dict.fromkeys(_owner(side.name) for side in sides))


def _record(
    sites: Sites, said: Mapping[str, list[tuple[str, str]]], left: dict[str, str]
) -> Record:
    """One entry for each module that was changed, and for each other linear layer."""
    for path, module in sites.unique():
        if isinstance(module, nn.Linear) and path not in said:
            left.setdefault(path, _unread(sites, path, module))
    paths = [path for path in (*said, *left) if path in sites.modules]
    whole = account(sites.model, paths)
    done = []
    for path, entries in said.items():
        kind = class_name(sites.modules[path]) if path in sites.modules else "Parameter"
        size = whole.layers.get(path, 0)
        what = f"{kind}, {', '.join(what for what, _ in entries)}"
        done.append(Done(path, what, "; ".join(why for _, why in entries), size, size))
    skipped = [
        Skipped(path, why, whole.layers.get(path, 0))
        for path, why in left.items()
        if path not in said
    ]
    return Record("smooth_", done, skipped, [], whole.unseen, whole.total)


def _unread(sites: Sites, path: str, module: nn.Module) -> str:
    """Why a linear layer was in no product."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter:
        return "it has no float weight"
    first = _owner(sites.users[id(weight)][0])
    if first != path:
        return f"its weight is that of {first}"
    return "the data never calls it"
