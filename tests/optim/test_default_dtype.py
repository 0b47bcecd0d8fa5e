"""A default dtype or device, also one that was set before the import, changes nothing here.

tests/house/test_default_device.py holds the rest of the package to the default device.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.train import (
    SGD,
    AdamW,
    MixedPrecision,
    Sampler,
    load_checkpoint,
    save_checkpoint,
)
from tests.support.kernels_ran import needs_extension, threads
from tests.support.optimizer_ways import same

pytestmark = needs_extension

CPU = torch.device("cpu")
SHAPES = [(70, 90), (90,), ()]
Job = Callable[[Path], list[Tensor]]


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    with threads(1):
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def drawn(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(CPU).manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float32, device=CPU).to(dtype)
        for s in SHAPES
    ]


def optimizer_job(make: Any, dtype: torch.dtype, **options: Any) -> Job:
    """Steps of both kinds, the last after a reload."""

    def job(folder: Path) -> list[Tensor]:
        params = [p.requires_grad_() for p in drawn(0, dtype)]
        optimizer = make(params, lr=1e-2, **options)
        for step in range(4):
            if step == 3:
                save_checkpoint(folder / "run.pt", optimizer=optimizer)
                optimizer = make(params, lr=1.0)
                load_checkpoint(folder / "run.pt", optimizer=optimizer)
            for p, grad in zip(params, drawn(step + 1, dtype), strict=True):
                p.grad = grad
            if step % 2:
                optimizer.step()
            else:
                assert optimizer.step_checked(clip_norm=1.0)
        held = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
        return [*(p.detach() for p in params), *held]

    return job


def precision_job(precision: str, make: Any) -> Job:
    def job(_: Path) -> list[Tensor]:
        params = [p.requires_grad_() for p in drawn(0, torch.float32)]
        optimizer = make(params, lr=1e-2)
        amp = MixedPrecision(precision, init_scale=64.0, growth_interval=1)
        for step in range(3):
            optimizer.zero_grad()
            x = drawn(step + 1, torch.float32)[0]
            with amp.autocast():
                loss = (params[0] @ x.T).float().square().mean()
            amp.backward(loss)
            assert amp.step(optimizer, clip_norm=1.0)
        again = MixedPrecision(precision)
        again.load_state_dict(amp.state_dict())
        scale = torch.tensor(again.scale, dtype=torch.float64, device=CPU)
        return [scale, *(p.detach() for p in params)]

    return job


def sampler_job(_: Path) -> list[Tensor]:
    sampler = Sampler(10, 3, seed=1)
    other = Sampler(10, 3)
    batches = [next(iter(sampler))]
    other.load_state_dict(sampler.state_dict())
    return [torch.tensor(batch, device=CPU) for batch in (*batches, *other, *other)]


JOBS: dict[str, Job] = {
    "AdamW": optimizer_job(AdamW, torch.float32),
    "AdamW, 8 bits": optimizer_job(AdamW, torch.float32, eight_bit=True),
    "AdamW, 8 bits and masters": optimizer_job(
        AdamW, torch.float16, eight_bit=True, master_weights=True
    ),
    "AdamW, stochastic": optimizer_job(AdamW, torch.bfloat16),
    "AdamW, float64": optimizer_job(AdamW, torch.float64, fused=True),
    "SGD": optimizer_job(SGD, torch.float32),
    "SGD, momentum in 8 bits": optimizer_job(SGD, torch.float32, momentum=0.9, eight_bit=True),
    "SGD, masters": optimizer_job(SGD, torch.bfloat16, momentum=0.9, master_weights=True),
    "fp16-mixed": precision_job("fp16-mixed", AdamW),
    "bf16-mixed": precision_job("bf16-mixed", SGD),
    "fp16-mixed, torch's optimiser": precision_job("fp16-mixed", torch.optim.SGD),
    "sampler": sampler_job,
}


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", [None, "meta"])
def test_a_default_changes_no_bit(
    name: str, dtype: torch.dtype, device: str | None, tmp_path: Path
) -> None:
    want = JOBS[name](tmp_path)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    got = JOBS[name](tmp_path)
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert [(t.dtype, t.device) for t in got] == [(t.dtype, CPU) for t in want]
    assert same(got, want)
    assert all(bool(t.isfinite().all()) for t in want)


IMPORT = """
import sys, torch
torch.set_num_threads(1)
torch.set_default_dtype(getattr(torch, sys.argv[1]))
torch.set_default_device("meta")
from pathlib import Path
from tests.optim.test_default_dtype import JOBS
results = {name: job(Path(sys.argv[2])) for name, job in JOBS.items()}
torch.save(results, sys.argv[3])
"""


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_defaults_that_stood_before_the_import_change_no_bit(dtype: str, tmp_path: Path) -> None:
    want = {name: job(tmp_path) for name, job in JOBS.items()}
    file = tmp_path / "results.pt"
    command = [sys.executable, "-c", IMPORT, dtype, tmp_path, file]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    assert same(torch.load(file), want)
