"""Two gloo ranks step or skip together, by one norm, over meshes and unequal microbatches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.ranks import run_ranks
from tests.train.worker import OPTIMIZERS, TOKENS, VOCABULARY, batch, same


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw in the cases of worker.py."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks("-m", "tests.train.worker", str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_inf_on_one_rank_skips_all(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (seen["unreduced"][name] for seen in ranks)
    for seen in (first, second):
        assert seen["stepped"] == [True, True, False, True]
        assert seen["scale"] == [1024, 1024, 512, 512]
        assert seen["skips"] == [0, 0, 1, 1]
        assert seen["kept"]
        assert not seen["moved"]
    assert first["norm"][:2] == second["norm"][:2]
    assert first["norm"][3] == second["norm"][3]
    assert same(first["weights"], second["weights"])


@pytest.mark.parametrize("bad_in", range(4), ids=["Shard", "Replicate", "other mesh", "plain"])
def test_a_nan_on_one_rank_skips_all_over_mixed_meshes(
    ranks: list[dict[str, Any]], bad_in: int
) -> None:
    first, second = (seen["meshes"][bad_in] for seen in ranks)
    for seen in (first, second):
        assert seen["stepped"] == [True, False, True, True]
        assert seen["scale"] == [1024, 512, 512, 512]
        assert seen["kept"]
        assert not seen["moved"]
        for step, scale in ((0, 1024), (2, 512), (3, 512)):  # the gradients are of scale 1024
            true = seen["sizes"][step] * 1024 / scale
            assert abs(seen["norm"][step] - true) <= 1e-14 * true
        assert abs(seen["partial"] - seen["expected"]) <= 1e-6 * seen["expected"]
    assert [n for n in first["norm"] if n == n] == [n for n in second["norm"] if n == n]


def test_a_nan_in_one_microbatch_skips_all(ranks: list[dict[str, Any]]) -> None:
    first, second = (seen["microbatch"] for seen in ranks)
    assert first["stepped"] == second["stepped"] == [True, False, True]
    assert first["kept"]
    assert second["kept"]
    assert same(first["weights"], second["weights"])


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP with no_sync", "fully_shard"])
def test_unequal_microbatches_give_the_gradient_of_the_mean_over_all_tokens(
    ranks: list[dict[str, Any]], sharded: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, VOCABULARY, dtype=torch.float64)
    every = [batch(rank, part) for rank in range(2) for part in range(2)]
    x, y = (torch.cat(parts) for parts in zip(*every, strict=True))
    F.cross_entropy(model(x), y).backward()
    assert int((y != -100).sum()) == sum(map(sum, TOKENS))
    for seen in ranks:
        for moved, param in zip(seen["tokens"][sharded], model.parameters(), strict=True):
            assert param.grad is not None
            assert (moved - param.grad).abs().max() <= 1e-15
    # The usual fault: the mean of the microbatches' means.
    wrong = torch.stack([F.cross_entropy(model(x), y) for x, y in every if (y != -100).any()])
    (grad,) = torch.autograd.grad(wrong.mean(), model.weight)
    assert (grad - model.weight.grad).abs().max() > 1e-2


@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "DDP"])
def test_amp_skips_together(ranks: list[dict[str, Any]], wrap: bool) -> None:
    first, second = (seen["apex"][wrap] for seen in ranks)
    for seen in (first, second):
        assert seen["scale"] == [2.0**16, 2.0**15, 2.0**15]
        assert seen["kept"] == [False, True, False]
    assert same(first["weights"], second["weights"]) == wrap


def test_stages_of_a_pipeline_add_up(ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        norm, moved, bad, kept = seen["stages"]
        assert abs(norm - 75**0.5) < 1e-12  # of (3, 3, 3) and (4, 4, 4)
        assert abs(moved + (3 + rank) / 75**0.5) < 1e-6
        assert bad != bad
        assert kept == 0


def test_ranks_that_step_alone(ranks: list[dict[str, Any]]) -> None:
    assert [seen["alone"] for seen in ranks] == [[True] * 4, [False] * 4]
