"""Data parallel runs: two gloo processes give what one process gives, and stop together."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.parallel import World, init
from bigops.recipes import mlp
from bigops.recipes.data import Dataset, load
from tests.support import tolerance
from tests.support.ranks import ROOT, run_ranks

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As many threads as each rank has: sums come in the same order, and nobody waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two ranks saw in the cases of worker.py."""
    folder = tmp_path_factory.mktemp("ranks")
    printed = run_ranks("-m", "tests.parallel.worker", "run", str(folder))
    assert ["first rank" in out for out in printed] == [True, False]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def _two_shards_in_plain_torch(
    dataset: Dataset,
    hidden: tuple[int, ...],
    *,
    epochs: int,
    batch_size: int,
    build_seed: int,
    seed: int,
    lr: float = 1e-3,
    local_means: bool = False,
) -> tuple[Tensor, Tensor]:
    """The job written anew with torch's own layers: two shares a batch, one after the other.

    ``local_means`` plants the usual fault: the mean of the shares' means.
    """
    ours = mlp.build(dataset.features, hidden, seed=build_seed, dtype=torch.float64)
    layers: list[nn.Module] = []
    for layer in ours:
        copy = nn.Linear(layer.in_features, layer.out_features, dtype=torch.float64)
        copy.load_state_dict(layer.state_dict())
        layers += [copy, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    decayed = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]
    )
    x, y = dataset.train_x.double(), dataset.train_y
    order = torch.Generator().manual_seed(seed)
    steps = epochs * math.ceil(len(x) / batch_size)
    losses: list[float] = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=order).split(batch_size):
            for group in optimizer.param_groups:
                group["lr"] = lr * mlp.one_cycle(len(losses), steps)
            optimizer.zero_grad()
            total = 0.0
            for rows in (batch[0::2], batch[1::2]):
                loss = F.cross_entropy(
                    model(x[rows]), y[rows], reduction="sum", label_smoothing=0.05
                )
                loss = loss / (2 * max(1, len(rows)) if local_means else len(batch))
                loss.backward()
                total += loss.item()
            optimizer.step()
            losses.append(total)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    return torch.tensor(losses, dtype=torch.float64), weights


def _hold(out: tuple[Tensor, Tensor], one: tuple[Tensor, Tensor], plain: tuple[Tensor, Tensor]):
    """Losses and weights against those of one process, by the numerics rule."""
    for what, a, b, c in zip(("losses", "weights"), out, one, plain, strict=True):
        tolerance.check(a, b, c, b.abs().max(), what=what)


# --------------------------------------------------------------------------- two processes, one job


def test_ragged_batches_equal_one_process(ranks: list[dict]) -> None:
    first, second = (seen["train"] for seen in ranks)
    assert first["losses"] == second["losses"]
    assert torch.equal(first["weights"], second["weights"])
    out = (torch.tensor(first["losses"], dtype=torch.float64), first["weights"])

    dataset = load("digits").subset(331)
    model = mlp.build(dataset.features, (24, 16), seed=5, dtype=torch.float64)
    options = {"epochs": 2, "batch_size": 33, "seed": 7}
    history = mlp.train(model, dataset, precision="fp32", progress=False, **options)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    one = (torch.tensor(history.losses, dtype=torch.float64), weights)
    assert len(one[0]) == 2 * 11
    plain = _two_shards_in_plain_torch(dataset, (24, 16), build_seed=5, **options)
    _hold(out, one, plain)

    faulty = _two_shards_in_plain_torch(
        dataset, (24, 16), build_seed=5, local_means=True, **options
    )
    with pytest.raises(AssertionError, match="losses: element"):
        _hold(faulty, one, plain)


@pytest.mark.slow
def test_torchrun_equals_one_process(tmp_path: Path) -> None:
    """The recipe's command line under torchrun and alone, in float64."""
    arguments = ["-m", "bigops.recipes.mlp", "--data", "digits", "--precision", "fp32"]
    arguments += ["--dtype", "float64", "--hidden", "32", "16", "--epochs", "1"]
    arguments += ["--batch-size", "64", "--save"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, command in (("two", torchrun), ("one", [sys.executable])):
        command = [*command, *arguments, str(tmp_path / f"{name}.json")]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("digits: 1197 rows") == 1  # one rank prints
        assert f"{2 if name == 'two' else 1} process(es)" in done.stdout
        assert "destroy_process_group" not in done.stderr  # torch warns where a rank just leaves

    def result(name: str) -> tuple[Tensor, Tensor]:
        losses = json.loads((tmp_path / f"{name}.json").read_text())["losses"]
        state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        weights = torch.cat([value.flatten() for value in state.values()])
        return torch.tensor(losses, dtype=torch.float64), weights

    plain = _two_shards_in_plain_torch(
        load("digits"), (32, 16), epochs=1, batch_size=64, build_seed=0, seed=0
    )
    _hold(result("two"), result("one"), plain)


@pytest.mark.parametrize("name", ["skip", "skip_own"])  # torch's optimiser, bigops's
def test_all_ranks_skip_together(ranks: list[dict], name: str) -> None:
    for rank in ranks:
        seen = rank[name]
        assert seen["stepped"] == [True, True, False, True]
        assert seen["scale"] == [1024, 1024, 512, 512]
        first, second, third, fourth = seen["weights"]
        assert not torch.equal(first, second)
        assert torch.equal(second, third)
        assert not torch.equal(third, fourth)
        assert torch.isfinite(fourth).all()
    for a, b in zip(ranks[0][name]["weights"], ranks[1][name]["weights"], strict=True):
        assert torch.equal(a, b)


def test_a_failing_rank_ends_the_run(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 exited 1|rank 0 exited"):
        run_ranks("-m", "tests.parallel.worker", "fail", str(tmp_path), timeout=100)
    assert time.monotonic() - begin < 100


# ----------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [0, 1, 4, 5, 7])
def test_shards_partition_the_batch(size: int, batch: int) -> None:
    worlds = [World(rank, size, CPU) for rank in range(size)]
    shares = [world.shard(torch.arange(batch)) for world in worlds]
    assert sorted(torch.cat(shares).tolist()) == list(range(batch))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batch_loss_averages_to_the_global_mean() -> None:
    losses = torch.tensor([1.0, 5.0])  # two ranks of four have no row
    worlds = [World(rank, 4, CPU) for rank in range(4)]
    shares = [world.batch_loss(world.shard(losses), 2) for world in worlds]
    assert torch.stack(shares).tolist() == [2, 10, 0, 0]
    assert torch.stack(shares).mean() == losses.mean()


def test_a_world_of_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with init() as world:
        assert world == World(0, 1, CPU)
        model = nn.Linear(2, 2)
        assert world.wrap(model) is model
        assert not torch.distributed.is_initialized()
        assert world.mean(torch.tensor(3.0)) == 3.0
        world.print("hello", 1)
    assert capsys.readouterr().out == "hello 1\n"
    World(1, 2, CPU).print("silent")
    assert capsys.readouterr().out == ""


def test_bad_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda'; got 'tpu'"),
        init("tpu"),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "two")
    with (
        pytest.raises(ValueError, match="WORLD_SIZE: expected a whole number .*; got 'two'"),
        init(),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK: expected 0 to WORLD_SIZE - 1 = 1; got 2"), init():
        pass
    if not torch.cuda.is_available():
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("LOCAL_RANK", "1")
        message = "rank 1 needs GPU 1, this torch sees 0"
        with pytest.raises(RuntimeError, match=message), init("cuda"):
            pass
