"""Loader: the same batches from any number of workers and ranks, and from a run that goes on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigops.train import Sampler, TrainState
from bigops.train.data import Arrays, Loader


class Drawn:
    """Rows that draw from every generator."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, row: int) -> tuple[int, Tensor]:
        numbers = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return row, torch.tensor(numbers, dtype=torch.float64)


def epochs(loader: Loader, count: int = 2) -> dict[tuple[int, int], list[float]]:
    """Numbers by epoch and row, and that a batch is what the sampler says."""
    seen: dict[tuple[int, int], list[float]] = {}
    for _ in range(count):
        for rows, numbers in loader:
            taken = loader.sampler.taken
            assert torch.equal(rows, taken.indices)
            pairs = zip(rows.tolist(), numbers.tolist(), taken.real.tolist(), strict=True)
            seen.update({(taken.epoch, row): own for row, own, real in pairs if real})
    return seen


def test_draws_are_a_rows_own() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    alone = epochs(Loader(Drawn(), Sampler(22, 5, seed=3)))
    assert len(alone) == 44
    assert len({numbers[0] for numbers in alone.values()}) == 44  # no epoch and no row like another
    assert epochs(Loader(Drawn(), Sampler(22, 8, seed=3), num_workers=2)) == alone
    ranks = [Sampler(22, 5, seed=3, rank=rank, world_size=3) for rank in range(3)]
    shares = [epochs(Loader(Drawn(), sampler)) for sampler in ranks]
    assert {**shares[0], **shares[1], **shares[2]} == alone
    assert sum(map(len, shares)) == 44
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    other = epochs(Loader(Drawn(), Sampler(22, 5, seed=4)))
    assert not {tuple(n) for n in other.values()} & {tuple(n) for n in alone.values()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch(workers: int, tmp_path: Path) -> None:
    whole = epochs(Loader(Drawn(), Sampler(22, 5, seed=3), num_workers=workers))
    loader = Loader(Drawn(), Sampler(22, 5, seed=3), num_workers=workers)
    seen: dict[tuple[int, int], list[float]] = {}
    for step, (rows, numbers) in enumerate(loader, 1):
        pairs = zip(rows.tolist(), numbers.tolist(), strict=True)
        seen.update({(0, row): own for row, own in pairs})
        if step == 2:
            TrainState(loader=loader).save(tmp_path, step)
            break
    torch.rand(3)
    resumed = Loader(Drawn(), Sampler(22, 5), num_workers=workers)
    TrainState(loader=resumed).load(tmp_path)
    assert {**seen, **epochs(resumed)} == whole


def test_batches_come_on_the_device() -> None:
    for rows, numbers in Loader(Drawn(), Sampler(22, 5), device="meta"):
        assert rows.is_meta
        assert numbers.is_meta


def test_whole_batches_are_taken_at_once(tmp_path: Path) -> None:
    x, y = np.arange(60, dtype=np.uint8).reshape(20, 3), torch.arange(20)
    np.save(tmp_path / "x.npy", x)
    data = Arrays(tmp_path / "x.npy", y)
    for workers in (0, 1):
        sampler = Sampler(20, 6, seed=1)
        for images, targets in Loader(data, sampler, num_workers=workers):
            assert images.dtype == torch.uint8
            assert torch.equal(images, torch.from_numpy(x)[sampler.taken.indices])
            assert torch.equal(targets, sampler.taken.indices)
    assert torch.equal(data[3][0], torch.tensor([9, 10, 11], dtype=torch.uint8))
    assert len(Arrays(x, validation_split=0.25, subset="validation")) == 5
    assert Arrays(x, validation_split=0.25, subset="training")[0].tolist() == [15, 16, 17]
    alone = Arrays(y)
    assert torch.equal(alone.take([2, 0]), torch.tensor([2, 0]))
    assert alone[4] == 4


BAD: dict[str, tuple[Any, str]] = {
    "none": (lambda p: Arrays(), "arrays: expected at least one"),
    "lengths": (lambda p: Arrays([1, 2], [1]), r"arrays: expected as many rows .*; got \[2, 1\]"),
    "no rows": (lambda p: Arrays(np.zeros((0, 3))), r"at least 1; got \[0\]"),
    "words": (lambda p: Arrays(np.array(["a"])), r"arrays\[0\]: expected numbers .*; got <U1"),
    "one number": (lambda p: Arrays(torch.tensor(1)), r"arrays\[0\]: expected rows"),
    "no array": (lambda p: Arrays(p), "x.npy: expected a .npy file of numbers"),
    "split": (lambda p: Arrays([1], validation_split=1.0), "validation_split: expected 0 to below"),
    "subset": (lambda p: Arrays([1], subset="test"), "subset: expected 'training', .*; got 'test'"),
    "empty part": (lambda p: Arrays([1], subset="validation"), "subset: expected rows in 'valid"),
    "sampler": (lambda p: Loader(Drawn(), Sampler(5, 2)), "sampler: expected one of .* 22 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"no array")
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "x.npy")
