"""A layer that is held in lists and other places, too: a swap reaches these, or stays away."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.files import FormatError
from bigops.graph.atomic import atomic
from tests.support.interrupts import check_every_line, state
from tests.support.kernels_ran import needs_extension
from tests.support.verbs import level  # noqa: F401

pytestmark = pytest.mark.usefixtures("level")
X = torch.randn(3, 64)
VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "fuse_": bigops.fuse_,
    "add_lora_": lambda m: bigops.add_lora_(m, rank=2),
    "compress_": lambda m: bigops.compress_(m, bigops.Int8(), keep="all"),
    "compress_ thrifty": lambda m: bigops.compress_(m, bigops.Int8(), keep="all", low_memory=True),
    "pack_": bigops.pack_,
}
PARAMETERS = [pytest.param(name, marks=needs_extension if "pack" in name else ()) for name in VERBS]
Pair = namedtuple("Pair", "layer name")


class Net(nn.Module):
    """Calls its first layer by what ``take`` finds in the attribute ``held``."""

    def __init__(self, hold: Callable[[nn.Linear], Any], take: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        # a module, too, would be registered by a plain assignment
        object.__setattr__(self, "held", hold(self.first))
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.take(self.held)(x).relu())


class Wrapper(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


OPEN: dict[str, tuple[Callable[[nn.Linear], Any], Callable[[Any], Any]]] = {
    "list": (lambda m: [torch.tanh, m, 1], lambda h: h[1]),
    "dictionary": (lambda m: {"a": None, "b": m}, lambda h: h["b"]),
    "ordered": (lambda m: OrderedDict(b=m), lambda h: h["b"]),
    "deque": (lambda m: deque([m, m]), lambda h: h[1]),
    "nested": (lambda m: [{"a": [[m]]}], lambda h: h[0]["a"][0][0]),
    "attribute": (lambda m: m, lambda h: h),
}
CLOSED: dict[str, tuple[Callable[[nn.Linear], Any], Callable[[Any], Any], str]] = {
    "tuple": (lambda m: (m,), lambda h: h[0], "a tuple in tests.graph.test_holders.Net.held"),
    "namedtuple": (lambda m: Pair(m, "a"), lambda h: h.layer, "a Pair in"),
    "list of tuples": (lambda m: [("a", m)], lambda h: h[0][1], "a tuple in"),
    "list in a tuple": (lambda m: ([m],), lambda h: h[0][0], "a list in"),
    "set": (lambda m: {m}, lambda h: next(iter(h)), "a set in"),
    "key": (lambda m: {m: 1}, lambda h: next(iter(h)), "a dict in"),
    "partial": (lambda m: functools.partial(m), lambda h: h, "a partial in"),
    "method": (lambda m: m.forward, lambda h: h, "a method in"),
    "closure": (lambda m: lambda x: m(x), lambda h: h, "a function in"),
    "default": (lambda m: lambda x, m=m: m(x), lambda h: h, "a function in"),
    "weak": (lambda m: weakref.ref(m), lambda h: h(), "in tests.graph.test_holders.Net.held"),
    "object": (lambda m: SimpleNamespace(m=m), lambda h: h.m, "a SimpleNamespace in"),
    "module": (lambda m: [Wrapper(m)], lambda h: h[0].layer, "a Wrapper in"),
}


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_swap_reaches_what_a_model_holds(name: str, kind: str) -> None:
    model = Net(*OPEN[kind])
    old = weakref.ref(model.first)
    assert model.take(model.held) is model.first
    record = VERBS[name](model)
    assert {done.name for done in record.done} == {"first", "last"}
    assert model.take(model.held) is model.first
    del record
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("kind", CLOSED)
@pytest.mark.parametrize("name", PARAMETERS)
def test_it_leaves_a_layer_where_it_reaches_not_all_that_is_called(name: str, kind: str) -> None:
    hold, take, where = CLOSED[kind]
    model = Net(hold, take)
    old, want = model.first, model(X)
    record = VERBS[name](model)
    assert model.first is old
    assert where in record.reason("first")
    assert "where a swap does not reach it" in record.reason("first")
    assert [done.name for done in record.done] == ["last"]
    tolerance = 0.1 if "compress_" in name else 1e-5
    assert float((model(X) - want).detach().abs().max()) < tolerance


def test_a_list_of_another_module_is_reached_too() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].before = [model[0]]  # type: ignore[assignment]
    bigops.fuse_(model)
    assert model[1].before[0] is model[0]


@pytest.mark.parametrize("hold", [lambda m: [m], lambda m: {"a": (m,)}, lambda m: m])
def test_what_a_class_holds_is_seen(hold: Callable[[nn.Module], Any]) -> None:
    cls = type("Registers", (nn.Sequential,), {})
    model = cls(nn.Linear(64, 64), nn.Linear(64, 64))
    cls.registered = hold(model[0])  # type: ignore[attr-defined]
    record = bigops.fuse_(model)
    assert "Registers.registered, where a swap does not reach it" in record.reason("0")
    assert record.reason("1") is None


def test_a_list_that_holds_itself_ends() -> None:
    model = Net(*OPEN["list"])
    model.held.append(model.held)
    model.take = SimpleNamespace(model=model, held=model.held)
    bigops.fuse_(model)
    assert model.held[1] is model.first


@needs_extension
def test_unpack_reaches_a_list_and_leaves_a_tuple() -> None:
    model = Net(*OPEN["list"])
    bigops.pack_(model)
    packed = model.held[1]
    bigops.unpack_(model)
    assert model.held[1] is model.first is not packed
    bigops.pack_(model)
    model.held = (model.first,)
    record = bigops.unpack_(model)
    assert "a tuple in" in record.reason("first")
    assert model.held[0] is model.first


def test_a_file_reaches_a_list_and_is_refused_for_a_tuple(tmp_path: Path) -> None:
    model = Net(*OPEN["list"])
    bigops.compress_(model, bigops.Int8(), keep="all")
    bigops.save(model, tmp_path / "m")
    other = Net(*OPEN["list"])
    bigops.load(tmp_path / "m", other)
    assert other.held[1] is other.first
    torch.testing.assert_close(other(X), model(X))
    closed = Net(*CLOSED["tuple"][:2])
    before = state(closed)
    with pytest.raises(FormatError, match=r"first: .* a tuple in"):
        bigops.load(tmp_path / "m", closed)
    assert state(closed) == before


@pytest.mark.parametrize("kind", OPEN)
def test_all_of_it_comes_back(kind: str) -> None:
    model = Net(*OPEN[kind])
    old = model.first

    def fails(model: nn.Module) -> None:
        VERBS["compress_"](model)
        assert model.take(model.held) is not old  # type: ignore[operator]
        raise MemoryError("planted")

    with pytest.raises(MemoryError, match="planted"):
        atomic(fails)(model)
    assert model.take(model.held) is model.first is old


def lines(count: int) -> range:
    return range(max(1, count - 60), count + 1)


@pytest.mark.parametrize("kind", ["nested", "attribute"])
def test_interrupted_at_the_exchange_all_is_as_before(kind: str) -> None:
    assert check_every_line(lambda: Net(*OPEN[kind]), VERBS["fuse_"], lines) > 40
