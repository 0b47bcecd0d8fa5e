"""Triton kernels executed from their compiled form (TTIR) on the CPU: no access out of bounds, no
race between programs, no value that nobody wrote, and values by the one numerics rule.

The interpreter runs the source; this runs what Triton's front end makes of it. The canaries come
first: faults that must be named, and the sound forms of the same kernels, which must not be.
"""

from __future__ import annotations

import csv

import pytest

pytest.importorskip("triton")

from tests.kernels import ttsem_child, ttsem_run
from tests.kernels.gpu_report.golden import GOLDEN
from tests.kernels.ttsem_run import Verdict, judge

pytestmark = pytest.mark.skipif(bool(ttsem_run.lacks()), reason=ttsem_run.lacks())

# canary: what is said of it, and a part of the message
CAUGHT = {
    "masked store": ("clean", ""),
    "unmasked store": ("oob_write", "tl.store(y + at, tl.load(x + at, mask=at < N"),
    "unmasked load": ("oob_read", "tl.load(x + at)"),
    "a place for each program": ("clean", ""),
    "one place for all programs": ("race", "both touch element 0 of `y`"),
    "a tensor behind a table": ("clean", ""),
    "past a tensor behind a table": ("oob_write", "tl.store(y + at, at.to(tl.float32)"),
    "a tensor that nobody named": ("oob_write", "tl.store(y + at, at.to(tl.float32)"),
    "some of the output left out": ("wrong values", "NaN at other places"),
}
CAUGHT_IN_THE_GEMM = {
    "a copy of the GEMM": ("clean", ""),
    "the GEMM without its mask": ("oob_write", "past the end of the tensor passed as `c`"),
    "the GEMM reads past K": ("oob_read", "kernel `gemm`"),
    "tiles of the GEMM in one place": ("race", "of `c`"),
}
# Kernels of the golden table that ttsem cannot judge, each with its reason: none today.
NOT_JUDGED: dict[str, str] = {}
# Cases that it cannot: the operation it stops at, and why. The interpreter runs them.
BEYOND = {
    # ttsem 0.1.0 shifts a uint64 by a Python int there, which numpy 1 refuses and numpy 2 takes
    "fused_adamw, stochastic rounding": "tt.mulhiui",
}


def assert_clean(case: str, verdict: Verdict) -> None:
    assert verdict.said == "clean", f"{case}: {verdict.said}: {verdict.message}"
    assert verdict.races_unchecked == 0, f"{case}: launches that are too large to be checked"
    assert verdict.kernels, f"{case}: no kernel was launched"
    assert not any(name.startswith("reference.") for name in verdict.names), verdict.names


def assert_caught(caught: dict[str, tuple[str, str]], found: dict[str, Verdict]) -> None:
    for case, (said, part) in caught.items():
        assert found[case].said == said, f"{case}: {found[case]}"
        assert part in found[case].message, f"{case}: {found[case].message}"


@pytest.mark.slow
def test_canaries_are_caught_and_one_case_of_each_kind_is_clean() -> None:
    """In one process: most of the time is its start."""
    assert set(CAUGHT) == set(ttsem_child.CANARIES)
    found = judge(*CAUGHT, *ttsem_child.QUICK)
    assert_caught(CAUGHT, found)
    for case in ttsem_child.QUICK:
        assert_clean(case, found[case])


@pytest.mark.slow
def test_faults_planted_in_the_gemm_are_caught() -> None:
    assert set(CAUGHT_IN_THE_GEMM) == set(ttsem_child.GEMM_CANARIES)
    assert_caught(CAUGHT_IN_THE_GEMM, judge(*CAUGHT_IN_THE_GEMM))


@pytest.fixture(scope="module")
def wide() -> dict[str, Verdict]:
    return judge(*ttsem_child.WIDE)


@pytest.mark.slow
@pytest.mark.parametrize("case", ttsem_child.WIDE)
def test_nothing_is_found(case: str, wide: dict[str, Verdict]) -> None:
    assert_clean(case, wide[case])


@pytest.mark.slow
def test_every_kernel_was_judged(wide: dict[str, Verdict]) -> None:
    """Each kernel of the golden table, by a case of ttsem_child.py or with a reason here."""
    with GOLDEN.open(newline="") as file:
        kernels = {row["kernel"] for row in csv.DictReader(file)}
    judged = {kernel for verdict in wide.values() for kernel in verdict.kernels}
    assert judged & set(NOT_JUDGED) == set(), "judged after all"
    assert kernels - judged == set(NOT_JUDGED), "a case is missing in ttsem_child.py"


@pytest.mark.slow
def test_what_cannot_be_judged_is_named_with_its_reason() -> None:
    assert set(BEYOND) == set(ttsem_child.BEYOND)
    for case, verdict in judge(*BEYOND).items():
        if verdict.said == "unjudged":
            assert BEYOND[case] in verdict.message, f"{case}: {verdict.message}"
        else:
            assert_clean(case, verdict)
