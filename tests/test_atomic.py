"""A verb that is interrupted at any line leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.nn.atomic import atomic
from tests.interrupts import check_every_line, state


@pytest.fixture(autouse=True)
def _level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and nothing is faster."""
    same = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", same)


class Counts(nn.Module):
    """Traceable, with a buffer and an attribute that each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1)
        return self.last(self.act(self.first(x)))


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def half_frozen() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6).requires_grad_(False), nn.Tanh().eval())
    return model.append(bigops.nn.Linear(6, 2, activation="silu")).append(nn.Identity())


MODELS = {"sequential": sequential, "counts": Counts, "untraced": Untraced, "half": half_frozen}
X = torch.randn(3, 4)


def some(count: int) -> Iterable[int]:
    """One line in a hundred, and the last forty, where the exchange is."""
    return sorted({*range(1, count + 1, 100), *range(max(1, count - 39), count + 1)})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("x", [None, X], ids=["untimed", "timed"])
@pytest.mark.parametrize(
    "which", [some, pytest.param(lambda n: range(1, n + 1), marks=pytest.mark.slow, id="every")]
)
def test_fuse_(name: str, x: Tensor | None, which: Callable[[int], Iterable[int]]) -> None:
    assert check_every_line(MODELS[name], lambda m: bigops.fuse_(m, x), which) > 35


def swaps_then_fails(model: nn.Module) -> None:
    model.eval()
    model.requires_grad_(False)
    children = list(model._modules)
    model._modules[children[0]] = nn.Identity()
    del model._modules[children[1]]
    model._modules[children[1]] = nn.Identity()
    model.register_parameter("late", nn.Parameter(torch.ones(2)))
    model.register_forward_pre_hook(lambda *a: None)
    model.get_submodule(children[2])._parameters.pop("weight", None)
    raise MemoryError("planted")


@pytest.mark.parametrize("name", ["sequential", "counts", "half"])
def test_all_that_a_verb_exchanged_is_back(name: str) -> None:
    model = MODELS[name]()
    before = state(model)
    with pytest.raises(MemoryError, match="planted"):
        atomic(swaps_then_fails)(model)
    assert state(model) == before
    with pytest.raises(MemoryError, match="planted"):
        swaps_then_fails(model)
    assert state(model) != before  # the planted fault is seen


def test_a_layer_that_is_changed_in_itself_is_as_it_was() -> None:
    for make in (bigops.nn.QuantLinear, bigops.nn.SparseLinear, bigops.nn.Fp8Linear):
        model = nn.Sequential(make(16, 16))

        def freezes(model: nn.Module) -> None:
            model[0].freeze()  # type: ignore[index, operator]
            raise KeyboardInterrupt

        before, keys = state(model), list(model.state_dict())
        with pytest.raises(KeyboardInterrupt):
            atomic(freezes)(model)
        assert state(model) == before
        assert list(model.state_dict()) == keys
        assert not model[0].frozen


def test_a_verb_gets_its_arguments_and_keeps_its_name() -> None:
    def verb(path: str, model: nn.Module | None = None, *, n: int = 1) -> tuple[str, object, int]:
        """What it does."""
        return path, model, n

    whole, model = atomic(verb), nn.ReLU()
    assert whole("a") == ("a", None, 1)
    assert whole("a", model, n=2) == ("a", model, 2)
    assert whole(model=model, path="b") == ("b", model, 1)
    assert (whole.__name__, whole.__doc__) == ("verb", "What it does.")
    with pytest.raises(TypeError, match="path"):
        whole()  # type: ignore[call-arg]
