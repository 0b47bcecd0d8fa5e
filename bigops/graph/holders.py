"""Where a model holds modules besides the places where they are registered.

``self.steps = [self.first, torch.tanh, self.last]`` calls the layers through a plain list, which
`nn.Module` knows nothing of: a swap has to reach that, too, or to stay away.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from bigops.graph.atomic import CONTAINERS
from bigops.graph.record import class_name


class Place(NamedTuple):
    """An entry of a plain list or dictionary, or of the attributes of a module."""

    container: Any
    key: Any

    def put(self, module: nn.Module) -> None:
        self.container[self.key] = module


@dataclass
class Held:
    """What holds one module."""

    places: list[Place] = field(default_factory=list)  # where another can take its place
    fixed: list[str] = field(default_factory=list)  # where none can, in words


class _Step(NamedTuple):
    value: Any
    place: Place | None  # None: what holds the value cannot be changed, or not brought back
    where: str


def find(modules: Iterable[nn.Module]) -> dict[int, Held]:
    """What holds modules in attributes, lists, dictionaries and whatever else, by their id.

    A place can be exchanged where `bigops.graph.atomic` brings it back: an attribute of a
    registered module, and the lists and dictionaries in it at any depth. Tuples, sets, keys,
    functions with the variables around them, bound methods, weak references, objects of other
    classes, modules among them that are not registered, and what the classes of modules hold, are
    looked into all the same.

    Args:
        modules: all that are registered in the model.
    """
    found: dict[int, Held] = {}
    registered = {id(m): m for m in modules}
    opened: list[_Step] = []
    closed: list[_Step] = []
    seen: set[int] = set(registered)
    for module in registered.values():
        own = vars(module)
        for name, value in own.items():
            if name not in _REGISTERED and not isinstance(value, _WITHOUT):
                opened.append(_Step(value, Place(own, name), f"{class_name(module)}.{name}"))
    for cls in {cls for module in registered.values() for cls in type(module).__mro__}:
        if not cls.__module__.startswith(("torch.", "bigops.", "builtins")):
            said = f"{cls.__module__}.{cls.__qualname__}"
            own = {n: v for n, v in vars(cls).items() if isinstance(v, _OF_CLASSES)}
            closed += [_Step(value, None, f"{said}.{name}") for name, value in own.items()]
    # What both reach is exchanged, so the containers that can be changed come first.
    while opened or closed:
        step = opened.pop() if opened else closed.pop()
        value = step.value
        if isinstance(value, nn.Module):
            held = found.setdefault(id(value), Held())
            if step.place is None:
                held.fixed.append(step.where)
            else:
                held.places.append(step.place)
        if id(value) in seen or isinstance(value, _WITHOUT):
            continue
        seen.add(id(value))
        if step.place is not None and type(value) in CONTAINERS and not isinstance(value, set):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            opened += [
                _Step(item, Place(value, key), step.where)
                for key, item in items
                if not isinstance(item, _WITHOUT)
            ]
            inside: Iterator[Any] = iter(value if isinstance(value, dict) else ())
        else:
            inside = _inside(value)
        where = f"a {type(value).__name__} in {step.where.rpartition(' in ')[2]}"
        closed += [_Step(item, None, where) for item in inside if not isinstance(item, _WITHOUT)]
    return found


_OF_CLASSES = (nn.Module, dict, list, tuple, set, deque)
_REGISTERED = {"_modules", "_parameters", "_buffers"}
# In these is no module: most of what lies in large lists.
_WITHOUT = (bool, int, float, complex, str, bytes, Tensor, type(None), type, ModuleType)


def _inside(value: Any) -> Iterator[Any]:
    """What a value holds that is no container of a module's own."""
    if isinstance(value, dict):
        yield from (*value.keys(), *value.values())
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from list(value)
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        yield from (c.cell_contents for c in value.__closure__ or () if is_filled(c))
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, nn.Module):
        yield from list(value._modules.values())
        yield from (v for name, v in list(vars(value).items()) if name != "_modules")
    elif not type(value).__module__.startswith("torch."):
        own = getattr(value, "__dict__", None)
        yield from list(own.values()) if isinstance(own, dict) else ()


def is_filled(cell: CellType) -> bool:
    """Whether a variable of a function around another has a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
