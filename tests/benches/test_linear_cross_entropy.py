"""The bench of linear_cross_entropy: its sides agree, its memory is counted and kept to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bigops.benches import bench_linear_cross_entropy as bench
from bigops.benches import harness, memory
from tests.support.kernels_ran import needs_extension


def test_the_count_sees_what_a_call_holds() -> None:
    def call() -> torch.Tensor:
        big = torch.empty(1 << 20, dtype=torch.uint8)
        return torch.empty(1 << 10, dtype=torch.uint8) + int(big.numel() > 0)

    use = memory.measure(call)
    assert use.kept == 1 << 10
    assert 1 << 20 <= use.working < (1 << 20) + (1 << 14)


@pytest.mark.slow  # a side is compiled
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_sides_agree_with_float64(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = next(c for c in bench.cases() if c.name == "small" and c.dtype == dtype)
    case = replace(case, m=24, k=16, n=40)
    reference, sides = bench.build(case, "cpu")
    assert {"bigops", "eager", "torch.compile"} <= {side.provider for side in sides}
    for side in sides:
        assert harness.relative_error(side.call(), reference) < (1e-5 if dtype == "fp32" else 0.02)
    assert "held beyond the gradients, as a part of the logits: bigops" in capsys.readouterr().err


@needs_extension
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
def test_our_side_holds_less_than_15_percent_of_the_logits(dtype: torch.dtype) -> None:
    # large enough that the megabyte which oneDNN takes for one bf16 product by AMX weighs little
    m, k, v = 2048, 128, 24576
    x = torch.randn(m, k).to(dtype).requires_grad_()
    weight = torch.randn(v, k).to(dtype).requires_grad_()
    target = torch.randint(0, v, (m,))
    logits = m * v * x.element_size()

    def forward(loss: bench.Loss) -> float:
        return memory.measure(lambda: loss(x, weight, target, "mean")).working / logits

    assert forward(bench.own) < 0.15
    with torch.no_grad():
        assert forward(bench.own) < 0.15
        assert forward(bench.eager) > 1
