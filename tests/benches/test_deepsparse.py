"""A rival in a process of its own: the protocol, with a worker that needs no DeepSparse."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigops import timing
from bigops.benches import families, harness, rivals, rivals_deepsparse
from bigops.benches.harness import Case, LeftOut, Side
from bigops.benches.limits import Cost, Limits
from tests.support import tolerance

# what worker.py does, with numpy's product in place of the engine
FAKE = """
import importlib.util, os, sys, time
import numpy as np
spec = importlib.util.spec_from_file_location("worker", {worker!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
folder, copies, threads = sys.argv[1:]
assert (int(copies), int(threads)) == (3, {threads}), sys.argv
x, weight = (np.load(os.path.join(folder, name + ".npy")) for name in ("x", "weight"))
def call():
    time.sleep(0.004)
    return x @ weight.T
worker.serve(call, sys.stdout, sys.stdin)
"""
COST = Cost("fp32", 1e6, 1e6)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake.py"
    worker = str(rivals_deepsparse.FOLDER / "worker.py")
    script.write_text(FAKE.format(worker=worker, threads=torch.get_num_threads()))
    return [sys.executable, str(script)]


def _layer(activation: str = "none") -> rivals.Layer:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 64), torch.randn(32, 64), torch.randn(32)
    weight = weight * (torch.rand(32, 64) < 0.2)
    return rivals.Layer(Case("an_op", "tiny", 4, 64, 32), x, weight, bias, activation)


def test_the_worker_gives_its_output_and_the_time_of_its_own_calls(command: list[str]) -> None:
    layer = _layer("relu")
    side = rivals_deepsparse.side(layer, command, 3)
    assert layer.bias is not None
    truth = (layer.x.double() @ layer.weight.double().t() + layer.bias.double()).relu()
    assert tolerance.snr_db(side.call(), truth) > 100
    assert side.seconds is not None
    assert 0.020 <= side.seconds(5) < 0.2
    assert side.own_pool
    kept = int(layer.weight.count_nonzero())
    assert side.cost.flops == pytest.approx(2 * 4 * kept)
    side.close()
    side.close()
    with pytest.raises(ValueError, match="closed file"):
        side.call()


def test_rounds_alternate_between_this_process_and_the_worker(command: list[str]) -> None:
    worker = rivals_deepsparse.side(_layer(), command, 3)
    order: list[str] = []

    def here() -> None:
        order.append("here")
        timing.time.sleep(0.008)

    def there(count: int) -> float:
        order.append("there")
        assert worker.seconds is not None
        return worker.seconds(count)

    def never() -> None:
        raise AssertionError("a remote side is not called in this process")

    samples = timing.interleave(
        {"here": here, "there": never},
        pairs=4,
        sample_seconds=1e-4,
        warmup=0,
        remote={"there": there},
    )
    worker.close()
    # of each kind's runs in a row, only the first: its own warm-up and its repeats follow it
    turns = [name for before, name in zip(["", *order], order, strict=False) if name != before]
    assert turns.count("there") >= 3
    assert turns.count("here") >= 3
    assert len(samples["here"]) == len(samples["there"]) == 4
    assert min(samples["there"]) > 0.0039  # what the fake worker sleeps: it was timed, not us


def test_a_case_closes_its_worker_and_counts_it_as_a_rival(command: list[str]) -> None:
    closed: list[bool] = []

    def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
        layer = replace(_layer(), case=case, bias=None)
        remote = rivals_deepsparse.side(layer, command, 3)
        end = remote.close

        def close() -> None:
            closed.append(True)
            end()

        def product() -> Tensor:
            return layer.x @ layer.weight.t()

        sides = [Side(name, product, COST) for name in ("bigops", "eager")]
        return [product().double()], [*sides, replace(remote, close=close)]

    found = harness.run_case(_layer().case, build, Limits(), pairs=3)
    by_name = {row.provider: row for row in found}
    assert by_name["deepsparse"].median_us > 3900
    assert by_name["deepsparse"].rel_error < 1e-5
    assert closed == [True]


def test_a_worker_that_dies_is_named_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import sys; sys.exit('no license for this machine')")
    with pytest.raises(LeftOut, match="the worker ended: no license for this machine"):
        rivals_deepsparse.side(_layer(), [sys.executable, str(script)], 1)
    script.write_text("print('{\"ready\": true}', flush=True)\ninput()\nraise SystemExit('later')")
    side = rivals_deepsparse.side(_layer(), [sys.executable, str(script)], 1)
    with pytest.raises(RuntimeError, match="the worker ended: later"):
        side.call()
    side.close()


def test_without_its_environment_it_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals_deepsparse, "PYTHON", tmp_path / "python")
    layer = _layer()
    with pytest.raises(LeftOut, match=r"no environment \(python3.11 benches/deepsparse/install"):
        rivals_deepsparse.deepsparse(layer)
    assert layer.bias is not None
    sides = families.sparse_fp32_sides(layer.case, layer.x, layer.weight, layer.bias, "none")
    assert [side.provider for side in sides] == ["torch csr"]


@pytest.mark.skipif(
    not rivals_deepsparse.PYTHON.exists(), reason="benches/deepsparse/install.py has not run"
)
def test_deepsparse_itself_computes_the_product() -> None:
    layer = _layer("relu")
    side = rivals_deepsparse.deepsparse(layer)
    try:
        assert layer.bias is not None
        assert side.seconds is not None
        truth = (layer.x.double() @ layer.weight.double().t() + layer.bias.double()).relu()
        assert tolerance.snr_db(side.call(), truth) > 100
        assert side.seconds(2) > 0
    finally:
        side.close()
