"""Verbs that run or trace a model leave it, and every random state, as they were."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.compress import measure
from bigops.graph.looking import looking

X = torch.randn(4, 8)


@pytest.fixture(autouse=True)
def _level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side runs twice, and nothing is faster."""

    def interleave(sides: Any, **_: Any) -> dict[str, Any]:
        for side in [*sides.values(), *sides.values()]:
            side()
        return {name: np.ones(30) for name in sides}

    monkeypatch.setattr("bigops.timing.interleave", interleave)


class Pair(NamedTuple):
    value: Tensor
    rest: list[Tensor]


class Meter:
    """Counts, as a plain object."""

    def __init__(self) -> None:
        self.count, self.total, self.log = 0, torch.zeros(2), {"all": [torch.zeros(1)]}

    def add(self, value: int) -> None:
        self.count += 1
        self.total += value
        self.log["all"][0] += value
        self.log["last"] = [torch.ones(1)]


class Moves(nn.Module):
    """Its forward moves state in one of several ways and draws random numbers from one source."""

    def __init__(self, how: str, traceable: bool) -> None:
        super().__init__()
        self.how, self.traceable = how, traceable
        self.first, self.act, self.last = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8).eval()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("view", self.mean[:4])
        self.plain, self.count = torch.zeros(8), 0
        self.cache: dict[str, Any] = {"k": [torch.zeros(8), (torch.zeros(8), 1)]}
        self.last_calls: deque[int] = deque(maxlen=3)
        self.torch_draws, self.numpy_draws = torch.Generator(), np.random.default_rng(0)
        self.python_draws = random.Random(0)
        self.meter = Meter()
        self.space = SimpleNamespace(mean=torch.zeros(2), sums=[0], inner=Meter())
        self.pair, self.array = Pair(torch.zeros(2), [torch.zeros(1)]), np.zeros(3)
        self.tuple = ([0], {"a": torch.zeros(2)})
        self.teacher = [nn.BatchNorm1d(8)]  # on purpose in a list: it is not trained

    def forward(self, x: Tensor) -> Tensor:
        if not self.traceable and x.sum() > 1e9:
            return x
        if self.how == "in place":
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1)
            self.view.fill_(7.0)
        elif self.how == "by data":
            self.mean.data.copy_(torch.ones(8))
            self.mean.data = torch.ones(8)
        elif self.how == "bound anew":
            self.mean = self.mean + 1
            self.register_buffer("late", torch.ones(2))
            self._buffers.pop("view", None)
        elif self.how == "attributes":
            self.count += 1
            self.plain += 1
            self.new = self.count
            self.last_calls.append(1)
        elif self.how == "nested":
            self.cache["k"][0] += 1
            self.cache["k"][1][0].add_(1)
            self.cache["k"].append(torch.ones(1))
            self.cache["new"] = 1
        elif self.how == "objects":
            self.meter.add(1)
            self.space.mean += 1
            self.space.sums.append(1)
            self.space.inner.add(2)
            self.space.late = 1
        elif self.how == "tuples and arrays":
            self.pair.value.add_(1)
            self.pair.rest[0] += 1
            self.pair.rest.append(self.pair.value)
            self.tuple[0].append(1)
            self.tuple[1]["a"].add_(1)
            self.array += 1
        elif self.how == "not registered":
            self.teacher[0].train()(torch.randn(4, 8))
            self.teacher[0].bias.data = torch.ones(8)
        elif self.how == "modes":
            self.act.train()
            self.norm.train()
            self.norm(torch.randn(4, 8))
        elif self.how == "torch draws":
            torch.rand(3)
            torch.rand(3, generator=self.torch_draws)
        elif self.how == "numpy draws":
            np.random.rand(3)
            self.numpy_draws.random()
        elif self.how == "python draws":
            random.random()
            self.python_draws.random()
        return self.last(self.act(self.first(x)))


HOWS = [
    "in place",
    "by data",
    "bound anew",
    "attributes",
    "nested",
    "objects",
    "tuples and arrays",
    "not registered",
    "modes",
    "torch draws",
    "numpy draws",
    "python draws",
]


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Moves("in place", traceable=True)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(1)
        self.inner(x)
        self.inner.count = 5
        raise ValueError("planted")


def content(value: Any) -> Any:
    """Values, deep, with the identity of tensors, generators' states, and order."""
    if isinstance(value, nn.Module):
        skipped = ("_modules", "_pack")
        return [(k, content(v)) for k, v in sorted(vars(value).items()) if k not in skipped]
    if isinstance(value, Tensor):
        return id(value), value.data_ptr(), value.dtype, value.tolist()
    if isinstance(value, dict):
        return [(k, content(v)) for k, v in value.items()]
    if isinstance(value, list | tuple | deque):
        return [content(v) for v in value]
    if isinstance(value, Meter | SimpleNamespace):
        return id(value), content(vars(value))
    if isinstance(value, np.ndarray):
        return id(value), value.tolist()
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return value.getstate()
    return value if isinstance(value, int | float | str | bool | None) else type(value)


def everything(*models: nn.Module) -> Any:
    """The models, but for the linear layers that a verb may exchange, and the random states."""
    kept = [
        (name, content(module))
        for model in models
        for name, module in model.named_modules()
        if not isinstance(module, nn.Linear | bigops.nn.QuantLinear | nn.ReLU | nn.Identity)
    ]
    numpy = np.random.get_state()
    return kept, torch.get_rng_state().tolist(), str(numpy), numpy[1].tolist(), random.getstate()  # type: ignore[index]


def accuracy(model: nn.Module) -> float:
    return float(model(X).detach().abs().sum())


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "fuse_": lambda m: bigops.fuse_(m),
    "fuse_, timed": lambda m: bigops.fuse_(m, X),
    "compress_": lambda m: bigops.compress_(m, bigops.Int8(), X),
    "compress_, static": lambda m: bigops.compress_(m, bigops.Int8(activations="static"), X),
    "smooth_": lambda m: bigops.smooth_(m, [X]),
    "receipt": lambda m: bigops.Receipt.measure(m, m, X, accuracy=accuracy, with_compile=False),
    "peak_bytes": lambda m: measure.peak_bytes(m, X),
}


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("how", HOWS)
def test_a_verb_leaves_the_model_as_it_was(how: str, traceable: bool) -> None:
    for name, verb in VERBS.items():
        for mode in (True, False):
            model = Moves(how, traceable).train(mode)
            before = everything(model)
            verb(model)
            assert everything(model) == before, f"{name} in mode {mode}"


@pytest.mark.parametrize("how", HOWS)
def test_each_of_these_moves_something(how: str) -> None:
    """The check sees what a call without protection does."""
    model = Moves(how, traceable=True).eval()
    before = everything(model)
    model(X)
    assert everything(model) != before


@pytest.mark.parametrize("name", [n for n in VERBS if n != "fuse_"])
def test_a_model_that_raises_is_as_it_was(name: str) -> None:
    model = Raises()
    before = everything(model)
    with pytest.raises(ValueError, match="planted"):
        VERBS[name](model)
    assert everything(model) == before


class Momentum(nn.Module):
    """As momentum encoders do it: the Parameters of one layer follow those of the other.

    Those may be in a list, so that no optimiser finds them.
    """

    def __init__(self, how: str, hide: bool = False) -> None:
        super().__init__()
        self.how = how
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.slow = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.hidden = [self._modules.pop("slow")] if hide else []

    def forward(self, x: Tensor) -> Tensor:
        follows = self.hidden[0] if self.hidden else self.slow
        slow, fast = list(follows.parameters()), list(self.net.parameters())
        with torch.no_grad():
            for p, q in zip(slow, fast, strict=True):
                if self.how == "by data":
                    p.data = p.data * 0.9 + q.data * 0.1
                elif self.how == "in a view of data":
                    p.data.view(-1)[::2].mul_(0.5)
                elif self.how == "in place":
                    p.mul_(0.9).add_(q, alpha=0.1)
            if self.how == "many at once":
                torch._foreach_mul_(slow, 0.9)
        return self.net(x) + follows(x)


@pytest.mark.parametrize("how", ["by data", "in a view of data", "in place", "many at once"])
@pytest.mark.parametrize("name", [n for n in VERBS if n != "receipt"])
def test_a_parameter_that_forward_writes_is_as_it_was(how: str, name: str) -> None:
    model = Momentum(how)
    x = model.slow[0].weight  # compress_ takes the layer out; x stays
    before = x.data_ptr(), x.tolist()
    VERBS[name](model)
    assert (x.data_ptr(), x.tolist()) == before
    if getattr(model.slow[0], "weight", None) is x:
        model(X)
        assert x.tolist() != before[1]  # as without protection


@pytest.mark.parametrize("how", ["by data", "in place"])
@pytest.mark.parametrize("name", [n for n in VERBS if n != "receipt"])
def test_a_parameter_that_is_not_registered_is_as_it_was(how: str, name: str) -> None:
    model = Momentum(how, hide=True)
    assert len(list(model.parameters())) == 2
    x = model.hidden[0][0].weight
    before = x.data_ptr(), x.tolist()
    VERBS[name](model)
    assert model.hidden[0][0].weight is x
    assert (x.data_ptr(), x.tolist()) == before
    model.net = nn.Sequential(nn.Linear(8, 8))  # of which a verb has taken the weight
    model(X)
    assert x.tolist() != before[1]  # as without protection


def test_the_run_sees_what_it_wrote() -> None:
    """Inside, state moves from call to call, and aliases stay aliases."""
    model = Moves("in place", traceable=True)
    model.alias = model.mean  # a plain attribute of the same tensor
    with looking(model):
        model(X)
        model(X)
        assert int(model.calls) == 2
        assert model.alias.tolist() == model.mean.tolist()
        assert model.mean[:4].tolist() == [7.0] * 4
    assert int(model.calls) == 0
    assert not model.mean.any()


def test_compressed_storage_is_not_copied() -> None:
    model = nn.Sequential(bigops.nn.QuantLinear(8, 8).freeze())
    values = model[0].values
    with looking(model):
        assert model[0].values is values


def test_a_lazy_layer_is_made_by_its_first_call() -> None:
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 2))
    bigops.fuse_(model, X)
    assert model(X).shape == (4, 2)
    assert model[0].in_features == 8


def test_a_long_chain_of_objects_is_gone_through() -> None:
    model = Moves("in place", traceable=False)
    first = last = SimpleNamespace(value=torch.zeros(1))
    for _ in range(3000):
        last.next = SimpleNamespace(value=torch.zeros(1))
        last = last.next
    model.chain, value = first, last.value
    with looking(model):
        assert last.value is not value
        last.value += 1
    assert last.value is value
    assert not value.any()
