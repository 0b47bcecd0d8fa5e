"""The 2:4 cases of sparse_linear: they need a GPU, but what they compute is checked anywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from bigops.benches import bench_sparse_linear, harness, sparse24
from tests.benches.test_harness import INT8_DB
from tests.support import tolerance

CASES = {f"{c.direction} {c.params['values']}": c for c in sparse24.cases()}


@pytest.mark.parametrize("name", CASES)
def test_every_side_agrees_with_float64(name: str) -> None:
    case = replace(CASES[name], m=16, k=64, n=32)
    reference, sides = bench_sparse_linear.build(case, "cpu")
    assert [side.provider for side in sides][:2] == ["bigops", "eager"]
    # a result that is rounded once, or int8 weights and activations
    floor = -20 * math.log10(torch.finfo(harness.DTYPES[case.dtype]).eps / 2)
    if case.params["values"] == "int8":
        floor = INT8_DB
    for side in sides:
        if "compile" not in side.provider:  # a compilation is for a GPU
            with torch.no_grad():
                out = side.call()
            out = side.shown(out) if side.shown else out
            db = tolerance.snr_db(out, reference[0])
            assert db >= floor, f"{side.provider}: {db:.1f} dB"
    assert tolerance.snr_db(reference[0] * 1.1, reference[0]) < floor


def test_a_cpu_leaves_them_out_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    harness._said.clear()
    with pytest.raises(ValueError, match="no case of sparse_linear has '2:4t'"):
        next(harness.run(["sparse_linear"], match="2:4t"))
    assert "sparse_linear: 2:4t packed left out: it needs a GPU" in capsys.readouterr().err
    assert all(case.gpu for case in sparse24.cases())
