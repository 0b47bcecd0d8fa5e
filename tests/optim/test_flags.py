"""Any options that torch's optimisers take, in float64: the same way, from the same gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigops.train import SGD, Adam, AdamW
from tests.support import tolerance
from tests.support.kernels_ran import needs_extension, threads

pytestmark = needs_extension
SHAPES = [(5, 7), (3,), ()]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


RATES = st.floats(1e-4, 1.0)
ADAM: dict[str, Any] = {
    "lr": RATES,
    # below, the second moment is the last gradient alone, whose roundings a small one magnifies
    "betas": st.tuples(st.floats(0, 0.999), st.floats(0.5, 0.9999)),
    "eps": st.floats(1e-8, 1e-2),
    "weight_decay": st.floats(0, 0.5),
    "maximize": st.booleans(),
}
OPTIONS: dict[str, Any] = {
    "AdamW": st.fixed_dictionaries(ADAM),
    "Adam": st.fixed_dictionaries({**ADAM, "decoupled_weight_decay": st.booleans()}),
    "SGD": st.fixed_dictionaries(
        {
            "lr": RATES,
            "momentum": st.floats(0.1, 0.99),
            "dampening": st.floats(0, 0.9),
            "weight_decay": st.floats(0, 0.5),
            "maximize": st.booleans(),
        }
    )
    | st.fixed_dictionaries(
        {"lr": RATES, "momentum": st.floats(0.1, 0.99), "nesterov": st.just(True)}
    )
    | st.fixed_dictionaries({"lr": RATES, "weight_decay": st.floats(0, 0.5)}),
}
OURS: dict[str, Any] = {"AdamW": AdamW, "Adam": Adam, "SGD": SGD}


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_options_are_torchs(name: str, data: st.DataObject) -> None:
    options = data.draw(OPTIONS[name])
    steps, scale = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1e-3, 1.0, 100.0]))

    def way(make: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(steps)
        params = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]
        optimizer = make(params, **options)
        for _ in range(steps):
            for p in params:
                p.grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
            optimizer.step()
        return [p.detach() for p in params]

    theirs = getattr(torch.optim, name)
    wide, truth = way(OURS[name], torch.float64), way(theirs, torch.float64)
    single, plain = way(OURS[name], torch.float32), way(theirs, torch.float32)
    for o, r in zip(wide, truth, strict=True):  # of float64 torch's own is the plain one, too
        tolerance.check(o, r, r, r.abs() + steps * 10 * (1 + scale))
    for o, r, p in zip(single, truth, plain, strict=True):
        tolerance.check(o, r, p, r.abs() + steps * 10 * (1 + scale))
