"""The MLP block's case: ours are two, with the same numbers and other kernels between."""

from __future__ import annotations

from dataclasses import replace

import torch

from bigops.benches import bench_quantized_mlp, rivals_openvino
from bigops.benches.rows import is_own
from tests.support.kernels_ran import expect, needs_extension


@needs_extension
def test_ours_differ_in_what_passes_between_only() -> None:
    torch.manual_seed(0)
    case = replace(bench_quantized_mlp.cases()[1], k=64, n=96)
    with torch.inference_mode():
        _, found = bench_quantized_mlp.build(case, "cpu")
        sides = {side.provider: side for side in found}
        with expect(".f32.w8a8_u8", ".u8.w8a8"):
            ours = sides["bigops"].call()
        with expect(".f32.w8a8"):
            floats = sides[bench_quantized_mlp.FLOATS].call()
    assert isinstance(ours, torch.Tensor)
    assert isinstance(floats, torch.Tensor)
    assert torch.equal(ours, floats)
    assert [name for name in sides if is_own(name)] == ["bigops", "bigops floats between"]
    assert ("openvino int8 static" in sides) == rivals_openvino.available()
    assert {"eager", "torch.compile", "torch int8"} <= set(sides)
