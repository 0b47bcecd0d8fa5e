"""The benchmark harness: ratios point the right way, errors are seen, rows keep their columns."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bigops import timing
from bigops.benches import harness, rivals, rows
from bigops.benches.harness import Case, LeftOut, Side
from bigops.benches.limits import Cost, Limits
from tests.support import tolerance

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = (
    "op,case,direction,dtype,m,k,n,params,provider,kernel,isa,threads,median_us,spread,"
    "ratio_to_eager,ratio_low,ratio_high,best_rival,ratio_to_best_rival,best_low,best_high,"
    "fraction_of_limit,rel_error,versions"
)
# Signal-to-noise against float64: below these a side computes something else. int8 with one scale
# a row gives about 40 dB on normal data, fp32 more than 130.
INT8_DB, FP32_DB = 30, 100
COST = Cost("fp32", 1e6, 1e6)
ROW = rows.Row(
    "an_op",
    "c",
    "forward",
    "fp32",
    1,
    2,
    3,
    "a=1",
    "bigops",
    "k",
    "avx2",
    2,
    1.5,
    0.1,
    2.0,
    1.9,
    2.1,
    "eager",
    1.2,
    1.1,
    1.3,
    None,
    1e-7,
    "bigops=0",
)


# --- timing ------------------------------------------------------------------------------------


def test_every_side_is_sampled_once_a_round_in_rotating_order() -> None:
    order: list[str] = []

    def side(name: str) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            time.sleep(1e-4)

        return call

    samples = timing.interleave(
        {name: side(name) for name in "abc"}, pairs=6, sample_seconds=1e-5, warmup=0
    )
    assert {name: len(s) for name, s in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = order[-2 * 3 * 6 :: 2]  # each sample is one untimed and one timed call here
    assert ["".join(rounds[i : i + 3]) for i in range(0, 18, 3)] == ["abc", "bca", "cab"] * 2


def test_speedup_is_the_median_of_pairs_and_its_interval_widens_with_noise() -> None:
    rng = np.random.default_rng(1)
    drift = np.exp(rng.normal(0, 0.5, 60))  # the machine slows both sides of a round alike
    exact = timing.speedup(2.0 * drift, 1.0 * drift)
    assert exact == (2.0, 2.0, 2.0)
    noisy = timing.speedup(2.0 * drift * np.exp(rng.normal(0, 0.2, 60)), drift)
    assert noisy.low < noisy.value < noisy.high
    assert 1.7 < noisy.low < 2.0 < noisy.high < 2.4


@pytest.mark.parametrize("shapes", [(3, 4), (0, 0)])
def test_speedup_refuses_samples_of_other_rounds(shapes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="paired samples"):
        timing.speedup(np.ones(shapes[0]), np.ones(shapes[1]))


def test_interleave_refuses_nothing_to_time() -> None:
    with pytest.raises(ValueError, match="sides: expected at least one"):
        timing.interleave({})
    with pytest.raises(ValueError, match="pairs: expected at least 1, got 0"):
        timing.interleave({"a": lambda: None}, pairs=0)


def test_idle_is_awaited_and_a_spinning_pool_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.wait_idle(limit=60.0)  # nothing of this process spins for that long
    monkeypatch.setattr(timing.time, "process_time", time.perf_counter)  # one core always busy
    start = time.perf_counter()
    assert not timing.wait_idle(limit=0.05)
    assert time.perf_counter() - start >= 0.05


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert timing.spread(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 3)


# --- one case ------------------------------------------------------------------------------------


def _case(**more: object) -> Case:
    return replace(Case("an_op", "tiny", 4, 8, 4), **more)


def _build(own: Callable[[Tensor], Tensor], *more: Side) -> harness.Build:
    def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
        x = torch.randn(case.m, case.k)
        sides = [
            Side("bigops", lambda: own(x), COST, "own kernel"),
            Side("eager", lambda: x * 2, COST, "aten"),
            *more,
        ]
        return [x.double() * 2], sides

    return build


LIMITS = Limits("avx2", 1, {"fp32": 1e12}, 1e10)


def test_a_row_per_provider_with_error_ratio_and_fraction() -> None:
    found = harness.run_case(_case(), _build(lambda x: x + x), LIMITS, pairs=5)
    own, eager = found
    assert [row.provider for row in found] == ["bigops", "eager"]
    assert (own.kernel, eager.kernel) == ("own kernel", "aten")
    assert own.rel_error == 0
    assert (eager.ratio_to_eager, eager.ratio_low, eager.ratio_high) == (1, 1, 1)
    assert own.fraction_of_limit == pytest.approx(1e6 / 1e12 / (own.median_us * 1e-6))
    assert own.ratio_low <= own.ratio_to_eager <= own.ratio_high


def test_a_wrong_result_shows_in_the_error_column() -> None:
    own, _ = harness.run_case(_case(), _build(lambda x: x * 2 + 1), LIMITS, pairs=2)
    assert own.rel_error > 0.1
    with pytest.raises(ValueError, match="expected shapes"):
        harness.run_case(_case(), _build(lambda x: x[:2]), LIMITS, pairs=2)


def test_a_failing_rival_is_left_out_and_a_failing_own_kernel_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError("no such shape")

    rival, wrong = Side("rival", broken, COST), Side("wrong", lambda: torch.ones(4, 8), COST)
    found = harness.run_case(_case(), _build(lambda x: x * 2, rival, wrong), LIMITS, pairs=2)
    assert [row.provider for row in found] == ["bigops", "eager"]
    said = capsys.readouterr().err
    assert "rival left out: no such shape" in said
    assert "wrong left out: wrong by" in said
    with pytest.raises(RuntimeError, match="no such shape"):
        harness.run_case(_case(), _build(broken), LIMITS, pairs=2)


def test_best_rival_is_the_fastest_of_the_others() -> None:
    def after(seconds: float) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            time.sleep(seconds)
            return x * 2

        return call

    torch.manual_seed(0)
    x = torch.randn(4, 8)  # what the case draws
    slow = Side("slow rival", lambda: after(0.02)(x), COST)
    found = harness.run_case(_case(), _build(after(0.005), slow), LIMITS, pairs=3)
    ratios = {row.provider: row.ratio_to_best_rival for row in found}
    assert {row.best_rival for row in found} == {"eager"}
    assert ratios["eager"] == 1  # by far the fastest
    assert all(row.best_low <= row.ratio_to_best_rival <= row.best_high for row in found)
    assert ratios["slow rival"] < ratios["bigops"] < 1


def test_several_providers_of_ours_are_no_rivals_of_each_other() -> None:
    def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
        x = torch.ones(case.m, case.k)
        names = ("bigops int8", "bigops sparse int8 80%", "eager", "bigopsless")
        return [x.double()], [Side(name, lambda: x + 0, COST) for name in names]

    found = harness.run_case(_case(), build, LIMITS, pairs=3)
    assert {row.best_rival for row in found} <= {"eager", "bigopsless"}

    def broken(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
        reference, sides = build(case, device)
        return [reference[0] * 2], [replace(s, call=lambda: 1 / 0) for s in sides[:1]]

    with pytest.raises(ZeroDivisionError):  # a form of ours that fails is no provider to leave out
        harness.run_case(_case(), broken, LIMITS, pairs=1)


def test_memory_cases_rotate_past_the_cache_and_others_do_not() -> None:
    weight = torch.ones(1 << 10, 1 << 10)  # 4 MB
    assert len(harness.clones(_case(), weight)) == 1
    many = harness.clones(_case(rotate=True), weight)
    assert len(many) * 4 * weight.numel() >= harness.PAST_CACHE
    assert len({t.data_ptr() for t in many}) == len(many)
    take = harness.in_turn(many)
    assert [take() is t for t in [*many, many[0]]] == [True] * (len(many) + 1)


def test_the_limit_is_whichever_binds_and_unknown_when_not_measured() -> None:
    cost = Cost("fp32", 1e9, 1e9)  # 1 ms of arithmetic, 100 ms of bytes
    assert LIMITS.floor_seconds(cost, from_dram=False) == pytest.approx(1e-3)
    assert LIMITS.floor_seconds(cost, from_dram=True) == pytest.approx(0.1)
    assert LIMITS.floor_seconds(replace(cost, nbytes=1e3), from_dram=True) == pytest.approx(1e-3)
    assert LIMITS.floor_seconds(replace(cost, unit="int8"), from_dram=False) is None
    assert LIMITS.floor_seconds(cost, from_dram=False, device="cuda") is None
    assert replace(LIMITS, dram=None).floor_seconds(cost, from_dram=True) is None
    assert "peaks unknown; DRAM unknown" in str(Limits())


# --- the cases of the ops ------------------------------------------------------------------------


@pytest.mark.parametrize("op", harness.op_names())
def test_cases_have_their_own_names_and_a_quick_part(op: str) -> None:
    cases = harness.bench_module(op).cases()
    names = [case.id for case in cases]
    assert len(set(names)) == len(names)
    quick = [case for case in cases if case.quick]
    assert quick
    assert len(quick) < len(cases)
    assert {case.op for case in cases} == {op}


@pytest.mark.parametrize("op", harness.op_names())
def test_every_side_of_a_small_case_agrees_with_float64(op: str) -> None:
    module = harness.bench_module(op)
    names = ("mlp", "layer")
    cases = [c for c in module.cases() if c.dtype == "fp32"]
    layers = [c for c in cases if any(n in c.name for n in names)]
    if layers:
        small = replace(layers[0], m=16, k=64, n=32)
    else:  # its sizes belong together
        small = min(cases, key=lambda c: c.m * c.k * c.n)
    with torch.inference_mode():
        reference, sides = module.build(small, "cpu")
        for side in sides:
            if "compile" not in side.provider:  # a compilation is for `pytest benches`
                truth = (side.reference or reference)[0]
                out = side.call()
                db = tolerance.snr_db(out if side.shown is None else side.shown(out), truth)
                # weight-only int8 multiplies in bf16
                rounds = (op, side.provider) == ("fp8_linear", harness.OWN)
                exact = side.cost.unit == "fp32" and not rounds and op != "act_quant"
                floor = FP32_DB if exact else INT8_DB
                assert db > floor, f"{side.provider}: {db:.1f} dB"


def test_unknown_op_device_and_empty_match_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"op: expected one of .*bert_layer, fp8_linear, fused_adamw, .*got 'conv'"
    ):
        harness.bench_module("conv")
    with pytest.raises(ValueError, match="no case of fused_linear has 'nothing like it'"):
        next(harness.run(["fused_linear"], match="nothing like it"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees no GPU"):
            next(harness.run(["fused_linear"], device="cuda"))


def test_rivals_say_why_they_are_left_out() -> None:
    x, weight, bias = torch.randn(2, 8), torch.randn(4, 8), torch.randn(4)
    with pytest.raises(LeftOut, match="no swiglu in one call"):
        rivals.onednn_prepacked(_case(), x, weight, bias, "swiglu", COST)
    with pytest.raises(LeftOut, match=r"refuses torch\.float64"):
        rivals.onednn_prepacked(_case(), x, weight.double(), bias, "relu", COST)
    with pytest.raises(LeftOut, match="float32 only"):
        rivals.dynamic_int8(_case(), "fbgemm", x.bfloat16(), weight, bias, "relu", COST)
    with pytest.raises(LeftOut, match="not in this torch"):
        rivals.dynamic_int8(_case(), "no engine", x, weight, bias, "relu", COST)
    sides: list[Side] = []
    harness.optional_side(sides, rivals.plugin_side, "no_such_package", *[None] * 6)
    assert sides == []


# --- rows ----------------------------------------------------------------------------------------


def test_csv_has_exactly_the_columns(tmp_path: Path) -> None:
    rows.write_csv([ROW, replace(ROW, fraction_of_limit=0.5)], tmp_path / "b.csv")
    text = (tmp_path / "b.csv").read_text()
    assert text.splitlines()[0] == COLUMNS
    read = list(csv.DictReader(text.splitlines()))
    assert [row["fraction_of_limit"] for row in read] == ["unknown", "0.5"]
    assert float(read[0]["ratio_low"]) == ROW.ratio_low


def test_a_broken_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "b.csv"
    rows.write_csv([ROW], target)
    before = target.read_text()
    with pytest.raises(TypeError):
        rows.write_csv([ROW, None], target)  # type: ignore[list-item]
    assert target.read_text() == before
    assert [f.name for f in tmp_path.iterdir()] == ["b.csv"]


def test_rows_survive_the_json_of_pytest_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"benchmarks": [{"extra_info": {"rows": [asdict(ROW)]}}]}))
    assert rows.from_benchmark_json(file) == [ROW]
    for text in ("", "{", "[]", "{}", '{"benchmarks": []}', '{"benchmarks": [{"extra_info": {}}]}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"b\.json: expected"):
            rows.from_benchmark_json(file)


def test_the_table_shows_every_case() -> None:
    found = [ROW, replace(ROW, provider="eager"), replace(ROW, case="d", m=7)]
    text = rows.table(found)
    assert "an_op c 1x2x3 fp32 forward a=1 (2 threads)" in text
    assert "an_op d 7x2x3 fp32 forward" in text
    assert "2.00x (1.90-2.10)" in text


@pytest.mark.slow
def test_the_versus_fixture_fills_the_json_that_makes_the_csv(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    # pytest-benchmark measures nothing where it finds itself in a worker of pytest-xdist.
    alone = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "benches",
            "-q",
            "--quick",
            "--pairs",
            "3",
            "-k",
            "overhead and not graph",
            f"--benchmark-json={out}",
        ],
        cwd=ROOT,
        check=True,
        timeout=300,
        env=alone,
    )
    found = rows.from_benchmark_json(out)
    without = {"act_quant", "bert_layer", "fp8_linear", "fused_adamw"}  # none of theirs is named so
    assert {row.op for row in found} == set(harness.op_names()) - without
    assert {"bigops", "eager", "torch.compile"} <= {row.provider for row in found}
    info = json.loads(out.read_text())["benchmarks"][0]["extra_info"]
    assert info["ratio_to_eager"] > 0
    assert len(info["ratio_interval"]) == 2
