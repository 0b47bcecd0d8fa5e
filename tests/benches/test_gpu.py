"""`bigops bench --device cuda` without a GPU: the benches take this CPU for one."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from bigops import cli, timing
from bigops.benches import harness, limits_gpu, plots, rivals, rivals_cuda, rows
from bigops.benches.harness import Case, LeftOut, Side
from bigops.benches.limits import Cost, Limits
from tests.support import tolerance

GPU_OPS = [op for op in harness.op_names() if op != "packed_linear"]
COST = Cost("fp32", 1.0, 1.0)


class Pretended(str):
    """The name of the CPU for torch, that of another device for the benches."""

    def __eq__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return super().__hash__()


DEVICE = Pretended("cpu")


class Event:
    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return max(1e-6, (end.at - self.at) * 1e3)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPU's clock is this CPU's, and its flush is counted."""
    flushes: list[str] = []
    events = functools.partial(
        timing.interleave_events,
        event=Event,
        sync=lambda: None,
        flush=lambda: flushes.append("f"),
        warmup=0,
    )
    monkeypatch.setattr(timing, "interleave_events", events)
    monkeypatch.setattr(limits_gpu, "name", lambda device: "A GPU 80GB sm_90")
    return flushes


def small_case(op: str, match: str = "") -> Case:
    module = harness.bench_module(op)
    case = next(c for c in module.cases() if match in c.id and c.n > 8)
    if op == "fused_adamw":
        return replace(case, m=1, k=16, n=32, params={**case.params, "vocab": 0})
    if op == "bert_layer":
        return replace(case, m=8, k=64, n=64, params={**case.params, "batch": 1})
    return replace(case, m=24, k=128, n=64, rotate=False)


CASES = [(op, "") for op in GPU_OPS] + [
    ("quantized_linear", "w4-grid"),
    ("quantized_linear", "w8-grid"),
    ("sparse_linear", "pattern-bf16-2:4"),
    ("sparse_linear", "pattern-int8-16x16"),
    ("sparse_linear", "backward-x"),
    ("fused_linear", "forward+backward"),
    ("fused_adamw", "clip"),
    ("fused_adamw", "8bit"),
]


@pytest.mark.parametrize(("op", "match"), CASES)
def test_every_case_runs_on_what_is_not_a_cpu(
    op: str, match: str, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rivals, "compiled", lambda function, *_: function)
    module, case = harness.bench_module(op), small_case(op, match)
    if op in ("bert_layer", "quantized_mlp"):
        monkeypatch.setattr(
            module,
            "compiled" if op == "bert_layer" else "_compiled",
            (lambda f: f) if op == "bert_layer" else _uncompiled,
        )
    found = harness.run_case(case, module.build, Limits(device="cuda"), device=DEVICE, pairs=2)
    providers = {row.provider for row in found}
    assert "eager" in providers
    assert any(map(rows.is_own, providers))
    assert clock, "timed by another clock than the GPU's"
    assert not providers & {"torch int8 fbgemm", "torch int8 onednn", "openvino fp32"}
    assert all("triton=" in row.versions and "cuda=" in row.versions for row in found)
    assert all(row.rel_error < 0.1 for row in found if not rows.is_own(row.provider))


def _uncompiled(model: Any, x: Tensor, cost: Cost) -> Side:
    return Side("torch.compile", lambda: model(x), cost)


def test_limits_are_measured_and_bytes_always_count() -> None:
    """Counted by a clock that says one second a call."""

    def timer(calls: Any) -> dict[str, float]:
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 1.0)

    peaks, bandwidth = limits_gpu.measure(torch.device("cpu"), timer, size=32, copied=1 << 12)
    assert peaks == dict.fromkeys(("fp32", "bf16", "fp16", "int8"), 2.0 * 32**3)
    assert bandwidth == 2 << 12
    limits = Limits("A GPU", 1, peaks, bandwidth, "cuda")
    cost = Cost("bf16", 65536.0, 8192.0 * 3)
    assert limits.floor_seconds(cost, True, "cuda") == pytest.approx(3.0)
    assert limits.floor_seconds(cost, False, "cuda") == pytest.approx(1.0)
    assert limits.floor_seconds(cost, True, "cpu") is None
    assert "int8" in str(limits)


def test_rows_name_the_gpu_and_its_plots_are_drawn(tmp_path: Path) -> None:
    def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
        x = torch.ones(4, 4, device=device)
        sides = [Side(name, lambda: x * 2, COST) for name in ("bigops", "eager")]
        return [x.double() * 2], sides

    limits = Limits("A GPU 80GB sm_90", 1, {"fp32": 1e9}, 1e9, DEVICE)
    limits = replace(limits, device="cuda")
    found = harness.run_case(Case("an_op", "c", 4, 4, 4), build, limits, device=DEVICE, pairs=3)
    assert {row.isa for row in found} == {"A GPU 80GB sm_90"}
    rows.write_csv(found, tmp_path / "b.csv")
    assert "A GPU 80GB sm_90" in (tmp_path / "b.csv").read_text()
    pytest.importorskip("matplotlib")
    assert [file.stat().st_size > 0 for file in plots.plot(found, tmp_path / "b.png")] == [True]


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_a_gpu_the_command_says_so_in_one_line(
    device: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--op", "fused_linear", "--device", device]) == cli.MISUSE
    said = capsys.readouterr().err
    assert f"torch sees no GPU here; got '{device}'" in said
    assert said.count("\n") == 1


def test_a_device_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, message in (("tpu", "cpu, cuda or cuda:N"), ("cuda:2", "an index below 2")):
        with pytest.raises(ValueError, match=f"device: expected {message}; got '{device}'"):
            next(harness.run(["fused_linear"], device=device))


def test_packed_linear_is_left_out_of_a_run_on_a_gpu(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "check_device", lambda device: None)
    monkeypatch.setattr(harness, "_said", set())
    with pytest.raises(ValueError, match="no case of packed_linear"):
        next(harness.run(["packed_linear"], device="cuda"))
    assert "packed_linear: a layout for CPUs" in capsys.readouterr().err


# --- rivals --------------------------------------------------------------------------------------


def layer(m: int = 24, k: int = 128, n: int = 64, dtype: torch.dtype = torch.bfloat16) -> Any:
    x, w, b = torch.randn(m, k).to(dtype), (torch.randn(n, k) / 11).to(dtype), torch.randn(n)
    return rivals.Layer(Case("an_op", "c", m, k, n), x, w, b.to(dtype), "relu")


def db(side: Side, given: Any, weight: Tensor) -> float:
    truth = torch.relu(given.x.double() @ weight.double().t() + given.bias.double())
    out = side.call()
    assert isinstance(out, Tensor)
    return tolerance.snr_db(out, truth)


def test_int8_rivals_compute_the_layer() -> None:
    given = layer()
    sides = rivals_cuda.int8_sides(given)
    assert [side.provider for side in sides] == ["torch _int_mm", "torch int8pack"]
    assert all(db(side, given, given.weight) > 30 for side in sides)
    with pytest.raises(LeftOut, match="needs M > 16"):
        rivals_cuda.int_mm(layer(m=16))


def test_tinygemm_gets_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what its two ops do with bytes, nibbles and (scale, zero) pairs."""
    given = layer()
    weight = rivals.round_int4(given.weight, 64)

    def multiply(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
        q = torch.stack([packed >> 4, packed & 15], dim=2).flatten(1).float() - 8
        scale, zero = (part.t().repeat_interleave(group, 1) for part in scales.float().unbind(2))
        return (x.float() @ (q * scale + zero).t()).bfloat16()

    ops = SimpleNamespace(
        _convert_weight_to_int4pack=lambda w, tiles: w, _weight_int4pack_mm=multiply
    )
    with monkeypatch.context() as patched:
        patched.setattr(torch.ops, "aten", ops)
        (side,) = rivals_cuda.int4_sides(given, weight)
        assert db(side, given, weight.to_dense()) > 30
    with pytest.raises(LeftOut, match="no groups of 16"):
        rivals_cuda.tinygemm(given, rivals.round_int4(given.weight, 16))


def test_semi_structured_and_liger_say_why_they_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(LeftOut, match="bf16 and fp16 only"):
        rivals_cuda.semi_structured(layer(dtype=torch.float32))
    with pytest.raises(LeftOut, match="torch semi-structured: "):
        rivals_cuda.semi_structured(layer())  # a CPU has no such cores
    given = layer()
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight)
    assert db(rivals_cuda.semi_structured(given), given, given.weight) > 30
    with pytest.raises(LeftOut, match="liger: ModuleNotFoundError"):
        rivals_cuda.liger(lambda loss: lambda: loss, COST)
