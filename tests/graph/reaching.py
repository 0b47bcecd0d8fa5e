"""Models whose code reaches into a part that they hold: nothing may move there."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from tests.graph.untraceable import Around, untraceable


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


class Tap:
    """An object that is no module."""

    def __init__(self, holder: Any = None) -> None:
        self.holder = holder

    def first(self, holder: Any, x: Tensor) -> Tensor:
        return first_of(holder.part)(x)

    def of_holder(self, x: Tensor) -> Tensor:
        return self.first(self.holder, x)


TAPS = {"first": lambda holder, x: first_of(holder.part)(x)}


class ByObject(Around):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.tap = Tap()

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + self.tap.first(self, x)


class ByClass(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + Tap(self).of_holder(x)


class ByTable(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + TAPS["first"](self, x)


class ByFunctionOfItsOwn(Around):
    """A function without a closure on the instance."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.tap = lambda holder, x: first_of(holder.part)(x)

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + self.tap(self, x)


class ByAttrgetter(Around):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.tap = operator.attrgetter("part")

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + first_of(self.tap(self))(x)


class ByDefault(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        def first(x: Tensor, part: Any = self.part) -> Tensor:
            return part[0](x)  # type: ignore[no-any-return]

        untraceable(x)
        return self.part(x) + first(x)


class ByDunder(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part(x) + first_of(self.__getattr__(f"pa{'rt'}"))(x)


class ByOtherName(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        take = getattr
        return self.part(x) + first_of(take(self, f"pa{'rt'}"))(x)


class ByApply(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        found: list[Any] = []
        self.apply(found.append)
        first = next(m for m in found if isinstance(m, nn.Linear))
        return self.part(x) + first(x)


REACH = [
    ByIndex,
    ByKeyword,
    ByNone,
    Sliced,
    Iterated,
    ByLocal,
    ByChildren,
    ByGetattr,
    ByComputedName,
    BySubmodule,
    ByProperty,
    ByHelper,
    ByList,
    ByClosure,
    ByHook,
    ByBase,
    ByForwardOfItsOwn,
    ByWalk,
    ByDict,
    ByObject,
    ByClass,
    ByTable,
    ByFunctionOfItsOwn,
    ByAttrgetter,
    ByDefault,
    ByDunder,
    ByOtherName,
    ByApply,
]
INDEXED = {ByIndex, ByKeyword, ByNone, Sliced, Iterated, ByLocal, ByBase, ByDefault}
