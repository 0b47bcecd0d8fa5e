"""bigops.train.AdamW and SGD: torch's trajectories, the checked step, 16 bits, MixedPrecision.

States that are saved, loaded and coded are in test_states.py.
"""

from __future__ import annotations

import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops.train import SGD, AdamW, MixedPrecision
from tests.support import tolerance
from tests.support.kernels_ran import expect, needs_extension, threads
from tests.support.optimizer_ways import (
    OWN,
    PAIRS,
    give_gradients,
    in_float64,
    leaves,
    run,
    same,
    snapshot,
)

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests this small only wait for each other's threads; the tests of threads set their own."""
    with threads(1):
        yield


# trajectories --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
def test_same_way_as_torch_over_many_steps(name: str) -> None:
    own, theirs = PAIRS[name]
    steps = 50
    with expect("fused_adamw.f32.fused" if "adam" in name else "fused_sgd.f32.fused"):
        out, _ = run(own, steps)
    plain, _ = run(theirs, steps)
    ref64 = in_float64(theirs, steps)
    for o, r, p in zip(out, ref64, plain, strict=True):
        tolerance.check(o, r, p, r.abs() + steps * 0.1)


@pytest.mark.parametrize("name", PAIRS)
def test_clipped_as_torch_clips(name: str) -> None:
    own, theirs = PAIRS[name]
    mine, plain = leaves(), leaves()
    a, b = own(mine), theirs(plain)
    for step in range(20):
        give_gradients(mine, step)
        give_gradients(plain, step)
        assert a.step_checked(clip_norm=2.0)
        nn.utils.clip_grad_norm_(plain, 2.0)
        b.step()
    for o, r, p in zip(mine, in_float64(theirs, 20, 2.0), plain, strict=True):
        tolerance.check(o, r, p, r.abs() + 2.0)


def test_groups_schedules_closures_and_tensor_rates() -> None:
    def both() -> list[Any]:
        result = []
        for make in (AdamW, torch.optim.AdamW):
            params = leaves()
            groups = [
                {"params": params[:1], "weight_decay": 0.3},
                {"params": params[1:], "lr": torch.tensor(0.03), "betas": (0.5, 0.9)},
            ]
            result.append((params, make(groups, lr=1e-2)))
        return result

    (mine, own), (plain, theirs) = both()
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (own, theirs)]
    for step in range(6):
        for params, optimizer in ((mine, own), (plain, theirs)):

            def closure(params: list[Tensor] = params, step: int = step) -> float:
                assert torch.is_grad_enabled()
                give_gradients(params, step)
                return 1.5

            assert optimizer.step(closure) == 1.5
        for schedule in schedules:
            schedule.step()
    for o, p in zip(mine, plain, strict=True):
        tolerance.check(o, p.detach().double(), p, p.detach().double().abs() + 1)


def test_a_schedule_knows_that_a_checked_step_is_a_step() -> None:
    params = leaves()
    optimizer = AdamW(params)
    seen: list[int] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    give_gradients(params, 0)
    assert optimizer.step_checked()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule.step()
    assert seen == [1]


def test_rate_zero_moves_states_alone() -> None:
    for own, theirs in PAIRS.values():
        params = leaves()
        optimizer = own(params)
        optimizer.param_groups[0]["lr"] = 0.0
        plain = leaves()
        other = theirs(plain)
        other.param_groups[0]["lr"] = 0.0
        give_gradients(params, 0)
        give_gradients(plain, 0)
        optimizer.step()
        other.step()
        for p, q in zip(params, leaves(), strict=True):
            assert torch.equal(p, q)
        for p, q in zip(params, plain, strict=True):
            assert optimizer.state[p].get("step") == other.state[q].get("step")
            for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if (want := other.state[q].get(key)) is not None:
                    scale = want.abs() + q.detach().abs() + q.grad.abs()
                    tolerance.check(optimizer.state[p][key], want.double(), want, scale)


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_without_gradient_and_none_at_all(name: str) -> None:
    own, _ = PAIRS[name]
    params = leaves()
    optimizer = own(params)
    optimizer.step()
    assert optimizer.step_checked(clip_norm=1.0)
    assert all(torch.equal(p, q) for p, q in zip(params, leaves(), strict=True))
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert [p for p, state in optimizer.state.items() if state] == params[: name != "sgd"]
    assert not torch.equal(params[0], leaves()[0])
    assert torch.equal(params[4], leaves()[4])
    with pytest.raises(ValueError, match="empty parameter list"):
        own([])


@pytest.mark.parametrize("name", PAIRS)
def test_devices_and_dtypes_in_one_optimizer(name: str) -> None:
    """The meta device stands for a second one: its tensors have no values, the CPU's must move."""
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

    def ways(*others: str) -> list[Tensor]:
        params = [p.detach().to(k).requires_grad_() for p, k in zip(leaves(), kinds, strict=False)]
        far = [torch.ones(3, 4, device=d, requires_grad=True) for d in others]
        optimizer = OWN[name]([*params, *far], stochastic_rounding=False)
        for step in range(2):
            give_gradients(params, step)
            for p in far:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return [p.detach() for p in params]

    mixed = ways("meta")
    assert same(mixed, ways())
    assert not same(mixed[:1], leaves()[:1])


# the checked step ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", [{}, {"eight_bit": True}, {"master_weights": True}], ids=str)
def test_a_bad_gradient_changes_nothing(name: str, value: float, first: bool, form: Any) -> None:
    dtype = torch.bfloat16 if "master_weights" in form else torch.float32
    params = leaves(dtype)
    optimizer = OWN[name](params, **form)
    if not first:
        give_gradients(params, 0)
        optimizer.step()
    before = snapshot(params, optimizer)
    give_gradients(params, 1)
    params[4].grad[1, 2, 3] = value  # type: ignore[index]
    assert not optimizer.step_checked(inv_scale=0.5, clip_norm=1.0)
    assert same(snapshot(params, optimizer), before)
    give_gradients(params, 1)
    assert optimizer.step_checked(inv_scale=0.5, clip_norm=1.0)
    assert not same(snapshot(params, optimizer), before)


def test_the_loss_scale_does_not_change_the_step_and_gradients_stay() -> None:
    a, b = leaves(), leaves()
    one, other = AdamW(a), AdamW(b)
    for step in range(3):
        give_gradients(a, step)
        give_gradients(b, step, 1024.0)
        assert one.step_checked(clip_norm=1.0)
        held = [p.grad.clone() for p in b]  # type: ignore[union-attr]
        assert other.step_checked(inv_scale=1 / 1024, clip_norm=1.0)
        assert same(held, [p.grad for p in b])
    for p, q in zip(a, b, strict=True):
        tolerance.check(p, q.detach().double(), q, q.detach().double().abs() + 1e-2)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    for own in OWN.values():
        params = leaves()
        optimizer = own([{"params": params[:1]}, {"params": params[1:]}])
        give_gradients(params, 0)
        params[1].grad = torch.ones(90).to_sparse()
        before = snapshot(params, optimizer)
        for step in (optimizer.step, optimizer.step_checked):
            with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\]: expected a"):
                step()
        assert same(snapshot(params, optimizer), before)


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_a_changed_parameter_is_refused_before_anything_changes(name: str) -> None:
    changes = {lambda t: t.double(): {}, lambda t: t.reshape(-1): {}}
    masters = {lambda t: t.float(): {"master_weights": True}}
    for change, options in [*changes.items(), *masters.items()]:
        params = leaves(torch.bfloat16 if options else torch.float32)
        optimizer = OWN[name]([{"params": params[:1]}, {"params": params[4:]}], **options)
        give_gradients(params, 0)
        optimizer.step()
        params[4].grad = None
        params[4].data = change(params[4].data)
        give_gradients(params, 1)
        before = snapshot(params, optimizer)
        with pytest.raises(ValueError, match=r"model changed after a step"):
            optimizer.step_checked()
        assert same(snapshot(params, optimizer), before)


WRONG: dict[str, tuple[Callable[[list[Tensor]], Any], type[Exception], str]] = {
    "amsgrad": (lambda p: AdamW(p, amsgrad=True), ValueError, "amsgrad: expected False"),
    "lr": (lambda p: AdamW(p, lr=-1.0), ValueError, "lr: expected at least 0; got -1"),
    "lr nan": (lambda p: SGD(p, lr=float("nan")), ValueError, "lr: expected at least 0; got nan"),
    "lr tensor": (lambda p: SGD(p, lr=torch.ones(2)), ValueError, "lr: expected one element"),
    "beta": (lambda p: AdamW(p, betas=(0.9, 1.0)), ValueError, r"betas\[1\]: expected .* below 1"),
    "eps": (lambda p: AdamW(p, eps=-1e-8), ValueError, "eps: expected at least 0"),
    "decay": (lambda p: SGD(p, weight_decay=-1), ValueError, "weight_decay: expected"),
    "momentum": (lambda p: SGD(p, momentum=-1), ValueError, "momentum: expected at least 0"),
    "nesterov": (lambda p: SGD(p, nesterov=True), ValueError, "nesterov: expected a momentum"),
    "integer": (lambda p: AdamW([torch.ones(3).int()]), TypeError, "params: expected dtype"),
    "sparse": (lambda p: AdamW([torch.ones(3).to_sparse()]), ValueError, "params: expected dense"),
    "seed": (lambda p: SGD(p, seed=2**63), ValueError, "seed: expected an integer of 64 bits"),
    "group": (
        lambda p: AdamW([{"params": p, "betas": (2.0, 0.9)}]),
        ValueError,
        r"betas\[0\]: expected",
    ),
    "scale": (lambda p: AdamW(p).step_checked(inv_scale=0), ValueError, "inv_scale: expected"),
    "clip": (lambda p: AdamW(p).step_checked(clip_norm=0), ValueError, "clip_norm: expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_arguments(name: str) -> None:
    make, error, match = WRONG[name]
    with pytest.raises(error, match=match):
        make(leaves())


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("master_weights", [False, True])
def test_a_graph_from_before_the_step_is_stale(name: str, master_weights: bool) -> None:
    weight = torch.randn(4, 4).bfloat16().requires_grad_()
    optimizer = OWN[name]([weight], master_weights=master_weights)
    x = torch.randn(2, 4).bfloat16().requires_grad_()
    (x @ weight).square().sum().backward()
    stale = (x @ weight).sum()
    before = weight._version
    assert optimizer.step_checked()
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# 16 bits -------------------------------------------------------------------------------------


def test_masters_are_the_float32_way_and_weights_their_rounding() -> None:
    params = leaves(torch.bfloat16)
    optimizer = AdamW(params, lr=1e-2, master_weights=True)
    wide = [p.detach().float().requires_grad_() for p in params]
    other = AdamW(wide, lr=1e-2)
    for step in range(5):
        give_gradients(params, step)
        for p, w in zip(params, wide, strict=True):
            w.grad = p.grad.float()  # type: ignore[union-attr]
        optimizer.step()
        other.step()
    for p, w in zip(params, wide, strict=True):
        assert torch.equal(optimizer.state[p]["master"], w)
        assert torch.equal(p, w.bfloat16())


def test_stochastic_rounding_moves_where_nearest_stands_still() -> None:
    means = {}
    for stochastic in (True, False):
        param = torch.ones(20000, dtype=torch.bfloat16, requires_grad=True)
        optimizer = SGD([param], lr=1e-4, stochastic_rounding=stochastic)
        for _ in range(50):
            param.grad = -torch.ones_like(param)
            optimizer.step()
        means[stochastic] = param.double().mean().item()
    assert means[False] == 1.0
    # 50 steps of 1e-4; each rounding has a deviation below 2^-8, over 20000 elements
    assert abs(means[True] - 1.005) < 5 * 2**-8 * (50 / 20000) ** 0.5


def test_every_step_and_every_parameter_has_random_bits_of_its_own() -> None:
    params = [torch.ones(1000, dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    optimizer = SGD([{"params": params[:1]}, {"params": params[1:]}], lr=2**-9)
    moved = []
    for _ in range(2):
        for p in params:
            p.grad = -torch.ones_like(p)  # a quarter of the way to the next bfloat16
        optimizer.step()
        moved += [(p > 1).tolist() for p in params]
        with torch.no_grad():
            for p in params:
                p.fill_(1.0)
    assert all(0 < sum(m) < 1000 for m in moved)
    assert all(a != b for a, b in itertools.combinations(moved, 2))


def test_rounding_is_the_same_at_every_thread_count_and_after_a_reload() -> None:
    def ways(count: int, reload_at: int | None = None) -> list[Tensor]:
        params = leaves(torch.bfloat16, [(300, 300), (77,)])
        optimizer = AdamW(params, seed=5)
        with threads(count):
            for step in range(6):
                if step == reload_at:
                    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                    optimizer = AdamW(params, seed=99)
                    optimizer.load_state_dict(state)
                give_gradients(params, step)
                optimizer.step()
        return [p.detach() for p in params]

    assert same(ways(1), ways(2))
    assert same(ways(1), ways(3, reload_at=4))
    params = leaves(torch.bfloat16, [(300, 300), (77,)])
    optimizer = AdamW(params, seed=6)
    for step in range(6):
        give_gradients(params, step)
        optimizer.step()
    assert not same(ways(1), [p.detach() for p in params])


# with MixedPrecision -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_mixed_precision_takes_the_same_way_in_two_passes(
    precision: str, clip_norm: float | None
) -> None:
    ends, scales, steps = [], [], []
    for make in (AdamW, lambda p: torch.optim.AdamW(p, fused=True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        optimizer = make(model.parameters())
        amp = MixedPrecision(precision, init_scale=2.0**10, growth_interval=2)
        seen = []
        for step in range(7):
            x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
            with amp.autocast():
                loss = model(x).float().square().mean()
            optimizer.zero_grad()
            amp.backward(loss)
            if step == 4 and (precision == "fp16-mixed" or clip_norm):
                model[0].weight.grad[0, 0] = float("nan")
            seen.append(bool(amp.step(optimizer, clip_norm)))
            scales.append(amp.scale)
        steps.append(seen)
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    half = len(scales) // 2
    assert scales[:half] == scales[half:]
    assert steps[0] == steps[1]
    skips = precision == "fp16-mixed" or clip_norm is not None
    assert steps[0] == [step != 4 or not skips for step in range(7)]
    # bf16 and fp16 gradients of weights that differ in a last bit differ in theirs
    unit = {"fp32": 2.0**-23, "bf16-mixed": 2.0**-8, "fp16-mixed": 2.0**-11}[precision]
    # each of 7 steps of at most 1e-3 rounds the parameter once
    allowed = 7 * (32 * unit * 1e-3 + 2.0**-24 * ends[1].abs())
    assert ((ends[0] - ends[1]).abs() <= allowed).all()


def test_two_kernels_a_step() -> None:
    params = leaves()
    optimizer = AdamW(params)
    give_gradients(params, 0)
    with expect("fused_grad_norm.f32.double", "fused_adamw.f32.fused"):
        assert optimizer.step_checked(clip_norm=1.0)
