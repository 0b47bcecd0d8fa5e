"""Observers: which range static u8 takes of all the numbers that a layer is given.

What is kept of them (`Seen`) is of one size however many come, and a sum over them: the same
numbers in other batches, or in another order, give the same qparams to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bigops.formats import quantize

Qparams = tuple[float, float]  # scale and zero point

_CODES = 1 << 16  # patterns of the upper half of a float32, which is a bfloat16 that was cut off
_PART = 1 << 20  # numbers that are taken in at a time


class Bins(NamedTuple):
    """The bins that hold something, by rising values: float64 [bins] each."""

    low: Tensor  # edges
    high: Tensor
    counts: Tensor


class Seen:
    """What is kept of a stream of tensors: its extent, and how many numbers lie where.

    The bins are those of the bfloat16 grid, each 1/128 of its values wide at most; below 2^-133 all
    is 0. They are there from the start: no range has to be known or to grow, no count ever moves.

    Args:
        counted: whether the numbers are counted, which takes 512 KiB.
    """

    def __init__(self, counted: bool = True) -> None:
        self.numbers = 0
        self.least, self.most = math.inf, -math.inf
        size = _CODES if counted else 0
        self._counts = torch.zeros(size, dtype=torch.int64, device="cpu")

    def add(self, x: Tensor) -> None:
        """Take in all numbers of ``x`` [..], floating, as float32.

        Raises:
            ValueError: NaN or inf.
        """
        for part in x.detach().reshape(-1).split(_PART) if x.numel() else ():
            single = part.float()
            least, most = (float(edge) for edge in torch.aminmax(single))
            if not (math.isfinite(least) and math.isfinite(most)):
                raise ValueError("x: expected finite numbers; got NaN or inf")
            self.least, self.most = min(self.least, least), max(self.most, most)
            self.numbers += single.numel()
            if len(self._counts):
                code = (single.view(torch.int32) >> 16) & (_CODES - 1)
                self._counts += torch.bincount(code, minlength=_CODES).to("cpu")

    @property
    def extent(self) -> Qparams:
        """From the least to the largest number, 0 included."""
        return min(self.least, 0.0), max(self.most, 0.0)

    def bins(self) -> Bins:
        """The numbers as they were counted."""
        code = self._counts.nonzero().squeeze(1)
        negative = code >= _CODES // 2
        code = torch.cat([code[negative].flip(0), code[~negative]])
        negative = code >= _CODES // 2
        magnitude = code & (_CODES // 2 - 1)
        inner, outer = _float(magnitude), _float(magnitude + (magnitude > 0))  # the first is 0
        low, high = torch.where(negative, -outer, inner), torch.where(negative, -inner, outer)
        low, high = (edge.clamp(self.least, self.most) for edge in (low, high))
        return Bins(low, high, self._counts[code].double())


def _float(code: Tensor) -> Tensor:
    """The value of a bfloat16 pattern, float64."""
    return (code << 16).to(torch.int32).view(torch.float32).double()


class Found(NamedTuple):
    """What an observer chose."""

    qparams: Qparams
    remark: str | None  # what is worth saying about it


class Observer:
    """Chooses the range of static u8; of one class for each way."""

    key: ClassVar[str]  # in `encode`, and as a name
    counts: ClassVar[bool] = True  # whether it asks for more than the extent

    def interval(self, seen: Seen) -> Qparams:
        """Least and largest number that u8 is to hold; ``seen`` holds more than zeros."""
        raise NotImplementedError

    def find(self, seen: Seen) -> Found | None:
        """The qparams; None where zeros alone, or nothing, were seen.

        A range without extent, as of a percentile where nearly all numbers are 0, becomes that of
        `MinMax`.
        """
        if seen.extent == (0, 0):
            return None
        (low, high), remark = self.interval(seen), None
        if not low < high:
            (low, high), remark = seen.extent, f"{self} leaves no range, so it is that of MinMax()"
        scale, zero = quantize.static_qparams(low, high).tolist()
        return Found((scale, zero), remark)

    def x_qparams(self, stream: Iterable[Tensor]) -> Tensor:
        """Scale and zero point, float32 [2], of all numbers of a stream of floating tensors.

        Raises:
            ValueError: no number but 0, or NaN or inf.
        """
        seen = Seen(self.counts)
        for x in stream:
            seen.add(x)
        found = self.find(seen)
        if found is None:
            raise ValueError(
                f"stream: expected numbers other than 0; got {seen.numbers:,} zeros"
                if seen.numbers
                else "stream: expected at least one number; got none (a generator gives them once)"
            )
        return torch.tensor(found.qparams, dtype=torch.float32, device="cpu")

    def encode(self) -> str | dict[str, Any]:
        """The observer as plain data; `observer_of` reads it back."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {self.key: given} if given else self.key


@dataclass(frozen=True)
class MinMax(Observer):
    """From the least to the largest number: nothing is cut off, one outlier widens every step."""

    key = "minmax"
    counts = False

    def interval(self, seen: Seen) -> Qparams:
        return seen.extent


MINMAX = MinMax()  # the default


@dataclass(frozen=True)
class Percentile(Observer):
    """From the (100 - q)th percentile to the qth, over all numbers there were and not by batches.

    Either is within the bin of the exact one: by 1/128 of itself.

    Args:
        q: percent, above 50 and at most 100, which is `MinMax`.
    """

    q: float = 99.99
    key = "percentile"

    def __post_init__(self) -> None:
        if isinstance(self.q, bool) or not isinstance(self.q, int | float):
            raise TypeError(f"q: expected a float; got {type(self.q).__name__}")
        if not 50 < self.q <= 100:
            raise ValueError(f"q: expected above 50 and at most 100 (percent); got {self.q}")
        object.__setattr__(self, "q", float(self.q))

    def interval(self, seen: Seen) -> Qparams:
        bins, share = seen.bins(), self.q / 100
        low, high = _quantile(seen, bins, 1 - share), _quantile(seen, bins, share)
        return min(low, 0.0), max(high, 0.0)


def _quantile(seen: Seen, bins: Bins, share: float) -> float:
    """The number below which a share of them lies, even within its bin."""
    rank = share * (seen.numbers - 1)
    if rank <= 0 or rank >= seen.numbers - 1:
        return seen.least if rank <= 0 else seen.most
    upto = bins.counts.cumsum(0)
    at = int(torch.searchsorted(upto, math.floor(rank), right=True))
    low, high, count = (float(of[at]) for of in bins)
    within = (rank - (float(upto[at]) - count) + 0.5) / count
    return low + (high - low) * min(within, 1.0)


@dataclass(frozen=True)
class MSE(Observer):
    """The range by which rounding and cutting off together have the least mean squared error.

    Either end is searched down to 1/1024 of the extent, in turns, by steps of 2%.
    """

    key = "mse"

    def interval(self, seen: Seen) -> Qparams:
        bins, ends = seen.bins(), list(seen.extent)
        for _ in range(4):  # turns; two are mostly enough
            before = tuple(ends)
            for end, most in enumerate(seen.extent):
                if most == 0:
                    continue
                ends[end] = _best(bins, ends, end, most * _COARSE)
                ends[end] = _best(bins, ends, end, (ends[end] * _FINE).clamp(*seen.extent))
            if tuple(ends) == before:
                break
        return ends[0], ends[1]


_COARSE = torch.arange(0, -81, -1, dtype=torch.float64, device="cpu").div(8).exp2()
_FINE = torch.arange(-3, 4, dtype=torch.float64, device="cpu").div(32).exp2()


def _best(bins: Bins, ends: list[float], end: int, tried: Tensor) -> float:
    """The best of some values for one end of the range; the other one stays."""
    ranges = [[*ends[:end], value, *ends[end + 1 :]] for value in (ends[end], *tried.tolist())]
    qparams = torch.stack([quantize.static_qparams(low, high) for low, high in ranges])
    return ranges[int(_squared_error(bins, qparams.double()).argmin())][end]


def _squared_error(bins: Bins, qparams: Tensor) -> Tensor:
    """Sum of squared errors of u8 by ``qparams`` [tried, 2] over all numbers; [tried].

    The numbers of a bin lie evenly in it. In steps of u8 the error of t is t - n, n = round(t)
    within what u8 holds, and the integral of its square from 0 to t is n / 12 + (t - n)^3 / 3.
    """
    scale, zero = qparams.unsqueeze(2).unbind(1)  # [tried, 1]
    t = torch.stack([bins.low, bins.high]).unsqueeze(1) / scale  # [2, tried, bins]
    n = torch.minimum(torch.maximum(t.round(), -zero), 255 - zero)
    below, above = n / 12 + (t - n) ** 3 / 3
    width = t[1] - t[0]
    middle = t.mean(0)
    near = (middle - torch.minimum(torch.maximum(middle.round(), -zero), 255 - zero)) ** 2
    # of a bin far narrower than a step the difference would be rounding alone
    mean = torch.where(width > 1e-4, (above - below) / width.clamp(min=1e-4), near)
    return (mean * bins.counts).sum(1) * scale.squeeze(1) ** 2


OBSERVERS: dict[str, type[Observer]] = {kind.key: kind for kind in (MinMax, Percentile, MSE)}


def observer_of(value: Any) -> Observer:
    """An observer, by itself, by its name, or as `Observer.encode` wrote it.

    Raises:
        TypeError: a value of another type.
        ValueError: an unknown name, or an argument out of range.
    """
    if isinstance(value, Observer):
        return value
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, dict) or len(value) != 1:
        raise TypeError(
            f"observer: expected one of {', '.join(OBSERVERS)}, or one of bigops.compress; got "
            f"{value!r}"
        )
    ((key, arguments),) = value.items()
    if key not in OBSERVERS:
        raise ValueError(f"observer: expected one of {', '.join(OBSERVERS)}; got {key!r}")
    return OBSERVERS[key](**arguments)
