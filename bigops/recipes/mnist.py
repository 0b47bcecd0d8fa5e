"""MNIST by an MLP of fused layers, in each precision and by apex's levels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from bigops.recipes.data import load
from bigops.recipes.mlp import HIDDEN, accuracy, build, one_cycle
from bigops.recipes.run import Run
from bigops.train import AdamW, MixedPrecision, Sampler, amp
from bigops.train.data import Arrays, Loader

LR, BATCH = 1e-3, 256
LEVELS = ("O0", "O1", "O2")


class Apex:
    """The calls of a script for apex behind those of `MixedPrecision`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, level: str) -> None:
        self._optimizer = amp.initialize(model, optimizer, opt_level=level)[1]

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: O1 wraps the model's forward."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        with amp.scale_loss(loss, self._optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, optimizer: Optimizer) -> None:
        optimizer.step()

    state_dict = staticmethod(amp.state_dict)
    load_state_dict = staticmethod(amp.load_state_dict)


def train(run: Run, data: str = "mnist", hidden: Sequence[int] = HIDDEN) -> dict[str, float]:
    """Accuracy in percent on the test split, and on the validation split epoch by epoch."""
    dataset = load(data)
    model = build(dataset.features, hidden, dataset.classes, seed=run.seed)
    optimizer = AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    precision: Any
    if run.precision in LEVELS:
        precision = Apex(model, optimizer, run.precision)
    else:
        precision = MixedPrecision(run.precision)
    sampler = Sampler(len(dataset.train_x), BATCH, seed=run.seed)
    batches = Loader(Arrays(dataset.train_x, dataset.train_y), sampler)
    steps = run.epochs * len(sampler)
    run.start(steps, model=model, optimizer=optimizer, precision=precision, sampler=sampler)
    while sampler.epoch < run.epochs:
        for x, y in batches:
            for group in optimizer.param_groups:
                group["lr"] = LR * one_cycle(run.done, steps)
            with precision.autocast():
                loss = F.cross_entropy(model(x), y, label_smoothing=0.05)
            optimizer.zero_grad()
            precision.backward(loss)
            precision.step(optimizer)
            run.step(loss=loss)
        run.point(validation=accuracy(model, dataset.val_x, dataset.val_y))
    return {"test accuracy": accuracy(model, dataset.test_x, dataset.test_y)}
