"""A default device takes no part where tensors have their own: "meta" stands for any other one.

Every job runs with and without it, and its results have to be the same bits. That no tensor is
made without a device at all is held by tests/house/test_architecture.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.ops.fused_adamw import reference_norm, states
from bigops.parallel import World
from bigops.recipes.data import load
from bigops.train import SGD, AdamW, MixedPrecision, load_checkpoint, save_checkpoint
from tests.support.optimizer_ways import same

CPU = torch.device("cpu")
X = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
Job = Callable[[Path], list[Tensor]]


@pytest.fixture(autouse=True)
def _default_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, the device as before afterwards, and no layer left because it was slower."""
    draw = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", draw)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_device(None)
    torch.set_num_threads(threads)


def model() -> nn.Module:
    """96 -> 64 -> 32, on the CPU whatever the default device."""
    with CPU:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def optimizer_job(make: Callable[..., Any], dtype: torch.dtype, **options: Any) -> Job:
    """Three steps, of which the last is taken after a reload."""

    def job(_: Path) -> list[Tensor]:
        trained = model().to(dtype)
        optimizer = make(trained.parameters(), lr=1e-2, **options)
        for step in range(3):
            if step == 2:
                state = optimizer.state_dict()
                optimizer = make(trained.parameters(), lr=1.0)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            trained(X.to(dtype)).float().square().mean().backward()
            assert optimizer.step_checked(clip_norm=1.0)
        return [p.detach() for p in trained.parameters()]

    return job


def precision_job(name: str) -> Job:
    def job(folder: Path) -> list[Tensor]:
        trained = model()
        optimizer: Any = (AdamW if name == "ours" else torch.optim.AdamW)(trained.parameters())
        precision = MixedPrecision("fp16-mixed", init_scale=64.0, growth_interval=1)
        for _ in range(2):
            with precision.autocast():
                loss = trained(X).float().square().mean()
            optimizer.zero_grad()
            precision.backward(loss)
            assert precision.step(optimizer, clip_norm=1.0)
        parts = {"model": trained, "optimizer": optimizer, "precision": precision}
        save_checkpoint(folder / "run.pt", **parts)
        load_checkpoint(folder / "run.pt", **parts)
        scale = torch.tensor(precision.scale, device=CPU)
        return [scale, *(p.detach() for p in trained.parameters())]

    return job


def compress_job(config: Any, example: bool = False) -> Job:
    """Compressed, saved, loaded without and into a model."""

    def job(folder: Path) -> list[Tensor]:
        small = model()
        bigops.compress_(small, config, *([X] if example else []))
        bigops.save(small, folder / "m.safetensors")
        loaded = bigops.load(folder / "m.safetensors")
        with torch.no_grad():
            return [small(X), loaded(X)]

    return job


def recovery_job(_: Path) -> list[Tensor]:
    small = model()
    bigops.compress_(small, bigops.Sparse(0.5), freeze=False)
    optimizer = AdamW(small.parameters())
    small(X).square().mean().backward()
    optimizer.step()
    bigops.freeze_(small)
    with torch.no_grad():
        return [small(X)]


def layer_job(_: Path) -> list[Tensor]:
    fused = model()
    bigops.fuse_(fused)
    tuned = model()
    bigops.add_lora_(tuned, rank=2, dropout=0.1)
    layer = tuned[0]
    assert isinstance(layer, bigops.nn.LoRALinear)
    with torch.no_grad():
        results = [fused(X), tuned(X), layer.to_linear()(X)]
        layer.merge()
        with torch.inference_mode():
            results += [fused(X), tuned(X)]
    with CPU:
        gated = bigops.nn.GatedMLP(96, 40)
        loss = bigops.nn.LinearCrossEntropy(96, 11)
        labels = torch.arange(16) % 11
    value = loss(X, labels)
    value.backward()
    with torch.no_grad():
        return [*results, gated(X), value.detach(), loss.weight.grad]


def reference_job(_: Path) -> list[Tensor]:
    """What kernels are held to, and the tables that they look up."""
    rows = X.reshape(-1)
    found = [*states.encode(rows, True), *states.encode(rows.abs(), False)]
    found += [states.decode(found[0], found[1], True), states.round_stochastic(rows, 1, 2, 3)]
    norms = [bigops.fused_grad_norm([]), reference_norm([])]
    return [*found, *map(states.buckets, (True, False)), *norms]


def world_job(_: Path) -> list[Tensor]:
    data = load("digits").subset(64)
    world = World(0, 1, CPU)
    return [data.train_x, world.shard(X), world.mean(X.mean()), world.batch_loss(X[:, 0], 16)]


JOBS: dict[str, Job] = {
    "AdamW": optimizer_job(AdamW, torch.float32),
    "AdamW, 8 bits": optimizer_job(AdamW, torch.float32, eight_bit=True),
    "AdamW, masters": optimizer_job(AdamW, torch.bfloat16, master_weights=True),
    "AdamW, stochastic": optimizer_job(AdamW, torch.bfloat16),
    "SGD": optimizer_job(SGD, torch.float32),
    "SGD, momentum in 8 bits": optimizer_job(SGD, torch.float32, momentum=0.9, eight_bit=True),
    "SGD, float64": optimizer_job(SGD, torch.float64, momentum=0.9),
    "fp16-mixed, our optimiser": precision_job("ours"),
    "fp16-mixed, torch's optimiser": precision_job("torch"),
    "Int8": compress_job(bigops.Int8()),
    "Int8, static": compress_job(bigops.Int8(activations="static"), example=True),
    "Int4": compress_job(bigops.Int4()),
    "Fp8": compress_job(bigops.Fp8()),
    "LowRank": compress_job(bigops.LowRank(rank=8)),
    "LowRank + Int8": compress_job(bigops.LowRank(rank=8) + bigops.Int8()),
    "Sparse": compress_job(bigops.Sparse(0.5)),
    "Sparse + Int8, static": compress_job(
        bigops.Sparse(0.5) + bigops.Int8(activations="static"), example=True
    ),
    "Sparse 2:4": compress_job(bigops.Sparse(0.5, pattern="2:4")),
    "recovery": recovery_job,
    "layers": layer_job,
    "references": reference_job,
    "data and world": world_job,
}


@pytest.mark.parametrize("name", JOBS)
def test_a_default_device_changes_nothing(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    want = JOBS[name](tmp_path)
    torch.set_default_device("meta")
    torch.manual_seed(1)
    got = JOBS[name](tmp_path)
    torch.set_default_device(None)
    assert [t.device for t in got] == [CPU] * len(want)
    assert same(got, want)
    assert all(bool(t.isfinite().all()) for t in want)


def test_a_step_is_one_under_another_default_device() -> None:
    """The counter of steps once lay on the default device: the step then did nothing at all."""
    trained = model()
    optimizer = AdamW(trained.parameters())
    before = [p.detach().clone() for p in trained.parameters()]
    trained(X).sum().backward()
    torch.set_default_device("meta")
    optimizer.step()
    torch.set_default_device(None)
    assert all(s["step"].device == CPU and float(s["step"]) == 1 for s in optimizer.state.values())
    assert not any(same(p.detach(), q) for p, q in zip(trained.parameters(), before, strict=True))
