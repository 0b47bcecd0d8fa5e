"""BatchSampler: every row once an epoch, a seed's order, a run that goes on where it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bigops.train import BatchSampler, load_checkpoint, save_checkpoint


def epochs(sampler: BatchSampler, count: int) -> list[list[int]]:
    return [batch.tolist() for _ in range(count) for batch in sampler]


def test_an_epoch_holds_every_row_once_and_orders_differ() -> None:
    sampler = BatchSampler(10, 4, seed=3)
    assert len(sampler) == 3
    first, second = (list(sampler) for _ in range(2))
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(torch.cat(batches).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_the_order_is_a_seeds_alone() -> None:
    before = torch.get_rng_state()
    first = epochs(BatchSampler(50, 8, seed=1), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert epochs(BatchSampler(50, 8, seed=1), 3) == first
    assert epochs(BatchSampler(50, 8, seed=2), 3) != first


@pytest.mark.parametrize("taken", [0, 1, 7, 9, 14])
def test_a_saved_run_goes_on_behind_the_last_batch(taken: int, tmp_path: Path) -> None:
    """7 batches an epoch: the state is saved in the middle of the loop over one, or at its end."""
    whole = epochs(BatchSampler(50, 8, seed=1), 3)
    sampler, seen = BatchSampler(50, 8, seed=1), []
    while len(seen) < taken:
        for batch in sampler:
            seen.append(batch.tolist())
            if len(seen) == taken:
                break
    save_checkpoint(tmp_path / "run", sampler=sampler)
    resumed = BatchSampler(50, 8, seed=99)
    load_checkpoint(tmp_path / "run", sampler=resumed)
    while len(seen) < len(whole):
        seen += [batch.tolist() for batch in resumed]
    assert seen == whole


def test_bad_requests(tmp_path: Path) -> None:
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="rows, batch_size: expected at least 1; got"):
            BatchSampler(*sizes)
    sampler = BatchSampler(5, 2)
    with pytest.raises(ValueError, match="of a sampler of .*'rows': 5.*; got .*'rows': 6"):
        sampler.load_state_dict(BatchSampler(6, 2).state_dict())
