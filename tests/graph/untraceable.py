"""Models that cannot be traced as a whole, by what they do with a part that they hold."""

from __future__ import annotations

import copy
import functools
import operator
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


# --- code that a trace of the whole does not run ---------------------------------------------


class HookOfRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Mlp()
        self.register_forward_hook(lambda m, args, y: y + m.part.up(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class PreHookOfRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Mlp()
        self.register_forward_pre_hook(lambda m, args: args[0] + m.part.up(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class HookOfLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.head = Mlp(), nn.Linear(16, 16)
        self.head.register_forward_hook(lambda m, args, y: y + self.part.up(args[0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


class HookOfSequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*block())
        self.register_forward_hook(lambda m, args, y: y + m[0](args[0]) + m[2](args[0]))


class CallOfRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.bend = nn.Linear(16, 16), nn.ReLU()

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + self.up(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.bend(self.up(x))


class ForwardOfRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Mlp()
        self.forward = functools.partial(ForwardOfRoot.with_hidden, self)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)

    def with_hidden(self, x: Tensor) -> Tensor:
        return self.part(x) + self.part.up(x)


class WithoutGradients(nn.Module):
    """Two results by whether gradients are on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bend = nn.Linear(16, 16), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        return self.bend(z) if torch.is_grad_enabled() else self.bend(z) + z


UNTRACED = [
    HookOfRoot,
    PreHookOfRoot,
    HookOfLayer,
    HookOfSequential,
    CallOfRoot,
    ForwardOfRoot,
    WithoutGradients,
]
QUIET = [Around, Whole, OwnNames, InASequential, Blocks]
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
