"""attention: every dtype, mask and shape on every instruction set against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigops
from tests.support.backends import CPU, REFERENCE, Way
from tests.support.cases.attention import DTYPES, MASKS, Case, Sizes, make
from tests.support.kernels_ran import (
    ISAS,
    crossover,
    expect,
    isa,
    needs_extension,
    served_by,
    threads,
)

pytestmark = needs_extension
FEW = 4  # rows of one head of keys that read keys and values as they lie


def kernel_of(level: str, dtype: str, form: str) -> str:
    """Name of the kernel at a level: VNNI adds nothing, BF16 only its own dtype."""
    isa = served_by(level, *(["avx512bf16", "amx"] if dtype == "bf16" else []))
    return f"cpu.{isa}.attention.{dtype}.{form}"


def form_of(sizes: Sizes) -> str:
    _, _, group, t, *_ = sizes
    return "few" if group * t <= FEW else "rows"


def run(way: Way, sizes: Sizes, dtype: str, mask: str, causal: bool) -> None:
    case = make(sizes, dtype, mask, causal)
    name = kernel_of(way.level, dtype, form_of(sizes)) if way.level else "reference.attention"
    with way.serving("attention", name):
        y = case.run()
    case.check(y, f"{way}, {sizes}, {dtype}, {mask}, causal {causal}")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [REFERENCE, *CPU], ids=str)
def test_every_kernel(way: Way, dtype: str, mask: str) -> None:
    """Several chunks and panels, a rest of rows, keys and columns; then few rows of the same."""
    for causal in (False, True):
        run(way, (2, 1, 2, 21, 333, 33, 17), dtype, mask, causal)
        run(way, (1, 2, 2, 2, 333, 32, 48), dtype, mask, causal)


@pytest.mark.parametrize("mask", ["none", "padding", "rows", "bias"])
@pytest.mark.parametrize("way", [REFERENCE, *CPU], ids=str)
def test_float32_in_bf16(way: Way, mask: str) -> None:
    """As with bf16: rests of rows, keys and columns, odd ones among them; then few rows."""
    for sizes in ((2, 1, 2, 21, 333, 33, 17), (1, 2, 1, 64, 64, 32, 80), (1, 2, 2, 2, 333, 32, 48)):
        for causal in (False, True):
            case = make(sizes, "f32", mask, causal)
            case.bf16 = True
            isa = served_by(way.level, "avx512bf16", "amx") if way.level else ""
            name = f"cpu.{isa}.attention.f32.{form_of(sizes)}" if isa else "reference.attention"
            with way.serving("attention", name):
                y = case.run()
            assert y.dtype == torch.float32
            case.check(y, f"{way}, {sizes}, {mask}, causal {causal}")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 3),
        st.integers(1, 40),
        st.one_of(st.integers(1, 140), st.integers(250, 270)),
        st.sampled_from([1, 7, 16, 31, 32, 33, 64, 80]),
        st.sampled_from([1, 8, 15, 16, 32, 65, 96, 128]),
    ),
    square=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    mask=st.sampled_from(list(MASKS)),
    causal=st.booleans(),
    way=st.sampled_from(CPU or [REFERENCE]),
    seed=st.integers(0, 2**16),
)
def test_ragged_shapes(
    sizes: Sizes, square: bool, dtype: str, mask: str, causal: bool, way: Way, seed: int
) -> None:
    torch.manual_seed(seed)
    b, own, group, t, s, d, dv = sizes
    run(way, (b, own, group, t, t if square else s, d, dv), dtype, mask, causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", ISAS)
def test_keys_in_parts(level: str, dtype: str) -> None:
    """A step of decoding over a cache: threads have parts of the keys, which are put together."""
    for rows in (1, 3):
        for mask in ("none", "padding", "lowest", "rows"):
            case = make((1, 1, 2, rows, 1500, 64, 40), dtype, mask)
            form = form_of((1, 1, 2, rows, 1500, 64, 40))
            with isa(level), threads(2), expect(kernel_of(level, dtype, form)):
                y = case.run()
                assert torch.equal(y, case.run())
            case.check(y, f"{level}, {rows} rows, {mask}")


def test_blocks_of_rows_of_long_sequences() -> None:
    for causal in (False, True):
        case = make((1, 1, 2, 400, 600, 32, 32), mask="padding", causal=causal)
        with threads(2):
            case.check(case.run())


@pytest.mark.parametrize("level", ISAS)
def test_what_the_mask_shuts_out_is_not_read(level: str) -> None:
    """Of a static cache, which is larger than what it holds: whole blocks of 64 keys."""
    for t in (1, 9):
        for lowest in (False, True):
            case = make((1, 1, 2, t, 640, 32, 32))
            mask = torch.zeros(1, 1, 1, 640, dtype=torch.bool)
            mask[..., 130:190] = True
            case.mask = mask
            if lowest:
                case.mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
            want = case.plain()
            truth = case.truth()
            for of in (case.k, case.v):
                of[:, :, :128] = math.nan
                of[:, :, 192:] = math.nan
            with isa(level):
                y = case.run()
            assert y.isfinite().all(), (level, t, lowest)
            torch.testing.assert_close(y, want)
            torch.testing.assert_close(y.double(), truth[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_without_an_open_key_are_zero_as_in_torch(dtype: str) -> None:
    for t in (1, 7):
        for mask in (
            torch.zeros(1, 1, 1, 70, dtype=torch.bool),
            torch.full((70,), -math.inf),
        ):
            case = make((1, 2, 1, t, 70, 16, 16), dtype)
            case.mask = mask
            assert torch.equal(case.run(), torch.zeros_like(case.q))
            assert torch.equal(case.plain(), torch.zeros_like(case.q))


def test_sizes_of_zero() -> None:
    for sizes in (
        (0, 1, 1, 3, 4, 8, 8),
        (1, 0, 1, 3, 4, 8, 8),
        (1, 2, 2, 0, 4, 8, 8),
        (1, 2, 2, 3, 0, 8, 8),
        (1, 2, 2, 3, 4, 8, 0),
    ):
        b, own, group, t, _, _, dv = sizes
        y = make(sizes).run()
        assert y.shape == (b, own * group, t, dv)
        assert torch.equal(y, torch.zeros_like(y))
    case = make((1, 1, 1, 3, 4, 0, 8))  # no columns: all scores are 0
    torch.testing.assert_close(case.run(), case.v.mean(2, keepdim=True).expand(1, 1, 3, 8))


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_what_is_not_finite_stays_where_torch_has_it(bad: float) -> None:
    for t in (2, 13):
        for name in ("q", "k", "v"):
            case = make((1, 1, 1, t, 70, 32, 32))
            getattr(case, name)[0, 0, 1, 3] = bad
            for level in ISAS:
                with isa(level):
                    y = case.run()
                torch.testing.assert_close(y, case.plain(), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_large_scores_stay_finite() -> None:
    for dtype in DTYPES:
        for scale in (300.0, -300.0, 0.0):
            case = make((1, 2, 1, 9, 100, 16, 16), dtype, scale=scale)
            case.check(case.run(), f"{dtype}, scale {scale}")


# layout ------------------------------------------------------------------------------------


def test_the_result_is_laid_out_for_the_next_product() -> None:
    for sizes in ((2, 2, 2, 5, 9, 16, 24), (2, 2, 2, 1, 9, 16, 24), (1, 1, 1, 5, 9, 16, 24)):
        y = make(sizes).run()
        b, heads, t, dv = y.shape
        merged = y.transpose(1, 2).reshape(b, t, heads * dv)
        assert merged.data_ptr() == y.data_ptr()
        assert merged.is_contiguous()


def test_views_of_a_merged_projection_are_not_copied() -> None:
    case = make((2, 2, 2, 40, 40, 32, 32), mask="bias")
    with torch.profiler.profile() as profile:
        y = case.run()
    copies = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::expand")
    assert not [event.name for event in profile.events() if event.name in copies]
    dense = Case(case.q.contiguous(), case.k.contiguous(), case.v.contiguous(), case.mask)
    assert torch.equal(y, dense.run())


def test_any_strides() -> None:
    q, k, v = (torch.randn(2, 3, 16, 9).transpose(2, 3) for _ in range(3))
    case = Case(q, k, v.flip(2))
    case.check(case.run())
    case = Case(q[..., ::2], k[:, :1, :, ::2].expand(2, 3, 9, 8), v.expand(2, 3, 9, 16))
    case.check(case.run())


def test_threads_change_nothing_in_whole_rows() -> None:
    case = make((2, 3, 1, 50, 50, 32, 32), mask="rows")
    with threads(1):
        one = case.run()
    with threads(2):
        torch.testing.assert_close(case.run(), one)


def test_a_perturbed_result_fails() -> None:
    for dtype in DTYPES:
        case = make((1, 1, 2, 21, 130, 32, 32), dtype, "rows")
        y = case.run()
        case.check(y)
        y[0, 1, 3] *= 1 + 8 * torch.finfo(y.dtype).eps if dtype != "f32" else 1.001
        with pytest.raises(AssertionError, match="too far"):
            case.check(y)


# torch's own -------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
def test_float64_goes_to_torch(mask: str) -> None:
    for causal in (False, True):
        case = make((1, 2, 2, 7, 9, 16, 8), mask=mask, causal=causal)
        case.q, case.k, case.v = (t.double() for t in (case.q, case.k, case.v))
        with expect(".attention.f64.sdpa"):
            y = case.run()
        assert y.transpose(1, 2).is_contiguous()
        case.check(y)


def test_the_table_says_where_torch_takes_over() -> None:
    case = make((1, 1, 2, 33, 40, 16, 16), mask="infinite", causal=True)
    with crossover("attention", "f32", 32, 0):
        with expect(".attention.f32.sdpa"):
            y = case.run()
        said = bigops.explain("attention", case.q, case.k, case.v)
        assert "attention.f32.sdpa; torch's scaled_dot_product_attention beyond 32 q" in str(said)
        few = make((1, 1, 2, 2, 40, 16, 16))
        with expect(".attention.f32.few"):
            few.run()
    assert y.transpose(1, 2).is_contiguous()
    case.check(y)
    for rows, flops in ((33, 0), (32, 200_000)):
        with crossover("attention", "f32", rows, flops), expect(".attention.f32.rows"):
            case.run()


def test_explain_names_what_serves() -> None:
    said = bigops.explain("attention", (1, 4, 8, 64), (1, 2, 8, 64), dtype=torch.float32)
    assert ".attention.f32.rows" in str(said)
    one = bigops.explain("attention", (1, 4, 1, 64), (1, 2, 8, 64), dtype=torch.float16)
    assert ".attention.f16.few" in str(one)
    wide = bigops.explain("attention", (1, 4, 1, 64), (1, 2, 8, 64), dtype=torch.float64)
    assert "attention.f64.sdpa; torch's scaled_dot_product_attention" in str(wide)
    gpu = bigops.explain(
        "attention", (1, 4, 8, 64), (1, 2, 8, 64), dtype=torch.float32, device="sm_90"
    )
    assert str(gpu).startswith("attention: reference.attention; torch's scaled_dot_product")
