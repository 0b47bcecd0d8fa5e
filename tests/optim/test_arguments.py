"""bigops.train's optimisers take torch's arguments: signature, collections, flags, states."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops.optim import optimizers
from bigops.train import SGD, Adam, AdamW
from tests.support import tolerance
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import give_gradients, leaves, same

pytestmark = needs_extension

PAIRS: dict[str, tuple[Any, Any]] = {
    "AdamW": (AdamW, torch.optim.AdamW),
    "Adam": (Adam, torch.optim.Adam),
    "SGD": (SGD, torch.optim.SGD),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.mark.parametrize("name", PAIRS)
def test_the_signature_begins_with_torchs(name: str) -> None:
    """Training scripts ask ``"fused" in inspect.signature(cls).parameters``."""
    own, theirs = (inspect.signature(cls).parameters for cls in PAIRS[name])
    for parameter in theirs.values():
        assert own[parameter.name].kind == parameter.kind
        assert own[parameter.name].default == parameter.default
    ordered = [[p.name for p in s.values() if p.kind != p.KEYWORD_ONLY] for s in (own, theirs)]
    assert ordered[0] == ordered[1]
    defaults = [cls(leaves()).defaults for cls in PAIRS[name]]
    assert {k: defaults[0].get(k, "none") for k in defaults[1]} == defaults[1]


# collections of parameters --------------------------------------------------------------------

SETS: dict[str, Callable[[Any, list[Tensor]], Any]] = {
    "a set": lambda make, p: make(set(p)),
    "a frozen set": lambda make, p: make(frozenset(p)),
    "a set of names and parameters": lambda make, p: make({(str(i), t) for i, t in enumerate(p)}),
    "a group": lambda make, p: make([{"params": p[:1]}, {"params": set(p[1:])}]),
    "a frozen group": lambda make, p: make([{"params": frozenset(p)}]),
    "a group added": lambda make, p: make(p[:1]).add_param_group({"params": set(p[1:])}),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", SETS)
def test_parameters_in_a_set_are_refused(name: str, kind: str) -> None:
    """Their order is another in each run, and states are saved by it."""
    with pytest.raises(
        TypeError, match=r"params: expected an ordered collection; got a (froz|set)"
    ):
        SETS[kind](PAIRS[name][0], leaves())


def test_a_refused_group_is_not_added() -> None:
    params = leaves()
    optimizer = AdamW(params[:1])
    for group in ({"params": set(params[1:])}, {"params": params[1:], "foreach": 1, "fused": 1}):
        with pytest.raises((TypeError, ValueError)):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


def named() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


ORDERED: dict[str, Callable[[nn.Module], Any]] = {
    "generator": lambda m: m.parameters(),
    "names and parameters": lambda m: m.named_parameters(),
    "items of a dict": lambda m: dict(m.named_parameters()).items(),
    "values of a dict": lambda m: dict(m.named_parameters()).values(),
    "keys of a dict": lambda m: dict.fromkeys(m.parameters()).keys(),
    "tuple": lambda m: tuple(m.parameters()),
    "ParameterList": lambda m: nn.ParameterList(m.parameters()),
    "group of a generator": lambda m: [{"params": m.parameters(), "lr": 0.2}],
    "group of names": lambda m: [{"params": m.named_parameters(), "fused": True}],
    "groups in a generator": lambda m: ({"params": layer.named_parameters()} for layer in m),
    "a group of one": lambda m: [{"params": m[0].weight}, {"params": iter([m[1].weight])}],
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ORDERED)
def test_an_ordered_collection_is_taken_as_torch_takes_it(name: str, kind: str) -> None:
    model = named()
    own, theirs = (cls(ORDERED[kind](model), lr=0.1) for cls in PAIRS[name])
    for group, torchs in zip(own.param_groups, theirs.param_groups, strict=True):
        assert list(map(id, group["params"])) == list(map(id, torchs["params"]))
        assert group.get("param_names") == torchs.get("param_names")
        assert {k: group[k] for k in torchs if k != "params"} == {
            k: v for k, v in torchs.items() if k != "params"
        }


@pytest.mark.parametrize("name", PAIRS)
def test_a_group_that_was_given_is_the_group(name: str) -> None:
    """Schedules keep the dict that they gave and write rates into it."""
    params = leaves()
    for make in PAIRS[name]:
        optimizer = make(params[:1])
        group: dict[str, Any] = {"params": iter(params[1:])}
        optimizer.add_param_group(group)
        assert optimizer.param_groups[1] is group


@pytest.mark.parametrize("name", PAIRS)
def test_a_parameter_twice_in_a_group_moves_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in torch's loop over parameters, with its warning; never twice in one call of a kernel,
    whose threads would both write it.

    Without momentum, of which torch's first step makes a buffer for each time and keeps the last.
    """
    once: list[bool] = []
    for op in ("step_adamw", "step_sgd"):
        kernel = getattr(optimizers, op)

        def watched(params: list[Tensor], *rest: Any, kernel: Any = kernel) -> None:
            once.append(len({p.data_ptr() for p in params}) == len(params))
            kernel(params, *rest)

        monkeypatch.setattr(optimizers, op, watched)
    ends = []
    for make in PAIRS[name]:
        params = leaves(shapes=[(90, 90), (3,)])
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizer = make([*params, params[0]], lr=0.1, foreach=False)
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert once == [True] * 6
    for o, p in zip(*ends, strict=True):
        tolerance.check(o, p.double(), p, p.double().abs() + 1)


# flags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_a_group_has_flags_and_rates_of_its_own(name: str) -> None:
    ends = []
    for make in PAIRS[name]:
        params = leaves()
        groups = [
            {"params": params[:1], "fused": True, "maximize": True},
            {"params": params[1:2], "foreach": True, "weight_decay": 0.3},
            {"params": params[2:], "foreach": False, "lr": torch.tensor(0.03)},
        ]
        optimizer = make(groups, lr=1e-2)
        read = [(g["foreach"], g["fused"], g["maximize"]) for g in optimizer.param_groups]
        assert read == [(None, True, True), (True, None, False), (False, None, False)]
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
        ends.append([p.detach() for p in params])
    for o, p in zip(*ends, strict=True):
        tolerance.check(o, p.double(), p, p.double().abs() + 1)


TENSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "rate": ("AdamW", {"lr": torch.tensor(0.02)}),
    "rate in one dimension": ("SGD", {"lr": torch.tensor([0.02])}),
    "rate and foreach": ("SGD", {"lr": torch.tensor(0.02), "foreach": True}),
    "betas": ("AdamW", {"betas": (torch.tensor(0.8), torch.tensor([0.9]))}),
    "decay": ("SGD", {"weight_decay": torch.tensor(0.1), "foreach": False}),
    "rate in float64, fused": ("AdamW", {"lr": torch.tensor(0.02).double(), "fused": True}),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_as_options(what: str) -> None:
    name, options = TENSORS[what]
    ends = []
    for make in PAIRS[name]:
        params = leaves()
        optimizer = make(params, **options)
        for step in range(4):
            give_gradients(params, step)
            optimizer.step()
            if "lr" in options:  # a schedule writes into it
                optimizer.param_groups[0]["lr"] = options["lr"] / (step + 2)
        ends.append([p.detach() for p in params])
    for o, p in zip(*ends, strict=True):
        tolerance.check(o, p.double(), p, p.double().abs() + 0.1)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", PAIRS)
def test_torchs_loss_scaler_unscales_for_it(name: str, fused: bool | None) -> None:
    """torch's own fused step takes scale and verdict from the scaler; this one leaves it both."""
    ends = []
    for make in PAIRS[name]:
        params = leaves()
        optimizer = make(params, lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            optimizer.zero_grad()
            give_gradients(params, step)
            loss = sum((p * p.grad.clone()).sum() for p in params)  # type: ignore[union-attr]
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # type: ignore[arg-type]
            if step == 1:
                params[0].grad[0, 0] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 512
        ends.append([p.detach() for p in params])
    for o, p in zip(*ends, strict=True):
        assert bool(p.isfinite().all())
        tolerance.check(o, p.double(), p, p.double().abs() + 1)


def test_a_capture_of_a_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would replay the counter of one step for ever."""
    params = leaves()
    optimizer = AdamW(params)
    give_gradients(params, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="outside the capture of a CUDA graph"):
        optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in leaves()])
    assert not optimizer.state


# states between torch's and ours --------------------------------------------------------------

STATES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "AdamW": ("AdamW", {}, {}),
    "AdamW, fused to foreach": ("AdamW", {"fused": True}, {"foreach": True}),
    "AdamW, a rate that is a tensor": ("AdamW", {"lr": torch.tensor(0.02)}, {}),
    "Adam": ("Adam", {"weight_decay": 0.2, "fused": True}, {}),
    "Adam, decoupled": ("Adam", {"weight_decay": 0.2, "decoupled_weight_decay": True}, {}),
    "SGD": ("SGD", {}, {}),
    "SGD, nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "fused": True}, {}),
    "SGD, dampening": ("SGD", {"momentum": 0.9, "dampening": 0.3}, {"foreach": False}),
}


@pytest.mark.parametrize("what", STATES)
def test_states_go_both_ways_and_the_run_goes_on(what: str) -> None:
    name, saved, taken = STATES[what]
    own, theirs = PAIRS[name]

    def ways(first: Any, second: Any) -> tuple[list[Tensor], Any]:
        params = leaves()
        optimizer = first(params, **saved)
        for step in range(6):
            if step == 3:
                state = optimizer.state_dict()
                optimizer = second(params, **taken)
                optimizer.load_state_dict(state)
            give_gradients(params, step)
            optimizer.step()
        return [p.detach() for p in params], optimizer

    want, held = ways(theirs, theirs)
    for first, second in itertools.product((own, theirs), repeat=2):
        got, optimizer = ways(first, second)
        for o, p in zip(got, want, strict=True):
            tolerance.check(o, p.double(), p, p.double().abs() + 0.1)
        group, torchs = optimizer.param_groups[0], held.param_groups[0]
        assert all(same(group[k], v) for k, v in torchs.items() if k != "params")


def test_adams_state_without_decay_is_adamws() -> None:
    params = leaves()
    adam = torch.optim.Adam(params, lr=0.1)
    give_gradients(params, 0)
    adam.step()
    optimizer = AdamW(params)
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
