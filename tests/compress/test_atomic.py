"""compress_ and freeze_ whole or not at all, and layer by layer where memory is short."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx
from torch import nn

import bigops
from bigops import Int8, LowRank, Sparse, compress_
from bigops.compress.apply import _Work
from bigops.nn import QuantLinear
from tests.support.interrupts import lines, state
from tests.support.verbs import VERBS

X = torch.randn(3, 32)


@pytest.fixture(autouse=True)
def _level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, and nothing is faster."""
    same = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", same)


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Dropout(), nn.Linear(48, 32), nn.Linear(32, 32))
    model[1].eval()
    return model


@pytest.mark.parametrize(("name", "at"), [("compress_", 3), ("freeze_", 1), ("compress_ again", 1)])
def test_no_memory_for_the_last_of_several_layers(
    name: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, verb = VERBS[name]
    model = make()
    before, real, calls = state(model), QuantLinear.make_storage, []

    def make_storage(layer: QuantLinear) -> Any:
        calls.append(layer)
        if len(calls) == at:
            raise MemoryError("planted")
        return real(layer)

    monkeypatch.setattr(QuantLinear, "make_storage", make_storage)
    with pytest.raises(MemoryError, match="planted"):
        verb(model)
    assert state(model) == before


def test_gradients_are_on_again_where_ctrl_c_hit_their_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        torch.set_grad_enabled(False)  # as torch.no_grad() leaves it, interrupted at its end
        raise KeyboardInterrupt

    monkeypatch.setattr("bigops.compress.apply.capture", stop)
    with pytest.raises(KeyboardInterrupt):
        compress_(dense(), Int8(), X)
    assert torch.is_grad_enabled()
    monkeypatch.undo()
    monkeypatch.setattr("bigops.compress.apply.contest", stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        compress_(dense(), Int8(), X, low_memory=True)
    assert torch.is_grad_enabled()
    assert caught.value.record.done == []  # type: ignore[attr-defined]


def test_an_interrupted_trace_leaves_no_patch_on_every_module(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call, find = nn.Module.__call__, nn.Module.__getattr__

    def trace(self: object, *args: Any) -> None:
        nn.Module.__call__ = lambda *a: None  # type: ignore[method-assign]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.fx.Tracer, "trace", trace)
    with pytest.raises(KeyboardInterrupt):
        bigops.fuse_(dense())
    assert (nn.Module.__call__, nn.Module.__getattr__) == (call, find)


# --- low_memory ----------------------------------------------------------------------------

CONFIGS: dict[str, Any] = {
    "int8": Int8(),
    # static the first, whose input is the same once others are compressed
    "mapping": {"0": Int8(activations="static"), "2": LowRank(4) + Int8(), "3": Sparse(0.9)},
    "factors": LowRank(4),
    "recovery": Sparse(0.9),
}


def convert(model: nn.Module, name: str) -> bigops.graph.record.Record:
    freeze = name != "recovery"
    return compress_(model, CONFIGS[name], data=[X], freeze=freeze, low_memory=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_by_layer_gives_the_same_model(name: str) -> None:
    at_once, by_layers = dense(), dense()
    want = compress_(at_once, CONFIGS[name], data=[X], freeze=name != "recovery")
    record = convert(by_layers, name)
    assert state_dicts_equal(at_once, by_layers)
    assert record.to_dict() == want.to_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_interrupted_each_layer_is_old_or_new_and_a_second_call_goes_on(name: str) -> None:
    whole = dense()
    convert(whole, name)
    count, _ = lines(lambda: convert(dense(), name))
    stopped = []
    for at in range(1, count + 1, count // 23):
        model = dense()
        old = dict(model.named_children())
        caught: list[BaseException] = []

        def run(model: nn.Module = model, caught: list[BaseException] = caught) -> None:
            try:
                convert(model, name)
            except KeyboardInterrupt as error:
                caught.append(error)
                raise

        _, place = lines(run, at)
        if not caught:
            continue
        changed = {n for n, m in model.named_children() if m is not old[n]}
        record = getattr(caught[0], "record", None)
        assert {d.name for d in record.done} == changed if record else not changed, place
        stopped.append(len(changed))
        convert(model, name)
        assert state_dicts_equal(whole, model), place
    assert {0, 1, 2} <= set(stopped)


def test_the_record_so_far_names_what_was_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _Work.make

    def make(self: _Work, name: str, *args: Any) -> Any:
        if name == "2":
            raise MemoryError("planted")
        return real(self, name, *args)

    model = dense()
    with monkeypatch.context() as patch:
        patch.setattr(_Work, "make", make)
        with pytest.raises(MemoryError, match="planted") as caught:
            compress_(model, Int8(), low_memory=True)
    record = caught.value.record  # type: ignore[attr-defined]
    assert [d.name for d in record.done] == ["0"]
    assert record.reason("2") == record.reason("3") == "it was interrupted before this layer"
    assert sum(record.shares().values()) == pytest.approx(1)
    assert record.plan()["layers"]["0"]
    assert record.plan()["layers"]["2"] is None
    again = compress_(model, {"0": Int8(), "[23]": Int8()}, low_memory=True)
    assert [d.name for d in again.done] == ["2", "3"]
    assert again.reason("0") == "it is frozen already"
    with pytest.raises(ValueError, match="no layer to compress matches '0'"):
        compress_(model, {"0": Int8()})


def test_each_dense_weight_is_gone_before_the_next_is_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = dense()
    weights = [weakref.ref(p) for n, p in model.named_parameters() if n.endswith("weight")]
    alive: list[int] = []
    real = QuantLinear.make_storage

    def make_storage(layer: QuantLinear) -> Any:
        alive.append(sum(ref() is not None for ref in weights))
        return real(layer)

    monkeypatch.setattr(QuantLinear, "make_storage", make_storage)
    compress_(model, Int8(), low_memory=True)
    assert alive == [3, 2, 1]
    assert not any(ref() is not None for ref in weights)


def state_dicts_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(t, second[n]) for n, t in first.items()
    )
