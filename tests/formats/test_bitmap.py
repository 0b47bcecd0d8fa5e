"""Weights as a bitmap and packed values: the storage, its round trip and its bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigops.formats.bitmap import BitmapWeight, tiles_of
from bigops.formats.sparse import SparseWeight

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 11),
    k=st.integers(0, 530),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_round_trip(n: int, k: int, density: float, dtype: torch.dtype, seed: int) -> None:
    """Exact, of the values and of the pattern: a kept zero stays kept, and keeps its sign."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).to(dtype)
    w[torch.rand(n, k, generator=generator) < 0.1] = -0.0
    mask = torch.rand(n, k, generator=generator) < density
    packed = BitmapWeight.from_mask(w, mask)
    packed.validate()
    assert packed.values.dtype == dtype
    assert torch.equal(packed.pattern(), mask)
    assert torch.equal(packed.to_dense(dtype), torch.where(mask, w, 0))
    kept = packed.values[packed.values.bool() | packed.values.signbit()]
    assert int(kept.signbit().sum()) == int((w.signbit() & mask).sum())


def test_the_layout_is_the_one_that_is_described() -> None:
    w = torch.zeros(6, 300)
    w[0, 0], w[0, 33], w[3, 255], w[5, 299] = 1.0, 2.0, 3.0, 4.0
    packed = BitmapWeight.from_mask(w, dtype=torch.bfloat16)
    assert packed.bits.shape == (2, 2, 32)
    assert packed.ptr.tolist() == [0, 1, 1, 1, 2]
    assert packed.values.tolist() == [1.0, 2.0, 3.0, 0, 0, 0, 0, 0, 4.0, *[0] * 7]
    found = {tuple(at): int(packed.bits[tuple(at)]) for at in packed.bits.nonzero().tolist()}
    assert found == {(0, 0, 0): 1, (0, 0, 1): 2, (0, 0, 31): -(2**31), (1, 1, 9): 1 << 11}


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float32])
def test_from_the_general_storage(values: torch.dtype) -> None:
    w = torch.randn(70, 530)
    general = SparseWeight.from_mask(w, torch.rand(70, 530) < 0.4, values, (1, 1))
    packed = BitmapWeight.from_sparse(general)
    packed.validate()
    assert packed.values.dtype == values
    assert torch.equal(packed.to_dense(), general.to_dense())
    assert BitmapWeight.from_sparse(general, torch.float16).values.dtype == torch.float16


@pytest.mark.parametrize(("density", "most"), [(0.5, 0.57), (0.3, 0.37)])
def test_bytes(density: float, most: float) -> None:
    """By the formula, and beside dense bfloat16 and the general storage of single entries."""
    n, k = 64, 2048
    mask = torch.rand(n, k).argsort(1) < density * k
    w = torch.randn(n, k).bfloat16()
    packed = BitmapWeight.from_mask(w, mask)
    groups, panels = tiles_of(n, k)
    counts = mask.view(groups, 4, panels, 256).sum((1, 3))
    stored = int(((counts + 7) // 8 * 16).sum())
    assert packed.nbytes == stored + n * k // 8 + 4 * (groups * panels + 1)
    assert packed.nbytes < most * w.nbytes
    general = SparseWeight.from_mask(w, mask, torch.bfloat16, (1, 1))
    assert packed.nbytes < 0.62 * general.nbytes


def test_errors() -> None:
    w = torch.randn(8, 64)
    packed = BitmapWeight.from_mask(w, torch.rand(8, 64) < 0.5)
    for broken, message in (
        ({"values": packed.values[:-4]}, "ptr: expected the sums of what the bits keep"),
        ({"ptr": packed.ptr + 1}, "ptr: expected the sums of what the bits keep"),
        ({"bits": packed.bits[:, :, :31]}, r"bits: expected shape \[2, 1, 32\]; got \[2, 1, 31\]"),
        ({"values": packed.values[:-1]}, r"values: expected shape \[a multiple of 4\]"),
        ({"n": -1}, "n, k: expected at least 0; got -1, 64"),
        ({"k": -1}, "n, k: expected at least 0; got 8, -1"),
    ):
        with pytest.raises(ValueError, match=message):
            packed.replace(**broken).validate()
    full = BitmapWeight.from_mask(torch.ones(4, 64), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"bits: expected none outside the shape \[4, 63\]"):
        full.replace(k=63).validate()
    with pytest.raises(TypeError, match="bits: expected dtype int32; got int64"):
        packed.replace(bits=packed.bits.long()).check()
    for args, error, message in (
        ((w, None, torch.int8), TypeError, "dtype: expected bfloat16, float16 or float32; got"),
        ((w, w), TypeError, "mask: expected dtype bool; got float32"),
        ((w, torch.ones(8, 63).bool()), ValueError, r"mask: expected shape \[8, 64\]; got"),
        ((w * torch.nan,), ValueError, "finite"),
    ):
        with pytest.raises(error, match=message):
            BitmapWeight.from_mask(*args)
    whole = SparseWeight.from_mask(w, torch.rand(8, 64) < 0.5, torch.int8, (1, 1))
    with pytest.raises(TypeError, match="weight: expected floating values; got s8"):
        BitmapWeight.from_sparse(whole)
    assert isinstance(packed, BitmapWeight)
