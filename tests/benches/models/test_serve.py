"""Serving: the requests, the threads, fresh processes, and what a row says."""

from __future__ import annotations

import csv
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigops import cli
from bigops.benches.models import serve, serve_process, zoo
from bigops.benches.models.subject import Call, resized

HERE = "tests.benches.models.small"
COLUMNS = (
    "op,model,provider,isa,cores,threads,requests,p50_ms,p99_ms,throughput,cold_start_s,"
    "workers_mb,versions"
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_lengths_are_drawn_from_a_seed_and_reach_both_ends() -> None:
    drawn = serve.drawn_lengths(5000)
    assert drawn == serve.drawn_lengths(5000)
    assert (min(drawn), max(drawn)) == serve.LENGTHS


@pytest.mark.parametrize("threads", [1, 4])
def test_every_request_is_answered_once_by_as_many_threads(threads: int) -> None:
    asked = [(torch.full((1, 2), n),) for n in range(20)]
    seen: Counter[int] = Counter()
    callers = set()
    together = threading.Barrier(threads)

    def make() -> Call:
        first = [True]

        def call(ids: Tensor) -> Tensor:
            if first:  # no thread takes all of them
                first.clear()
                together.wait(10)
            callers.add(threading.get_ident())
            seen[int(ids[0, 0])] += 1
            return ids

        return call

    took, wall = serve.load(make, asked, threads)
    assert seen == Counter(range(20))
    assert len(callers) == threads
    assert len(took) == 20
    assert 0 < max(took) <= wall


def test_what_a_request_raises_is_raised() -> None:
    def call(*inputs: Tensor) -> Tensor:
        raise RuntimeError("of a length that it does not take")

    with pytest.raises(RuntimeError, match="does not take"):
        serve.load(lambda: call, [(torch.ones(1, 2),)], 2)


def test_threads_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [serve.share(threads) for threads in (1, 2, 4, 16)] == [4, 2, 1, 1]


def test_the_calibration_of_a_server_is_of_one_row() -> None:
    subject = next(iter(zoo.subjects(f"{HERE}:with_calibration")))
    single = serve.one_row(subject)
    shapes = {tuple(one[0].shape) for one in (single.inputs, *single.calibration)}
    assert shapes == {(1, 61)}
    assert resized(single.inputs, 8)[0].shape == (1, 8)


# --- processes ---------------------------------------------------------------------------------


def test_a_fresh_process_answers_and_its_memory_is_read() -> None:
    found = serve_process.fresh(("eager", f"{HERE}:tokens"), 2)
    assert found is not None
    seconds, megabytes = found
    assert seconds > 0
    if sys.platform == "linux":
        assert megabytes is not None
        assert 10 < megabytes < 5000


def test_a_process_that_fails_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert serve_process.fresh(("eager", "no_such_module:f"), 2) is None
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_the_command_has_a_row_for_each_provider_and_number_of_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "servers", ours_and_eager)
    monkeypatch.setattr(serve_process, "fresh", lambda arguments, workers: (1.5, None))
    file = tmp_path / "s.csv"
    options = ("--requests", "20", "--csv", str(file))
    assert cli.main(["bench", "--serve", f"{HERE}:tokens", *options]) == 0
    assert "8-256 tokens, 16 concurrent on 1 cores" in capsys.readouterr().out
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert ",".join(rows[0]) == COLUMNS
    assert [(row["threads"], row["provider"]) for row in rows] == [
        (threads, name) for threads in ("1", "4", "16") for name in ("eager", "bigops int8")
    ]
    for row in rows:
        assert float(row["p50_ms"]) <= float(row["p99_ms"])
        assert (row["requests"], row["cold_start_s"], row["workers_mb"]) == ("60", "1.5", "unknown")


def ours_and_eager(subject: serve.Subject, model: str) -> list[serve.Server]:
    return [serve.eager(subject, model), serve.ours(subject, model)]
