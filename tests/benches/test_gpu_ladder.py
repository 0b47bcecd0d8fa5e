"""The ladder of dense products before a GPU is there: in the interpreter, by a made-up clock."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bigops import timing
from bigops.benches import gpu_ladder, limits_gpu
from bigops.benches.gpu_ladder import LADDER, Rung
from bigops.kernels.common import tiles
from tests.support import triton_interpreter

triton_interpreter.install()

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
SMALL = (
    Rung(40, 48, 33, candidates=True),
    Rung(1, 48, 32),
    Rung(20, 24, 40, "swiglu", candidates=True),
    Rung(20, 24, 40, "gelu", epilogue=True),
)


def clock(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Each side is called, more often than there are inputs; the n-th takes n milliseconds."""
    for call in calls.values():
        for _ in range(gpu_ladder.SETS + 1):
            call()
    return {name: 1e-3 * (1 + i) for i, name in enumerate(calls)}


def shipped(form: str) -> set[str]:
    entries = tiles.table_for("interpreter").entries
    return {str(e.config) for e in entries if e.form == form and e.aligned and "bf16" in e.dtypes}


def test_every_provider_of_every_rung_has_a_row() -> None:
    rows = list(gpu_ladder.climb(CPU, 1e9, 1e12, ladder=SMALL, timer=clock))
    for rung, form in zip(SMALL, ("plain", "plain", "gated", "plain"), strict=True):
        of = [row for row in rows if row.case == str(rung)]
        names = [row.provider.partition(":")[0] for row in of]
        assert names[:2] == ["torch", "bigops as served"]
        assert set(names[2:]) == (shipped(form) if rung.candidates else set())
        assert len(of) == len(set(names))
        assert of[1].provider.partition(": ")[2], "no kernel is named"
        assert not any(row.why for row in of)
        assert of[0].distance == 0.0
        # in the root mean square a few roundings to bfloat16 stay below its eps
        assert all(row.distance < torch.finfo(torch.bfloat16).eps for row in of)
        assert [row.speedup for row in of] == pytest.approx([1 / (1 + i) for i in range(len(of))])
    assert len(shipped("plain")) >= 2


def test_rates_are_of_the_nearer_ceiling() -> None:
    (rung,) = (r for r in LADDER if (r.m, r.n, r.k) == (4096, 14336, 4096))
    assert rung.flops == 2 * 4096 * 14336 * 4096
    assert rung.nbytes == 2 * (4096 * 4096 + 14336 * 4096 + 4096 * 14336)
    gated = Rung(2, 3, 5, "swiglu")
    assert (gated.flops, gated.nbytes) == (2 * 2 * 6 * 5, 2 * (2 * 5 + 6 * 5 + 2 * 3))
    full = Rung(2, 3, 5, "gelu", epilogue=True)
    assert full.nbytes == 2 * (2 * 5 + 3 * 5 + 2 * 3 + 3 + 2 * 3)

    def rates(peak: float, bandwidth: float) -> tuple[str, float]:
        row = gpu_ladder.measure(SMALL[1], CPU, peak, bandwidth, clock)[0]
        return row.rate.split()[1], row.share

    work, moved = SMALL[1].flops, SMALL[1].nbytes
    assert rates(work * 1e3, moved * 1e6) == ("TFLOP/s", pytest.approx(1.0))
    assert rates(work * 1e6, moved * 2e3) == ("GB/s", pytest.approx(0.5))


def test_a_tile_that_does_not_launch_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    whole, broken = gpu_ladder.kernels.forward, sorted(shipped("plain"))[0]

    def forward(*inputs: object, config: object, **options: object) -> object:
        if str(config) == broken:
            raise RuntimeError("out of resource: shared memory")
        y, z = whole(*inputs, config=config, **options)
        return y * 1.5, z  # garbage, which the distance tells

    monkeypatch.setattr(gpu_ladder.kernels, "forward", forward)
    path = tmp_path / "ladder.csv"
    rows = gpu_ladder.climb(CPU, 1e9, 1e9, ladder=SMALL[:1], timer=clock)
    assert gpu_ladder.write(rows, path) == 1
    printed = capsys.readouterr().out.splitlines()
    with path.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(printed) == len(written) == 2 + len(shipped("plain"))
    (failed,) = (row for row in written if row["why"])
    assert (failed["provider"], failed["why"]) == (
        broken,
        "RuntimeError: out of resource: shared memory",
    )
    candidates = [row for row in written if row["provider"].split(":")[0] in shipped("plain")]
    for row in candidates:
        assert row is failed or 0.4 < float(row["distance"]) < 0.6


def test_no_rung_begins_after_the_time() -> None:
    rows = list(gpu_ladder.climb(CPU, 1e9, 1e9, until=time.monotonic() - 1, ladder=SMALL))
    assert [row.case for row in rows] == [str(rung) for rung in SMALL]
    assert {row.why for row in rows} == {"left out: the time is up"}


def test_the_medians_are_of_interleaved_rounds_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def interleave_events(calls: object, **options: object) -> dict[str, object]:
        asked.update(options)
        return {"a": timing.np.array([3.0, 1.0, 2.0])}

    monkeypatch.setattr(timing, "interleave_events", interleave_events)
    assert gpu_ladder.medians({"a": lambda: None}) == {"a": 2.0}
    assert asked == {"pairs": 20}


def test_the_program_measures_the_ceilings_and_climbs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_ladder.main([]) == 1
    assert "sees no GPU" in capsys.readouterr().err
    fake = SimpleNamespace(is_available=lambda: True, current_device=lambda: 0)
    monkeypatch.setattr(gpu_ladder.torch, "cuda", fake)
    monkeypatch.setattr(gpu_ladder.torch, "device", lambda *_: CPU)
    monkeypatch.setattr(limits_gpu, "name", lambda device: "A GPU sm_90")
    monkeypatch.setattr(limits_gpu, "measure", lambda device: ({"bf16": 8e14}, 4e12))
    monkeypatch.setattr(gpu_ladder, "climb", lambda *given: iter(given[1:3]))
    monkeypatch.setattr(gpu_ladder, "write", lambda rows, path: print(*rows) or 0)
    assert gpu_ladder.main(["--seconds", "5"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "A GPU sm_90; T(FL)OP/s: bf16 800; copy 4000 GB/s",
        "800000000000000.0 4000000000000.0",
    ]


def test_the_ladder_holds_the_sizes_that_decide() -> None:
    plain = [(r.m, r.n, r.k) for r in LADDER if r.activation == "none"]
    assert {(m, 4096, 4096) for m in (1, 16, 64, 256, 4096)} <= set(plain)
    assert {(8192, 8192, 8192), (4096, 14336, 4096)} <= set(plain)
    assert [r.m for r in LADDER if r.candidates] == [8192, 16]
    assert [r.activation for r in LADDER if r.epilogue] == ["gelu"]
