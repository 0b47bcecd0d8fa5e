"""u8 between layers: quantized_linear and sparse_linear that give and take u8 on a qparams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops.formats.quantize import dequantize_u8, quantize_u8, static_qparams
from bigops.formats.quantized import QuantizedWeight
from bigops.ops.family import U8Op
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.ops.family.u8_cases import (
    FORMS,
    ONE_OF_EACH,
    U8_FORMS,
    X_QPARAMS,
    call,
    check_u8,
    kernel,
    on_qparams,
    qparams_of,
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


def u8_op(case: Case) -> U8Op:
    twin = case.linear_op.u8
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
                qparams = qparams_of(case)
                seen = [(case, case.x)]
                if form in U8_FORMS:
                    seen.append((on_qparams(case), quantize_u8(case.x, X_QPARAMS)))
                for of, x in seen:
                    with isa(level), expect(kernel(form, level, x, m, True)):
                        y = raw(case)(*raw_arguments(case, x, qparams))
                    check_u8(of, y, qparams)


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
    qparams = qparams_of(case)
    with expect("_u8"):
        check_u8(case, call(case, case.x, qparams), qparams)
        check_u8(on_qparams(case), call(case, quantize_u8(case.x, X_QPARAMS), qparams), qparams)


@pytest.mark.parametrize("form", ONE_OF_EACH)
@pytest.mark.parametrize("m", [4, 40])
def test_any_strides(form: str, m: int) -> None:
    case = make(form, m, 10, 24, "f32", "gelu")
    qparams, q = qparams_of(case), quantize_u8(case.x, X_QPARAMS)
    spread = torch.stack([qparams, qparams + 1], 1)[:, 0]
    assert not spread.is_contiguous()
    check_u8(on_qparams(case), call(case, q.t().contiguous().t(), spread), qparams)
    check_u8(on_qparams(case), call(case, q.repeat_interleave(2, -1)[..., ::2], qparams), qparams)


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


def test_static_qparams_of_sparse_x_is_what_quantized_linear_does() -> None:
    """The same whole numbers, whoever multiplies them."""
    case = make("sparse_int8", 9, 20, 33, sparsity=0.0)
    dense = QuantizedWeight.from_dense(
        case.dense.float(), activations="static", x_qparams=X_QPARAMS
    )
    assert torch.equal(dense.to_dense(), case.weight.to_dense())
    with expect(".sparse_linear.f32.s8_columns", ".quantized_linear.f32.w8a8"):
        y = sparse_linear(case.x, case.weight, case.bias, x_qparams=X_QPARAMS)
        want = quantized_linear(case.x, dense, case.bias)
    seen = replace(on_qparams(case), residual=None)
    seen.check_forward(y)
    seen.check_forward(want)
    case.x[2, 3] = float("nan")
    y = sparse_linear(case.x, case.weight, case.bias, x_qparams=X_QPARAMS)
    assert y[2].isnan().all()
    assert y[:2].isfinite().all()


@pytest.mark.parametrize("level", ISAS)
def test_a_chain_of_u8_gives_the_numbers_of_a_chain_of_floats(level: str) -> None:
    """An MLP block: the hidden u8 numbers are those that the next layer makes of floats, but for
    ties that two kernels may round to either side."""
    x = torch.randn(30, 40)
    b1, b2 = torch.randn(96), torch.randn(50)
    qparams = static_qparams(-0.2, 4.0)
    first = QuantizedWeight.from_dense(
        torch.randn(96, 40) / 6, activations="static", x_qparams=static_qparams(-3, 3)
    )
    second = QuantizedWeight.from_dense(
        torch.randn(50, 96) / 9, activations="static", x_qparams=qparams
    )
    with isa(level), expect(".f32.w8a8_u8", ".u8.w8a8"):
        u8 = quantized_linear(x, first, b1, activation="gelu", y_qparams=second.x_qparams)
        y = quantized_linear(u8, second, b2)
        hidden = quantized_linear(x, first, b1, activation="gelu")
    beside = (u8.int() - quantize_u8(hidden, qparams).int()).abs()
    assert int(beside.max()) <= 1
    assert float(beside.float().mean()) < 0.01
    seen, w = dequantize_u8(u8, qparams, torch.float32), second.to_dense()
    ref64 = F.linear(seen.double(), w.double(), b2.double())
    scale = F.linear(seen.double().abs(), w.double().abs(), b2.double().abs())
    check(y, ref64, F.linear(seen, w, b2), scale)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_bitwise_equal_from_run_to_run_at_every_thread_count(form: str) -> None:
    case = make(form, 130, 200, 700, "f32", "gelu")
    qparams, q = qparams_of(case), quantize_u8(case.x, X_QPARAMS)
    for count in (1, 2):
        with threads(count):
            first, again = (call(case, q, qparams) for _ in range(2))
        assert torch.equal(first, again)
        check_u8(on_qparams(case), first, qparams)


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
                    qparams = qparams_of(case)
                    t = getattr(case, place)
                    t[..., column] = bad
                    with isa(level), pytest.raises(RuntimeError, match="y: expected finite"):
                        call(case, case.x, qparams)


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_the_reference_refuses_them_too(form: str) -> None:
    case = make(form, 3, 19, 37)
    case.x[1, 3] = float("nan")
    op = u8_op(case)
    arguments = raw_arguments(case, case.x, qparams_of(make(form, 3, 19, 37)))
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
        y = call(case, case.x, static_qparams(-1e-30, 1e-30))
    assert bool((y[:, ::2] == 255).all())
    assert bool((y[:, 1::2] == 0).all())


# paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "lead"), covering(FORMS, [[], [3], [2, 9]]), ids=str)
def test_opcheck(form: str, lead: list[int]) -> None:
    dtype = "bf16" if form == "sparse_bf16" else "f32"
    case = make(form, lead, 5, 7, dtype, "gelu")
    qparams = qparams_of(case)
    paths.opcheck(raw(case), raw_arguments(case, case.x, qparams))
    if form in U8_FORMS:
        q = quantize_u8(case.x, X_QPARAMS)
        paths.opcheck(raw(case), raw_arguments(case, q, qparams))
        paths.opcheck(raw(case), raw_arguments(case, q, None))


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_compiled_and_exported(form: str) -> None:
    case = make(form, 5, 12, 9, "f32", "gelu")
    qparams, q = qparams_of(case), quantize_u8(case.x, X_QPARAMS)

    class Chain(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(case, x, qparams)

    for x in (case.x, q):
        want = call(case, x, qparams)
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
    qparams = qparams_of(case)
    f, x_qparams = (
        (sparse_linear, {"x_qparams": X_QPARAMS}) if case.sparse else (quantized_linear, {})
    )
    q = quantize_u8(case.x, X_QPARAMS)
    several = torch.stack([qparams, qparams * torch.tensor([2.0, 1.0]), qparams, qparams])

    def g(x: Tensor, bias: Tensor, qparams: Tensor) -> Tensor:
        return f(x, case.weight, bias, None, "gelu", y_qparams=qparams, **x_qparams)  # type: ignore[operator]

    with expect("_u8"):
        got = torch.vmap(g, in_dims=(0, None, None))(q, case.bias, qparams)
    assert torch.equal(got, g(q, case.bias, qparams))
    got = torch.vmap(g, in_dims=(1, None, 0))(q.transpose(0, 1), case.bias, several)
    assert torch.equal(got[1], g(q[1], case.bias, several[1]))
    none = torch.vmap(g, in_dims=(0, None, None))(q[:0], case.bias, qparams)
    assert none.shape == (0, 3, 12)
    assert none.dtype == torch.uint8


def test_autocast_casts_what_is_floating() -> None:
    case = make("int8_static", 5, 12, 8)
    q = quantize_u8(case.x, X_QPARAMS)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(case, q, None).dtype == torch.bfloat16
        assert call(case, case.x, qparams_of(case)).dtype == torch.uint8


@pytest.mark.parametrize("form", FORMS)
def test_explain_names_the_kernel_that_runs(form: str) -> None:
    dtype = "bf16" if form == "sparse_bf16" else "f32"
    for m in (2, 9):
        case = make(form, m, 5, 7, dtype)
        xs = [case.x] + [quantize_u8(case.x, X_QPARAMS)] * (form in U8_FORMS)
        for x in xs:
            for qparams in (qparams_of(case), None):
                x_qparams = {"x_qparams": X_QPARAMS} if form == "sparse_int8" else {}
                said = bigops.explain(case.op, x, case.weight, y_qparams=qparams, **x_qparams)
                with expect(said.kernel):
                    call(case, x, qparams)
                assert said.kernel.endswith("_u8") is (qparams is not None)
                assert ("stored as u8" in said.reason) is (qparams is not None)


# planted faults ------------------------------------------------------------------------------


def test_a_wrong_number_and_a_stand_in_are_seen() -> None:
    case = make("int8_static", 5, 37, 83, "f32", "gelu")
    qparams = qparams_of(case)
    y = call(case, case.x, qparams)
    off = y.clone()
    off.view(-1)[7] += 1 if off.view(-1)[7] < 255 else -1
    off.view(-1)[9] += 2 if off.view(-1)[9] < 128 else -2
    with pytest.raises(AssertionError, match="u8 off by"):
        check_u8(case, off, qparams)
    truncated = (
        (case.truth(torch.float64)[0] / qparams[0] + qparams[1]).clamp(0, 255).to(torch.uint8)
    )
    with pytest.raises(AssertionError, match="u8 off by"):
        check_u8(case, truncated, qparams)

    def stand_in() -> None:
        with expect("_u8"):
            u8_op(case)._serve(*raw_arguments(case, case.x, qparams))

    with pytest.raises(AssertionError, match="a reference ran"):
        stand_in()


def test_qparams_there_and_back() -> None:
    qparams = static_qparams(-0.3, 7.1)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantize_u8(dequantize_u8(every, qparams), qparams), every)
