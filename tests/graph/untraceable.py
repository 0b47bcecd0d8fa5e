"""Models that cannot be traced as a whole, by what they do with a part that they hold."""

from __future__ import annotations

import copy
import functools

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
