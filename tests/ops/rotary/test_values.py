"""rotary: every dtype by every way that serves it, shapes and strides, by float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops.backend import machine
from bigops.ops.rotary import reference
from tests.support.backends import CPU, REFERENCE, Way, covering
from tests.support.cases.rotary import DTYPES, Case, make
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, served_by, threads

pytestmark = needs_extension
WAYS = [REFERENCE, *CPU]


@pytest.mark.parametrize("wide", [False, True], ids=["own", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_kernel(way: Way, dtype: str, wide: bool) -> None:
    for r in (72, 40):
        case = make((2, 3, 5, 72, r), dtype, wide=wide)
        level = served_by(way.level) if way.level else ""
        with way.serving("rotary", f"cpu.{level}.rotary.{dtype}.half"), torch.no_grad():
            case.check(case.run(), str(way))


@pytest.mark.parametrize(("dtype", "level"), covering(DTYPES, ISAS), ids=str)
def test_ragged_columns(dtype: str, level: str) -> None:
    for half in (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33):
        for rest in (0, 1, 9):
            case = make((1, 2, 3, 2 * half + rest, 2 * half), dtype, wide=half % 2 == 0)
            with isa(level):
                case.check(case.run(), f"R = {2 * half}, {rest} more")


def test_no_column_turns() -> None:
    for way in (REFERENCE, *CPU[-1:]):
        with way.serving("rotary"):
            case = make((2, 3, 5, 7, 0))
            case.check(case.run())


@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:]], ids=str)
@pytest.mark.parametrize("sizes", [(0, 3, 5, 8), (2, 0, 5, 8), (2, 3, 0, 8), (2, 3, 5, 0)], ids=str)
def test_nothing_to_turn(way: Way, sizes: tuple[int, int, int, int]) -> None:
    with way.serving("rotary"):
        y = make((*sizes, sizes[-1])).run()
    assert y.shape == sizes
    assert y.transpose(1, 2).is_contiguous()


LEADS: list[tuple[int, ...]] = [(), (1,), (2,), (1, 1), (2, 1)]


@pytest.mark.parametrize("lead", LEADS, ids=str)
@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:]], ids=str)
def test_tables_of_all_shapes(way: Way, lead: tuple[int, ...]) -> None:
    case = make((2, 3, 5, 16, 12), lead=lead)
    with way.serving("rotary"):
        case.check(case.run())


STRIDED: dict[str, Callable[[], Tensor]] = {  # [2, 3, 5, 16]
    "contiguous": lambda: torch.randn(2, 3, 5, 16),
    "rows of tokens": lambda: torch.randn(2, 5, 3, 16).transpose(1, 2),
    "a part of each head": lambda: torch.randn(2, 5, 3, 48)[..., 16:32].transpose(1, 2),
    "every other head": lambda: torch.randn(2, 6, 5, 16)[:, ::2],
    "every other token": lambda: torch.randn(2, 3, 10, 16)[:, :, ::2],
    "one head for all": lambda: torch.randn(2, 1, 5, 16).expand(2, 3, 5, 16),
    "columns first": lambda: torch.randn(2, 3, 16, 5).mT,
    "every other column": lambda: torch.randn(2, 3, 5, 32)[..., ::2],
    "backwards in batches": lambda: torch.randn(3, 5, 2, 16).permute(2, 0, 1, 3),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_read(name: str, dtype: str) -> None:
    case = make((2, 3, 5, 16, 12), dtype)
    found = Case(STRIDED[name]().to(DTYPES[dtype]), case.cos, case.sin)
    found.check(found.run(), name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_tables_are_read(dtype: str) -> None:
    x, of = make((2, 3, 5, 16, 12), dtype).x, DTYPES[dtype]
    for table in (
        lambda: torch.randn(5, 24).to(of)[:, 12:],
        lambda: torch.randn(1, 12, 5).to(of).mT,
        lambda: torch.randn(12).to(of).expand(2, 5, 12),
        lambda: torch.randn(5, 1, 12).to(of).transpose(0, 1)[None],
        lambda: torch.randn(2, 1, 10, 24).to(of)[:, :, ::2, ::2],
    ):
        case = Case(x, table(), table())
        case.check(case.run())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    b, heads, t = (draw(st.integers(1, n)) for n in (3, 5, 9))
    half = draw(st.integers(0, 40))
    d = 2 * half + draw(st.integers(0, 20))
    lead = draw(st.sampled_from([(), (1,), (b,), (b, 1)]))
    case = make(
        (b, heads, t, d, 2 * half),
        draw(st.sampled_from(sorted(DTYPES))),
        wide=draw(st.booleans()),
        lead=lead,
    )
    with isa(draw(st.sampled_from(ISAS))):
        case.check(case.run())


def test_threads_give_the_same() -> None:
    case = make((3, 12, 65, 64, 64), lead=(3,))
    with threads(1):
        one = case.run()
    case.check(one)
    with threads(4):
        assert torch.equal(case.run(), one)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bad_numbers_stay_in_their_pair(dtype: str) -> None:
    case = make((1, 2, 3, 40, 36), dtype)
    want = case.run()
    x = case.x.clone()
    x[0, 1, 2, 3], x[0, 0, 1, 39] = math.nan, math.inf
    y = Case(x, case.cos, case.sin).run()
    changed = {(0, 1, 2, 3), (0, 1, 2, 21), (0, 0, 1, 39)}
    assert {tuple(at) for at in (y != want).nonzero().tolist()} == changed
    assert y[0, 1, 2, 3].isnan()
    assert y[0, 1, 2, 21].isnan()
    assert y[0, 0, 1, 39] == math.inf


def test_the_reference_is_its_meaning() -> None:
    for dtype in DTYPES:
        case = make((2, 3, 5, 16, 12), dtype, wide=True)
        case.check(reference(*case.tensors))


def test_explain_names_the_kernel_that_runs() -> None:
    case = make(dtype="bf16")
    said = bigops.explain("rotary", *case.tensors)
    with expect(said.kernel):
        case.run()
    assert "read once for all heads" in said.reason
    assert said == bigops.explain("rotary", (2, 3, 5, 16), (1, 5, 16), dtype=torch.bfloat16)
    gpu = bigops.explain("rotary", *case.tensors, device="sm_90")
    assert gpu.kernel == "reference.rotary"
    assert "no GPU kernel" in gpu.reason
    with pytest.raises(ValueError, match=r"cos: expected shape \[B or 1, T, R\]"):
        bigops.explain("rotary", (2, 3, 5, 16), (1, 5, 18), dtype=torch.bfloat16)


def test_explain_without_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "extension", None)
    monkeypatch.setattr(machine, "extension_error", "not built")
    assert str(bigops.explain("rotary", *make().tensors)) == "rotary: reference.rotary; not built"


# errors ------------------------------------------------------------------------------------

X, TABLE = torch.randn(2, 3, 5, 8), torch.randn(1, 5, 8)
SHAPE = r"expected shape \[B or 1, T, R\] of x \[B, H, T, D\] \[2, 3, 5, 8\], R even and at most D"
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, "x: expected a torch.Tensor; got None"),
    ({"cos": [1.0]}, TypeError, "cos: expected a torch.Tensor; got list"),
    ({"sin": None}, TypeError, "sin: expected a torch.Tensor; got None"),
    ({"x": X.double()}, TypeError, "x: expected dtype float32, bfloat16, float16; got float64"),
    ({"x": X[0]}, ValueError, r"x: expected 4 dimensions; got shape \[3, 5, 8\]"),
    ({"cos": TABLE.half()}, TypeError, "cos: expected dtype float32, float32; got float16"),
    ({"sin": TABLE.half()}, TypeError, "sin: expected dtype float32; got float16"),
    ({"cos": TABLE.to("meta")}, ValueError, "cos: expected device cpu, that of x; got meta"),
    ({"cos": TABLE[:, :4]}, ValueError, f"cos: {SHAPE}; got \\[1, 4, 8\\]"),
    ({"cos": TABLE[..., :7]}, ValueError, f"cos: {SHAPE}; got \\[1, 5, 7\\]"),
    ({"cos": TABLE.repeat(1, 1, 2)}, ValueError, f"cos: {SHAPE}; got \\[1, 5, 16\\]"),
    ({"cos": TABLE.repeat(3, 1, 1)}, ValueError, f"cos: {SHAPE}; got \\[3, 5, 8\\]"),
    ({"cos": TABLE[0, 0]}, ValueError, f"cos: {SHAPE}; got \\[8\\]"),
    ({"sin": TABLE.repeat(1, 3, 1, 1)}, ValueError, f"sin: {SHAPE}; got \\[1, 3, 5, 8\\]"),
    ({"sin": TABLE[..., :4]}, ValueError, r"sin: expected shape \[1, 5, 8\]; got \[1, 5, 4\]"),
]


@pytest.mark.parametrize(("other", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments(other: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bigops.rotary(**{"x": X, "cos": TABLE, "sin": TABLE, **other})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), TABLE, TABLE), "x: expected dtype f32, bf16 or f16; got f64"),
        ((X[0], TABLE, TABLE), r"x: expected shape \[B, H, T, D\]; got \[3, 5, 8\]"),
        ((X, TABLE.half(), TABLE.half()), "cos: expected dtype f32; got f16"),
        ((X, TABLE, TABLE.half()), "sin: expected dtype f32; got f16"),
        ((X, TABLE[..., :7], TABLE), f"cos: {SHAPE}; got"),
        ((X, TABLE, TABLE.repeat(1, 3, 1, 1)), f"sin: {SHAPE}; got"),
        ((X, TABLE, TABLE[..., :4]), r"sin: expected the columns of cos; got \[1, 5, 4\]"),
    ],
)
def test_the_kernel_checks_again(args: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bigops.rotary(*args)
