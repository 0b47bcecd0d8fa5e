"""The loss scale of fp16-mixed at its ends: runs of NaN, growth to float32's last, saved scales."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops.train import SGD, AdamW, MixedPrecision
from tests.support.kernels_ran import threads

MAKE: dict[str, Callable[..., Any]] = {
    "own AdamW": AdamW,
    "own SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "own 8 bits": lambda p: AdamW(p, eight_bit=True),
    "torch AdamW": torch.optim.AdamW,
    "torch fused": lambda p: torch.optim.AdamW(p, fused=True),
    "torch SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
LEAST = 2.0**-14


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def backward(model: nn.Module, optimizer: Any, precision: MixedPrecision, factor: float) -> None:
    optimizer.zero_grad()
    precision.backward((model(torch.ones(2, 4)) * factor).sum())


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", MAKE)
def test_a_run_of_bad_gradients_keeps_skipping_and_recovers(
    name: str, value: float, clip_norm: float | None
) -> None:
    torch.manual_seed(0)
    model, precision = nn.Linear(4, 4), MixedPrecision("fp16-mixed", growth_interval=3)
    optimizer = MAKE[name](model.parameters())
    before = weights(model)
    for _ in range(64):  # 30 reach the least scale
        backward(model, optimizer, precision, value)
        assert not precision.step(optimizer, clip_norm)
    assert torch.equal(weights(model), before)
    assert precision.scale == LEAST
    scales = []
    for _ in range(6):
        backward(model, optimizer, precision, 1.0)
        assert precision.step(optimizer, clip_norm)
        scales.append(precision.scale / LEAST)
    assert scales == [1, 1, 2, 2, 2, 4]
    moved = weights(model)
    assert bool(moved.isfinite().all())
    assert not torch.equal(moved, before)


@pytest.mark.parametrize("name", MAKE)
def test_a_scale_that_starts_lower_may_stay_there(name: str) -> None:
    model, low = nn.Linear(4, 4), 2.0**-20
    precision = MixedPrecision("fp16-mixed", init_scale=low, growth_interval=1)
    optimizer = MAKE[name](model.parameters())
    for factor, scale in ((math.nan, low), (1.0, 2 * low), (math.inf, low), (math.inf, low)):
        backward(model, optimizer, precision, factor)
        assert bool(precision.step(optimizer)) is (factor == 1.0)
        assert precision.scale == scale


@pytest.mark.parametrize("name", MAKE)
def test_growth_ends_before_inf(name: str) -> None:
    """Zero gradients never overflow: the scale grows to float32's last power of two and stays."""
    model = nn.Linear(4, 4)
    precision = MixedPrecision("fp16-mixed", init_scale=2.0**120, growth_interval=1)
    optimizer = MAKE[name](model.parameters())
    for _ in range(20):
        backward(model, optimizer, precision, 0.0)
        assert precision.step(optimizer)
        assert bool(weights(model).isfinite().all())
    assert precision.scale == 2.0**127
    backward(model, optimizer, precision, 1e-30)  # one over it is subnormal, and exact
    assert precision.step(optimizer)
    assert bool(weights(model).isfinite().all())


@pytest.mark.parametrize("name", ["own SGD", "torch SGD"])
@pytest.mark.parametrize("scale", [2.0**-126, 2.0**126])
def test_the_scale_cancels_at_the_ends_of_float32(name: str, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    precision = MixedPrecision("fp16-mixed", init_scale=scale)
    optimizer = MAKE[name](model.parameters())
    before = weights(model)
    factor = 2.0**60 if scale < 1 else 2.0**-60  # the scaled gradients are normal numbers
    backward(model, optimizer, precision, factor)
    assert precision.step(optimizer)
    want = before.double() - torch.tensor(0.1).double() * 2 * factor
    assert torch.equal(weights(model), want.float())


@pytest.mark.parametrize("name", ["own AdamW", "torch AdamW"])
@pytest.mark.parametrize("precision", ["fp32", "fp16-mixed"])
def test_gradients_whose_norm_leaves_float32_are_clipped(name: str, precision: str) -> None:
    """torch's own norm is inf from 1.8e19 on, and the clipped gradients would all be 0."""
    torch.manual_seed(0)
    model, amp = nn.Linear(4, 4), MixedPrecision(precision, init_scale=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    if name.startswith("own"):
        optimizer = SGD(model.parameters(), lr=1.0)
    before = weights(model)
    backward(model, optimizer, amp, 1e25)
    assert amp.step(optimizer, clip_norm=1.0)
    way = (weights(model) - before).double().norm()
    assert abs(float(way) - 1.0) < 1e-5


def test_a_saved_scale_is_checked_and_raised_to_the_least() -> None:
    """Runs of before may have saved a scale of 0."""
    precision = MixedPrecision("fp16-mixed", init_scale=64.0)
    state = precision.state_dict()
    state["scaler"]["scale"] = 0.0
    precision.load_state_dict(state)
    assert precision.scale == LEAST
    held = precision.state_dict()
    faults: list[tuple[Any, str]] = [
        ({"scale": math.inf}, "expected a finite scale; got inf"),
        ({"scale": math.nan}, "expected a finite scale; got nan"),
        ({"scale": -1.0}, "expected a finite scale; got -1.0"),
        ({"more": 1}, "expected a scaler with keys"),
    ]
    for change, match in faults:
        broken = {**held, "scaler": {**held["scaler"], **change}}
        for verb in (precision.check_state_dict, precision.load_state_dict):
            with pytest.raises(ValueError, match=match):
                verb(broken)
        assert precision.state_dict() == held
    plain = MixedPrecision("fp32")
    plain.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"expected a scaler with keys \[\]; got"):
        plain.load_state_dict({"precision": "fp32", "scaler": held["scaler"]})


@pytest.mark.parametrize("scale", [1e39, 1e-39, 0.0, math.nan])
def test_scales_that_float32_does_not_hold_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="init_scale: expected a finite number above 0; got"):
        MixedPrecision("fp16-mixed", init_scale=scale)
    with pytest.raises(ValueError, match="growth_factor: expected a number above 1; got inf"):
        MixedPrecision("fp16-mixed", growth_factor=math.inf)
