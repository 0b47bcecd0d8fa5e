"""amp.scale_loss: masters, accumulation, skipped steps, and a resume that keeps the masters."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops import amp
from bigops.train import SGD, AdamW
from bigops.train.amp import current

LEVELS = ["O0", "O1", "O2", "O3"]


def made(opt_level: str, make: Any = torch.optim.SGD, **options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    given: Any = {"lr": 0.1} | ({"momentum": 0.9} if make in (SGD, torch.optim.SGD) else {})
    return amp.initialize(model, make(model.parameters(), **given), opt_level=opt_level, **options)


def loss_of(model: nn.Module, factor: float = 1.0, seed: int = 0) -> Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean() * factor


def backward(model: nn.Module, optimizer: Any, *args: Any, **kwargs: Any) -> None:
    with amp.scale_loss(loss_of(model, *args), optimizer, **kwargs) as scaled:
        scaled.backward()


def grads(optimizer: Any) -> list[Tensor]:
    return [p.grad.clone() for p in amp.master_params(optimizer)]


def everything(model: nn.Module, optimizer: Any) -> list[Tensor]:
    tensors = [p.detach() for p in model.parameters()]
    for param in amp.master_params(optimizer):
        held = optimizer.state.get(param, {})
        tensors += [param.detach(), *(t for t in held.values() if isinstance(t, Tensor))]
    return [t.clone() for t in tensors]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


def scaler(i: int = 0) -> tuple[float, int]:
    held = amp.state_dict()[f"loss_scaler{i}"]
    return held["loss_scale"], held["unskipped"]


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("opt_level", LEVELS)
def test_the_loss_is_scaled_in_float32_and_gradients_are_not(opt_level: str) -> None:
    model, optimizer = made(opt_level)
    loss = loss_of(model)
    with amp.scale_loss(loss.detach().half(), optimizer) as scaled:
        assert scaled.dtype == torch.float32
        assert scaled.item() == loss.half().item() * scaler()[0]
    with amp.scale_loss(loss, optimizer) as scaled:
        scaled.backward()
    plain = nn.Linear(4, 2)
    plain.load_state_dict(model.state_dict())
    loss_of(plain).backward()
    for got, param in zip(grads(optimizer), plain.parameters(), strict=True):
        assert param.grad is not None
        # x, w, y and what comes back are rounded, numbers up to 1: by 2^-11 in fp16
        unit = 2.0**-24 if opt_level == "O0" else 2.0**-11
        assert (got.float() - param.grad).abs().max() <= 4 * unit


@pytest.mark.parametrize("opt_level", LEVELS)
def test_gradients_add_up_until_they_are_cleared(opt_level: str) -> None:
    model, optimizer = made(opt_level)
    parts = []
    for seed in (1, 2):
        optimizer.zero_grad()
        backward(model, optimizer, 1.0, seed)
        parts.append(grads(optimizer))
    optimizer.zero_grad()
    for seed in (1, 2):
        backward(model, optimizer, 1.0, seed)
    assert same(grads(optimizer), [a + b for a, b in zip(*parts, strict=True)])
    optimizer.zero_grad()
    assert all(p.grad is None for p in (*model.parameters(), *amp.master_params(optimizer)))
    backward(model, optimizer, 1.0, 2)
    assert same(grads(optimizer), parts[1])
    optimizer.zero_grad(set_to_none=False)
    assert all(bool(grad.eq(0).all()) for grad in grads(optimizer))
    backward(model, optimizer, 1.0, 2)
    assert same(grads(optimizer), parts[1])


def test_zero_grad_of_optimizer_clears_what_the_model_holds() -> None:
    model, optimizer = made("O2")
    for param in model.parameters():
        param.grad = torch.full_like(param, 3.0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_delayed_unscale_adds_scaled_gradients(opt_level: str) -> None:
    model, optimizer = made(opt_level)
    backward(model, optimizer, 0.1, 1)
    backward(model, optimizer, 0.1, 2)
    backward(model, optimizer, 0.1, 3)
    true = grads(optimizer)
    optimizer.zero_grad()
    assert scaler() == (2.0**16, 3)
    backward(model, optimizer, 0.1, 1)  # unscaled gradients wait meanwhile
    backward(model, optimizer, 0.1, 2, delay_unscale=True)
    assert scaler() == (2.0**16, 4)  # no exit that counts
    backward(model, optimizer, 0.1, 3)
    assert scaler() == (2.0**16, 5)
    for got, want in zip(grads(optimizer), true, strict=True):
        assert (got - want).abs().max() <= 2.0**-10 * want.abs().max()


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_zero_grad_clears_what_waits_for_a_delayed_unscale(opt_level: str) -> None:
    model, optimizer = made(opt_level)
    backward(model, optimizer, 0.1, 3)
    true = grads(optimizer)
    backward(model, optimizer, 0.1, 1, delay_unscale=True)
    optimizer.zero_grad()
    backward(model, optimizer, 0.1, 3)
    assert same(grads(optimizer), true)


@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_a_block_that_raises_leaves_the_gradients(opt_level: str) -> None:
    model, optimizer = made(opt_level)
    backward(model, optimizer, 1.0, 1)
    before = grads(optimizer)
    loss = loss_of(model)
    loss.register_hook(lambda grad: grad / 0)
    with pytest.raises(KeyError), amp.scale_loss(loss, optimizer) as scaled:
        {}[scaled.backward()]
    assert same(grads(optimizer), before)
    assert scaler() == (2.0**16, 1)
    optimizer.step()


def test_master_params_are_clipped_for_what_they_are() -> None:
    model, optimizer = made("O2")
    backward(model, optimizer)
    norm = nn.utils.clip_grad_norm_(amp.master_params(optimizer), 0.1)
    assert norm > 0.5
    assert abs(float(nn.utils.get_total_norm(grads(optimizer))) - 0.1) < 1e-5


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, SGD, AdamW])
def test_o2_steps_masters_and_rounds_them_into_the_model(make: Any) -> None:
    model, optimizer = made("O2", make)
    for seed in range(3):
        optimizer.zero_grad()
        backward(model, optimizer, 1.0, seed)
        optimizer.step()
        masters = list(amp.master_params(optimizer))
        assert optimizer.param_groups[0]["params"] == masters
        for param, master in zip(model.parameters(), masters, strict=True):
            assert torch.equal(param, master.half())
            assert master.grad is None  # model.zero_grad() would not reach it
    assert any(not torch.equal(m, m.half().float()) for m in masters)


@pytest.mark.parametrize("make", [torch.optim.SGD, AdamW])
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("opt_level", ["O1", "O2"])
def test_an_overflow_skips_the_next_step_of_every_optimizer(
    opt_level: str, value: float, make: Any
) -> None:
    torch.manual_seed(0)
    models = [nn.Linear(4, 2), nn.Linear(4, 2)]
    optimizers = [make(m.parameters(), lr=0.1) for m in models]
    models, optimizers = amp.initialize(models, optimizers, opt_level=opt_level)
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        before = [everything(m, o) for m, o in zip(models, optimizers, strict=True)]
        loss = loss_of(models[0]) + loss_of(models[1], value if step == 1 else 1.0)
        with amp.scale_loss(loss, optimizers) as scaled:
            scaled.backward()
        if step == 1:  # a good one after it does not take the skip back
            backward(models[0], optimizers[0])
        for optimizer in optimizers:
            optimizer.step()
        after = [everything(m, o) for m, o in zip(models, optimizers, strict=True)]
        assert [same(a, b) for a, b in zip(before, after, strict=True)] == [step == 1] * 2
    assert scaler() == (2.0**15, 3)


def test_the_scale_moves_per_exit_and_stays_within_its_bounds() -> None:
    model, optimizer = made("O2", max_loss_scale=2.0**17, min_loss_scale=2.0**14)
    scale = current.run.scales[0]
    scale.growth_interval = 2
    seen = []
    for factor in (*[0.01] * 6, *[math.inf] * 5):
        backward(model, optimizer, factor)
        seen.append(math.log2(scaler()[0]))
    assert seen == [16, 17, 17, 17, 17, 17, 16, 15, 14, 14, 14]
    assert (scale.growth_factor, scale.backoff_factor) == (2.0, 0.5)
    made("O2")
    scale = current.run.scales[0]
    assert (scale.growth_interval, scale.most) == (2000, 2.0**24)


@pytest.mark.parametrize("opt_level", ["O0", "O2", "O3"])
def test_a_static_scale_is_never_checked(opt_level: str) -> None:
    model, optimizer = made(opt_level, loss_scale=64.0)
    backward(model, optimizer, math.nan)
    optimizer.step()
    assert bool(model.weight.isnan().any())
    assert scaler() == (64.0, 0)


def test_a_delayed_check_is_made_up_for() -> None:
    model, optimizer = made("O2")
    before = everything(model, optimizer)
    backward(model, optimizer, math.inf, delay_overflow_check=True)
    assert scaler() == (2.0**16, 0)
    backward(model, optimizer, 1.0)
    assert scaler() == (2.0**15, 0)
    optimizer.step()
    assert same(everything(model, optimizer), before)


def test_losses_have_scales_of_their_own() -> None:
    model, optimizer = made("O2", num_losses=2)
    backward(model, optimizer, math.inf, loss_id=1)
    backward(model, optimizer, 1.0, loss_id=0)
    assert (scaler(0), scaler(1)) == ((2.0**16, 1), (2.0**15, 0))
    with pytest.raises(ValueError, match="loss_id: expected 0 to num_losses - 1 = 1; got 2"):
        backward(model, optimizer, 1.0, loss_id=2)


@pytest.mark.parametrize("opt_level", ["O1", "O2", "O3"])
def test_a_closure_is_refused(opt_level: str) -> None:
    model, optimizer = made(opt_level)
    backward(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match="step: expected no closure under amp"):
        optimizer.step(lambda: 1.0)
    assert same(everything(model, optimizer), before)
    plain, other = made("O0")
    backward(plain, other)
    assert other.step(lambda: 1.0) == 1.0


@pytest.mark.parametrize("before", [False, True])
def test_schedules_of_torch_work(before: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1) if before else None
    model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
    schedule = schedule or torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(model, optimizer, math.inf)
    weight = model.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.weight, weight)
    backward(model, optimizer)
    optimizer.step()
    schedule.step()
    assert not torch.equal(model.weight, weight)
    assert schedule.get_last_lr() == [0.1 * 0.1]


def test_a_group_that_is_added_gets_masters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer: Any = torch.optim.SGD(model[1].parameters(), lr=0.1)
    model, optimizer = amp.initialize(model, optimizer, opt_level="O2")
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.2})
    assert {p.dtype for p in amp.master_params(optimizer)} == {torch.float32}
    before = model[0].weight.detach().clone()
    backward(model, optimizer)
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


# --- misuse --------------------------------------------------------------------------------------


def test_calls_that_amp_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made("O2")

    def scale(loss: Any, optimizers: Any) -> None:
        with amp.scale_loss(loss, optimizers):
            pass

    with pytest.raises(TypeError, match="loss: expected a tensor; got float"):
        scale(1.0, optimizer)
    foreign = torch.optim.SGD(model.parameters(), lr=0.1)
    for optimizers in (foreign, [optimizer, foreign], []):
        with pytest.raises(RuntimeError, match="optimizers: expected ones that amp.initialize was"):
            scale(loss_of(model), optimizers)
    monkeypatch.setattr(current, "run", None)
    with pytest.raises(RuntimeError, match="scale_loss: expected model, optimizer = amp.init"):
        scale(loss_of(model), optimizer)
    for call in (amp.state_dict, lambda: amp.load_state_dict({})):
        with pytest.raises(RuntimeError, match="expected a call of amp.initialize before it"):
            call()


def test_states_that_do_not_fit() -> None:
    made("O2", num_losses=2)
    state = amp.state_dict()
    state["loss_scaler0"] = {"loss_scale": 4.0, "unskipped": 7}
    with pytest.raises(RuntimeError, match=r"expected keys loss_scaler0 and on; got \['other'\]"):
        amp.load_state_dict({**state, "other": 1})
    with pytest.raises(ValueError, match="loss_scaler1: expected a scale above 0 and a count"):
        amp.load_state_dict({**state, "loss_scaler1": {"loss_scale": math.nan, "unskipped": 0}})
    assert scaler() == (2.0**16, 0)
    amp.load_state_dict(state)
    assert scaler() == (4.0, 7)
    made("O2")
    with pytest.warns(UserWarning, match="expected 1 loss scales .num_losses.; got 2"):
        amp.load_state_dict(state)
    assert scaler() == (4.0, 7)


# --- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, AdamW])
@pytest.mark.parametrize("opt_level", ["O1", "O2", "O5"])
def test_a_resumed_run_goes_on_with_the_same_bits(opt_level: str, make: Any) -> None:
    """With the three state_dicts that apex's users save; apex itself loses the masters of O2."""

    def run(model: nn.Module, optimizer: Any, steps: range) -> list[Tensor]:
        for step in steps:
            optimizer.zero_grad()
            bad = step == 3 and opt_level != "O5"  # whose static scale checks nothing
            backward(model, optimizer, math.inf if bad else 1.0, step)
            optimizer.step()
        return everything(model, optimizer)

    model, optimizer = made(opt_level, make)
    run(model, optimizer, range(5))
    file = io.BytesIO()
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**parts, "amp": amp.state_dict()}, file)
    straight = run(model, optimizer, range(5, 9))
    kept = scaler()

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, other = made(opt_level, make)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    amp.load_state_dict(saved["amp"])
    assert same(run(again, other, range(5, 9)), straight)
    assert scaler() == kept
    if opt_level == "O2":  # what apex does: masters of the halved weights
        third, last = made(opt_level, make)
        halved = {k: v.half().float() for k, v in saved["model"].items()}
        third.load_state_dict(halved)
        last.load_state_dict(copy.deepcopy(saved["optimizer"]))
        amp.load_state_dict(saved["amp"])
        assert not same(run(third, last, range(5, 9)), straight)
