"""step_in_backward: bits of the ordinary step, gradients that never all exist, what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bigops.benches import memory
from bigops.train import SGD, Adam, AdamW, MixedPrecision, step_in_backward
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import same, snapshot

pytestmark = needs_extension
FORMS: dict[str, tuple[torch.dtype, Any, dict[str, Any]]] = {
    "fp32": (torch.float32, AdamW, {}),
    "stochastic": (torch.bfloat16, AdamW, {}),
    "8 bit": (torch.bfloat16, AdamW, {"eight_bit": True}),
    "masters": (torch.bfloat16, Adam, {"eight_bit": True, "master_weights": True}),
    "momentum": (torch.bfloat16, SGD, {"momentum": 0.9, "dampening": 0.1, "eight_bit": True}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


def tied(dtype: torch.dtype = torch.float32) -> nn.Module:
    """An embedding that is the head too, a layer without gradient, a frozen one."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(100, 48),
            "layer": nn.Linear(48, 48),
            "unused": nn.Linear(3, 3),
            "frozen": nn.Linear(48, 48).requires_grad_(False),
        }
    )
    return model.to(dtype)


def loss_of(model: Any, step: int) -> Tensor:
    ids = torch.randint(100, (20,), generator=torch.Generator().manual_seed(step))
    x = model["frozen"](model["layer"](model["embedding"](ids)).tanh())
    return nn.functional.cross_entropy((x @ model["embedding"].weight.T).float(), ids)


def groups(model: Any) -> list[dict[str, Any]]:
    head, *rest = model.parameters()
    return [{"params": rest, "weight_decay": 0.1}, {"params": [head], "lr": 0.03}]


@pytest.mark.parametrize("form", FORMS)
def test_the_bits_of_the_ordinary_step(form: str) -> None:
    dtype, make, options = FORMS[form]
    ends = []
    for hooked in (False, True):
        model = tied(dtype)
        optimizer = make(groups(model), lr=1e-2, seed=5, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        handle = step_in_backward(optimizer) if hooked else None
        for step in range(5):
            if step == 3:  # a resumed run has other dicts for groups
                state = pickle.loads(pickle.dumps(optimizer.state_dict()))
                optimizer.load_state_dict(state)
            loss_of(model, step).backward()
            assert hooked == all(p.grad is None for p in model.parameters())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if handle:
            handle.remove()
            loss_of(model, 9).backward()
            assert model["layer"].weight.grad is not None
            optimizer.zero_grad()
        ends.append(snapshot(list(model.parameters()), optimizer))
    assert same(*ends)


def test_gradients_never_all_exist() -> None:
    width, depth = 128, 8
    one = width * width * 4
    peaks = {}
    for hooked in (False, True):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth)))
        optimizer = AdamW(model.parameters(), eight_bit=True)
        optimizer.make_states()
        if hooked:
            step_in_backward(optimizer)

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            model(torch.ones(2, width)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        peaks[hooked] = memory.measure(step).peak
    assert peaks[False] > depth * one
    assert peaks[True] < 2 * one  # that of one layer, and what a layer's backward holds beside it


# refused, by name ------------------------------------------------------------------------------


def hooked() -> tuple[Any, AdamW]:
    model = tied()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    step_in_backward(optimizer)
    return model, optimizer


def test_accumulation_is_refused_before_anything_moves() -> None:
    model, optimizer = hooked()
    loss_of(model, 0).backward()
    before = snapshot(list(model.parameters()), optimizer)
    with pytest.raises(RuntimeError, match=r"expected a call of optimizer.step\(\) after each"):
        loss_of(model, 1).backward()
    assert same(snapshot(list(model.parameters()), optimizer), before)
    optimizer.zero_grad()
    optimizer.step()
    loss_of(model, 1).backward()


def test_a_reentrant_checkpoint_is_refused_and_the_other_is_not() -> None:
    for reentrant in (True, False):
        layer = nn.Linear(4, 4)
        optimizer = AdamW(layer.parameters())
        step_in_backward(optimizer)
        x = torch.ones(2, 4, requires_grad=True)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=reentrant)
        if reentrant:
            with pytest.raises(ValueError, match="nor checkpointing be reentrant"):
                x.sum().backward()
        else:
            x.sum().backward()


def test_what_needs_all_gradients_is_refused() -> None:
    model, optimizer = hooked()
    before = snapshot(list(model.parameters()), optimizer)
    with pytest.raises(ValueError, match="step_checked: expected an optimiser that steps after"):
        optimizer.step_checked(clip_norm=1.0)
    with pytest.raises(ValueError, match="grad_factor: expected 1 beside step_in_backward"):
        optimizer.step(grad_factor=0.5)
    with pytest.raises(RuntimeError, match="expected a loss that is not scaled"):
        MixedPrecision("fp16-mixed").backward(loss_of(model, 0))
    with pytest.raises(RuntimeError, match="nor a sum over tokens"):
        MixedPrecision().backward(loss_of(model, 0), weight=20)
    assert same(snapshot(list(model.parameters()), optimizer), before)
    optimizer.zero_grad()
    MixedPrecision("bf16-mixed").backward(loss_of(model, 0))
    assert not same(snapshot(list(model.parameters()), optimizer), before)


def test_what_it_cannot_begin_with() -> None:
    model, optimizer = hooked()
    with pytest.raises(ValueError, match="optimizer: expected one that steps after"):
        step_in_backward(optimizer)
    with pytest.raises(TypeError, match=r"optimizer: expected AdamW, Adam or SGD.*torch\.optim"):
        step_in_backward(torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    weight = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate"):
        twice = SGD([weight, weight])
    with pytest.raises(ValueError, match=r"\['params'\]\[1\]: expected each parameter once"):
        step_in_backward(twice)
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"\['params'\]\[0\]: expected no gradient"):
        step_in_backward(SGD([weight]))
    sparse = nn.Embedding(4, 2, sparse=True)
    held = SGD(sparse.parameters())
    with step_in_backward(held), pytest.raises(ValueError, match="expected dense gradients"):
        sparse(torch.tensor([1])).sum().backward()
    assert not held.in_backward


def test_a_copy_has_no_hooks() -> None:
    model, optimizer = hooked()
    twin, other = copy.deepcopy((model, optimizer))
    assert not other.in_backward
    loss_of(twin, 0).backward()
    assert twin["layer"].weight.grad is not None
