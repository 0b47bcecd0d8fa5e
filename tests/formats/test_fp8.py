"""The storage of fp8_linear by its definition: codes, rounding, scales, checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.formats import fp8
from bigops.formats.fp8 import Fp8Weight
from bigops.ops.fp8_linear import fp8_linear
from tests.support.cases.compressed import FP8
from tests.support.tolerance import snr_db

# Of the weight and of the product to those of the matrix, random normal data; each test of the
# floor shows that the next coarser thing fails it.
SNR_FLOOR_DB = {"weight": 31.0, "rounded": 28.0}


def numbers() -> Tensor:
    """All finite numbers of e4m3 by the definition: 4 bits of exponent with bias 7, 3 of fraction.

    OCP 8-bit floating point, revision 1.0, table 1: only all ones is NaN, there is no infinity.
    """
    code = torch.arange(127)
    exponent, fraction = code >> 3, (code & 7).double() / 8
    normal = torch.ldexp(1 + fraction, exponent - 7)
    small = torch.ldexp(fraction, torch.tensor(-6))
    positive = torch.where(exponent > 0, normal, small)
    return torch.cat([-positive.flip(0), positive[1:]])


def nearest(x: Tensor) -> Tensor:
    """Each x as its nearest number, ties to the even code, past the ends the ends; float64."""
    grid, x = numbers(), x.double()
    above = torch.searchsorted(grid, x.contiguous()).clamp(1, len(grid) - 1)
    below = above - 1
    to_below, to_above = x - grid[below], grid[above] - x
    even = below % 2 == 0  # 0 is number 126
    lower = (to_below < to_above) | ((to_below == to_above) & even)
    return grid[torch.where(lower, below, above)]


def test_codes_are_those_of_the_definition() -> None:
    codes = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(codes.double(), numbers()[126:])
    assert numbers().max() == fp8.LARGEST


def test_casts_round_to_nearest_even_and_saturate() -> None:
    grid = numbers()
    ties = (grid[1:] + grid[:-1]) / 2
    beside = [ties * (1 + s * 2.0**-20) for s in (-1, 1)]
    x = torch.cat([grid, ties, *beside, torch.randn(500) * 100, torch.tensor([1e9, -1e9])]).float()
    assert torch.equal(fp8.to_codes(x).double(), nearest(x))
    assert bool(fp8.to_codes(torch.tensor([float("nan")])).float().isnan().all())
    ends = fp8.to_codes(torch.tensor([float("inf"), -float("inf")])).float()
    assert ends.tolist() == [448, -448]


@pytest.mark.parametrize("scales", fp8.SCALES)
@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        (1, 1, torch.bfloat16),
        (20, 133, torch.float16),
        (9, 20, torch.float64),
        (130, 300, torch.float32),
    ],
)
def test_from_dense_rounds_to_the_nearest_number(
    n: int, k: int, scales: str, dtype: torch.dtype
) -> None:
    w = torch.randn(n, k) * torch.logspace(-3, 3, n).unsqueeze(1)
    w[n // 2] = 0
    w = w.to(dtype)
    q = Fp8Weight.from_dense(w, scales)
    q.validate()
    assert q.shape == w.shape
    assert list(q.scale.shape) == fp8.scale_shape(n, k, scales)
    rows = n if scales == "tensor" else 1 if scales == "row" else 128
    columns = 128 if scales == "block" else k
    for i in range(0, n, rows):
        for j in range(0, k, columns):
            part = w[i : i + rows, j : j + columns].float()
            by = q.scale[i // rows, j // columns]
            assert by == (part.abs().max() / 448 if bool(part.any()) else 1)
            got = q.values[i : i + rows, : q.k][:, j : j + columns].double()
            assert torch.equal(got, nearest(part / by))
            dense = q.to_dense(torch.float64)[i : i + rows, j : j + columns]
            assert torch.equal(dense, got * by.double())


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("k", [1, 128, 300])
def test_rows_are_rounded_by_their_largest_magnitude(k: int, block: bool) -> None:
    x = torch.randn(6, k) * torch.logspace(-40, 4, 6).unsqueeze(1)
    x[1] = 0
    x[2, -1], x[3, 0] = float("nan"), float("inf")
    rows = fp8.act_quant(x, block)
    length = 128 if block else k
    assert list(rows.scale.shape) == [6, -(-k // length)]
    for m in range(6):
        for j in range(0, k, length):
            part, by = x[m, j : j + length], rows.scale[m, j // length]
            got = rows.q[m, j : j + length]
            if not bool(part.isfinite().all()):
                assert bool(by.isnan())
                assert not got.any()
                continue
            assert by == torch.clamp(part.abs().max() / 448, min=torch.finfo(torch.float32).tiny)
            assert torch.equal(got.double(), nearest(part * (1 / by)))
    assert not rows.q[1].any()


def test_a_given_scale_saturates() -> None:
    x = torch.tensor([[1.0, -3.0, 0.1, 1000.0]])
    rows = fp8.act_quant(x, False, torch.tensor([2.0 / 448]))
    assert torch.equal(rows.q.double(), nearest(x * 224))
    assert rows.q[0, 1] == -448
    assert rows.q[0, 3] == 448


@pytest.mark.parametrize("lead", [[], [0], [3, 2]], ids=str)
@pytest.mark.parametrize("block", [False, True])
def test_rows_of_no_columns_and_any_rank(block: bool, lead: list[int]) -> None:
    for k in (0, 130):
        x = torch.randn(*lead, k)
        rows = fp8.act_quant(x, block)
        assert rows.q.shape == rows.dense().shape == x.shape
        assert list(rows.scale.shape[:-1]) == lead


@pytest.mark.parametrize("form", FP8)
def test_signal_to_noise(form: str) -> None:
    """Of weight and product; with one bit of fraction less both fall below the floor."""
    w, x = torch.randn(200, 320), torch.randn(50, 320)
    given = FP8[form] | ({"x_scale": 4.5 / 448} if "x_scale" in FP8[form] else {})
    weight = Fp8Weight.from_dense(w, **given)
    coarse = weight.replace(values=_coarser(weight.values))
    assert snr_db(weight.to_dense(), w) > SNR_FLOOR_DB["weight"] > snr_db(coarse.to_dense(), w)
    truth = x.double() @ w.double().t()
    kind = "weight" if weight.activations == "none" else "rounded"
    assert snr_db(fp8_linear(x, weight), truth) > SNR_FLOOR_DB[kind]
    assert snr_db(fp8_linear(x, coarse), truth) < SNR_FLOOR_DB[kind]


def _coarser(values: Tensor) -> Tensor:
    """The numbers with two bits of fraction."""
    codes = values.view(torch.uint8)
    return ((codes.int() + 1).clamp(max=255).to(torch.uint8) & 0xFE).view(torch.float8_e4m3fn)


def test_storage_is_a_byte_a_weight() -> None:
    q = Fp8Weight.from_dense(torch.randn(20, 33))
    assert list(q.values.shape) == [20, 48]
    assert q.nbytes == 20 * 48 + 20 * 4
    assert q.activations == "dynamic"
    again = Fp8Weight.from_dense(q.to_dense())
    assert torch.equal(again.values.view(torch.uint8), q.values.view(torch.uint8))


def test_validate_accepts_what_is_made_and_refuses_the_rest() -> None:
    w = torch.randn(20, 70)
    row, block = Fp8Weight.from_dense(w), Fp8Weight.from_dense(w, "block", "none")
    static = Fp8Weight.from_dense(w, "tensor", "static", 0.5)
    for good in (row, block, static):
        good.validate()
    odd = row.values.view(torch.uint8).clone()
    odd[3, 5] = 127
    past = row.values.view(torch.uint8).clone()
    past[3, 75] = 1
    codes = torch.float8_e4m3fn
    bad: list[tuple[Fp8Weight, type[Exception], str]] = [
        (row.replace(values=row.values.float()), TypeError, "values: expected dtype float8_e4m3"),
        (row.replace(values=row.values[:, :70]), ValueError, r"values: expected shape \[20, 80\]"),
        (row.replace(values=odd.view(codes)), ValueError, "values: expected numbers; got NaN"),
        (row.replace(values=past.view(codes)), ValueError, "values: expected zeros beyond col"),
        (row.replace(scale=row.scale[:1]), ValueError, r"scale: expected shape \[20, 1\]"),
        (row.replace(scale=row.scale.double()), TypeError, "scale: expected dtype float32"),
        (row.replace(scale=row.scale * 0), ValueError, "scale: expected finite values above 0"),
        (row.replace(scale=row.scale / 0), ValueError, "scale: expected finite values above 0"),
        (row.replace(k=-1), ValueError, "k: expected at least 0; got -1"),
        (row.replace(scales="column"), ValueError, "scales: expected one of tensor, row, block"),
        (row.replace(activations="u8"), ValueError, "activations: expected one of none, dyn"),
        (row.replace(x_scale=torch.ones(1)), ValueError, "x_scale: expected None with activ"),
        (static.replace(x_scale=None), ValueError, "x_scale: expected a tensor with activations"),
        (static.replace(x_scale=torch.ones(2)), ValueError, r"x_scale: expected shape \[1\]"),
        (static.replace(x_scale=-torch.ones(1)), ValueError, "x_scale: expected finite values"),
        (block.replace(scale=row.scale), ValueError, r"scale: expected shape \[1, 1\]"),
        (
            block.replace(activations="static", x_scale=torch.ones(1)),
            ValueError,
            "activations: expected 'none' or 'dynamic' with scales 'block'",
        ),
    ]
    for weight, error, message in bad:
        with pytest.raises(error, match=message):
            weight.validate()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scales": "group"},
            ValueError,
            "scales: expected one of .*; got 'group'",
        ),
        ({"activations": "static"}, ValueError, "x_scale: expected a scale with activations"),
        ({"x_scale": 1.0}, ValueError, "x_scale: expected a scale with activations 'static'"),
        ({"activations": "static", "x_scale": 0.0}, ValueError, "x_scale: expected finite"),
        ({"w": torch.randn(3)}, ValueError, r"w: expected 2 dimensions \[N, K\]"),
        ({"w": torch.full((2, 2), float("inf"))}, ValueError, "w: expected finite values"),
        ({"w": torch.ones(2, 2, dtype=torch.int8)}, TypeError, "w: expected dtype"),
        ({"w": [1.0]}, TypeError, "w: expected a torch.Tensor; got list"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Fp8Weight.from_dense(**{"w": torch.randn(4, 5), **options})
