"""SparseWeight: conversions, the layout as documented, inspection, and what validate() refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigops.formats.patterns import Pattern, block_mask, n_m_mask
from bigops.formats.sparse import SparseWeight
from tests.support.cases.compressed import PATTERNS, VALUES

COLUMNS = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}  # of a word


def full_mask(pattern: str, mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The mask of single entries that a mask of blocks stands for."""
    if ":" in pattern or pattern == "1x1":
        return mask
    height, width = (int(v) for v in pattern.split("x"))
    n, k = shape
    return mask[torch.arange(n).unsqueeze(1) // height, torch.arange(k) // width]


def store(
    pattern: str, w: Tensor, sparsity: float, dtype: torch.dtype
) -> tuple[SparseWeight, Tensor]:
    """The storage and the matrix that it holds before any rounding."""
    how = Pattern.parse(pattern)
    mask = how.mask(w, sparsity)
    weight = SparseWeight.from_mask(w, mask, dtype, (how.height, how.width))
    n, k = w.shape
    return weight, torch.where(full_mask(pattern, mask, (n, k)), w, 0)


# round trips -------------------------------------------------------------------------------

SHAPES = [(1, 1), (5, 7), (30, 512), (9, 1030), (3, 0), (0, 5), (70, 300), (1030, 40), (2060, 9)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", VALUES.values(), ids=str)
def test_round_trip(shape: tuple[int, int], pattern: str, dtype: torch.dtype) -> None:
    w = torch.randn(shape)
    for sparsity in (0.0, 0.3, 0.9, 1.0):
        weight, pruned = store(pattern, w, sparsity, dtype)
        weight.validate()
        got = weight.to_dense()
        if weight.scale is None:
            assert torch.equal(got, pruned.to(dtype).float())
        else:
            error = (weight.to_dense(torch.float64) - pruned.double()).abs()
            assert bool((error <= weight.scale.double().unsqueeze(1) * 0.5 * (1 + 1e-5)).all())
            assert not got[pruned == 0].any()
            assert weight.sums is not None
            whole = (got.double() / weight.scale.double().unsqueeze(1)).round().sum(1)
            assert torch.equal(weight.sums.double(), whole)
        assert bool(weight.pattern()[pruned != 0].all())
        assert_sizes(weight, pruned != 0)


def assert_sizes(weight: SparseWeight, kept: Tensor) -> None:
    """density and nbytes, counted here from the pattern by the rules of the layout."""
    n, k = weight.shape
    columns = COLUMNS[weight.values.dtype]
    chunk = 256 if n >= 2048 else 128 if n >= 1024 else 64
    assert weight.chunk == chunk
    words = -(-k // columns)
    mask = torch.zeros(-(-n // chunk) * chunk, -(-words // 64) * 64, columns, dtype=torch.bool)
    mask.flatten(1)[:n, :k] = kept
    touched = mask.any(-1)
    group = weight.group
    shared = touched.unflatten(0, (-1, group)).any(1)  # [groups, words]
    steps = 0
    for rows in shared.split(chunk // group):
        for panel in rows.split(64, 1):
            lengths = sorted(panel.sum(1).tolist(), reverse=True)
            steps += sum(lengths[:: 16 // group])  # a slice is as long as its longest
    slices = -(-n // chunk) * -(-words // 64) * (chunk // 16)
    per = 16 // group
    assert weight.values.shape == (steps, 16, columns)
    assert weight.index.shape == (steps, per)
    assert weight.rows.shape == weight.length.shape == (slices, per)
    size = steps * (64 + per) + 2 * slices * per + 4 * (slices + 1)
    assert weight.nbytes == size + (8 * n if weight.scale is not None else 0)
    stored = int(shared.repeat_interleave(group, 0)[:n].sum())  # no rows past N
    assert weight.density == (stored / (n * words) if n * words else 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_from_dense_drops_zeros(dtype: torch.dtype) -> None:
    w = (torch.randn(40, 90) * (torch.rand(40, 90) > 0.8)).to(dtype)
    weight = SparseWeight.from_dense(w)
    weight.validate()
    assert weight.values.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    assert torch.equal(weight.to_dense(dtype), w.float().to(dtype))
    assert SparseWeight.from_dense(w, torch.int8).scale is not None
    assert SparseWeight.from_dense(torch.zeros(3, 5)).density == 0


# layout ------------------------------------------------------------------------------------


def test_layout_as_documented() -> None:
    """3 x 66 in float32: two panels, one chunk of 64 rows, so 2 x 4 slices; written by hand."""
    w = torch.zeros(3, 66)
    w[0, 5], w[0, 63], w[1, 2] = 1, 2, 3  # panel 0: rows of length 2, 1, 0
    w[2, 64], w[2, 65], w[1, 65] = 4, 5, 6  # panel 1: rows of length 0, 1, 2
    weight = SparseWeight.from_dense(w)
    assert (weight.shape, weight.chunk, weight.group) == ((3, 66), 64, 1)
    assert weight.ptr.tolist() == [0, 2, 2, 2, 2, 4, 4, 4, 4]
    assert weight.values[:, :3, 0].tolist() == [[1, 3, 0], [2, 0, 0], [4, 6, 0], [5, 0, 0]]
    assert weight.index[:, :3].tolist() == [[5, 2, 0], [63, 0, 0], [0, 1, 0], [1, 0, 0]]
    assert not weight.values[:, 3:].any()
    assert not weight.index[:, 3:].any()
    others = [r for r in range(64) if r not in (1, 2)]
    assert weight.rows.flatten().tolist() == [*range(64), 2, 1, *others]
    assert weight.length.flatten().tolist() == [2, 1, *[0] * 62, 2, 1, *[0] * 62]
    assert weight.scale is None
    assert weight.sums is None


def test_layout_of_a_group_and_of_int8() -> None:
    """Four rows that share a pattern share an index; four columns are one word."""
    w = torch.zeros(6, 9)
    w[:4, 1] = torch.tensor([127.0, -127, 127, 127])
    w[:4, 8] = torch.tensor([1.0, 2, 3, 4])
    w[4:, 5] = 127
    weight = SparseWeight.from_dense(w, torch.int8)
    assert (weight.group, weight.chunk) == (4, 64)
    assert weight.ptr.tolist() == [0, 2, 2, 2, 2]
    assert weight.rows.flatten().tolist() == list(range(16))
    assert weight.length.flatten().tolist() == [2, 1, *[0] * 14]
    assert weight.index.tolist() == [[0, 1, 0, 0], [2, 0, 0, 0]]
    first, second = weight.values.tolist()
    assert first[:6] == [
        [0, 127, 0, 0],
        [0, -127, 0, 0],
        [0, 127, 0, 0],
        [0, 127, 0, 0],
        [0, 127, 0, 0],
        [0, 127, 0, 0],
    ]
    assert second[:4] == [[v, 0, 0, 0] for v in (1, 2, 3, 4)]
    assert weight.scale is not None
    assert weight.scale.tolist() == [1.0] * 6
    assert weight.sums is not None
    assert weight.sums.tolist() == [128, -125, 130, 131, 127, 127]


@pytest.mark.parametrize("n", [1, 15, 16, 37, 1030])
def test_the_group_is_the_tallest_that_holds_everywhere(n: int) -> None:
    for height, group in ((16, 16), (32, 16), (8, 4), (4, 4), (2, 1), (1, 1)):
        w = torch.randn(n, 40)
        mask = torch.rand(-(-n // height), 40) > 0.5
        mask[0, 0], mask[-1, -1] = True, True
        if n > height:
            mask[0], mask[1] = True, False  # neighbours differ
        want = group if n > height else 16
        assert SparseWeight.from_mask(w, mask, torch.float32, (height, 1)).group == want
    if n >= 16:
        one_off = torch.ones(n, 40, dtype=torch.bool)
        one_off[n // 2, 3] = False
        assert SparseWeight.from_mask(torch.randn(n, 40), one_off, torch.float32, (1, 1)).group == 1


def test_pattern_shows_what_fills_a_word() -> None:
    w = torch.zeros(2, 9)
    w[0, 1], w[1, 8] = 1, 1
    for dtype, stored in (
        (torch.float32, {(0, 1), (1, 8)}),
        (torch.bfloat16, {(0, 0), (0, 1), (1, 8)}),
        (torch.int8, {(0, 0), (0, 1), (0, 2), (0, 3), (1, 8)}),
    ):
        weight = SparseWeight.from_dense(w, dtype)
        assert {tuple(at) for at in weight.pattern().nonzero().tolist()} == stored
        assert weight.density == 2 / (2 * -(-9 // COLUMNS[dtype]))


def test_picture() -> None:
    w = torch.zeros(8, 16)
    w[:4, :8] = 1
    w[4, 15] = 1
    lines = SparseWeight.from_dense(w).picture(4, 4).splitlines()
    assert lines[0].startswith("8 x 16, 25.8% stored as f32, ")
    assert lines[1:] == ["+----+", "|@@  |", "|@@  |", "|   :|", "|    |", "+----+"]
    assert SparseWeight.from_dense(torch.zeros(0, 4)).picture() == "[0 x 4, empty]"
    tall = SparseWeight.from_dense(torch.ones(300, 2)).picture().splitlines()
    assert len(tall) == 24 + 3
    assert set(tall[2:-1]) == {"|@@|"}


@pytest.mark.parametrize("dtype", VALUES.values(), ids=str)
def test_numpy_round_trip(dtype: torch.dtype) -> None:
    weight, _ = store("4x1", torch.randn(37, 50), 0.7, dtype)
    arrays = weight.to_numpy()
    assert all(isinstance(v, np.ndarray) for k, v in arrays.items() if k not in ("shape", "chunk"))
    assert ("scale" in arrays) == ("sums" in arrays) == (dtype == torch.int8)
    again = SparseWeight.from_numpy(arrays)
    assert again.shape == weight.shape
    assert again.chunk == weight.chunk
    for a, b in zip(again.tensors().values(), weight.tensors().values(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
    del arrays["length"]
    with pytest.raises(ValueError, match="arrays: expected values, .*; length is missing"):
        SparseWeight.from_numpy(arrays)
    with pytest.raises(ValueError, match="ptr: "):
        SparseWeight.from_numpy({**weight.to_numpy(), "ptr": np.zeros(5, np.int32)})


# masks -------------------------------------------------------------------------------------


def test_block_mask_keeps_the_largest_blocks() -> None:
    w = torch.randn(20, 30)
    for sparsity in (0.0, 0.3, 0.7, 1.0):
        assert int(block_mask(w, sparsity).sum()) == 160 - round(sparsity * 160)
    norm = torch.nn.functional.pad(w, (0, 2)).view(20, 8, 4).norm(dim=-1)
    mask = block_mask(w, 0.7)
    assert norm[mask].min() > norm[~mask].max()
    ties = block_mask(torch.ones(2, 8), 0.5)  # of equal norms the first stays
    assert ties.tolist() == [[True, True], [False, False]]
    tall = block_mask(torch.tensor([[1.0, 0], [1, 0], [0, 3]]), 0.5, (2, 1))
    assert tall.tolist() == [[True, False], [False, True]]


def test_n_m_mask_keeps_the_largest_of_each_group() -> None:
    w = torch.tensor([[1.0, -4, 3, 2, 0, 0, 0, 0, 5, -6, 7], [1, 1, 1, 1, 4, 3, 2, 1, 0, 0, 0]])
    want = [[0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0]]
    assert n_m_mask(w).int().tolist() == want
    assert n_m_mask(w, 1, 3)[0].int().tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 1]
    assert n_m_mask(torch.zeros(3, 0)).shape == (3, 0)
    assert n_m_mask(torch.zeros(0, 8)).shape == (0, 8)


def test_patterns_are_read_and_written() -> None:
    for text in (*PATTERNS, "8x8", "1:2", "4:8"):
        assert str(Pattern.parse(text)) == text
    assert Pattern.parse("2:4") == Pattern(1, 1, 2, 4)
    assert Pattern.parse("16x4").mask_shape(17, 9) == (2, 3)
    assert torch.equal(
        Pattern.parse("2:4").mask(torch.ones(2, 8), None), n_m_mask(torch.ones(2, 8))
    )


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: block_mask(torch.ones(2, 4), 1.5), ValueError, "sparsity: expected .* 0 to 1"),
        (lambda: block_mask(torch.ones(4), 0.5), ValueError, "w: expected 2 dimensions"),
        (lambda: block_mask(torch.full((2, 4), float("inf")), 0.5), ValueError, "w: expected fin"),
        (lambda: block_mask(torch.ones(2, 4).int(), 0.5), TypeError, "w: expected dtype float32"),
        (lambda: block_mask(torch.ones(2, 4), 0.5, (0, 4)), ValueError, "block: expected two"),
        (lambda: n_m_mask(torch.ones(2, 4), 4, 4), ValueError, "n, m: expected 0 < n < m; got 4:4"),
        (lambda: n_m_mask(torch.ones(2, 4), 0, 4), ValueError, "n, m: expected 0 < n < m; got 0:4"),
        (lambda: n_m_mask(torch.full((2, 4), float("nan"))), ValueError, "w: expected finite"),
        (lambda: Pattern.parse("4"), ValueError, "pattern: expected HxW .*; got '4'"),
        (lambda: Pattern.parse("0x4"), ValueError, "pattern: expected HxW .*; got '0x4'"),
        (lambda: Pattern.parse("4:2"), ValueError, "N:M with N < M; got '4:2'"),
        (lambda: Pattern.parse(4), TypeError, "pattern: expected a string .*; got int"),  # type: ignore[arg-type]
        (
            lambda: Pattern(1, 4).mask(torch.ones(2, 4), None),
            ValueError,
            "sparsity: expected a number for the pattern 1x4; got None",
        ),
        (
            lambda: SparseWeight.from_mask(torch.ones(2, 8), torch.ones(2, 8).bool()),
            ValueError,
            r"mask: expected shape \[2, 2\]; got \[2, 8\]",
        ),
        (
            lambda: SparseWeight.from_mask(torch.ones(2, 8), torch.ones(2, 2)),
            TypeError,
            "mask: expected dtype bool; got float32",
        ),
        (
            lambda: SparseWeight.from_mask(torch.ones(2, 8), None),
            TypeError,  # type: ignore[arg-type]
            "mask: expected a torch.Tensor; got NoneType",
        ),
        (
            lambda: SparseWeight.from_mask(
                torch.ones(2, 8), torch.ones(2, 2).bool(), torch.float16
            ),
            TypeError,
            "dtype: expected int8, bfloat16 or float32; got torch.float16",
        ),
        (
            lambda: SparseWeight.from_mask(
                torch.ones(2, 8), torch.ones(2, 2).bool(), block=(1, -4)
            ),
            ValueError,
            "block: expected two sizes of at least 1",
        ),
        (
            lambda: SparseWeight.from_dense(torch.full((2, 2), float("nan"))),
            ValueError,
            "w: expected finite",
        ),
        (
            lambda: SparseWeight.from_dense([[1.0]]),
            TypeError,
            "w: expected a torch.Tensor; got list",
        ),
    ],
)
def test_conversions_refuse(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


# validate ----------------------------------------------------------------------------------
# What breaks memory safety is in tests/ops/sparse_linear/test_errors.py: the kernels refuse it too.


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"values": torch.zeros(2, 16, 4).half()}, TypeError, "values: expected dtype float32, bf"),
        ({"values": torch.zeros(2, 16, 3).char()}, ValueError, r"values: expected shape \[steps, "),
        ({"index": torch.zeros(3, 4).byte()}, ValueError, r"index: expected shape \[2, 16\], .*"),
        ({"index": torch.zeros(2, 2).byte()}, ValueError, r"index: expected .*; got \[2, 2\]"),
        ({"index": torch.zeros(2, 4).int()}, TypeError, "index: expected dtype uint8"),
        ({"rows": torch.zeros(4, 16).byte()}, ValueError, r"rows: expected shape \[4, 4\]"),
        ({"rows": torch.zeros(4, 4).int()}, TypeError, "rows: expected dtype uint8"),
        ({"rows": torch.zeros(4, 4).byte()}, ValueError, "rows: expected each of 0..15 once"),
        ({"length": torch.zeros(5, 4).byte()}, ValueError, r"length: expected shape \[4, 4\]"),
        ({"length": torch.zeros(4, 4).int()}, TypeError, "length: expected dtype uint8"),
        ({"length": torch.full((4, 4), 3).byte()}, ValueError, "length: expected at most the step"),
        ({"length": torch.zeros(4, 4).byte()}, ValueError, "values: expected 0 in the padding"),
        ({"ptr": torch.zeros(4).int()}, ValueError, r"ptr: expected shape \[5\]"),
        ({"ptr": torch.zeros(5).long()}, TypeError, "ptr: expected dtype int32"),
        ({"ptr": torch.zeros(5).int()}, ValueError, "ptr: expected values that rise from 0 to 2"),
        ({"scale": torch.zeros(6)}, ValueError, "scale: expected finite values above 0"),
        (
            {"scale": torch.full((6,), float("nan"))},
            ValueError,
            "scale: expected finite",
        ),
        ({"scale": torch.ones(4)}, ValueError, r"scale: expected shape \[6\]"),
        ({"scale": None}, TypeError, "scale: expected a tensor with int8 .*; got None with int8"),
        ({"sums": None}, TypeError, "sums: expected a tensor with int8 values"),
        (
            {"sums": torch.zeros(6).int()},
            ValueError,
            "sums: expected the sum of the values",
        ),
        ({"sums": torch.zeros(6)}, TypeError, "sums: expected dtype int32"),
        ({"values": None}, TypeError, "values: expected a torch.Tensor; got None"),
        ({"ptr": 3}, TypeError, "ptr: expected a torch.Tensor; got int"),
        ({"n": -1}, ValueError, "n, k: expected at least 0; got -1, "),
        ({"k": -1}, ValueError, "n, k: expected at least 0; got 6, -1"),
        ({"k": 5}, ValueError, "index: expected words inside the 5 columns"),
        ({"n": 70}, ValueError, r"rows: expected shape \[8, 4\]"),
        ({"chunk": 32}, ValueError, "chunk: expected 64, 128 or 256; got 32"),
    ],
)
def test_validate(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    w = torch.zeros(6, 12)
    w[:4, 1], w[:4, 8], w[4:, 5] = 1, 2, 3
    good = SparseWeight.from_dense(w, torch.int8)
    good.validate()
    assert good.index.shape == (2, 4)
    with pytest.raises(kind, match=message):
        good.replace(**change).validate()


def test_validate_refuses_values_that_are_not_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        good = SparseWeight.from_dense(torch.eye(5), dtype)
        for bad in (float("nan"), float("inf")):
            values = good.values.clone()
            values[0, 0, 0] = bad
            with pytest.raises(ValueError, match="values: expected finite values; got NaN or inf"):
                good.replace(values=values).validate()


def test_validate_refuses_words_past_the_columns() -> None:
    """The last of 1030 columns lies in word 257: index 1 of panel 4 is the last one of it."""
    good = SparseWeight.from_mask(torch.randn(6, 1030), torch.ones(6, 258).bool())
    at, last = good.positions(), good.index.clone()
    step = int((at.word == 257).nonzero()[0, 0])
    last[step] = 2
    with pytest.raises(ValueError, match="index: expected words inside the 1030 columns"):
        good.replace(index=last).validate()


def test_positions_say_where_each_word_lies() -> None:
    """By hand from the layout, for the tiny matrix of test_layout_as_documented."""
    w = torch.zeros(3, 66)
    w[0, 5], w[0, 63], w[2, 65] = 1, 2, 5
    weight = SparseWeight.from_dense(w)
    at = weight.positions()
    found = {
        (int(at.row[s, i]), int(at.word[s, i])): weight.values[s, i, 0].item()
        for s, i in at.stored.nonzero().tolist()
    }
    assert found == {(0, 5): 1, (0, 63): 2, (2, 65): 5}


# --- what validate refuses -----------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "16x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_words_of_a_row_rise_and_come_once(dtype: torch.dtype, pattern: str) -> None:
    how = Pattern.parse(pattern)
    w = torch.randn(48, 80)
    weight = SparseWeight.from_mask(w, how.mask(w, 0.5), dtype, (how.height, how.width))
    weight.validate()
    first = int(weight.ptr.diff().argmax())
    start = int(weight.ptr[first])
    assert int(weight.length[first, 0]) >= 2
    twice, turned = weight.index.clone(), weight.index.clone()
    twice[start + 1, 0] = twice[start, 0]
    turned[[start, start + 1], 0] = turned[[start + 1, start], 0]
    for index in (twice, turned):
        with pytest.raises(ValueError, match="index: expected the words of a row to rise"):
            weight.replace(index=index).validate()


def test_a_slice_has_no_more_steps_than_a_panel_has_words() -> None:
    w = torch.randn(16, 64)
    weight = SparseWeight.from_mask(w, torch.ones(16, 64, dtype=torch.bool), torch.float32, (1, 1))
    longer = torch.cat([weight.values, torch.zeros(1, *weight.values.shape[1:])])
    index = torch.cat([weight.index, weight.index[:1]])
    ptr = weight.ptr.clone()
    ptr[1:] += 1
    with pytest.raises(ValueError, match="ptr: expected at most 64 steps in a slice.*got 65"):
        weight.replace(values=longer, index=index, ptr=ptr).validate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_what_is_wrong_is_found_in_any_part_that_is_looked_at(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigops.formats.sparse.BLOCK", 7)  # many parts of a small weight
    w = torch.randn(150, 600)
    weight = SparseWeight.from_mask(w, torch.rand(150, 600) < 0.1, dtype, (1, 1))
    weight.validate()
    stored = weight.positions().stored
    for step in (0, len(weight.values) // 2, len(weight.values) - 1):
        lane = int(stored[step].long().argmax())
        index = weight.index.clone()
        index[step, lane // weight.group] = 64
        with pytest.raises(ValueError, match="index: expected words below 64"):
            weight.replace(index=index).validate()
        values = weight.values.clone()
        values[step, lane] = torch.nan if dtype == torch.float32 else -values[step, lane] - 1
        with pytest.raises(ValueError, match="values: expected finite|sums: expected the sum"):
            weight.replace(values=values).validate()
        if not bool(stored[step].all()):
            values = weight.values.clone()
            values[step, int(stored[step].long().argmin())] = 1
            with pytest.raises(ValueError, match="values: expected 0 in the padding"):
                weight.replace(values=values).validate()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [(1, 4), (16, 1)])
def test_whole_chunks_merge(dtype: torch.dtype, block: tuple[int, int]) -> None:
    parts = []
    for n in (64, 192, 128):
        w = torch.randn(n, 270)
        mask = torch.rand(-(-n // block[0]), -(-270 // block[1])) < 0.3
        parts.append(SparseWeight.from_mask(w, mask, dtype, block, chunk=64))
    merged = SparseWeight.merge(parts)
    merged.validate()
    assert merged.n == 384
    assert torch.equal(merged.to_dense(), torch.cat([part.to_dense() for part in parts]))


def test_parts_that_end_amid_a_chunk_do_not_merge() -> None:
    w = torch.randn(96, 64)
    odd, even = (SparseWeight.from_dense(w[:n]) for n in (96, 64))
    for parts in ([odd, even], [even, SparseWeight.from_dense(torch.randn(64, 128))]):
        with pytest.raises(ValueError, match="parts: expected one, since .* whole chunks"):
            SparseWeight.merge(parts)
