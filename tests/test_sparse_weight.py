"""SparseWeight: conversions, the layout as documented, and broken storage that must raise."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from bigops.ops.sparse_linear import (
    SparseWeight,
    block_mask,
    panels,
    sparse_linear,
    sparsify_weight,
)
from tests.kernels_ran import ISAS, isa, needs_extension

module = importlib.import_module("bigops.ops.sparse_linear")  # the name is the function's, too


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (30, 512), (9, 1030), (3, 0), (0, 5)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 1.0])
def test_round_trip(shape: tuple[int, int], sparsity: float) -> None:
    w = torch.randn(shape)
    mask = block_mask(w, sparsity)
    blocks = mask.numel()
    assert int(mask.sum()) == blocks - round(sparsity * blocks)
    pruned = w * mask.repeat_interleave(4, 1)[:, : shape[1]]
    exact = sparsify_weight(w, mask, False)
    exact.validate()
    assert torch.equal(exact.to_dense(), pruned)
    rounded = sparsify_weight(w, mask, True)
    rounded.validate()
    assert rounded.scale is not None
    error = (rounded.to_dense(torch.float64) - pruned.double()).abs()
    assert bool((error <= rounded.scale.double().unsqueeze(1) * 0.5 * (1 + 1e-5)).all())
    kept = int(mask.sum())
    assert rounded.density == (kept / blocks if blocks else 1.0)
    assert rounded.nbytes == kept * 5 + (panels(shape[1]) * shape[0] + 1) * 4 + shape[0] * 4
    assert exact.nbytes == kept * 17 + (panels(shape[1]) * shape[0] + 1) * 4


def test_layout_as_documented() -> None:
    """Panel by panel, within a panel row by row, indices rising: written out by hand."""
    w = torch.zeros(2, 520)
    mask = torch.zeros(2, 130, dtype=torch.bool)
    for block, (row, column) in enumerate([(0, 3), (0, 127), (1, 0), (0, 129), (1, 128)], 1):
        mask[row, column] = True
        w[row, column * 4 : column * 4 + 4] = block
    weight = sparsify_weight(w, mask, False)
    assert weight.index.tolist() == [3, 127, 0, 1, 0]
    assert weight.panel_ptr.tolist() == [0, 2, 3, 4, 5]
    assert weight.values[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert weight.shape == (2, 520)


def test_block_mask_keeps_the_largest_blocks() -> None:
    w = torch.randn(20, 30)
    norm = torch.nn.functional.pad(w, (0, 2)).view(20, 8, 4).norm(dim=-1)
    mask = block_mask(w, 0.7)
    assert norm[mask].min() > norm[~mask].max()
    ties = block_mask(torch.ones(2, 8), 0.5)  # of equal norms the first stays
    assert ties.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: block_mask(torch.ones(2, 4), 1.5), ValueError, "sparsity: expected .* 0 to 1"),
        (lambda: block_mask(torch.ones(4), 0.5), ValueError, "w: expected 2 dimensions"),
        (lambda: block_mask(torch.full((2, 4), float("inf")), 0.5), ValueError, "w: expected fin"),
        (lambda: sparsify_weight(torch.ones(2, 8), torch.ones(2, 8).bool(), True), ValueError,
         r"mask: expected shape \[2, 2\]; got \[2, 8\]"),
        (lambda: sparsify_weight(torch.ones(2, 8), torch.ones(2, 2), True), TypeError,
         "mask: expected dtype bool; got float32"),
    ],
)  # fmt: skip
def test_conversions_refuse(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def corruptions() -> dict[str, tuple[SparseWeight, str]]:
    """Storage that is broken where only its contents show it -> what validate() says."""
    w = torch.randn(6, 1030)
    good = sparsify_weight(w, block_mask(w, 0.5), True)
    falling = good.panel_ptr.clone()
    falling[4], falling[5] = falling[5].clone(), falling[4].clone()
    beyond = good.panel_ptr.clone()
    beyond[3] = 1_000_000
    negative = good.panel_ptr.clone()
    negative[2] = -5
    late = good.panel_ptr.clone()
    late[0] = 1
    short = good.panel_ptr.clone()
    short[-1] -= 1
    wide = good.index.clone()
    wide[3] = 128
    last = good.index.clone()
    last[-1] = 2  # the last panel of 1030 columns has two blocks
    return {
        "falling pointers": (good._replace(panel_ptr=falling), "panel_ptr: .*falling"),
        "a pointer past the blocks": (good._replace(panel_ptr=beyond), "panel_ptr: "),
        "a negative pointer": (good._replace(panel_ptr=negative), "panel_ptr: "),
        "a late start": (good._replace(panel_ptr=late), "panel_ptr: .* got 1 to"),
        "an early end": (good._replace(panel_ptr=short), "panel_ptr: "),
        "an index past the panel": (good._replace(index=wide), "index: .*below 128 in panel 0"),
        "an index past the columns": (good._replace(index=last), "index: .*below 2 in panel 2"),
    }


@needs_extension
@pytest.mark.parametrize("what", corruptions())
@pytest.mark.parametrize("level", ISAS)
def test_broken_contents_raise_and_nothing_is_read_through_them(level: str, what: str) -> None:
    weight, message = corruptions()[what]
    with pytest.raises(ValueError, match=message):
        weight.validate()
    with isa(level):
        for m in (1, 3, 70):
            x = torch.randn(m, 1030)
            with pytest.raises(RuntimeError, match="storage is broken"):
                sparse_linear(x, weight)
            with pytest.raises(RuntimeError, match="storage is broken"):
                torch.ops.bigops.sparse_linear_backward(
                    torch.randn(m, 6), x, *weight[:4], None, "none", True, False
                )
    with pytest.raises(ValueError, match=message):
        module._op._serve(torch.randn(2, 1030), *weight[:4], None, None, "none")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"values": torch.zeros(3, 4)}, TypeError, "values: expected dtype int8"),
        ({"values": torch.zeros(3, 5).char()}, ValueError, r"values: expected shape \[blocks, 4\]"),
        ({"index": torch.zeros(2).byte()}, ValueError, "index: expected shape"),
        ({"index": torch.zeros(3).int()}, TypeError, "index: expected dtype uint8"),
        ({"panel_ptr": torch.zeros(4).int()}, ValueError, r"panel_ptr: expected shape \[6\]"),
        ({"panel_ptr": torch.zeros(6).long()}, TypeError, "panel_ptr: expected dtype int32"),
        ({"scale": torch.zeros(5)}, ValueError, "scale: expected finite values above 0"),
        ({"scale": torch.ones(4)}, ValueError, r"scale: expected shape \[5\]"),
        ({"scale": None}, TypeError, "values: expected dtype float32"),
        ({"values": None}, TypeError, "values: expected a torch.Tensor; got None"),
        ({"shape": (-1, 8)}, ValueError, "shape: expected two sizes of at least 0"),
    ],
)
def test_validate(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good = sparsify_weight(torch.randn(5, 12), torch.eye(5, 3, dtype=torch.bool), True)
    assert good.values.shape == (3, 4)
    with pytest.raises(kind, match=message):
        good._replace(**change).validate()
