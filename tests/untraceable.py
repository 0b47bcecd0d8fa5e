"""Models that cannot be traced as a whole, by what they do with a part that they hold."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def untraceable(x: Tensor) -> None:
    if float(x.sum()) > 1e9:
        raise ValueError


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())


class Mlp(nn.Module):
    """A part of a user's class, with a second way in."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bend, self.down = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.bend(self.up(x)))

    def before_bend(self, x: Tensor) -> Tensor:
        return self.up(x)


class Nested(nn.Module):
    """A part whose pair lies in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + x


class Around(nn.Module):
    """Holds a part and cannot be traced."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x)


# --- ways that take nothing of a part but its result -----------------------------------------


class Whole(Around):
    """Calls it, twice in a row."""

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(self.part(x)) if hidden else self.part(x)


class OwnNames(Around):
    """Has children named like those of the part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.up, self.bend = nn.Linear(16, 16), nn.GELU()

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        z = self.up(x)
        return self.part(self.bend(z)) + z


class InASequential(nn.Module):
    """The part sits in a Sequential that is only called."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(part, nn.Identity()), nn.Linear(16, 16))

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.body(x)


class Blocks(nn.Module):
    """A list of parts that is walked: their insides have names that nobody says."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([part, copy.deepcopy(part)])

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        for each in self.parts:
            x = each(x)
        return x


# --- ways that reach into it -----------------------------------------------------------------


def first_of(part: Any) -> Any:
    for name in ("0", "a", "up", "inside", "part", "body", "parts"):
        if name in part._modules:
            found = part._modules[name]
            return first_of(found) if isinstance(found, nn.ModuleList | nn.ModuleDict) else found
    raise AssertionError


class ByIndex(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) * torch.sigmoid(self.part[0](x))


class ByKeyword(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        if hidden:
            return self.part[0](x)
        return self.part(x)


class ByNone(Around):
    def forward(self, x: Tensor, hidden: bool | None = None) -> Tensor:
        if hidden is not None and hidden:
            return self.part[0](x)
        return self.part(x)


class Sliced(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        z = self.part[:1](x)
        return self.part[1:](z) + z


class Iterated(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        total = x
        for each in self.part:
            x = each(x)
            total = total + x
        return total


class ByLocal(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        part = self.part
        return part(x) + part[0](x)


class ByChildren(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        (part,) = self.children()
        return part(x) + first_of(part)(x)


class ByGetattr(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + first_of(getattr(self, "part"))(x)  # noqa: B009


class ByComputedName(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + first_of(getattr(self, f"pa{'rt'}"))(x)


class BySubmodule(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + first_of(self.get_submodule("part"))(x)


class ByProperty(Around):
    @property
    def head(self) -> Any:
        return first_of(self.part)

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + self.head(x)


def helper(part: nn.Module, x: Tensor) -> Tensor:
    return part(x) + first_of(part)(x)


class ByHelper(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return helper(self.part, x)


class ByList(Around):
    """A plain list, made when the model is built."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.taps = [first_of(part)]

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + self.taps[0](x)


class ByClosure(Around):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.tap = lambda x: first_of(part)(x)

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + self.tap(x)


class ByHook(Around):
    """A hook on the model that calls a child."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.register_forward_hook(lambda m, args, y: y + first_of(m.part)(args[0]))


class ByBase(ByIndex):
    """The code stands in a class above."""

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        return super().forward(x) * 2


class ByForwardOfItsOwn(Around):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.forward = lambda x, hidden=False: part(x) + first_of(part)(x)  # type: ignore[method-assign]


class ByWalk(nn.Module):
    """A list of Sequentials that is walked, and each child in it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([part])

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        for each in self.parts:
            x = each(x) + first_of(each)(x)
        return x


class ByDict(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": part})

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.parts["a"](x) + first_of(self.parts["a"])(x)


QUIET = [Around, Whole, OwnNames, InASequential, Blocks]
REACH = [ByIndex, ByKeyword, ByNone, Sliced, Iterated, ByLocal, ByChildren, ByGetattr,
         ByComputedName, BySubmodule, ByProperty, ByHelper, ByList, ByClosure, ByHook, ByBase,
         ByForwardOfItsOwn, ByWalk, ByDict]  # fmt: skip
INDEXED = {ByIndex, ByKeyword, ByNone, Sliced, Iterated, ByLocal, ByBase}
