"""States of bigops.train.AdamW and SGD: resumed runs, torch's files, 8 bits."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigops.ops.fused_adamw import states
from bigops.recipes import mlp
from bigops.recipes.data import load
from bigops.train import AdamW, MixedPrecision
from tests.support import tolerance
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import OWN, PAIRS, give_gradients, leaves, run, same, snapshot

pytestmark = needs_extension
IN_ONE_ROW = Path(__file__).parents[1] / "golden" / "saved" / "states_in_one_row.pt"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests this small only wait for each other's threads; the tests of threads set their own."""
    with threads(1):
        yield


@pytest.mark.parametrize("name", PAIRS)
def test_states_go_to_torch_and_back(name: str) -> None:
    own, theirs = PAIRS[name]
    for first, second in itertools.permutations((own, theirs)):
        params = leaves()
        a = first(params)
        for step in range(3):
            give_gradients(params, step)
            a.step()
        b = second(params)
        b.load_state_dict(a.state_dict())
        for step in range(3, 6):
            give_gradients(params, step)
            b.step()
        straight, _ = run(theirs, 6)
        for p, q in zip(params, straight, strict=True):
            tolerance.check(p, q.double(), q, q.double().abs() + 1)


FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp64": (torch.float64, {"eight_bit": True}),
    "masters": (torch.float16, {"master_weights": True}),
    "8 bit": (torch.float32, {"eight_bit": True}),
    "8 bit masters": (torch.bfloat16, {"eight_bit": True, "master_weights": True}),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_resume_is_bitwise_equal(name: str, form: str) -> None:
    dtype, options = FORMS[form]
    straight, whole = run(OWN[name], 6, dtype, **options)
    params = leaves(dtype)
    optimizer = OWN[name](params, **options)
    for step in range(6):
        if step == 3:
            state = pickle.loads(pickle.dumps(optimizer.state_dict()))
            optimizer = OWN[name](params)  # options come from the state
            optimizer.load_state_dict(state)
        give_gradients(params, step)
        optimizer.step()
    assert same(straight, [p.detach() for p in params])
    assert same(list(whole.state.values()), list(optimizer.state.values()))


@pytest.mark.parametrize("form", FORMS)
def test_a_loaded_state_is_the_optimisers_own(form: str) -> None:
    dtype, options = FORMS[form]
    params = leaves(dtype)
    optimizer = AdamW(params, **options)
    give_gradients(params, 0)
    optimizer.step()
    state = optimizer.state_dict()
    held = copy.deepcopy(state)
    other = AdamW(leaves(dtype))
    other.load_state_dict(state)
    give_gradients(list(other.state), 1)
    other.step()
    assert same(state, held)


def test_states_are_converted_to_the_width_that_is_asked_for() -> None:
    _, torchs = run(PAIRS["adamw"][1], 2)
    params = leaves()
    optimizer = AdamW(params, eight_bit=True)
    optimizer.load_state_dict(torchs.state_dict())
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32  # small
    want = torchs.state_dict()["state"][0]["exp_avg"]
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["eight_bit"] = False
    wide = AdamW(params)
    wide.load_state_dict(state)
    assert tolerance.snr_db(wide.state[params[0]]["exp_avg"], want) > 30


def test_states_that_do_not_fit_change_nothing() -> None:
    params = leaves()
    optimizer = AdamW(params, eight_bit=True)
    give_gradients(params, 0)
    optimizer.step()
    before = snapshot(params, optimizer)
    good = optimizer.state_dict()

    def broken(change: Callable[[Any], None]) -> Any:
        state = copy.deepcopy(good)
        change(state)
        return state

    cases = {
        r"exp_avg of parameter 4: expected shape \[3, 4, 5\]; got \[2\]": broken(
            lambda s: s["state"][4].update(exp_avg=torch.ones(2))
        ),
        r"exp_avg of parameter 0: expected scales of shape \[70, 1\]; got none": broken(
            lambda s: s["state"][0].pop("exp_avg_scale")
        ),
        "amsgrad: expected False": broken(lambda s: s["param_groups"][0].update(amsgrad=True)),
        "decoupled_weight_decay: expected True": broken(
            lambda s: s["param_groups"][0].update(decoupled_weight_decay=False)
        ),
        "parameter group": broken(lambda s: s["param_groups"][0]["params"].append(5)),
    }
    for match, state in cases.items():
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(state)
        assert same(snapshot(params, optimizer), before), match


def test_8_bit_states_take_the_memory_that_is_promised() -> None:
    bytes_of = {}
    for eight_bit in (True, False):
        params = leaves(shapes=[(1000, 100), (4096,), (4095,), (1000, 15), (500, 1, 3, 3)])
        optimizer = AdamW(params, eight_bit=eight_bit)
        give_gradients(params, 0)
        optimizer.step()
        kinds = [optimizer.state[p]["exp_avg"].dtype for p in params]
        assert kinds == [torch.uint8 if eight_bit and i < 2 else torch.float32 for i in range(5)]
        bytes_of[eight_bit] = sum(
            t.nbytes for p in params[:2] for t in optimizer.state[p].values() if t.numel() > 1
        )
    assert bytes_of[True] <= 0.26 * bytes_of[False]


def test_files_of_before_rows_load() -> None:
    """Scales of one row: as they are where rows are whole blocks, else values are rounded anew."""
    saved = torch.load(IN_ONE_ROW, weights_only=True)["states"]["optimizer"]
    params = leaves(shapes=[(70, 60), (8, 512), (4100,), (520, 8), (90,)])
    optimizer = AdamW(params)
    optimizer.load_state_dict(saved)
    for i, param in enumerate(params):
        held, old = optimizer.state[param], saved["state"][i]
        assert float(held["step"]) == 3
        for name, signed in optimizer._SIGNED.items():
            scales = old.get(f"{name}_scale")
            codes = old[name]
            if scales is None:
                assert torch.equal(held[name], codes)
                continue
            assert scales.shape == (-(-param.numel() // 256),)
            want = states.decode(codes["codes"], scales, signed)
            if i == 3:  # rows of 8 have states in floats
                assert torch.equal(held[name], want)
                continue
            assert held[f"{name}_scale"].shape == states.scales_shape(param.shape)
            got = states.decode(held[name], held[f"{name}_scale"], signed)
            if i in (1, 2):  # the same blocks
                assert torch.equal(held[name], codes["codes"])
                assert torch.equal(got, want)
            assert tolerance.snr_db(got, want) > 30
    give_gradients(params, 3)
    optimizer.step()


def test_8_bit_states_end_at_the_same_loss() -> None:
    """The demo's training on digits, as recipes/mlp.py runs it, within 0.1 % of the loss."""
    data = load("digits")
    x, y = data.train_x, data.train_y

    def final(make: Callable[..., torch.optim.Optimizer]) -> float:
        model = mlp.build(data.features, (256, 128), data.classes, seed=0)
        optimizer = make(model.parameters(), lr=1e-3)
        amp = MixedPrecision("fp32")
        order = torch.Generator().manual_seed(0)
        steps = 8 * len(range(0, len(x), 64))
        step = 0
        for _ in range(8):
            for rows in torch.randperm(len(x), generator=order).split(64):
                optimizer.param_groups[0]["lr"] = 1e-3 * mlp.one_cycle(step, steps)
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                amp.backward(loss)
                amp.step(optimizer, 1.0)
                step += 1
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).item()

    with threads(1):
        plain = final(lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True))
        coded = final(lambda p, lr: AdamW(p, lr=lr, eight_bit=True))
    assert abs(coded - plain) <= 1e-3 * plain, (coded, plain)


def test_8_bit_states_survive_gradients_that_come_once() -> None:
    """exp_avg_sq far below its block's absmax must not read as 0 beside an exp_avg that is not."""
    param = torch.zeros(4096, requires_grad=True)
    optimizer = AdamW([param], lr=1e-3, eight_bit=True, weight_decay=0.0)
    for step in range(5):
        param.grad = torch.zeros(4096)
        param.grad[::256] = 1.0
        if step == 0:
            param.grad[1::256] = 1e-4
        optimizer.step()
    assert float(param.detach().abs().max()) <= 5 * 1e-3 * 1.01


# 8-bit states and torch's optimisers ----------------------------------------------------------


def coded(name: str) -> tuple[list[torch.Tensor], Any]:
    params = leaves()
    optimizer = OWN[name](params, eight_bit=True)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    return params, optimizer


IMPLEMENTATIONS: list[dict[str, bool]] = [{}, {"foreach": True}, {"fused": True}]
THEIRS: dict[str, list[Callable[..., Any]]] = {
    "adamw": [torch.optim.AdamW, torch.optim.Adam, torch.optim.NAdam],
    "momentum": [lambda p, **o: torch.optim.SGD(p, lr=0.1, momentum=0.9, **o)],
}


@pytest.mark.parametrize("options", IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_torch_refuses_codes_for_moments(name: str, options: dict[str, bool]) -> None:
    for make in THEIRS[name]:
        params, ours = coded(name)
        if make is torch.optim.NAdam and "fused" in options:
            continue
        theirs = make(params, **options)
        saved = copy.deepcopy(ours.state_dict())
        for group in saved["param_groups"]:  # the file's options win there, too
            group.update({"foreach": None, "fused": None, "capturable": False, **options})
            group.update({"decoupled_weight_decay": True, "momentum_decay": 4e-3})
            if make is torch.optim.NAdam:
                for state in saved["state"].values():
                    state["mu_product"] = torch.ones(())
        theirs.load_state_dict(saved)
        with pytest.raises((TypeError, AttributeError, RuntimeError), match=r"dict|Tensor"):
            theirs.step()


def test_small_states_stay_torchs() -> None:
    """Where no tensor is large enough for 8 bits, all states are in floats."""
    small = [(90,), (3, 4, 5)]
    ends = []
    for make in (lambda p: AdamW(p, eight_bit=True), torch.optim.AdamW):
        params = leaves(shapes=small)
        first = AdamW(params, eight_bit=True)
        give_gradients(params, 0)
        first.step()
        second = make(params)
        second.load_state_dict(first.state_dict())
        give_gradients(params, 1)
        second.step()
        ends.append([p.detach() for p in params])
    for ours, theirs in zip(*ends, strict=True):
        tolerance.check(ours, theirs.double(), theirs, theirs.double().abs() + 1)


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("path", ["torch.save", "pickle", "flat", "flat by torch.save"])
def test_8_bit_states_come_back_by_every_path(name: str, path: str, tmp_path: Path) -> None:
    """Flat is the form of older files: the codes themselves under the name of the moment."""
    params, ours = coded(name)
    saved = ours.state_dict()
    if "flat" in path:
        for state in saved["state"].values():
            state.update({k: v["codes"] for k, v in state.items() if isinstance(v, dict)})
    if "torch.save" in path:
        torch.save(saved, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        saved = pickle.loads(pickle.dumps(saved))
    twin = OWN[name](copy.deepcopy(params))
    twin.check_state_dict(saved)
    twin.load_state_dict(saved)
    others = twin.param_groups[0]["params"]
    assert same([ours.state[p] for p in params], [twin.state[p] for p in others])
    assert ours.state[params[0]][next(iter(ours._SIGNED))].dtype == torch.uint8
    for group, optimizer in ((params, ours), (others, twin)):
        give_gradients(group, 9)
        optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in others])
