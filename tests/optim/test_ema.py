"""EMA: the averages in float64, exact restoring, files beside the weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bigops import FormatError, Int8, compress_
from bigops.train import (
    EMA,
    Adam,
    AdamW,
    MixedPrecision,
    TrainState,
    load_checkpoint,
    save_checkpoint,
)
from tests.support import tolerance
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import same

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def made(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(dtype)


def shake(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype), alpha=0.1)
        for b in model.buffers():
            b.add_(1)


def in_float64(dtype: torch.dtype, decays: list[float], steps: int) -> list[Tensor]:
    model = made(dtype)
    averages = [p.detach().double().clone() for p in model.parameters()]
    for step in range(steps):
        shake(model, step)
        for average, p in zip(averages, model.parameters(), strict=True):
            average.lerp_(p.detach().double(), 1 - decays[step])
    return averages


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from([0.0, 0.5, 0.99, 0.9999]),
    st.booleans(),
    st.integers(0, 12),
)
def test_the_averages_are_those_of_float64(
    dtype: torch.dtype, decay: float, warmup: bool, steps: int
) -> None:
    model = made(dtype)
    ema = EMA(model, decay, warmup=warmup)
    for step in range(steps):
        shake(model, step)
        ema.update()
    decays = [min(decay, (2 + n) / (11 + n)) if warmup else decay for n in range(steps)]
    truth = in_float64(dtype, decays, steps)
    averages = ema.state_dict()["averages"]
    for (name, p), want in zip(model.named_parameters(), truth, strict=True):
        got = averages[name]
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        plain = want.to(got.dtype)
        tolerance.check(got, want, plain, (want.abs() + 0.1) * (steps + 1))
        assert p.dtype == dtype
    assert ema.state_dict()["updates"] == steps


def test_bfloat16_weights_are_followed_where_torchs_average_stands_still() -> None:
    """At 0.999, what is added to a bfloat16 average rounds to nothing."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema = EMA(model, 0.999)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    theirs.update_parameters(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):
        ema.update()
        theirs.update_parameters(model)
    assert bool((theirs.module.weight == 1).all())
    want = torch.full((4, 4), 2 - 0.999**100).double()
    tolerance.check(ema.state_dict()["averages"]["weight"], want, want.float(), 100.0)


def test_skipped_steps_do_not_move_it() -> None:
    model = made()
    ema, precision = EMA(model, 0.5), MixedPrecision("fp32")
    optimizer = AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        precision.backward(model(torch.randn(4, 6)).square().mean())
        if step == 1:
            next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        before = copy.deepcopy(ema.state_dict())
        ema.update(precision.step(optimizer, 1.0))
        assert same(ema.state_dict(), before) == (step == 1)
        optimizer.zero_grad()
    assert ema.updates == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_has_averages_inside_and_its_own_bits_after(dtype: torch.dtype) -> None:
    model = made(dtype)
    ema = EMA(model, 0.9)
    shake(model, 0)
    ema.update()
    shake(model, 1)
    own, addresses = copy.deepcopy(model.state_dict()), [p.data_ptr() for p in model.parameters()]

    def evaluate(inside: nn.Module) -> None:
        assert inside is model
        for name, p in model.named_parameters():
            assert torch.equal(p, ema.state_dict()["averages"][name].to(dtype))
            assert not torch.equal(p, own[name])
        assert int(model[1].num_batches_tracked) == 1  # a buffer, as it was at the update
        for call in (ema.update, lambda: ema.averaged().__enter__(), ema.weights):
            with pytest.raises(RuntimeError, match=r"expected a call outside averaged\(\)"):
                call()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="got EMA's averages in their place"):
            model.state_dict()
        raise KeyError("evaluation")

    with pytest.raises(KeyError), ema.averaged() as inside:
        evaluate(inside)
    assert same(model.state_dict(), own)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    ema.update()


def test_the_averages_alone_are_a_model() -> None:
    model = made(torch.bfloat16)
    model.append(nn.Linear(3, 3, bias=False))
    model.append(nn.Linear(3, 3, bias=False))
    model[4].weight = model[3].weight  # tied: both names are saved
    ema = EMA(model, 0.9)
    shake(model, 0)
    ema.update()
    other = copy.deepcopy(model)
    other.load_state_dict(ema.weights())
    with ema.averaged():
        assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_codes_of_compressed_layers_are_copied() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    compress_(model, {"0": Int8()})
    ema = EMA(model, 0.5)
    assert list(ema.state_dict()["averages"]) == ["0.bias", "1.weight", "1.bias"]
    y = model(torch.ones(2, 64))
    with ema.averaged():
        assert torch.equal(model(torch.ones(2, 64)), y)


# files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_goes_on_to_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    ends: list[Any] = []
    for cut in (None, 3):
        model = made(dtype)
        ema = EMA(model, 0.9, warmup=True)
        for step in range(6):
            if step == cut:
                save_checkpoint(tmp_path / "run", model=model, ema=ema)
                model = made(dtype)
                ema = EMA(model, 0.1)
                load_checkpoint(tmp_path / "run", model=model, ema=ema)
            shake(model, step)
            ema.update()
        ends.append([model.state_dict(), ema.state_dict()])
    assert same(*ends)


def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    ema = EMA(made(), 0.9)
    before = copy.deepcopy(ema.state_dict())
    other = copy.deepcopy(before)
    cases: dict[str, Any] = {
        "expected keys": {**other, "step": 1},
        "expected a decay from 0": {**other, "decay": 1.0},
        r"averages: only the model has '0.weight'": {
            **other,
            "averages": {k: v for k, v in other["averages"].items() if k != "0.weight"},
        },
        r"expected shape \[5\]; got \[6\]": {
            **other,
            "copies": {**other["copies"], "1.running_mean": torch.zeros(6)},
        },
    }
    for match, state in cases.items():
        with pytest.raises(ValueError, match=match):
            ema.load_state_dict(state)
        assert same(ema.state_dict(), before)
    save_checkpoint(tmp_path / "file", ema=EMA(nn.Linear(2, 2)))
    with pytest.raises(FormatError, match="ema: state: averages: only"):
        load_checkpoint(tmp_path / "file", ema=ema)
    assert same(ema.state_dict(), before)


def test_bad_arguments() -> None:
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay: expected a number from 0 up to below 1"):
            EMA(made(), decay)
    with pytest.raises(ValueError, match="model: expected floating parameters; got none"):
        EMA(nn.ReLU())
    model = made()
    ema = EMA(model)
    model[0] = nn.Linear(6, 5, bias=False)
    with pytest.raises(ValueError, match="'0.bias' is gone"):
        ema.update()
    model[0] = nn.Linear(7, 5)
    with pytest.raises(ValueError, match=r"0.weight: expected shape \[5, 6\]; got \[5, 7\]"):
        ema.update()
    assert ema.updates == 0


def test_it_is_a_part_of_a_runs_state(tmp_path: Path) -> None:
    """By safetensors and JSON, beside an optimiser with 8-bit states by rows."""
    ends = []
    for cut in (None, 2):
        torch.manual_seed(0)
        model = nn.Linear(300, 20).bfloat16()
        optimizer, ema = Adam(model.parameters(), lr=0.1, eight_bit=True), EMA(model, 0.9)
        for step in range(4):
            if step == cut:
                TrainState(model=model, optimizer=optimizer, ema=ema).save(tmp_path, step)
                model = nn.Linear(300, 20).bfloat16()
                optimizer, ema = Adam(model.parameters()), EMA(model, 0.1)
                TrainState(model=model, optimizer=optimizer, ema=ema).load(tmp_path)
            model(torch.full((3, 300), step + 1.0).bfloat16()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        ends.append([model.state_dict(), ema.state_dict(), optimizer.state_dict()["state"]])
    assert same(*ends)
