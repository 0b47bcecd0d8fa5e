"""A verb that is interrupted at any line leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
import bigops.graph.atomic as atomic_module
from bigops.graph.atomic import atomic
from bigops.graph.looking import looking
from tests.support.interrupts import check_every_line, lines, state
from tests.support.verbs import PARAMETERS, VERBS, Counts, X, dense, half_frozen, level  # noqa: F401

pytestmark = pytest.mark.usefixtures("level")
MODELS = {"sequential": dense, "counts": Counts, "half": half_frozen}


def some(count: int) -> Iterable[int]:
    """Six lines, and the last fourteen, where the exchange is."""
    return sorted({*range(1, count + 1, count // 6 + 1), *range(max(1, count - 13), count + 1)})


def many(count: int) -> Iterable[int]:
    """A hundred and some, and all of the last hundred."""
    return sorted({*range(1, count + 1, count // 120 + 1), *range(max(1, count - 99), count + 1)})


@pytest.mark.parametrize("which", [some, pytest.param(many, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PARAMETERS)
def test_interrupted_at_any_line_the_model_is_as_before(
    name: str, which: Callable[[int], Iterable[int]]
) -> None:
    assert check_every_line(*VERBS[name], which) > 10


@pytest.mark.parametrize("where", ["restore", "_put_back"])
@pytest.mark.parametrize("name", ["fuse_", "load", "add_lora_"])
def test_ctrl_c_pressed_again_during_the_rollback(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, verb = VERBS[name]
    verb(make())  # what is made once per process is made now
    count, _ = lines(lambda: verb(make()))
    model = make()
    before = state(model)
    holder = atomic_module.Before if where == "restore" else atomic_module
    real, calls = getattr(holder, where), []

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) in (1, 2, 4, 9):
            raise KeyboardInterrupt
        real(*args)

    def interrupt_twice() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(holder, where, interrupted)
            verb(model)

    # looking, which puts back as well, has ended where the exchange begins
    monkeypatch.setattr("bigops.graph.looking.Before", Untouched)
    _, place = lines(interrupt_twice, count - 1)
    assert place is not None
    assert len(calls) > 2
    assert state(model) == before


class Untouched(atomic_module.Before):
    """As it is before any patch."""

    restore = atomic_module.Before.restore


def test_ctrl_c_at_the_end_of_a_look_is_raised_when_all_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Momentum()
    before, random = state(model), torch.get_rng_state()
    real, calls = atomic_module.Before.restore, []

    def restore(self: atomic_module.Before) -> None:
        calls.append(1)
        real(self)
        if len(calls) < 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic_module.Before, "restore", restore)
    with pytest.raises(KeyboardInterrupt), looking(model), torch.no_grad():
        model(X)
    assert len(calls) == 3
    assert state(model) == before
    assert torch.equal(random, torch.get_rng_state())


class Momentum(Counts):
    """Writes a Parameter in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.last.weight.mul_(0.5)
        return super().forward(x + torch.randn(()))


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


@pytest.mark.parametrize("name", MODELS)
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
