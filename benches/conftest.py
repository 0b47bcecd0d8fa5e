"""The pytest door to the cases: one benchmark per case, ratios and rows in its extra_info."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bigops.benches import harness, rows
from bigops.benches.limits import Limits


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the cases marked quick")
    parser.addoption("--pairs", type=int, default=30, help="interleaved rounds per case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        cases = [c for c in metafunc.module.cases() if c.quick or not quick]
        metafunc.parametrize("case", cases, ids=[c.id for c in cases])


@pytest.fixture(scope="session")
def limits() -> Limits:
    """The machine's limits, measured once at the start of the run."""
    return Limits.measure()


@pytest.fixture
def versus(
    request: pytest.FixtureRequest, benchmark: Any, limits: Limits
) -> Iterator[Callable[[harness.Case], None]]:
    """Run all sides of a case interleaved; keep rows and ratios in the benchmark's extra_info.

    pytest-benchmark's own statistics are of bigops's side alone and only there to fill its report;
    the ratios come from the interleaved rounds.
    """
    done: list[rows.Row] = []

    def run(case: harness.Case) -> None:
        pairs, device = request.config.getoption("--pairs"), "cuda" if case.gpu else "cpu"
        if case.gpu and not torch.cuda.is_available():
            pytest.skip("the case is of GPU kernels, and torch sees no GPU")
        result = harness.run_case(case, request.module.build, limits, device=device, pairs=pairs)
        done.extend(result)
        own = next(row for row in result if rows.is_own(row.provider))
        benchmark.group = f"{case.op} {case.direction} {case.dtype}"
        benchmark.extra_info.update(
            rows=[asdict(row) for row in result],
            ratio_to_eager=own.ratio_to_eager,
            ratio_interval=[own.ratio_low, own.ratio_high],
            best_rival=own.best_rival,
            ratio_to_best_rival=own.ratio_to_best_rival,
            best_rival_interval=[own.best_low, own.best_high],
            limits=str(limits),
        )
        own_side = own_call(case, request.module.build, device)
        benchmark.pedantic(own_side, rounds=5, warmup_rounds=1)

    yield run
    print(rows.table(done))


def own_call(case: harness.Case, build: harness.Build, device: str) -> Callable[[], object]:
    """This package's side of a case, on its own."""
    _, sides = build(case, device)
    for side in sides:
        side.close()
    return next(side.call for side in sides if rows.is_own(side.provider))
