"""Sampler: every row once an epoch, one order on any number of ranks, a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from bigops.train import Sampler, load_checkpoint, save_checkpoint


def epochs(sampler: Sampler, count: int) -> list[list[int]]:
    return [batch for _ in range(count) for batch in sampler]


def test_an_epoch_holds_every_row_once_and_orders_differ() -> None:
    sampler = Sampler(10, 4, seed=3)
    assert len(sampler) == 3
    first, second = (list(sampler) for _ in range(2))
    for batches in (first, second):
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(row for batch in batches for row in batch) == list(range(10))
    assert first != second
    in_order = Sampler(10, 4, shuffle=False, drop_last=True)
    assert len(in_order) == 2
    assert epochs(in_order, 2) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_the_order_is_a_seeds_alone() -> None:
    before = torch.get_rng_state()
    first = epochs(Sampler(50, 8, seed=1), 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert epochs(Sampler(50, 8, seed=1), 3) == first
    assert epochs(Sampler(50, 8, seed=2), 3) != first
    later = Sampler(50, 8, seed=1)
    later.set_epoch(2)
    assert [*later] == first[14:]
    later.set_epoch(0)  # a step back
    assert [*later] == first[:7]


@pytest.mark.parametrize("taken", [0, 1, 7, 9, 14])
def test_a_saved_run_goes_on_behind_the_last_batch(taken: int, tmp_path: Path) -> None:
    """7 batches an epoch: the state is saved in the middle of the loop over one, or at its end."""
    whole = epochs(Sampler(50, 8, seed=1), 3)
    sampler, seen = Sampler(50, 8, seed=1), []
    while len(seen) < taken:
        for batch in sampler:
            seen.append(batch)
            if len(seen) == taken:
                sampler.set_epoch(sampler.epoch)  # as others' loops do
                break
    save_checkpoint(tmp_path / "run", sampler=sampler)
    resumed = Sampler(50, 8, seed=99)
    load_checkpoint(tmp_path / "run", sampler=resumed)
    while len(seen) < len(whole):
        seen += list(resumed)
    assert seen == whole


def test_a_state_of_before_there_were_epochs_goes_on() -> None:
    whole = epochs(Sampler(50, 8, seed=5), 4)
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        torch.randperm(50, generator=generator)
    resumed = Sampler(50, 8)
    begin = generator.get_state()
    resumed.load_state_dict({"rows": 50, "batch_size": 8, "begin": begin, "taken": 3})
    assert resumed.state_dict() == {"rows": 50, "seed": 5, "epoch": 2, "samples_seen": 24}
    assert epochs(resumed, 2) == whole[2 * 7 + 3 :]


# --- ranks ----------------------------------------------------------------------------------


def worlds(size: int, rows: int, batch: int, **options: Any) -> list[Sampler]:
    return [Sampler(rows, batch, seed=7, rank=r, world_size=size, **options) for r in range(size)]


def step(samplers: list[Any]) -> list[int]:
    """The rows that the ranks see in a step, padding left out, in the order of the batch."""
    batches = [next(it) for _, it in samplers]
    takens = [sampler.taken for sampler, _ in samplers]
    shares = []
    for batch, taken in zip(batches, takens, strict=True):
        assert batch == taken.indices.tolist()
        shares.append(taken.indices[taken.real].tolist())
    seen = [rows[i] for i in range(len(shares[0])) for rows in shares if i < len(rows)]
    assert [taken.size for taken in takens] == [len(seen)] * len(takens)
    assert len({len(b) for b in batches}) == 1  # ranks step with equal sizes
    return seen


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_share_one_order(size: int) -> None:
    rows, batch = 53, 10
    expected = Sampler(rows, batch, seed=7)
    samplers = worlds(size, rows, batch)
    for _ in range(2):
        pairs = [(sampler, iter(sampler)) for sampler in samplers]
        for whole in expected:
            assert step(pairs) == whole
        assert all(next(it, None) is None for _, it in pairs)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_run_changes_its_number_of_ranks(data: st.DataObject) -> None:
    """2 -> 1 -> 2 and any other course, also with another batch size, repeat and lose no row."""
    rows = data.draw(st.integers(1, 40), "rows")
    state: dict[str, int] | None = None
    seen: list[list[int]] = [[]]
    for size in data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4), "sizes"):
        samplers = worlds(size, rows, data.draw(st.integers(1, 12), "batch"))
        for sampler in samplers:
            if state is not None:
                sampler.load_state_dict(state)
        pairs = [(sampler, iter(sampler)) for sampler in samplers]
        for _ in range(data.draw(st.integers(0, 6), "steps")):
            if samplers[0].samples_seen == rows:
                assert all(next(it, None) is None for _, it in pairs)
                pairs = [(sampler, iter(sampler)) for sampler in samplers]
                seen.append([])
            seen[-1] += step(pairs)
        states = [sampler.state_dict() for sampler in samplers]
        assert all(one == states[0] for one in states)
        state = states[0]
    whole = Sampler(rows, rows, seed=7)
    for epoch, had in enumerate(seen):
        (order,) = whole
        assert had == order[: len(had)], epoch
        assert epoch == len(seen) - 1 or len(had) == rows


def test_what_torchs_sampler_does_beside_it() -> None:
    """11 rows on 4 ranks: it repeats one, unmarked, or loses three, and has no state to go on."""

    def of_torch(**options: Any) -> list[int]:
        ranks = [DistributedSampler(range(11), 4, r, shuffle=False, **options) for r in range(4)]
        return sorted(row for rank in ranks for row in rank)

    assert of_torch() == [0, *range(11)]
    assert of_torch(drop_last=True) == list(range(8))
    assert not hasattr(DistributedSampler, "state_dict")

    ours = worlds(4, 11, 11)
    assert {len(next(iter(sampler))) for sampler in ours} == {3}
    marked = [row for sampler in ours for row in sampler.taken.indices[sampler.taken.real].tolist()]
    assert sorted(marked) == list(range(11))


# --- loaders --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loaders_state_is_what_the_loop_took(workers: int) -> None:
    rows = list(range(100, 140))
    whole = [[rows[i] for i in batch] for batch in epochs(Sampler(40, 4, seed=2), 2)]

    def loader(sampler: Sampler) -> DataLoader:
        return DataLoader(
            rows, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0
        )

    sampler, seen = Sampler(40, 4, seed=2), []
    before = torch.get_rng_state()
    for batch in sampler.over(loader(sampler)):
        seen.append(batch.tolist())
        assert seen[-1] == [rows[i] for i in sampler.taken.indices]
        if len(seen) == 3:
            state = sampler.state_dict()
            break
    assert state["samples_seen"] == 12
    resumed = Sampler(40, 4)
    resumed.load_state_dict(state)
    batches = loader(resumed)
    for _ in range(2):
        seen += [batch.tolist() for batch in resumed.over(batches)]
    assert seen == whole
    assert torch.equal(torch.get_rng_state(), before)  # a resumed run draws no more than another


def test_workers_that_nobody_counts_are_refused() -> None:
    sampler = Sampler(40, 4)
    for _ in DataLoader(range(40), batch_sampler=sampler, num_workers=1):
        with pytest.raises(RuntimeError, match=r"expected a loop over sampler.over\(loader\)"):
            sampler.state_dict()
        break
    sampler.load_state_dict({"rows": 40, "seed": 0, "epoch": 0, "samples_seen": 0})
    for _ in DataLoader(range(40), batch_sampler=sampler):  # in step with the loop
        assert sampler.state_dict()["samples_seen"] == 4
        break
    with pytest.raises(RuntimeError, match=r"rows 8 to 12 .*; got the end"):
        list(sampler.over([1]))
    with pytest.raises(RuntimeError, match="expected the end of epoch 0; got a batch"):
        list(sampler.over(iter(range(99))))


def test_bad_requests() -> None:
    for sizes in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="rows, batch_size: expected at least 1; got"):
            Sampler(*sizes)
    with pytest.raises(ValueError, match="rank: expected 0 to below world_size, 2; got 2"):
        Sampler(4, 2, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size: expected at most rows, 4; got 5"):
        Sampler(4, 5, drop_last=True)
    sampler = Sampler(5, 2)
    with pytest.raises(ValueError, match="of a sampler of .*'rows': 5.*; got .*'rows': 6"):
        sampler.load_state_dict(Sampler(6, 2).state_dict())
    good = sampler.state_dict()
    for bad in ({}, {**good, "epoch": 1.5}, {**good, "epoch": -1}, {**good, "samples_seen": 6}):
        with pytest.raises(ValueError, match="state: expected"):
            sampler.load_state_dict(bad)
    assert sampler.state_dict() == good
