"""act_quant: what each row becomes, by every instruction set, held to what quantising means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops import QuantizedRows, act_quant
from tests.support.cases.compressed import DTYPES
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, threads

pytestmark = needs_extension
TINY = torch.finfo(torch.float32).tiny
EPS = torch.finfo(torch.float32).eps


def check_rows(x: Tensor, rows: QuantizedRows, symmetric: bool) -> None:
    """Every number at most half a step off, 0 exact, the range of the row used."""
    values, scale, zero_point = rows
    assert (values.dtype, scale.dtype, zero_point.dtype) == (
        torch.uint8,
        torch.float32,
        torch.int32,
    )
    assert values.shape == x.shape
    assert scale.shape == zero_point.shape == x.shape[:-1]
    if not x.numel():
        return
    wide = x.double()
    finite = wide.isfinite().all(-1)
    assert torch.equal(scale.isnan(), ~finite)
    assert not values[~finite].any()
    wide, values, zero = wide[finite], values[finite].double(), zero_point[finite].double()
    step = scale[finite].double()
    lo, hi = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    want = torch.maximum(-lo, hi) / 127 if symmetric else hi / 255 - lo / 255
    assert bool(((step - want.clamp(min=TINY)).abs() <= 4 * EPS * want + TINY).all())
    off = 512 * 4 * EPS  # a few roundings of numbers below 512
    if symmetric:
        assert bool((zero == 128).all())
        assert bool((values >= 1).all())
    else:
        assert bool(((zero - (-lo / step)).abs() <= 0.5 + off).all())
    exact = wide / step.unsqueeze(-1) + zero.unsqueeze(-1)
    error = (values - exact.clamp(0, 255)).abs()
    assert bool((error <= 0.5 + off).all()), float(error.max())
    assert bool((values == zero.unsqueeze(-1))[wide == 0].all())


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_around_those_of_vectors(level: str, symmetric: bool, dtype: str) -> None:
    form = "symmetric" if symmetric else "dynamic"
    for m in (1, 3, 4, 9):
        for k in (0, 1, 7, 8, 15, 16, 31, 33, 63, 64, 65, 130, 515):
            x = (torch.randn(m, k) * 3 + 1).to(DTYPES[dtype])
            with isa(level), expect(f".act_quant.{dtype}.{form}"):
                rows = act_quant(x, symmetric)
            check_rows(x, rows, symmetric)


@given(
    rows=st.integers(0, 9),
    k=st.integers(0, 200),
    exponent=st.integers(-44, 37),
    shift=st.floats(-2, 2),
    symmetric=st.booleans(),
    level=st.sampled_from(ISAS or ["portable"]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_row(
    rows: int, k: int, exponent: int, shift: float, symmetric: bool, level: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = ((torch.randn(rows, k, generator=generator) + shift).double() * 10.0**exponent).float()
    x[torch.rand(rows, k, generator=generator) < 0.1] = 0
    x[torch.rand(rows, k, generator=generator) < 0.002] = float("nan")
    with isa(level), expect(".act_quant.f32"):
        check_rows(x, act_quant(x, symmetric), symmetric)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_nan_and_infinity_in_any_lane(level: str, symmetric: bool) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        for column in range(0, 77, 5):
            x = torch.randn(6, 77)
            x[column % 6, column] = bad
            with isa(level):
                check_rows(x, act_quant(x, symmetric), symmetric)


@pytest.mark.parametrize("shape", [(5,), (0, 4), (2, 0, 3), (2, 3, 4, 2, 37)], ids=str)
def test_leading_dimensions_and_strides(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with expect(".act_quant.f32.dynamic"):
        check_rows(x, act_quant(x), False)
        strided = x.repeat_interleave(2, -1)[..., ::2]
        check_rows(strided, act_quant(strided), False)


def test_the_same_bits_at_every_thread_count() -> None:
    x = torch.randn(300, 500)
    found = []
    for count in (1, 2, 5):
        with threads(count):
            found.append(act_quant(x))
    for rows in found[1:]:
        for got, want in zip(rows, found[0], strict=True):
            assert torch.equal(got, want)


def test_the_reference_means_the_same() -> None:
    from bigops.ops.act_quant import _serve

    for symmetric in (False, True):
        for x in (torch.randn(5, 67), torch.randn(3, 0)):
            check_rows(x, QuantizedRows(*_serve(x, symmetric)), symmetric)


def test_paths() -> None:
    x = torch.randn(2, 3, 40)
    want = act_quant(x)
    torch.library.opcheck(torch.ops.bigops.act_quant.default, (x, False))
    torch._dynamo.reset()
    with expect(".act_quant"):
        compiled = torch.compile(act_quant, fullgraph=True, backend="aot_eager")(x)
    vmapped = torch.vmap(act_quant, in_dims=1, out_dims=1)(x)
    traced = torch.fx.symbolic_trace(lambda x: act_quant(x))(x)
    for rows in (compiled, vmapped, traced):
        for got, expected in zip(rows, want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("way", ["public", "raw", "functorch"])
def test_what_wants_a_gradient_is_refused(way: str) -> None:
    raw = torch.ops.bigops.act_quant
    x = torch.randn(3, 4, requires_grad=way != "functorch")
    f: Any = {
        "public": act_quant,
        "raw": lambda x: raw(x, False),
        "functorch": torch.func.grad(lambda x: act_quant(x).scale.sum()),
    }[way]
    with pytest.raises(Exception, match="x: expected a tensor that needs no gradient"):
        f(x)
    with torch.no_grad():
        act_quant(torch.randn(3, 4, requires_grad=True))


def test_refused_by_name() -> None:
    with pytest.raises(TypeError, match="x: expected"):
        act_quant(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="x: expected a torch.Tensor"):
        act_quant([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected shape \[.., K\]"):
        act_quant(torch.tensor(1.0))


def test_explain_names_the_kernel_that_runs() -> None:
    for dtype in DTYPES.values():
        for symmetric in (False, True):
            x = torch.randn(3, 5).to(dtype)
            with expect(bigops.explain("act_quant", x, symmetric).kernel):
                act_quant(x, symmetric)
    assert "reference" in bigops.explain("act_quant", x, device="sm_90").kernel
