"""u8 between layers: quantized_linear and sparse_linear that give and take u8 on a grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops.formats.quantize import from_grid, static_grid, to_grid
from bigops.formats.quantized import QuantizedWeight
from bigops.ops.family import GridOp
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.ops.family.grid_cases import (
    FORMS,
    U8_FORMS,
    X_GRID,
    call,
    check_u8,
    grid_of,
    kernel,
    on_grid,
    raw,
    raw_arguments,
    run,
)
from tests.support import paths
from tests.support.backends import covering
from tests.support.cases.compressed import DTYPES, Case, make, served
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, threads
from tests.support.tolerance import check

pytestmark = needs_extension
ONE_OF_EACH = ("int8_static", "sparse_int8")


def grid_op(case: Case) -> GridOp:
    twin = case.linear_op.twin
    assert twin is not None
    return twin


# values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", [f for f in FORMS if "int8" in f])
def test_every_width_around_those_of_vectors(level: str, form: str) -> None:
    for dtype in DTYPES:
        for m in (1, 2, 7, 33):
            for k in (1, 15, 16, 67, 515):
                case = make(form, m, 50, k, dtype)
                grid = grid_of(case)
                seen = [(case, case.x)]
                if form in U8_FORMS:
                    seen.append((on_grid(case), to_grid(case.x, X_GRID)))
                for of, x in seen:
                    with isa(level), expect(kernel(form, level, x, m, True)):
                        y = raw(case)(*raw_arguments(case, x, grid))
                    check_u8(of, y, grid)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("name", PLAIN)
def test_activations_on_every_instruction_set(level: str, name: str) -> None:
    for form in FORMS:
        for dtype in served(form) if "sparse" in form else DTYPES:
            for m in (5, 21):
                with isa(level):
                    run(form, level, m, 37, 83, dtype, name)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 130, 65), (2, 70, 16), (8, 49, 64), (9, 8, 31), (27, 66, 130), (70, 5, 1100)],
)
def test_ragged_shapes(level: str, form: str, m: int, n: int, k: int) -> None:
    with isa(level):
        run(form, level, m, n, k, "bf16" if form == "sparse_bf16" else "f32", "gelu")


@given(
    m=st.integers(0, 60),
    n=st.integers(0, 120),
    k=st.integers(0, 200),
    form=st.sampled_from(FORMS),
    name=st.sampled_from(PLAIN),
    bias=st.booleans(),
    residual=st.booleans(),
    level=st.sampled_from(ISAS or ["portable"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_shape(
    m: int, n: int, k: int, form: str, name: str, bias: bool, residual: bool, level: str
) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    dtype = "bf16" if form == "sparse_bf16" else "f32"
    with isa(level):
        run(form, level, m, n, k, dtype, name, bias=bias, residual=residual)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_sums_past_int32(form: str) -> None:
    """K where sums are added in parts of int64."""
    for m in (2, 9):
        with isa(ISAS[-1]):
            run(form, ISAS[-1], m, 3, 70000, "f32", "none")


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 3, 2, 2]], ids=str)
def test_leading_dimensions(form: str, lead: list[int]) -> None:
    case = make(form, lead, 6, 7, "f32", "silu")
    grid = grid_of(case)
    with expect("_u8"):
        check_u8(case, call(case, case.x, grid), grid)
        check_u8(on_grid(case), call(case, to_grid(case.x, X_GRID), grid), grid)


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("m", [4, 40])
def test_any_strides(form: str, m: int) -> None:
    case = make(form, m, 10, 24, "f32", "gelu")
    grid, q = grid_of(case), to_grid(case.x, X_GRID)
    spread = torch.stack([grid, grid + 1], 1)[:, 0]
    assert not spread.is_contiguous()
    check_u8(on_grid(case), call(case, q.t().contiguous().t(), spread), grid)
    check_u8(on_grid(case), call(case, q.repeat_interleave(2, -1)[..., ::2], grid), grid)


@pytest.mark.parametrize("form", U8_FORMS)
def test_dtype_of_a_floating_result_of_u8(form: str) -> None:
    q = torch.randint(0, 256, (3, 24), dtype=torch.uint8)
    for dtype, to in DTYPES.items():
        for bias, residual in ((True, True), (True, False), (False, True)):
            case = make(form, 3, 10, 24, dtype, bias=bias, residual=residual)
            assert call(case, q, None).dtype == to
    assert call(make(form, 3, 10, 24, "f16", bias=False, residual=False), q, None).dtype == (
        torch.float32
    )


def test_static_grid_of_sparse_x_is_what_quantized_linear_does() -> None:
    """The same whole numbers, whoever multiplies them."""
    case = make("sparse_int8", 9, 20, 33, sparsity=0.0)
    dense = QuantizedWeight.from_dense(case.dense.float(), activations="static", x_grid=X_GRID)
    assert torch.equal(dense.to_dense(), case.weight.to_dense())
    with expect(".sparse_linear.f32.s8_columns", ".quantized_linear.f32.w8a8"):
        y = sparse_linear(case.x, case.weight, case.bias, x_grid=X_GRID)
        want = quantized_linear(case.x, dense, case.bias)
    seen = replace(on_grid(case), residual=None)
    seen.check_forward(y)
    seen.check_forward(want)
    case.x[2, 3] = float("nan")
    y = sparse_linear(case.x, case.weight, case.bias, x_grid=X_GRID)
    assert y[2].isnan().all()
    assert y[:2].isfinite().all()


@pytest.mark.parametrize("level", ISAS)
def test_a_chain_of_u8_gives_the_numbers_of_a_chain_of_floats(level: str) -> None:
    """An MLP block: the hidden u8 numbers are those that the next layer makes of floats, but for
    ties that two kernels may round to either side."""
    x = torch.randn(30, 40)
    b1, b2 = torch.randn(96), torch.randn(50)
    grid = static_grid(-0.2, 4.0)
    first = QuantizedWeight.from_dense(
        torch.randn(96, 40) / 6, activations="static", x_grid=static_grid(-3, 3)
    )
    second = QuantizedWeight.from_dense(torch.randn(50, 96) / 9, activations="static", x_grid=grid)
    with isa(level), expect(".f32.w8a8_u8", ".u8.w8a8"):
        u8 = quantized_linear(x, first, b1, activation="gelu", y_grid=second.x_grid)
        y = quantized_linear(u8, second, b2)
        hidden = quantized_linear(x, first, b1, activation="gelu")
    beside = (u8.int() - to_grid(hidden, grid).int()).abs()
    assert int(beside.max()) <= 1
    assert float(beside.float().mean()) < 0.01
    seen, w = from_grid(u8, grid, torch.float32), second.to_dense()
    ref64 = F.linear(seen.double(), w.double(), b2.double())
    scale = F.linear(seen.double().abs(), w.double().abs(), b2.double().abs())
    check(y, ref64, F.linear(seen, w, b2), scale)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_bitwise_equal_from_run_to_run_at_every_thread_count(form: str) -> None:
    case = make(form, 130, 200, 700, "f32", "gelu")
    grid, q = grid_of(case), to_grid(case.x, X_GRID)
    for count in (1, 2):
        with threads(count):
            first, again = (call(case, q, grid) for _ in range(2))
        assert torch.equal(first, again)
        check_u8(on_grid(case), first, grid)


# NaN, inf, the ends -------------------------------------------------------------------------


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity_never_become_numbers(level: str, form: str) -> None:
    """From x, from the bias and from the residual, in a whole vector and in the last columns."""
    dtype = "bf16" if form == "sparse_bf16" else "f32"
    for m in (3, 20):
        for bad in (float("nan"), float("inf"), float("-inf")):
            for column in (0, 18):
                for place in ("bias", "residual", "x"):
                    if place == "x" and form in ("w4", "w8_zero", "sparse_float", "sparse_bf16"):
                        continue  # such a row need not reach a stored weight
                    case = make(form, m, 19, 37, dtype, "silu" if place == "x" else "none")
                    grid = grid_of(case)
                    t = getattr(case, place)
                    t[..., column] = bad
                    with isa(level), pytest.raises(RuntimeError, match="y: expected finite"):
                        call(case, case.x, grid)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_the_reference_refuses_them_too(form: str) -> None:
    case = make(form, 3, 19, 37)
    case.x[1, 3] = float("nan")
    op = grid_op(case)
    arguments = raw_arguments(case, case.x, grid_of(make(form, 3, 19, 37)))
    with pytest.raises(RuntimeError, match="y: expected finite values, since u8"):
        op.reference(op.call(*arguments))


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_numbers_outside_go_to_the_ends(level: str, form: str, m: int) -> None:
    case = make(form, m, 19, 37)
    assert case.bias is not None
    case.bias[::2], case.bias[1::2] = 3e38, -3e38
    with isa(level), expect("_u8"):
        y = call(case, case.x, static_grid(-1e-30, 1e-30))
    assert bool((y[:, ::2] == 255).all())
    assert bool((y[:, 1::2] == 0).all())


# paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "lead"), covering(FORMS, [[], [3], [2, 9]]), ids=str)
def test_opcheck(form: str, lead: list[int]) -> None:
    dtype = "bf16" if form == "sparse_bf16" else "f32"
    case = make(form, lead, 5, 7, dtype, "gelu")
    grid = grid_of(case)
    paths.opcheck(raw(case), raw_arguments(case, case.x, grid))
    if form in U8_FORMS:
        q = to_grid(case.x, X_GRID)
        paths.opcheck(raw(case), raw_arguments(case, q, grid))
        paths.opcheck(raw(case), raw_arguments(case, q, None))


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_compiled_and_exported(form: str) -> None:
    case = make(form, 5, 12, 9, "f32", "gelu")
    grid, q = grid_of(case), to_grid(case.x, X_GRID)

    class Chain(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(case, x, grid)

    for x in (case.x, q):
        want = call(case, x, grid)
        torch._dynamo.reset()
        with expect("_u8"):
            got = torch.compile(Chain(), fullgraph=True)(x)
        assert got.dtype == torch.uint8
        assert torch.equal(got, want)
        program = torch.export.export(Chain(), (x,), strict=False)
        assert torch.equal(program.module()(x), want)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_vmap_folds_rows_and_picks_the_rest(form: str) -> None:
    case = make(form, [4, 3], 12, 9, "f32", "gelu", residual=False)
    assert case.bias is not None
    grid = grid_of(case)
    f, x_grid = (sparse_linear, {"x_grid": X_GRID}) if case.sparse else (quantized_linear, {})
    q = to_grid(case.x, X_GRID)
    grids = torch.stack([grid, grid * torch.tensor([2.0, 1.0]), grid, grid])

    def g(x: Tensor, bias: Tensor, grid: Tensor) -> Tensor:
        return f(x, case.weight, bias, None, "gelu", y_grid=grid, **x_grid)  # type: ignore[operator]

    with expect("_u8"):
        got = torch.vmap(g, in_dims=(0, None, None))(q, case.bias, grid)
    assert torch.equal(got, g(q, case.bias, grid))
    got = torch.vmap(g, in_dims=(1, None, 0))(q.transpose(0, 1), case.bias, grids)
    assert torch.equal(got[1], g(q[1], case.bias, grids[1]))
    none = torch.vmap(g, in_dims=(0, None, None))(q[:0], case.bias, grid)
    assert none.shape == (0, 3, 12)
    assert none.dtype == torch.uint8


def test_autocast_casts_what_is_floating() -> None:
    case = make("int8_static", 5, 12, 8)
    q = to_grid(case.x, X_GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(case, q, None).dtype == torch.bfloat16
        assert call(case, case.x, grid_of(case)).dtype == torch.uint8


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("path", ["public", "raw", "functorch", "compiled"])
@pytest.mark.parametrize("name", ["x", "bias", "residual", "y_grid"])
def test_what_wants_a_gradient_is_refused(form: str, path: str, name: str) -> None:
    case = make(form, 3, 5, 4)
    given = {"x": case.x, "bias": case.bias, "residual": case.residual, "y_grid": grid_of(case)}

    def f(t: Tensor) -> Tensor:
        now: dict[str, Any] = {**given, name: t}
        case.bias, case.residual = now["bias"], now["residual"]
        if path == "raw":
            y: Tensor = raw(case)(*raw_arguments(case, now["x"], now["y_grid"]))
            return y
        return call(case, now["x"], now["y_grid"])

    t = given[name]
    assert t is not None
    if path == "functorch":
        go: Any = torch.func.grad(lambda t: f(t).float().sum())
    else:
        torch._dynamo.reset()
        go = torch.compile(f, backend="aot_eager") if path == "compiled" else f
    with pytest.raises(Exception, match=f"{name}: expected a tensor that needs no gradient"):
        go(t if path == "functorch" else t.clone().requires_grad_())
    with torch.no_grad(), expect("_u8"):
        f(t.clone().requires_grad_())


# errors, explain ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "change", "kind", "message"),
    [
        ("int8_static", {"y_grid": torch.ones(3)}, ValueError, r"y_grid: expected shape \[2\]"),
        ("int8_static", {"y_grid": torch.ones(2).double()}, TypeError, "y_grid: expected dtype f"),
        ("int8_static", {"y_grid": torch.tensor([0.0, 1.0])}, ValueError, "y_grid: expected a fin"),
        ("int8_static", {"y_grid": torch.tensor([1.0, 0.5])}, ValueError, "got 1.0, 0.5"),
        ("int8_static", {"y_grid": torch.tensor([1.0, 256.0])}, ValueError, "got 1.0, 256.0"),
        ("int8_static", {"y_grid": torch.tensor([torch.nan, 1.0])}, ValueError, "got nan, 1.0"),
        ("int8_static", {"y_grid": torch.tensor([1e-40, 1.0])}, ValueError, "a finite scale"),
        ("int8_static", {"y_grid": [1.0, 0.0]}, TypeError, "y_grid: expected a torch.Tensor; got"),
        ("int8_static", {"x": torch.zeros(3, 5).byte()}, ValueError, r"x: expected shape \[.., 4"),
        ("int8_static", {"x": torch.zeros(3, 4).char()}, TypeError, "x: expected dtype .* int8"),
        (
            "int8_static",
            {"x": torch.zeros(3, 4).byte(), "residual": torch.zeros(3, 5).half()},
            TypeError,
            "residual: expected dtype float32; got float16",
        ),
        (
            "int8_static",
            {"x": torch.zeros(3, 4).byte(), "bias": torch.zeros(5).double()},
            TypeError,
            "bias: expected dtype .*; got float64",
        ),
        (
            "int8",
            {"x": torch.zeros(3, 4).byte()},
            TypeError,
            "x: expected a floating dtype, since the weight's activations are not 'static'",
        ),
        ("sparse_int8", {"x": torch.zeros(3, 4).byte()}, TypeError, "since there is no x_grid"),
        ("sparse_float", {"x_grid": X_GRID}, ValueError, "x_grid: expected None with floating"),
        ("sparse_float", {"x": torch.zeros(3, 4).byte()}, TypeError, "has floating values"),
        ("sparse_int8", {"x_grid": torch.ones(1)}, ValueError, r"x_grid: expected shape \[2\]"),
        ("sparse_int8", {"x_grid": torch.tensor([-1.0, 3.0])}, ValueError, "x_grid: expected a f"),
        ("sparse_int8", {"y_grid": X_GRID.to("meta")}, ValueError, "y_grid: expected device cpu"),
    ],
)
def test_errors_name_argument_expected_and_got(
    form: str, change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    case = make(form, 3, 5, 4)
    f: Any = sparse_linear if case.sparse else quantized_linear
    given = {"x": case.x, "bias": case.bias, "residual": case.residual, "y_grid": X_GRID, **change}
    with pytest.raises(kind, match=message):
        f(given.pop("x"), case.weight, **given)


@pytest.mark.parametrize(
    ("form", "place", "value", "message"),
    [
        ("int8_static", -4, torch.ones(3), r"y_grid: expected shape \[2\]"),
        ("int8_static", -4, torch.tensor([0.0, 1.0]), "y_grid: expected a finite scale"),
        ("int8_static", -4, torch.ones(2).double(), "y_grid: expected dtype f32"),
        ("int8_static", 5, torch.tensor([1.0, -1.0]), "x_grid: expected a finite scale"),
        ("int8", 0, torch.zeros(3, 4).byte(), "x: expected a floating dtype without x_grid"),
        ("sparse_int8", 0, torch.zeros(3, 4).byte(), "x: expected a floating dtype without"),
        ("sparse_float", -5, X_GRID, "x_grid: expected None with floating values"),
        ("int8_static", -1, "swiglu", "activation: expected one that is no gated pair"),
    ],
)
def test_raw_op_checks_again(form: str, place: int, value: Any, message: str) -> None:
    case = make(form, 3, 5, 4)
    args = raw_arguments(case, case.x, X_GRID)
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        raw(case)(*args)


@pytest.mark.parametrize("form", FORMS)
def test_explain_names_the_kernel_that_runs(form: str) -> None:
    dtype = "bf16" if form == "sparse_bf16" else "f32"
    for m in (2, 9):
        case = make(form, m, 5, 7, dtype)
        xs = [case.x] + [to_grid(case.x, X_GRID)] * (form in U8_FORMS)
        for x in xs:
            for grid in (grid_of(case), None):
                x_grid = {"x_grid": X_GRID} if form == "sparse_int8" else {}
                said = bigops.explain(case.op, x, case.weight, y_grid=grid, **x_grid)
                with expect(said.kernel):
                    call(case, x, grid)
                assert said.kernel.endswith("_u8") is (grid is not None)
                assert ("stored as u8" in said.reason) is (grid is not None)


# planted faults ------------------------------------------------------------------------------


def test_a_wrong_number_and_a_stand_in_are_seen() -> None:
    case = make("int8_static", 5, 37, 83, "f32", "gelu")
    grid = grid_of(case)
    y = call(case, case.x, grid)
    off = y.clone()
    off.view(-1)[7] += 1 if off.view(-1)[7] < 255 else -1
    off.view(-1)[9] += 2 if off.view(-1)[9] < 128 else -2
    with pytest.raises(AssertionError, match="u8 off by"):
        check_u8(case, off, grid)
    truncated = (case.truth(torch.float64)[0] / grid[0] + grid[1]).clamp(0, 255).to(torch.uint8)
    with pytest.raises(AssertionError, match="u8 off by"):
        check_u8(case, truncated, grid)

    def stand_in() -> None:
        with expect("_u8"):
            grid_op(case)._serve(*raw_arguments(case, case.x, grid))

    with pytest.raises(AssertionError, match="no '_u8' among"):
        stand_in()


def test_grids_there_and_back() -> None:
    grid = static_grid(-0.3, 7.1)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_grid(from_grid(every, grid), grid), every)
