"""Every verb that changes a model, each with a model for it, for tests that interrupt them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import Fp8, Int8, LowRank, Sparse
from bigops.backend import machine
from tests.support.kernels_ran import needs_extension

X = torch.randn(3, 32)


@pytest.fixture
def level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed, nothing is faster, and panels pay on every CPU."""
    same = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", same)
    monkeypatch.setattr(machine, "packs", lambda dtype: True)
    monkeypatch.setattr("bigops.graph.pack._LEAST", 16)


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 48),
        nn.GELU(),
        nn.Linear(48, 32),
        nn.BatchNorm1d(32),
        nn.ReLU().eval(),
        nn.Linear(32, 32),
    ).train()


def recovering() -> nn.Sequential:
    model = dense()
    config = {"0": Sparse(0.5), "2": Int8(), "5": LowRank(4) + Int8()}
    bigops.compress_(model, config, freeze=False)
    return model


def thawed() -> nn.Sequential:
    model = dense()
    bigops.compress_(model, Sparse(0.5), freeze=False)
    bigops.freeze_(model)
    model[0].thaw()
    return model


class Counts(nn.Module):
    """Traceable, with a buffer and an attribute that each call moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(32, 6), nn.GELU(), nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(1)
        return self.last(self.act(self.first(x)))


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


def half_frozen() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 6).requires_grad_(False), nn.Tanh().eval())
    return model.append(bigops.nn.Linear(6, 2, activation="silu")).append(nn.Identity())


def adapted() -> nn.Module:
    model = dense()
    bigops.add_lora_(model, rank=2, targets=["0", "2"])
    return model


def outlying() -> nn.Module:
    """A norm with outliers before two layers in a chain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 48), nn.ReLU().eval(), nn.Linear(48, 8))
    with torch.no_grad():
        for made in (model[0].weight, model[1].weight):
            made[:3] *= 50
    return model.train()


def packable() -> nn.Sequential:
    """Each kind that is packed, of 64 rows, which a panel has, and a layer that is too small."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 64),
        bigops.nn.GatedMLP(64, 64, bias=True),
        bigops.nn.LowRankLinear(64, 64, 64),
        nn.Linear(64, 2),
    ).train()


def packed() -> nn.Sequential:
    model = packable()
    bigops.pack_(model)
    return model


_FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def _saved(make: Callable[[], nn.Module]) -> Path:
    path = Path(_FOLDER.name) / make.__name__
    bigops.save(make(), path)
    return path


Verb = Callable[[nn.Module], object]
VERBS: dict[str, tuple[Callable[[], nn.Module], Verb]] = {
    "compress_": (dense, lambda m: bigops.compress_(m, Int8())),
    "compress_ static": (
        dense,
        lambda m: bigops.compress_(m, Int8(activations="static"), data=[X, (2 * X,)]),
    ),
    "compress_ timed": (dense, lambda m: bigops.compress_(m, {"0": Sparse(0.9), "*": Int8()}, X)),
    "compress_ factors": (dense, lambda m: bigops.compress_(m, LowRank(4), freeze=False)),
    "compress_ forced": (dense, lambda m: bigops.compress_(m, Fp8(), keep="all")),
    "compress_ again": (recovering, lambda m: bigops.compress_(m, Int8())),
    "freeze_": (recovering, bigops.freeze_),
    "freeze_ thawed": (thawed, bigops.freeze_),
    "fuse_": (dense, bigops.fuse_),
    "fuse_ timed": (Counts, lambda m: bigops.fuse_(m, X)),
    "fuse_ untraced": (Untraced, bigops.fuse_),
    "fuse_ half": (half_frozen, lambda m: bigops.fuse_(m, X)),
    "smooth_": (outlying, lambda m: bigops.smooth_(m, [X])),
    "smooth_ searched": (outlying, lambda m: bigops.smooth_(m, [X, (2 * X,)], "search")),
    "add_lora_": (dense, lambda m: bigops.add_lora_(m, rank=2)),
    "add_lora_ again": (adapted, lambda m: bigops.add_lora_(m, rank=3, name="second")),
    "pack_": (packable, bigops.pack_),
    "pack_ timed": (packable, lambda m: bigops.pack_(m, X)),
    "unpack_": (packed, bigops.unpack_),
    "load": (dense, lambda m: bigops.load(_saved(recovering), m)),
    "load packed": (packable, lambda m: bigops.load(_saved(packed), m)),
    "load over": (recovering, lambda m: bigops.load(_saved(thawed), m)),
}
PARAMETERS = [pytest.param(name, marks=needs_extension if "pack" in name else ()) for name in VERBS]
