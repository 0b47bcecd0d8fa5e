"""Nested states as JSON and tensors: what stands in a state_dict, each value of its own type.

JSON has no tuple, no key that is a number and no tensor: such a value is a table with one key that
begins with ``$`` and says what it is.
"""

from __future__ import annotations

import base64
import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigops.files import FormatError
from bigops.files.tensors import check_storable

_WORDS = "an object with state_dict, or numbers, strings, tensors and lists or dicts of them"


class Writer:
    """Takes states apart.

    Args:
        copied: whether the tensors are copies; else those on the CPU that lie in one piece are the
            state's own.

    Attributes:
        tensors: by name, on the CPU and contiguous.
    """

    def __init__(self, copied: bool = False) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._copied = copied
        self._names: dict[Any, str] = {}  # of memory that has one
        self._alive: list[Tensor] = []  # so that no other tensor comes to lie there

    def encode(self, value: Any, *path: str) -> Any:
        """The JSON of a value.

        Args:
            path: where it stands; its tensors are named by it.

        Raises:
            TypeError: a value that a file cannot give back.
            ValueError: a tensor that safetensors does not hold.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return {"$tensor": self._place(value, ".".join(path))}
        if kind is list:
            return self._items(value, path)
        if kind is tuple or kind is torch.Size:
            return {"$tuple" if kind is tuple else "$size": self._items(value, path)}
        if kind is dict and all(type(key) is str and key[:1] != "$" for key in value):
            return {key: self.encode(item, *path, key) for key, item in value.items()}
        if kind in _DICTS:
            pairs = [
                [self.encode(key, *path, "key"), self.encode(item, *path, str(key))]
                for key, item in value.items()
            ]
            versions = getattr(value, "_metadata", None)  # of modules, in what they give
            if versions is None:
                return {_DICTS[kind]: pairs}
            return {"$versioned": [pairs, self.encode(dict(versions), *path, "versions")]}
        if kind is np.ndarray and value.dtype != object:
            return {"$array": self._place(_of_array(value, path), ".".join(path))}
        if isinstance(value, np.generic) and not isinstance(value, np.void | np.object_):
            return {"$scalar": [value.dtype.str, self.encode(value.item(), *path)]}
        if kind is complex:
            return {"$complex": [self.encode(part, *path) for part in (value.real, value.imag)]}
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode()}
        if kind in (torch.dtype, torch.device):
            return {f"${kind.__name__}": str(value).removeprefix("torch.")}
        raise TypeError(f"{'.'.join(path)}: expected {_WORDS}; got {kind.__name__}")

    def _items(self, values: Any, path: tuple[str, ...]) -> list[Any]:
        return [self.encode(item, *path, str(i)) for i, item in enumerate(values)]

    def _place(self, value: Tensor, name: str) -> list[Any]:
        """Name of a tensor's memory, and the order of its dimensions where it is another."""
        check_storable(name, value)
        value = value.detach().resolve_conj().resolve_neg()
        strides = value.stride()
        order = sorted(range(value.dim()), key=lambda d: -strides[d])
        rows = value.is_contiguous() or not value.permute(order).is_contiguous()
        where = (value.device, value.data_ptr(), value.dtype, value.shape, strides)
        known = self._names.get(where) if value.numel() else None
        if known is None:
            while name in self.tensors:
                name += "_"
            known = self._names[where] = name
            self._alive.append(value)
            lying = value if rows else value.permute(order)
            self.tensors[name] = lying.to("cpu", copy=self._copied).contiguous()
        return [known] if rows else [known, order]


_DICTS: dict[type, str] = {
    dict: "$dict",
    collections.OrderedDict: "$ordered",
    collections.Counter: "$counter",
}


def _of_array(value: np.ndarray, path: tuple[str, ...]) -> Tensor:
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except TypeError:  # words, dates, numbers of another byte order
        raise TypeError(
            f"{'.'.join(path)}: expected an array of numbers that torch has; got {value.dtype}"
        ) from None


def decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `Writer.encode` took apart.

    Raises:
        FormatError: nothing that it wrote.
    """
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1 or not next(iter(value)).startswith("$"):
        return {key: decode(item, tensors) for key, item in value.items()}
    ((kind, held),) = value.items()
    try:
        return _KINDS[kind](held, tensors)
    except FormatError:
        raise
    except Exception as error:  # what a foreign hand wrote there may raise nearly anything
        raise FormatError(f"expected a value of kind {kind}; got {str(held)[:80]}") from error


def _pairs(held: Any, tensors: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
    return [(decode(key, tensors), decode(item, tensors)) for key, item in held]


def _tensor(held: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    name, *order = held
    if not order:
        return tensors[name]
    (dims,) = order
    return tensors[name].permute([dims.index(d) for d in range(len(dims))])


def _versioned(held: Any, tensors: Mapping[str, Tensor]) -> Any:
    pairs, versions = held
    made = collections.OrderedDict(_pairs(pairs, tensors))
    made._metadata = collections.OrderedDict(decode(versions, tensors))  # type: ignore[attr-defined]
    return made


_KINDS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "$tensor": _tensor,
    "$array": lambda held, tensors: _tensor(held, tensors).cpu().numpy(),
    "$scalar": lambda held, tensors: np.dtype(held[0]).type(decode(held[1], tensors)),
    "$float": lambda held, _: float(held),
    "$complex": lambda held, tensors: complex(*decode(held, tensors)),
    "$tuple": lambda held, tensors: tuple(decode(held, tensors)),
    "$size": lambda held, tensors: torch.Size(decode(held, tensors)),
    "$dict": lambda held, tensors: dict(_pairs(held, tensors)),
    "$ordered": lambda held, tensors: collections.OrderedDict(_pairs(held, tensors)),
    "$counter": lambda held, tensors: collections.Counter(dict(_pairs(held, tensors))),
    "$versioned": _versioned,
    "$bytes": lambda held, _: base64.b64decode(held, validate=True),
    "$dtype": lambda held, _: _dtype(held),
    "$device": lambda held, _: torch.device(held),
}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise FormatError(f"expected the name of a dtype; got {name!r}")
    return found
