"""bigops.parallel.init in processes that the caller spawns: one world, or a clear error."""

from __future__ import annotations

import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from bigops.parallel import _rendezvous, init, launch


def alone(monkeypatch: pytest.MonkeyPatch, spawned: bool = False) -> None:
    """No environment of torchrun, and this process one that multiprocessing started, or not."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    parent: Any = os if spawned else None
    monkeypatch.setattr(launch.multiprocessing, "parent_process", lambda: parent)


def enter(**arguments: Any) -> Any:
    with init(**arguments) as world:
        return world


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rank": 1}, ValueError, "rank and world_size: expected both or none; got 1 alone"),
        ({"world_size": 2}, ValueError, "rank and world_size: expected both or none; got 2"),
        ({"rank": 2, "world_size": 2}, ValueError, "rank: expected 0 to world_size - 1 = 1; got 2"),
        ({"rank": -1, "world_size": 2}, ValueError, "rank: expected 0 to world_size - 1 = 1"),
        ({"rank": 0, "world_size": 0}, ValueError, "rank: expected 0 to world_size - 1 = -1"),
        ({"rank": "0", "world_size": 2}, TypeError, "rank: expected an int; got '0'"),
        ({"rank": 0, "world_size": True}, TypeError, "world_size: expected an int; got True"),
        ({"rank": 0, "world_size": 2}, ValueError, "address: expected 'host:port' in processes"),
        (
            {"rank": 0, "world_size": 2, "address": "here"},
            ValueError,
            "address: expected 'host:port'; got 'here'",
        ),
    ],
)
def test_arguments_that_make_no_world(
    arguments: dict[str, Any], error: Any, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(monkeypatch)
    with pytest.raises(error, match=match):
        enter(**arguments)
    assert not torch.distributed.is_initialized()


def test_a_spawned_process_without_a_rank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, spawned=True)
    with pytest.raises(ValueError, match=r"expected init\(rank=, world_size=\) in a process that"):
        enter()
    assert enter(rank=0, world_size=1).size == 1
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE: expected both or none; got 0 alone"):
        enter()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert enter().size == 1


def test_arguments_against_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert enter(rank=0, world_size=1).size == 1
    for arguments, match in (
        ({"rank": 1, "world_size": 2}, "rank: expected 0, as in the environment; got 1"),
        ({"rank": 0, "world_size": 2}, "world_size: expected 1, as in the environment; got 2"),
    ):
        with pytest.raises(ValueError, match=match):
            enter(**arguments)
    monkeypatch.delenv("RANK")
    with pytest.raises(ValueError, match="RANK and WORLD_SIZE: expected both or none; got 1 alone"):
        enter()


# how siblings find each other -----------------------------------------------------------------


class Parent:
    """What `multiprocessing.parent_process` gives in a spawned process."""

    pid = 4


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file of rank 0, for threads that stand for processes of one parent."""
    monkeypatch.setattr(_rendezvous.multiprocessing, "parent_process", Parent)
    monkeypatch.setattr(_rendezvous.tempfile, "gettempdir", lambda: str(tmp_path))
    return _rendezvous._file()


def meet(*places: tuple[int, int], seconds: float = 20.0) -> list[Any]:
    """What each (rank, size) gets, in threads: a store or an error."""

    def one(place: tuple[int, int]) -> Any:
        try:
            return _rendezvous.meet(*place, timedelta(seconds=seconds))
        except RuntimeError as error:
            return str(error)

    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def test_siblings_meet_and_leave_no_file(meeting: Path) -> None:
    for _ in range(2):
        stores = meet((2, 3), (0, 3), (1, 3))
        stores[0].set("key", "value")
        assert [store.get("key") for store in stores] == [b"value"] * 3
        assert not meeting.exists()
        assert list(meeting.parent.iterdir()) == []


def test_the_file_of_a_rank_0_that_ended_is_no_rank_0(meeting: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    meeting.write_text(f"1 {ended.pid} 2")
    assert "expected rank 0 among the processes of the same parent" in meet((1, 2), seconds=0.2)[0]
    assert all(not isinstance(store, str) for store in meet((1, 2), (0, 2)))


def test_ranks_that_do_not_fit_together_say_so(meeting: Path) -> None:
    first, other = meet((0, 2), (1, 3))
    assert other == "world_size: expected 2, that of rank 0; got 3"
    kept = meet((0, 3)) + meet((1, 3))  # the third is missing: the file stays
    assert meet((1, 3)) == ["rank: expected one process of each; rank 1 is there already"]
    meeting.write_text(f"1 {os.getppid()} 2")
    assert meet((0, 2)) == ["rank: expected one process of each; rank 0 is there already"]
    del first, kept


# real processes --------------------------------------------------------------------------------


def work(rank: int, case: str, folder: str, address: str | None) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ["TMPDIR"] = folder
    torch.set_num_threads(1)
    said = []
    try:
        if case == "none":
            enter()
        for _ in range(2):  # the second world finds nothing of the first
            with init(timeout_s=60, rank=rank, world_size=2, address=address) as world:
                total = torch.tensor([float(10**world.rank)])
                said.append((world.rank, world.size, world.mean(total).item()))
            if address is not None:
                break
    except (ValueError, RuntimeError) as error:
        said.append(str(error))
    torch.save(said, Path(folder) / f"{rank}.pt")


def spawned(case: str, folder: Path, address: str | None = None) -> list[list[Any]]:
    folder.mkdir()
    mp.spawn(work, args=(case, str(folder), address), nprocs=2)
    said = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert sorted(file.name for file in folder.iterdir()) == ["0.pt", "1.pt"]
    return said


@pytest.mark.slow
def test_two_spawned_ranks_are_one_world_and_then_another(tmp_path: Path) -> None:
    for again in range(2):  # the same parent spawns twice
        assert spawned("two", tmp_path / str(again)) == [
            [(rank, 2, 5.5), (rank, 2, 5.5)] for rank in range(2)
        ]


@pytest.mark.slow
def test_spawned_ranks_meet_at_an_address(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    said = spawned("two", tmp_path / "ranks", address)
    assert said == [[(rank, 2, 5.5)] for rank in range(2)]


@pytest.mark.slow
def test_spawned_ranks_without_ranks_are_no_two_worlds(tmp_path: Path) -> None:
    for said in spawned("none", tmp_path / "ranks"):
        assert said[0].startswith("rank: expected init(rank=, world_size=)")
