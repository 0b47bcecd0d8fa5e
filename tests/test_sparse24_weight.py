"""2:4 sparse products by mma.sp: the host twins held to NVIDIA's manual."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import hostrun

SOURCE = Path(__file__).parent / "hostrun_kernels.cu"

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


def multiply(library: Path, kind: str, numbers: Tensor, b: Tensor, meta: Tensor, selector: int,
             seed: int = 7) -> Tensor:  # fmt: skip
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
