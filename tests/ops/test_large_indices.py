"""Results past 2**31 elements: 32-bit index arithmetic would wrap and write elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bigops.formats.packed import PackedWeight
from bigops.formats.patterns import block_mask
from bigops.formats.quantized import QuantizedWeight
from bigops.formats.sparse import SparseWeight
from bigops.ops.packed_linear import packed_linear
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.support.kernels_ran import expect, needs_extension

ROWS, FEATURES, K = (1 << 16) + 40, 1 << 15, 8
NEEDED = 7 << 30  # bytes: the result in bf16 takes 4.3 GB


def _free() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _sparse(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return sparse_linear(x, SparseWeight.from_mask(w, block_mask(w, 0.5), dtype))

    return product


def _quantised(bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, w: Tensor) -> Tensor:
        return quantized_linear(x, QuantizedWeight.from_dense(w, bits=bits))

    return product


def _packed(x: Tensor, w: Tensor) -> Tensor:
    return packed_linear(x, PackedWeight.from_dense(w.bfloat16()))


FORMS = {
    "packed_linear.bf16": _packed,
    "sparse_linear.bf16.s8": _sparse(torch.int8),
    "sparse_linear.bf16.f32": _sparse(torch.float32),
    "sparse_linear.bf16.bf16": _sparse(torch.bfloat16),
    "quantized_linear.bf16.w8": _quantised(8),
    "quantized_linear.bf16.w4": _quantised(4),
}


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_result_past_two_to_the_31_elements(name: str) -> None:
    if _free() < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory; {_free() >> 30} are there")
    assert ROWS * FEATURES > 1 << 31
    x = torch.randn(ROWS, K).bfloat16()
    w = torch.randn(FEATURES, K)
    with torch.inference_mode(), expect(name):
        y = FORMS[name](x, w)
    # rows do not depend on each other: the same rows alone, on both sides of the border
    border = (1 << 31) // FEATURES
    for rows in (slice(0, 20), slice(border - 20, border + 20), slice(ROWS - 20, ROWS)):
        alone = FORMS[name](x[rows], w)
        assert torch.equal(y[rows], alone)
    del y


@needs_extension
@pytest.mark.slow
def test_a_pass_over_logits_past_two_to_the_31_elements() -> None:
    if _free() < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free memory; {_free() >> 30} are there")
    options = (float(FEATURES), -100, 0.1, 0.01, 5.0, True, False)
    border = (1 << 31) // FEATURES
    logits = torch.zeros(ROWS, FEATURES, dtype=torch.bfloat16)
    target = torch.full((ROWS,), -100)
    parts = [slice(0, 20), slice(border - 20, border + 20), slice(ROWS - 20, ROWS)]
    alone = []
    for rows in parts:
        logits[rows] = torch.randn(rows.stop - rows.start, FEATURES).bfloat16()
        target[rows] = torch.randint(0, FEATURES, (rows.stop - rows.start,))
        alone.append(logits[rows].clone())
    run = torch.ops.bigops.linear_cross_entropy_chunk
    with expect("linear_cross_entropy.bf16.gradient"):
        losses, *_ = run(logits, target, None, None, None, *options)
    for rows, own in zip(parts, alone, strict=True):
        assert torch.equal(losses[rows], run(own, target[rows], None, None, None, *options)[0])
        assert torch.equal(logits[rows], own)
    del logits
