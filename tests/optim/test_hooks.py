"""Hooks of torch.optim.Optimizer on bigops.train's optimisers, and loads that are refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.train import SGD, AdamW
from tests.support.optimizer_ways import OWN, PAIRS, give_gradients, leaves, same, snapshot

State = dict[str, Any]
MOMENT = {"adamw": "exp_avg", "momentum": "momentum_buffer"}


def stepped(name: str, step: int = 0, **options: Any) -> tuple[list[Tensor], Any]:
    params = leaves()
    optimizer = OWN[name](params, **options)
    give_gradients(params, step)
    optimizer.step()
    return params, optimizer


# the same calls in the same order as torch's --------------------------------------------------

HOOKS = [
    "step_pre_hook",
    "step_post_hook",
    "state_dict_pre_hook",
    "state_dict_post_hook",
    "load_state_dict_pre_hook",
    "load_state_dict_post_hook",
]


def calls(make: Callable[..., Any], replace: bool) -> list[Any]:
    """What the hooks of each kind are called with while states are made, saved and loaded."""
    params = leaves()
    optimizer = make(params)
    seen: list[Any] = []

    def watch(name: str) -> Callable[..., Any]:
        def hook(given: Any, *rest: Any) -> Any:
            assert given is optimizer
            moved = not same([p.detach() for p in params], [p.detach() for p in leaves()])
            keys = [sorted(r) if isinstance(r, dict) else len(r) for r in rest]
            numbers = [float(s["step"]) for s in optimizer.state.values() if "step" in s]
            seen.append((name, keys, moved, numbers, sum(map(len, optimizer.state.values()))))
            return (
                rest[-1]
                if replace and name.startswith(("state_dict_post", "load")) and (rest)
                else None
            )

        return hook

    handles = []
    for kind in HOOKS:
        register = getattr(optimizer, f"register_{kind}")
        handles.append(register(watch(f"{kind} one")))
        handles.append(register(watch(f"{kind} two")))
        if not kind.startswith("step"):
            handles.append(register(watch(f"{kind} first"), prepend=True))
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    return seen


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_every_hook_is_called_as_torch_calls_it(name: str, replace: bool) -> None:
    own, theirs = (calls(make, replace) for make in PAIRS[name])
    assert own == theirs
    assert {event[0].rpartition(" ")[0] for event in own} == set(HOOKS)


def test_hooks_of_a_step_may_change_what_it_is_called_with() -> None:
    for make in (AdamW, torch.optim.AdamW):
        params = leaves()
        optimizer = make(params)
        give_gradients(params, 0)
        optimizer.register_step_pre_hook(lambda o, *_: ((o,), {"closure": lambda: 7.0}))
        assert optimizer.step() == 7.0


def test_a_skipped_step_calls_no_hook() -> None:
    params = leaves()
    optimizer = AdamW(params)
    give_gradients(params, 0)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("a step"))
    params[0].grad[0, 0] = float("nan")  # type: ignore[index]
    assert not optimizer.step_checked()


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("name", MOMENT)
def test_what_pre_hooks_give_is_loaded_and_what_post_hooks_write_stays(
    name: str, eight_bit: bool
) -> None:
    key = MOMENT[name]
    _, source = stepped(name, eight_bit=eight_bit)

    def reset(_: Any, given: State) -> State:
        state = {
            i: {
                k: torch.zeros_like(v) if k == key and isinstance(v, Tensor) else v
                for k, v in held.items()
            }
            for i, held in given["state"].items()
        }
        return {**given, "state": state}

    params, target = stepped(name, 3)
    target.register_load_state_dict_pre_hook(reset)
    target.load_state_dict(source.state_dict())
    small = [p for p in params if p.numel() < 4096]
    assert len(small) == 4
    assert not any(bool(target.state[p][key].any()) for p in small)

    def write(optimizer: Any) -> None:
        for held in optimizer.state.values():
            held[key] = torch.full_like(held[key], 3)

    params, target = stepped(name, 3)
    target.register_load_state_dict_post_hook(write)
    target.load_state_dict(source.state_dict())
    assert all(bool((target.state[p][key] == 3).all()) for p in params)


@pytest.mark.parametrize("name", MOMENT)
def test_states_are_loaded_by_the_names_of_parameters(name: str) -> None:
    """The recipe of torch's documentation, for a model whose parameters come in another order."""

    def made(order: int) -> tuple[list[tuple[str, Tensor]], Any]:
        named = [(n, torch.ones(2 + i).requires_grad_()) for i, n in enumerate("abc")][::order]
        for n, p in named:
            p.grad = torch.full_like(p, float(ord(n)))
        return named, OWN[name](named)

    def by_name(optimizer: Any, given: State) -> State:
        where = {n: i for i, n in enumerate(given["param_groups"][0]["param_names"])}
        groups = optimizer.state_dict()["param_groups"]
        names = groups[0]["param_names"]
        return {
            "state": {i: given["state"][where[n]] for i, n in enumerate(names)},
            "param_groups": groups,
        }

    named, source = made(1)
    source.step()
    others, target = made(-1)
    target.register_load_state_dict_pre_hook(by_name)
    target.load_state_dict(source.state_dict())
    mine = dict(others)
    for n, p in named:
        assert torch.equal(target.state[mine[n]][MOMENT[name]], source.state[p][MOMENT[name]])


def test_a_state_dict_hook_sees_and_changes_the_saved_form() -> None:
    params, optimizer = stepped("adamw", eight_bit=True)
    held = optimizer.state[params[0]]["exp_avg"]

    def count(_: Any, given: State) -> State:
        assert given["state"][0]["exp_avg"]["codes"] is held
        return {**given, "epoch": 3}

    optimizer.register_state_dict_post_hook(count)
    assert optimizer.state_dict()["epoch"] == 3
    assert optimizer.state[params[0]]["exp_avg"] is held


# loads that are refused -----------------------------------------------------------------------


def fail(*_: Any) -> None:
    raise KeyError("planted")


def grow_and_fail(optimizer: Any, given: State) -> None:
    optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})
    optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = 5.0
    fail()


def write_and_fail(optimizer: Any) -> None:
    for held in optimizer.state.values():
        for value in held.values():
            value.zero_()
        held["more"] = 1
    optimizer.param_groups[0]["lr"] = 5.0
    fail()


def no_codes(given: State) -> None:
    given["state"][0]["exp_avg"] = {"values": given["state"][0]["exp_avg"]["codes"]}


def as_torch_cast_them(given: State) -> None:
    given["state"][0]["exp_avg"] = given["state"][0]["exp_avg"]["codes"].float()


BROKEN: dict[str, tuple[Callable[[State], Any], type[Exception], str]] = {
    "shape": (
        lambda s: s["state"][4].update(exp_avg=torch.ones(2)),
        ValueError,
        r"exp_avg of parameter 4: expected shape \[3, 4, 5\]; got \[2\]",
    ),
    "scales": (
        lambda s: s["state"][0].pop("exp_avg_scale"),
        ValueError,
        r"exp_avg of parameter 0: expected scales of shape \[70, 1\]; got none",
    ),
    "no codes": (no_codes, TypeError, "exp_avg of parameter 0: expected a torch.Tensor; got None"),
    "codes taken for values": (
        as_torch_cast_them,
        TypeError,
        "expected codes of uint8 beside their scales; got torch.float32",
    ),
    "integers": (
        lambda s: s["state"][1].update(exp_avg=torch.ones(90).int()),
        TypeError,
        "exp_avg of parameter 1: expected a floating dtype; got torch.int32",
    ),
    "no tensor": (
        lambda s: s["state"][1].update(exp_avg_sq=[1.0]),
        TypeError,
        "exp_avg_sq of parameter 1: expected a torch.Tensor; got list",
    ),
    "half a state": (
        lambda s: s["state"][1].pop("exp_avg_sq"),
        ValueError,
        "state of parameter 1: expected step, exp_avg, exp_avg_sq; got step, exp_avg$",
    ),
    "another optimiser's names": (
        lambda s: s["state"].update({1: {"step": 3, "state1": torch.ones(90)}}),
        ValueError,
        "state of parameter 1: expected step, exp_avg, exp_avg_sq; got step, state1",
    ),
    "step": (
        lambda s: s["state"][1].update(step=torch.ones(2)),
        ValueError,
        "step of parameter 1: expected a number",
    ),
    "groups": (
        lambda s: s["param_groups"][0]["params"].append(5),
        ValueError,
        r"expected parameter groups of sizes \[5\]; got \[6\]",
    ),
    "keys": (lambda s: s.pop("state"), ValueError, "expected keys state and param_groups; got"),
    "amsgrad": (
        lambda s: s["param_groups"][0].update(amsgrad=True),
        ValueError,
        "amsgrad: expected False",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_state_that_does_not_fit_is_refused_by_check_and_by_load(fault: str) -> None:
    change, error, match = BROKEN[fault]
    params, optimizer = stepped("adamw", eight_bit=True)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.check_state_dict(saved)
    change(saved)
    before, kept = snapshot(params, optimizer), copy.deepcopy(saved)
    for verb in (optimizer.check_state_dict, optimizer.load_state_dict):
        with pytest.raises(error, match=match):
            verb(saved)
        assert same(snapshot(params, optimizer), before)
        assert same(saved, kept)


@pytest.mark.parametrize("name", ["adamw", "momentum"])
@pytest.mark.parametrize("hook", [fail, grow_and_fail, write_and_fail])
def test_a_load_in_which_a_hook_raises_leaves_states_and_groups(
    name: str, hook: Callable[..., None]
) -> None:
    _, source = stepped(name, 5)
    params, optimizer = stepped(name)
    before = snapshot(params, optimizer)
    groups, options = list(optimizer.param_groups), copy.copy(optimizer.param_groups[0])
    held = [(p, s, dict(s)) for p, s in optimizer.state.items()]
    if hook is not write_and_fail:
        optimizer.register_load_state_dict_pre_hook(hook)
    else:
        optimizer.register_load_state_dict_post_hook(hook)
    with pytest.raises(KeyError, match="planted"):
        optimizer.load_state_dict(source.state_dict())
    assert same(snapshot(params, optimizer), before)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is groups[0]
    assert same({**groups[0], "params": 0}, {**options, "params": 0})
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in params]
    for param, state, values in held:
        assert optimizer.state[param] is state
        assert all(state[k] is v for k, v in values.items())
    give_gradients(params, 1)
    optimizer.step()
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == (hook is write_and_fail)


def test_a_load_that_is_interrupted_at_any_line_leaves_states_and_groups() -> None:
    _, source = stepped("adamw", 5, eight_bit=True)
    saved = source.state_dict()
    params, optimizer = stepped("adamw")
    before = snapshot(params, optimizer)
    rate = optimizer.param_groups[0]["lr"]
    saved["param_groups"][0]["lr"] = 3.0
    places = {
        str(Path(sys.modules[AdamW.__module__].__file__ or "").parent),
        torch.optim.__path__[0],
    }
    count = interrupted = 0
    while True:
        left = count = count + 1

        def trace(frame: Any, event: str, _: object) -> Any:
            nonlocal left
            if str(Path(frame.f_code.co_filename).parent) not in places:
                return None
            left -= event == "line"
            if event == "line" and left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
            return trace

        tracing = sys.gettrace()
        sys.settrace(trace)
        try:
            optimizer.load_state_dict(saved)
        except KeyboardInterrupt:
            interrupted += 1
            sys.settrace(tracing)
            assert same(snapshot(params, optimizer), before), count
            assert optimizer.param_groups[0]["lr"] == rate, count
            continue
        finally:
            sys.settrace(tracing)
        break
    assert interrupted > 50
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_a_hook_decides_so_check_looks_at_nothing() -> None:
    _, optimizer = stepped("adamw")
    optimizer.register_load_state_dict_pre_hook(lambda *_: None)
    optimizer.check_state_dict({"what": "a hook may take"})


def test_an_empty_state_of_sgd_is_one() -> None:
    """torch.optim.SGD without momentum saves None for its buffers."""
    params = leaves()
    theirs = torch.optim.SGD(params, lr=0.1)
    give_gradients(params, 0)
    theirs.step()
    ours = SGD(leaves(), lr=0.1, momentum=0.9)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["momentum"] == 0
