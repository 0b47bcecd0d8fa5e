"""MixedPrecision: what a step answers, several optimisers and losses, tokens, who waits, misuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigops.train import SGD, AdamW, MixedPrecision, StepResult, stepping
from tests.support.kernels_ran import threads
from tests.train.worker import held, same

MAKE: dict[str, Callable[..., Any]] = {
    "own": lambda p: AdamW(p, lr=1e-2),
    "torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "torch fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "torch momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, fused=True),
}


@pytest.fixture(autouse=True, params=["numbers", "tensors"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The way of the CPU, and that of a GPU, on tensors of the CPU."""
    if request.param == "tensors":
        monkeypatch.setattr(stepping, "reading_waits", lambda device: True)
    with threads(1):
        yield


def small(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3).to(dtype)


def backward(precision: MixedPrecision, *models: nn.Module, factor: float = 1.0) -> None:
    for model in models:
        model.zero_grad()
    x = torch.arange(8.0).reshape(2, 4)
    precision.backward(
        sum((m(x.to(m.weight.dtype)).float() * factor).square().mean() for m in models)
    )


# --- what a step answers -----------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_the_result_says_what_became_of_the_step(name: str) -> None:
    model, precision = small(), MixedPrecision("fp16-mixed", init_scale=64.0, growth_interval=2)
    optimizer = MAKE[name](model.parameters())
    results, norms = [], []
    for factor in (1.0, math.inf, 1.0, 1.0):
        backward(precision, model, factor=factor)
        norms.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm())
        results.append(precision.step(optimizer, clip_norm=0.5))
    # What was kept of a step stays what it was.
    assert [bool(r) for r in results] == [True, False, True, True]
    assert [bool(r.stepped) for r in results] == [True, False, True, True]
    assert [float(r.scale) for r in results] == [64, 32, 32, 64]
    assert [int(r.skips) for r in results] == [0, 1, 1, 1]
    for i, scale in ((0, 64), (2, 32), (3, 32)):
        norm = results[i].norm
        assert norm is not None
        assert norm.dtype == torch.float64
        assert abs(float(norm) - float(norms[i]) / scale) <= 1e-12 * float(norm)
        assert float(norm) > 0.5  # before clipping
    with pytest.raises(dataclasses.FrozenInstanceError):
        results[0].skips = results[1].skips  # type: ignore[misc]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16-mixed"])
def test_a_norm_that_nobody_asked_for_is_none_and_inf_asks_without_clipping(precision: str) -> None:
    ends = []
    for clip_norm in (None, math.inf):
        model, amp = small(), MixedPrecision(precision)
        optimizer = MAKE["own"](model.parameters())
        backward(amp, model)
        result = amp.step(optimizer, clip_norm)
        assert result
        assert (result.norm is None) == (clip_norm is None)
        assert (float(result.scale), int(result.skips)) == (1, 0)
        ends.append(held(list(model.parameters()), optimizer))
    assert same(*ends)


def test_a_schedule_moves_with_the_steps_that_were_taken() -> None:
    model, precision = small(), MixedPrecision("fp32")
    optimizer = MAKE["torch"](model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for factor in (1.0, math.nan, 1.0, math.inf):  # NaN and inf in the data
        backward(precision, model, factor=factor)
        if precision.step(optimizer, clip_norm=1.0):
            schedule.step()
    assert schedule.get_last_lr() == [1e-2 / 4]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_skips_are_saved_and_states_of_before_load() -> None:
    model, precision = small(), MixedPrecision("fp16-mixed")
    optimizer = MAKE["own"](model.parameters())
    backward(precision, model, factor=math.nan)
    assert not precision.step(optimizer)
    state = precision.state_dict()
    assert state["skips"] == 1
    again = MixedPrecision("fp16-mixed")
    again.load_state_dict(state)
    backward(again, model)
    assert int(again.step(optimizer).skips) == 1
    del state["skips"]
    again.load_state_dict(state)
    assert again.state_dict()["skips"] == 0
    for broken in ({**state, "skips": -1}, {**state, "skips": "1"}):
        with pytest.raises(ValueError, match="state: expected skips to be a count; got"):
            again.load_state_dict(broken)


@pytest.mark.parametrize("name", MAKE)
def test_a_first_step_that_is_skipped_leaves_no_state(name: str) -> None:
    """Told to skip its first step, torch's fused SGD keeps uninitialised memory as momentum."""
    model, precision = small(), MixedPrecision("fp16-mixed", init_scale=64.0)
    optimizer = MAKE[name](model.parameters())
    backward(precision, model, factor=math.nan)
    assert not precision.step(optimizer)
    assert not any(optimizer.state.values())
    assert all(bool(p.grad.isnan().any()) for p in model.parameters())


# --- several optimisers, several losses -----------------------------------------------------------


@pytest.mark.parametrize("second", MAKE)
@pytest.mark.parametrize("first", ["own", "torch fused"])
def test_optimizers_of_one_backward_step_by_one_verdict(first: str, second: str) -> None:
    models = [small(), small()]
    precision = MixedPrecision("fp16-mixed", init_scale=64.0, growth_interval=2)
    optimizers = [MAKE[n](m.parameters()) for n, m in zip((first, second), models, strict=True)]
    for step in range(4):
        backward(precision, *models)
        if step == 2:
            models[1].bias.grad[0] = math.nan
        grads = [p.grad.double().flatten() / 64 for m in models for p in m.parameters()]
        before = [held(list(m.parameters()), o) for m, o in zip(models, optimizers, strict=True)]
        result = precision.step(optimizers, clip_norm=0.1)
        after = [held(list(m.parameters()), o) for m, o in zip(models, optimizers, strict=True)]
        moved = [not same(a, b) for a, b in zip(before, after, strict=True)]
        assert moved == [step != 2] * 2
        assert bool(result) == (step != 2)
        if step == 0:
            true = float(torch.cat(grads).norm())
            assert abs(float(result.norm) - true) <= 1e-12 * true
    assert precision.scale == 64.0  # once doubled, once halved


def test_losses_with_a_step_each() -> None:
    """A GAN's: the verdict of one is none of the other's."""
    models, precision = [small(), small()], MixedPrecision("fp16-mixed", init_scale=64.0)
    optimizers = [MAKE["own"](m.parameters()) for m in models]
    stepped = []
    for step in range(3):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            backward(precision, model, factor=math.inf if (step, i) == (1, 0) else 1.0)
            stepped.append(bool(precision.step(optimizer)))
    assert stepped == [True, True, False, True, True, True]
    assert precision.scale == 32.0


def test_optimizers_that_make_no_step_together() -> None:
    model, precision = small(), MixedPrecision("fp32")
    optimizer, twin = MAKE["own"](model.parameters()), MAKE["torch"](model.parameters())
    idle = MAKE["own"](small().parameters())
    backward(precision, model)
    before = held(list(model.parameters()), optimizer)
    for given_, error, match in (
        ([optimizer, twin], ValueError, r"got one of optimizers\[0\] in optimizers\[1\] too"),
        ([optimizer, optimizer], ValueError, r"got one of optimizers\[0\] in optimizers\[1\] too"),
        ([optimizer, idle], RuntimeError, r"no parameter of optimizers\[1\] has one"),
        ([], ValueError, "optimizers: expected at least one; got none"),
    ):
        with pytest.raises(error, match=match):
            precision.step(given_)
    assert same(before, held(list(model.parameters()), optimizer))
    assert precision.step([optimizer])


# --- tokens ------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=5),
    st.sampled_from(["own", "torch"]),
    st.booleans(),
)
def test_unequal_microbatches_give_the_gradient_of_the_mean_over_all_tokens(
    sizes: list[int], name: str, as_tensor: bool
) -> None:
    model = small(torch.float64)
    make = {"own": SGD, "torch": torch.optim.SGD}[name]
    optimizer, precision = make(model.parameters(), lr=1.0), MixedPrecision("fp32")
    generator = torch.Generator().manual_seed(sum(sizes))
    parts = [torch.randn(n, 4, dtype=torch.float64, generator=generator) for n in sizes]
    before = [p.detach().clone() for p in model.parameters()]
    for x in parts:
        weight: Any = torch.tensor(len(x)) if as_tensor else len(x)
        precision.backward(model(x).square().mean(1).sum(), weight=weight)
    result = precision.step(optimizer)
    assert bool(result) == (sum(sizes) > 0)
    after = [p.detach().clone() for p in model.parameters()]
    if not result:
        assert same(before, after)
        return
    model.load_state_dict(dict(zip(("weight", "bias"), before, strict=True)))
    model.zero_grad()
    model(torch.cat(parts)).square().mean(1).mean().backward()
    for a, b, p in zip(before, after, model.parameters(), strict=True):
        assert p.grad is not None
        assert ((a - b) - p.grad).abs().max() <= 1e-14
    assert (
        abs(
            float(result.norm)
            - float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
        )
        <= 1e-14
    )


def test_a_step_of_padding_is_skipped_and_no_overflow() -> None:
    model, precision = small(), MixedPrecision("fp16-mixed", init_scale=64.0)
    optimizer = MAKE["own"](model.parameters())
    precision.backward(model(torch.ones(2, 4)).sum() * 0, weight=0)
    assert not precision.step(optimizer)
    assert precision.scale == 64.0
    precision.backward(model(torch.ones(2, 4)).sum() * math.nan, weight=8)
    assert not precision.step(optimizer)
    assert precision.scale == 32.0


def test_weights_that_do_not_fit() -> None:
    model, precision = small(), MixedPrecision("fp32")
    for weight, match in (
        (-1, "weight: expected a finite number from 0 on; got -1"),
        (math.nan, "weight: expected a finite number from 0 on; got nan"),
        (torch.ones(2), r"weight: expected one element; got shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            precision.backward(model(torch.ones(2, 4)).sum(), weight=weight)
    assert model.weight.grad is None
    precision.backward(model(torch.ones(2, 4)).sum(), weight=2)
    with pytest.raises(ValueError, match=r"expected on each backward\(\) since the last step or"):
        precision.backward(model(torch.ones(2, 4)).sum())
    precision.discard()  # and what it counted
    backward(precision, model)
    assert precision.step(MAKE["own"](model.parameters())).norm is None


# --- gradients of other kinds ----------------------------------------------------------------


def test_sparse_and_complex_gradients_are_unscaled_and_clipped() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)
    phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
    before = [table.weight.detach().clone(), phase.detach().clone()]
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in (table.weight, phase)]
    precision = MixedPrecision("fp16-mixed", init_scale=64.0)
    ids = torch.tensor([1, 1, 4])  # a row that comes twice adds up
    precision.backward(table(ids).sum() + (phase * (3 - 4j)).real.sum())
    result = precision.step(optimizers, clip_norm=1.0)
    true = (3 * (2**2 + 1) + 4 * 5**2) ** 0.5
    assert abs(float(result.norm) - true) < 1e-6
    moved = [before[0] - table.weight.detach(), before[1] - phase.detach()]
    assert (moved[0][1] - 2 / true).abs().max() < 1e-6
    assert (moved[1] - (3 + 4j) / true).abs().max() < 1e-6
    precision.backward(table(ids).sum() * math.nan + phase.real.sum())
    assert not precision.step(optimizers)


# --- precisions --------------------------------------------------------------------------------


def test_tf32_sets_the_matmul_precision_and_puts_it_back() -> None:
    seen = []

    class Sees(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(torch.get_float32_matmul_precision())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            seen.append(torch.get_float32_matmul_precision())
            return grad

    precision, x = MixedPrecision("tf32"), torch.ones((), requires_grad=True)
    before = torch.get_float32_matmul_precision()
    with precision.autocast():
        loss = Sees.apply(x)
    assert torch.get_float32_matmul_precision() == before
    precision.backward(loss)
    with pytest.raises(KeyError), precision.autocast():
        raise KeyError
    assert torch.get_float32_matmul_precision() == before != "high"
    assert seen == ["high", "high"]


@pytest.mark.parametrize("options", [{}, {"master_weights": True, "stochastic_rounding": False}])
def test_bf16_true_keeps_updates_below_half_a_unit(options: dict[str, bool]) -> None:
    precision = MixedPrecision("bf16-true")
    model = nn.Linear(64, 64, bias=False).to(precision.dtype)
    nn.init.ones_(model.weight)
    optimizer = SGD(model.parameters(), lr=2.0**-12, **options)
    for _ in range(16):  # together one unit below 1, each a sixteenth of it
        with precision.autocast():
            y = model(torch.ones(1, 64, dtype=precision.dtype))
        assert y.dtype == torch.bfloat16
        optimizer.zero_grad()
        precision.backward(y.float().sum())
        assert precision.step(optimizer, clip_norm=math.inf)
    assert model.weight.dtype == torch.bfloat16
    mean = float(model.weight.detach().float().mean())
    assert abs(mean - (1 - 2.0**-8)) < 3e-4


def test_parameters_that_a_precision_does_not_train() -> None:
    half, brain, whole = small(torch.float16), small(torch.bfloat16), small()
    for name, model, optimizer, match in (
        ("fp16-mixed", half, torch.optim.AdamW, "with master_weights for torch.float16"),
        ("fp16-mixed", half, AdamW, "with master_weights for torch.float16 parameters"),
        ("bf16-true", brain, torch.optim.AdamW, "stochastic_rounding or master_weights for torch"),
        ("bf16-true", whole, AdamW, "expected torch.bfloat16 parameters.*; got torch.float32"),
    ):
        precision, stepper = MixedPrecision(name, init_scale=8.0), optimizer(model.parameters())
        backward(precision, model)
        before = held(list(model.parameters()), stepper)
        with pytest.raises(ValueError, match=match):
            precision.step(stepper)
        assert same(before, held(list(model.parameters()), stepper))
        assert precision.scale == (8.0 if name == "fp16-mixed" else 1.0)
    nearest = AdamW(brain.parameters(), stochastic_rounding=False)
    with pytest.raises(ValueError, match="stochastic_rounding or master_weights"):
        precision.step(nearest)
    precision = MixedPrecision("fp16-mixed", init_scale=8.0)
    backward(precision, half)
    assert precision.step(AdamW(half.parameters(), master_weights=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a machine without a GPU")
def test_fp8_needs_a_device_that_has_it() -> None:
    with pytest.raises(RuntimeError, match="'fp8-mixed' needs a GPU with float8 .* got a CPU"):
        MixedPrecision("fp8-mixed")


@pytest.mark.parametrize("group", ["others", 3.0])
def test_a_process_group_that_is_none(group: Any) -> None:
    with pytest.raises(ValueError, match="process_group: expected 'all', 'none' or a process"):
        MixedPrecision(process_group=group)


def test_losses_that_are_no_scalar_tensor() -> None:
    model, precision = small(), MixedPrecision("fp16-mixed")
    with pytest.raises(TypeError, match="loss: expected a tensor; got float"):
        precision.backward(1.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="does not require grad"):
        precision.backward(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"expected a call of backward\(\)"):
        precision.step(MAKE["own"](model.parameters()))
    with pytest.raises(ValueError, match="loss: expected a scalar"):
        precision.backward(F.relu(model(torch.ones(2, 4))))


# --- who waits for the device ------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name in ("aten::_local_scalar_dense", "aten::equal")
        return func(*args, **(kwargs or {}))


def reads(optimizer: Any, model: nn.Module, precision: str, ask: bool = False) -> int:
    amp = MixedPrecision(precision, init_scale=64.0)
    with Reads() as mode:
        for step in range(3):
            backward(amp, model, factor=math.nan if step == 1 else 1.0)
            if step == 1:
                mode.count = 0  # a first step makes states
            result: StepResult = amp.step(optimizer, clip_norm=1.0)
            if ask:
                bool(result)
    return mode.count


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_nobody_waits_where_the_optimizer_skips_on_the_device(
    kind: Any, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "reading_waits", lambda device: True)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def count(fused: bool, ask: bool = False) -> int:
        model = small()
        optimizer = kind(model.parameters(), lr=1e-2, fused=fused, **options)
        return reads(optimizer, model, precision, ask)

    assert count(fused=True) == 0
    assert count(fused=True, ask=True) == 2
    # Once a step; torch's Adam reads its counters besides, which are on the CPU.
    assert count(fused=False) == 2 + 2 * (kind is not torch.optim.SGD)
