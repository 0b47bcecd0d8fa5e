"""2:4 sparse weights and products by mma.sp: the compressed form and the host twins of the
instructions, held to NVIDIA's manual.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigops.formats.patterns import _BLOCKS, n_m_mask, transposable_mask
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse24 import Sparse24Weight, _bits, sample, to_dense, transpose
from bigops.ops.sparse_linear.sparse24_pack import pack24, prune24
from tests.support import hostrun

SOURCE = hostrun.HERE / "hostrun_kernels.cu"

# Parallel Thread Execution ISA, "Sparse matrix storage", figure "Sparse MMA storage example": rows
# 0 to 7 of a 16 x 16 matrix as it prints them, the numbers that it keeps and their places in four.
# Rows 8 to 15 and columns 8 to 15 repeat them.
FIGURE = (
    ([1, 0, 2, 0, 3, 0, 4, 0], [1, 2, 3, 4], [0, 2, 0, 2]),
    ([0, 5, 0, 6, 0, 7, 0, 8], [5, 6, 7, 8], [1, 3, 1, 3]),
    ([9, 10, 0, 0, 0, 0, 11, 12], [9, 10, 11, 12], [0, 1, 2, 3]),
    ([0, 0, 13, 14, 15, 16, 0, 0], [13, 14, 15, 16], [2, 3, 0, 1]),
    ([17, 18, 0, 0, 19, 20, 0, 0], [17, 18, 19, 20], [0, 1, 0, 1]),
    ([21, 22, 0, 0, 23, 24, 0, 0], [21, 22, 23, 24], [0, 1, 0, 1]),
    ([0, 0, 25, 26, 0, 0, 27, 28], [25, 26, 27, 28], [2, 3, 2, 3]),
    ([0, 0, 29, 30, 0, 0, 31, 32], [29, 30, 31, 32], [2, 3, 2, 3]),
)


def figure(columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The matrix [16, columns] of repeated figures, its numbers and their places, half as wide."""
    parts = (torch.tensor(part).repeat(2, columns // 8) for part in zip(*FIGURE, strict=True))
    matrix, numbers, places = parts
    return matrix, numbers, places


def word(places: list[int]) -> int:
    """A register of metadata: the first place lowest."""
    return sum(place << 2 * i for i, place in enumerate(places))


def lanes(places: Tensor, bits: int, selector: int = 0) -> Tensor:
    """int32 [32]: the metadata of a tile as the figures of the metadata of sparse mma.m16n8k32
    (.f16/.bf16) and mma.m16n8k64 (.u8/.s8) spread it; lanes that the selector leaves out hold a
    word of places that do not rise.

    places: [16, 16] or, of 8 bits, [16, 32].
    """
    out = [0] * 32
    rows = places.tolist()
    for g in range(8):
        if bits == 16:  # T0 or T2: columns 0 to 15 of rows g and g + 8; T1 or T3: 16 to 31
            for half in (0, 1):
                part = slice(8 * half, 8 * half + 8)
                out[4 * g + 2 * selector + half] = word(rows[g][part] + rows[g + 8][part])
        else:  # T0: columns 0 to 31 of row g, T1: of row g + 8; T2 and T3: columns 32 to 63
            for half in (0, 1):
                part = slice(16 * half, 16 * half + 16)
                out[4 * g + 2 * half] = word(rows[g][part])
                out[4 * g + 2 * half + 1] = word(rows[g + 8][part])
    return torch.tensor(out).to(torch.int32)


DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "s8": torch.int8}


def multiply(
    library: Path, kind: str, numbers: Tensor, b: Tensor, meta: Tensor, selector: int, seed: int = 7
) -> Tensor:
    """The product [16, 8] by one instruction; numbers [16, K / 2], b [8, K]."""
    dtype = DTYPES[kind]
    c = torch.zeros(16, 8, dtype=torch.int32 if kind == "s8" else torch.float32)
    more = () if kind == "s8" else (selector,)
    given = (numbers.to(dtype).contiguous(), b.to(dtype).contiguous(), meta, c, *more)
    hostrun.call(library, f"run_sparse_{kind}", *given, seed=seed)
    return c


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.build(SOURCE)


CALLS = [("bf16", 0), ("bf16", 1), ("f16", 0), ("f16", 1), ("s8", 0)]


@hostrun.needs()
@pytest.mark.parametrize(("kind", "selector"), CALLS)
def test_the_example_of_the_manual(library: Path, kind: str, selector: int) -> None:
    """The figure's numbers and metadata give the product with the figure's matrix."""
    depth = 64 if kind == "s8" else 32
    matrix, numbers, places = figure(depth)
    meta = lanes(places, 8 if kind == "s8" else 16, selector)
    if selector == 0 and kind != "s8":
        # the register that the figure prints for T0 of rows 0 and 8: 0 2 0 2 .. 0 2
        assert int(meta[0]) & 0xFFFFFFFF == 0x88888888
    b = torch.randint(-9, 10, (8, depth))
    c = multiply(library, kind, numbers, b, meta, selector)
    assert torch.equal(c.long(), matrix @ b.t())


@hostrun.needs()
def test_an_example_of_llvm(library: Path) -> None:
    """Its integration test sparse-mma-2-4-f16.mlir, for a GPU, and the corners that it prints."""
    i, j = torch.arange(16).unsqueeze(1), torch.arange(16)
    b = torch.arange(8).unsqueeze(1) - torch.arange(32)
    meta = torch.full((32,), 0x88888888 - 2**32).to(torch.int32)
    c = multiply(library, "f16", i + j + 1, b, meta, 0)
    corners = [float(c[r, s]) for r in (0, 15) for s in (0, 7)]
    assert corners == [-2720, -1768, -6320, -3688]


@hostrun.needs()
@pytest.mark.parametrize(("kind", "selector"), CALLS)
def test_any_places(library: Path, kind: str, selector: int) -> None:
    """Places that differ in every row and four; a wrong spread of the metadata is seen."""
    depth, bits = (64, 8) if kind == "s8" else (32, 16)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    places = pairs[torch.randint(6, (16, depth // 4))]
    numbers = torch.randint(1, 9, (16, depth // 2))
    dense = torch.zeros(16, depth // 4, 4, dtype=torch.long)
    dense.scatter_(2, places, numbers.view(16, -1, 2))
    b = torch.randint(-9, 10, (8, depth))
    truth = dense.flatten(1) @ b.t()
    meta = lanes(places.flatten(1), bits, selector)
    for seed in (0, 1, 7):
        assert torch.equal(multiply(library, kind, numbers, b, meta, selector, seed).long(), truth)
    order = torch.arange(32).view(8, 2, 2).flip(1 if bits == 8 else 2).flatten()
    assert not torch.equal(multiply(library, kind, numbers, b, meta[order], selector).long(), truth)


@hostrun.needs()
def test_metadata_that_the_manual_forbids_ends_the_run(library: Path, tmp_path: Path) -> None:
    """Selector 1 with metadata for selector 0: the other lanes hold places that do not rise."""
    _, numbers, places = figure(32)
    given = (numbers.half(), torch.ones(8, 32).half(), lanes(places, 16), torch.zeros(16, 8), 1)
    done = hostrun.call_apart(library, "run_sparse_f16", *given, folder=tmp_path)
    assert done.returncode != 0
    assert "mma.sp.f16: metadata whose places do not rise" in done.stderr


# the compressed form -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES)
def test_packing_gives_the_figure(kind: str) -> None:
    """The numbers and the metadata that the manual prints; any other spread of them is seen."""
    matrix, numbers, places = figure(128)
    packed = pack24(matrix.float() / (1 if kind != "s8" else 32), dtype=DTYPES[kind])
    tiles = places.view(16, 2, 32) if kind == "s8" else places.view(16, 4, 16)
    if kind != "s8":
        assert torch.equal(packed.values, numbers.to(DTYPES[kind]))
        meta = [
            lanes(tiles[:, 2 * i], 16, 0) * (t < 2) + lanes(tiles[:, 2 * i + 1], 16, 1) * (t >= 2)
            for i in range(2)
            for t in [torch.arange(32) % 4]
        ]
    else:
        assert packed.scale is not None
        ideal = numbers / 32 / packed.scale.unsqueeze(1)
        assert bool(((packed.values - ideal).abs() <= 0.5).all())
        meta = [lanes(tiles[:, i], 8) for i in range(2)]
    assert torch.equal(packed.meta, torch.stack(meta).unsqueeze(0))


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (37, 130), (70, 257), (5, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("kind", DTYPES)
def test_round_trip(kind: str, shape: tuple[int, int]) -> None:
    w = torch.randn(shape).to(torch.bfloat16)
    mask = n_m_mask(w) & (torch.rand(shape) < 0.9)  # some fours keep fewer than two
    packed = pack24(w, mask, DTYPES[kind])
    assert packed.shape == shape
    packed.validate()
    want = torch.where(mask, w.float(), 0)
    if kind == "s8":
        general = SparseWeight.from_mask(w, mask, torch.int8, (1, 1))
        assert torch.equal(packed.to_dense(), general.to_dense())
        assert packed.sums is not None
        assert general.sums is not None
        assert torch.equal(packed.sums, general.sums)
    else:
        assert torch.equal(packed.to_dense(), want)
        general = SparseWeight.from_mask(w, mask, torch.bfloat16, (1, 1))
    again = Sparse24Weight.from_sparse(general, DTYPES[kind])
    assert {name for name, t in again.tensors().items() if t is None} == {
        name for name, t in packed.tensors().items() if t is None
    }
    assert torch.equal(again.to_dense(), packed.to_dense())
    if kind != "s8":
        assert torch.equal(again.values, packed.values)
        assert torch.equal(again.meta, packed.meta)


def test_bytes_are_nine_sixteenths_of_dense_bfloat16() -> None:
    w = torch.randn(64, 256).bfloat16()
    packed = pack24(w, n_m_mask(w))
    assert packed.values.dtype == torch.bfloat16
    assert packed.nbytes * 16 == w.nbytes * 9


def test_places_rise_in_every_four() -> None:
    """What mma.sp::ordered_metadata demands, of fours that keep none, one or two."""
    w = torch.randn(48, 192)
    bits = _bits(pack24(w, n_m_mask(w) & (torch.rand(48, 192) < 0.5)).meta, torch.bfloat16)
    assert set(bits.unique().tolist()) == {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}


# the transposable form ---------------------------------------------------------------------------


def blocks_of(t: Tensor) -> Tensor:
    """[N, K] as 4 x 4 blocks, [.., 16]."""
    return t.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2).flatten(0, 1)


def test_no_mask_of_two_a_row_and_column_keeps_more() -> None:
    """All 65536 masks of a block, by a count of its own; of whole numbers, whose sums are exact."""
    every = torch.arange(2**16).unsqueeze(1) >> torch.arange(16) & 1
    lines = every.view(-1, 4, 4)
    legal = every[(lines.sum(1) == 2).all(1) & (lines.sum(2) == 2).all(1)].double()
    assert len(legal) == len(_BLOCKS) == 90
    for top in (1000, 2):  # few magnitudes: many masks are equally good
        w = torch.randint(-top, top + 1, (24, 36)).double()
        mask = transposable_mask(w)
        kept, size = blocks_of(mask).double(), blocks_of(w.abs())
        assert bool((kept.view(-1, 4, 4).sum(1) == 2).all())
        assert bool((kept.view(-1, 4, 4).sum(2) == 2).all())
        assert torch.equal((kept * size).sum(1), (size @ legal.t()).amax(1))


def test_of_equal_masks_the_first_stays() -> None:
    want = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    assert torch.equal(transposable_mask(torch.ones(4, 4)), want)
    assert torch.equal(transposable_mask(torch.zeros(4, 4)), want)


def test_blocks_that_the_edges_cut() -> None:
    for shape in ((5, 7), (1, 1), (3, 4), (0, 4), (4, 0)):
        w = torch.randn(shape)
        mask = transposable_mask(w)
        assert mask.shape == shape
        full = torch.nn.functional.pad(mask, (0, -shape[1] % 4, 0, -shape[0] % 4))
        assert bool((full.unflatten(1, (-1, 4)).sum(-1) <= 2).all())
        assert bool((full.t().unflatten(1, (-1, 4)).sum(-1) <= 2).all())
        whole = w[: shape[0] // 4 * 4, : shape[1] // 4 * 4]
        assert torch.equal(mask[: whole.shape[0], : whole.shape[1]], transposable_mask(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_transposable_pack_holds_both(dtype: torch.dtype) -> None:
    """W, and with the values of W^T, which are made of it, W^T: 2:4 each."""
    w = torch.randn(36, 72).to(dtype)
    packed = prune24(w, transposable=True)
    assert packed.meta_t is not None
    packed.validate()
    want = torch.where(transposable_mask(w), w, 0)
    assert torch.equal(packed.to_dense(dtype), want)
    values_t = transpose(packed.values, packed.meta, packed.meta_t, 72)
    assert torch.equal(to_dense(values_t, packed.meta_t, 36).to(dtype), want.t())
    assert torch.equal(sample(want, packed.meta, dtype), packed.values)
    assert packed.nbytes == sum(t.nbytes for t in (packed.values, packed.meta, packed.meta_t))
    again = pack24(want, transposable=True)
    assert torch.equal(again.meta_t, packed.meta_t)  # type: ignore[arg-type]


def test_what_is_not_transposable_is_refused() -> None:
    w = torch.randn(8, 64).bfloat16()
    for call, error, message in (
        (
            lambda: prune24(w[:7], transposable=True),
            ValueError,
            r"w: expected N and K .* \[7, 64\]",
        ),
        (lambda: pack24(w, n_m_mask(w), transposable=True), ValueError, "got . in column 0 from"),
        (
            lambda: prune24(w, torch.int8, True),
            TypeError,
            "dtype: expected bfloat16 or float16 for",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    packed = prune24(w, transposable=True)
    assert packed.meta_t is not None
    with pytest.raises(ValueError, match=r"meta_t: expected shape \[4, 1, 32\]; got \[3, 1, 32\]"):
        packed.replace(meta_t=packed.meta_t[:3]).check()
    with pytest.raises(ValueError, match="meta_t: expected None unless values are bfloat16"):
        prune24(w, torch.int8).replace(meta_t=packed.meta_t).check()


def test_errors() -> None:
    w = torch.randn(8, 64)
    with pytest.raises(ValueError, match=r"mask: expected at most 2 .* got 4 in row 0, columns 0 "):
        pack24(w)
    with pytest.raises(TypeError, match="dtype: expected bfloat16, float16 or int8; got torch.f"):
        pack24(w, n_m_mask(w), torch.float32)
    with pytest.raises(ValueError, match=r"mask: expected shape \[8, 64\]; got \[8, 60\]"):
        pack24(w, n_m_mask(w)[:, :60])
    general = SparseWeight.from_mask(w, n_m_mask(w), torch.int8, (1, 1))
    with pytest.raises(TypeError, match="dtype: expected int8 for values of s8; got torch.float16"):
        Sparse24Weight.from_sparse(general, torch.float16)
    packed = pack24(w, n_m_mask(w))
    with pytest.raises(ValueError, match=r"values: expected shape \[N, 64\]; got \[8, 32\]"):
        packed.replace(k=65).check()
    with pytest.raises(TypeError, match="scale: expected a tensor with int8 values and None with"):
        packed.replace(scale=torch.ones(8)).check()
