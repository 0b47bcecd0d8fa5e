"""The storage of quantized_linear by its definition: layout, rounding, checks."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.formats import quantized as storage
from bigops.formats.quantize import static_qparams
from bigops.formats.quantized import QuantizedWeight
from tests.support.cases.compressed import DTYPES, QUANTISED


def test_int8_lines_hold_four_columns_of_sixteen_rows() -> None:
    q = torch.arange(-128, 128).float().view(32, 8)
    values = storage.pack(q, 8)
    assert list(values.shape) == [2, 2, 16, 4]
    for n in range(32):
        for k in range(8):
            assert values[n // 16, k // 4, n % 16, k % 4] == q[n, k]


def test_int4_words_hold_even_columns_below_odd_ones() -> None:
    """Nibble j of the low half of a row's 32 bits is column 2j, of the high half 2j + 1."""
    q = torch.randint(-8, 8, (17, 19)).float()
    values = storage.pack(q, 4)
    assert list(values.shape) == [2, 3, 16, 4]
    words = values.contiguous().view(torch.int32).squeeze(-1)  # little-endian, as all we serve
    for n in range(17):
        for k in range(19):
            shift = k % 8 // 2 * 4 + k % 2 * 16
            assert words[n // 16, k // 8, n % 16].item() >> shift & 15 == q[n, k] + 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("n", "k"), [(0, 0), (0, 5), (3, 0), (1, 1), (16, 8), (35, 83)])
def test_unpack_is_the_inverse(bits: int, n: int, k: int) -> None:
    q = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k)).float()
    assert torch.equal(storage.unpack(storage.pack(q, bits), n, k, bits), q)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64])
@pytest.mark.parametrize("form", QUANTISED)
def test_from_dense_rounds_to_the_nearest_step(form: str, dtype: torch.dtype) -> None:
    """Half a step off at most (a zero point is rounded too: one step at the ends of a range)."""
    w = torch.randn(20, 133).to(dtype)
    w[3] = 0
    w[4] = w[4].abs() + 1
    w[5, 32:] = 0
    options = dict(QUANTISED[form])
    if options.get("activations") == "static":
        options["x_qparams"] = static_qparams(-1, 1)
    q = QuantizedWeight.from_dense(w, **options)
    q.validate()
    rounded = q.codes()
    steps = storage.quantize.widen(rounded.scale, q.group, 133).double()
    error = (q.to_dense(torch.float64) - w.double()).abs()
    limit = 0.5 if q.zero_point is None else 1.0
    assert bool((error <= steps * limit * (1 + 1e-5)).all())
    assert not q.to_dense()[3].any()
    inside = rounded.q > -8 if q.bits == 4 else rounded.q > -128
    inside &= rounded.q < (7 if q.bits == 4 else 127)
    assert bool((error <= steps * 0.5 * (1 + 1e-5))[inside].all())
    assert q.shape == w.shape


def test_int8_takes_the_whole_range_and_rounds_once() -> None:
    w = torch.randn(20, 33)
    w[3] = 0
    q = QuantizedWeight.from_dense(w)
    assert q.codes().q.abs().amax(1).tolist() == [127] * 3 + [0] + [127] * 16
    assert torch.equal(QuantizedWeight.from_dense(q.to_dense()).values, q.values)
    assert q.nbytes == 32 * 36 + 32 * 4 + 32 * 4
    assert q.activations == "dynamic"
    assert QuantizedWeight.from_dense(w, 4).activations == "none"


def test_validate_accepts_what_is_made_and_refuses_the_rest() -> None:
    w = torch.randn(20, 70)
    int8 = QuantizedWeight.from_dense(w)
    int4 = QuantizedWeight.from_dense(w, 4, 32, symmetric=False, activations="dynamic")
    static = QuantizedWeight.from_dense(w, activations="static", x_qparams=static_qparams(-1, 1))
    assert int8.row_sum is not None
    assert int4.row_sum is not None
    zero = int4.zero_point
    assert zero is not None
    bad: list[tuple[QuantizedWeight, type[Exception], str]] = [
        (int8.replace(values=int8.values.float()), TypeError, "values: expected dtype int8"),
        (int8.replace(values=int8.values[:1]), ValueError, r"values: expected shape \[2, 18, 16"),
        (int8.replace(scale=int8.scale * 0), ValueError, "scale: expected finite"),
        (int8.replace(scale=int8.scale * float("inf")), ValueError, "scale: expected finite"),
        (int8.replace(row_sum=int8.row_sum + 1), ValueError, "row_sum: expected the sums"),
        (int4.replace(row_sum=int4.row_sum * 1.01), ValueError, "row_sum: expected the sums"),
        (int4.replace(zero_point=zero + 16), ValueError, r"zero_point: expected values in -8..7"),
        (int8.replace(bits=3), ValueError, "bits: expected 8 or 4; got 3"),
        (int8.replace(k=-1), ValueError, "n, k: expected at least 0"),
        (
            static.replace(x_qparams=torch.tensor([0.0, 3.0])),
            ValueError,
            "x_qparams: expected a finite",
        ),
        (
            static.replace(x_qparams=torch.tensor([1.0, 2.5])),
            ValueError,
            "x_qparams: expected a finite",
        ),
    ]
    for good in (int8, int4, static):
        good.validate()
    for weight, kind, message in bad:
        with pytest.raises(kind, match=message):
            weight.validate()


@pytest.mark.parametrize(
    ("w", "options", "kind", "message"),
    [
        (torch.randn(3), {}, ValueError, "w: expected 2 dimensions"),
        (torch.ones(2, 2, dtype=torch.int32), {}, TypeError, "w: expected dtype float32, .*int32"),
        (torch.tensor([[1.0, float("nan")]]), {}, ValueError, "w: expected finite values"),
        ([[1.0]], {}, TypeError, "w: expected a torch.Tensor; got list"),
        (torch.ones(2, 2), {"bits": 2}, ValueError, "bits: expected 8 or 4; got 2"),
        (torch.ones(2, 2), {"group": 16}, ValueError, "group: expected None, 32, 64 or 128"),
        (torch.ones(2, 2), {"activations": "x"}, ValueError, "activations: expected one of none"),
        (torch.ones(2, 2), {"group": 32, "activations": "dynamic"}, ValueError, "group: expected"),
        (torch.ones(2, 2), {"activations": "static"}, ValueError, "x_qparams: expected a scale"),
        (torch.ones(2, 2), {"x_qparams": (1.0, 0)}, ValueError, "x_qparams: expected a scale"),
        (
            torch.ones(2, 2),
            {"activations": "static", "x_qparams": (-1.0, 0)},
            ValueError,
            "x_qparams: expected a finite scale",
        ),
    ],
)
def test_from_dense_refuses(
    w: Tensor, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        QuantizedWeight.from_dense(w, **options)


@pytest.mark.parametrize("ends", [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_static_qparams_refuses(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="lo, hi: expected finite numbers"):
        static_qparams(*ends)


@pytest.mark.parametrize(
    ("op", "forms"),
    [
        ("quantized_linear", "QuantizedWeight"),
        ("fp8_linear", "Fp8Weight"),
        ("sparse_linear", "SparseWeight or Sparse24Weight or BitmapWeight"),
        ("packed_linear", "PackedWeight"),
    ],
)
def test_a_dense_weight_in_place_of_a_stored_one(op: str, forms: str) -> None:
    call = getattr(importlib.import_module(f"bigops.ops.{op}"), op)
    said = f"weight: expected a {forms}; got Tensor"
    with pytest.raises(TypeError, match=said):
        call(torch.randn(2, 8), torch.randn(4, 8))
    with pytest.raises(TypeError, match=said):
        bigops.explain(op, (2, 8), (4, 8), dtype=torch.float32, device="sm_90")


# --- what validate finds in packed numbers -------------------------------------------------

SUMMED = [
    {},
    {"symmetric": False},
    {"bits": 4, "activations": "dynamic"},
    {"bits": 4, "group": 32, "activations": "dynamic"},
    {"bits": 4, "group": 64, "symmetric": False, "activations": "symmetric"},
    {"bits": 4, "group": 128, "symmetric": False, "activations": "dynamic"},
]


@pytest.mark.parametrize("size", [(1e-20, 37), (1.0, 600), (1e20, 129)], ids=str)
@pytest.mark.parametrize("form", SUMMED, ids=str)
def test_each_sum_is_compared_with_the_packed_numbers(form: dict, size: tuple) -> None:
    scale, k = size
    weight = QuantizedWeight.from_dense(torch.randn(37, k) * scale, **form)
    weight.validate()
    assert weight.row_sum is not None
    for row in (0, 36):
        for way in (-1, 1):
            sums = weight.row_sum.clone()
            if weight.bits == 8:
                sums[row] += way
            else:  # by the least step of the codes: what a number that is off by one makes
                sums[row] += way * weight.scale[:, row].min()
            with pytest.raises(ValueError, match="row_sum: expected the sums"):
                weight.replace(row_sum=sums).validate()
    if weight.bits == 4:
        with pytest.raises(ValueError, match="row_sum: expected the sums"):
            weight.replace(row_sum=weight.row_sum + torch.nan).validate()
    sums = weight.row_sum.clone()
    sums[37:] = 3  # rows that only fill up a tile are nobody's
    weight.replace(row_sum=sums).validate()


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_beyond_the_last_column_are_zeros(bits: int) -> None:
    weight = QuantizedWeight.from_dense(torch.randn(20, 37), bits, activations="none")
    for at in ((0, 3), (1, 3)):
        values = weight.values.clone()
        values[at[0], -1, 0, at[1]] ^= 0x70
        with pytest.raises(ValueError, match="values: expected zeros beyond column 37"):
            weight.replace(values=values).validate()
