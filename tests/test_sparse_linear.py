"""sparse_linear on the CPU: values on every instruction set, layouts, determinism, errors.

Gradients on every road are in test_frozen_linear_roads.py, storage in test_sparse_weight.py.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigops.ops.sparse_linear import (
    block_mask,
    reference,
    sparse_linear,
    sparsify_weight,
)
from tests.compressed_cases import DTYPES, LEVELS, Case
from tests.compressed_cases import make as make_case
from tests.kernels_ran import ISAS, expect, isa, needs_extension
from tests.linear_cases import PLAIN
from tests.tolerance import snr_db

module = importlib.import_module("bigops.ops.sparse_linear")  # the name is the function's, too
raw = torch.ops.bigops.sparse_linear
pytestmark = needs_extension

VALUES = ("s8", "f32")
SNR_FLOOR_DB = 38.0  # int8 values, normal weights and activations, K >= 256


def make(values: str, lead: int | list[int], n: int, k: int, *rest: Any, **options: Any) -> Case:
    form = "sparse_int8" if values == "s8" else "sparse_float"
    return make_case(form, lead, n, k, *rest, **options)


def form_of(values: str, m: int, level: str) -> str:
    if values == "s8" and m <= 2 and level in ("avx512vnni", "avx512bf16"):
        return "s8_permute"
    return f"{values}_columns"


def run(case: Case, level: str, dtype: str, m: int) -> None:
    """Forward and backward of one case at one level, values and kernel names."""
    values = "s8" if case.quantised else "f32"
    kernel = f"cpu.{level}.sparse_linear"
    x, bias, residual = leaves = case.leaves()
    assert x is not None
    with (
        isa(level),
        expect(
            f"{kernel}.{dtype}.{form_of(values, m, level)}",
            f"{kernel}_backward.{dtype}.{values}_scatter",
        ),
    ):
        y = case.public(x, bias, residual)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    case.check_gradients([None if t is None else next(grads) for t in leaves], level)


# values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", PLAIN)
def test_activations_on_every_instruction_set(level: str, values: str, name: str) -> None:
    for dtype in DTYPES:
        run(make(values, 2, 37, 83, dtype, name), level, dtype, 2)
        run(make(values, 21, 37, 83, dtype, name), level, dtype, 21)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 300, 515), (2, 3, 16), (3, 49, 512), (17, 8, 513), (65, 66, 31), (70, 5, 1100)],
)
def test_ragged_shapes(level: str, values: str, m: int, n: int, k: int) -> None:
    run(make(values, m, n, k, "f32", "gelu"), level, "f32", m)
    run(make(values, m, n, k, "bf16", "none"), level, "bf16", m)


@given(
    m=st.integers(0, 90),
    n=st.integers(0, 120),
    k=st.one_of(st.integers(0, 200), st.integers(500, 1040)),
    values=st.sampled_from(VALUES),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(PLAIN),
    bias=st.booleans(),
    residual=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
    level=st.sampled_from(LEVELS or ["portable"]),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_shape(
    m: int,
    n: int,
    k: int,
    values: str,
    dtype: str,
    name: str,
    bias: bool,
    residual: bool,
    sparsity: float,
    level: str,
) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    case = make(values, m, n, k, dtype, name, bias=bias, residual=residual, sparsity=sparsity)
    run(case, level, dtype, m)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 3, 33])
def test_int8_kernels_equal_the_reference_to_the_bit(level: str, dtype: str, m: int) -> None:
    """Exact sums and the same float steps: not one element differs without an activation."""
    for k in (1, 67, 515, 1030):
        case = make("s8", m, 50, k, dtype)
        with isa(level), expect(f".sparse_linear.{dtype}.{form_of('s8', m, level)}"):
            y = case.raw(*case.inputs)
        assert torch.equal(y, reference(case.x, *case.storage, case.bias, case.residual))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("k", [64, 65536, 66000, 140000])
def test_integer_extremes(level: str, k: int) -> None:
    """All weights and activations at the ends: 16-bit sums would saturate, int32 ones wrap."""
    for sign in (1, -1):
        weight = sparsify_weight(
            torch.full((3, k), float(sign)), torch.ones(3, (k + 3) // 4, dtype=torch.bool), True
        )
        assert weight.scale is not None
        weight = weight._replace(scale=torch.ones(3))
        for m in (2, 12):
            x = torch.full((m, k), 255.0)
            x[1, 0] = 0
            with isa(level), expect(f".sparse_linear.f32.{form_of('s8', m, level)}"):
                y = sparse_linear(x, weight)
            want = x.double().sum(1, keepdim=True) * 127 * sign
            assert torch.equal(y, want.float().expand(m, 3))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 3, 2, 2]], ids=str)
def test_leading_dimensions(values: str, lead: list[int]) -> None:
    case = make(values, lead, 6, 7, "f32", "silu")
    run(case, LEVELS[-1], "f32", torch.Size(lead).numel())


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("m", [1, 40])
def test_empty_rows_and_uneven_rows(values: str, m: int) -> None:
    """Rows without a block, one full row, one full panel: the epilogue still reaches all."""
    w = torch.randn(300, 1100)
    mask = torch.zeros(300, 275, dtype=torch.bool)
    mask[7] = True
    mask[200:, 128:256] = True
    for bias in (True, False):
        case = make(values, m, 300, 1100, "f32", "sigmoid", bias=bias)
        case.weight = sparsify_weight(w, mask, values == "s8")
        case.dense = case.weight.to_dense(torch.float64)
        run(case, LEVELS[-1], "f32", m)
        if not bias:
            y = case.public(case.x, None, None)
            assert bool((y[:, 8:200] == 0.5).all())


@pytest.mark.parametrize("values", VALUES)
def test_any_strides(values: str) -> None:
    case = make(values, 40, 10, 24, "f32", "gelu")
    x, bias, residual = case.inputs
    assert bias is not None
    assert residual is not None
    want = case.public(x, bias, residual)
    weight = case.weight
    spread = torch.empty(10, 3)
    spread[:, 1] = bias
    stored = weight._replace(
        values=weight.values.t().contiguous().t(), index=weight.index.repeat_interleave(2)[::2]
    )
    assert not stored.values.is_contiguous()
    layouts = {
        "x": (x.t().contiguous().t(), weight, bias, residual),
        "storage": (x, stored, bias, residual),
        "bias": (x, weight, spread[:, 1], residual),
        "residual": (x, weight, bias, residual.repeat_interleave(2, 1)[:, ::2]),
    }
    for what, args in layouts.items():
        assert torch.equal(sparse_linear(*args, activation="gelu"), want), what


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 20])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(level: str, dtype: str, m: int) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        case = make("s8", m, 19, 37, dtype, "relu")
        case.x[1, 36] = bad
        with isa(level), expect(f".sparse_linear.{dtype}."):
            y = case.public(*case.inputs)
        assert bool(y[1].isnan().all())
        others = torch.arange(m) != 1
        assert bool(y[others].isfinite().all())


def test_float_values_pass_nan_through_stored_blocks_only() -> None:
    """Dropped blocks are not computed, so a NaN below them does not show."""
    w = torch.ones(2, 8)
    mask = torch.tensor([[True, False], [False, True]])
    y = sparse_linear(
        torch.tensor([[1.0, 2, 3, 4, float("nan"), 6, 7, 8]]), sparsify_weight(w, mask, False)
    )
    assert y[0, 0] == 10
    assert bool(y[0, 1].isnan())


@pytest.mark.parametrize("values", VALUES)
def test_bitwise_equal_from_run_to_run_and_over_threads(values: str) -> None:
    case = make(values, 130, 700, 1200, "f32", "gelu")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            x, bias, residual = leaves = case.leaves()
            assert x is not None
            y = case.public(x, bias, residual)
            results.append((y, *torch.autograd.grad(y, leaves, case.grad)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_signal_to_noise_against_the_pruned_weight() -> None:
    for k in (256, 784, 2048):
        w, x = torch.randn(128, k), torch.randn(64, k)
        mask = block_mask(w, 0.8)
        pruned = w.double() * mask.repeat_interleave(4, 1)
        y = sparse_linear(x, sparsify_weight(w, mask, True))
        assert snr_db(y, x.double() @ pruned.t()) > SNR_FLOOR_DB


# errors ------------------------------------------------------------------------------------


def refusals() -> list[tuple[str, type[Exception], str, dict[str, Any]]]:
    w = torch.randn(5, 4)
    good = sparsify_weight(w, block_mask(w, 0), True)
    return [
        ("activation", ValueError, "activation: expected one of none, .*; got 'geglu'",
         {"activation": "geglu"}),
        ("x dtype", TypeError, "x: expected dtype float32, bfloat16, float16; got int64",
         {"x": torch.ones(3, 4).long()}),
        ("x columns", ValueError, r"x: expected shape \[.., 4\] .*; got \[3, 7\]",
         {"x": torch.randn(3, 7)}),
        ("x scalar", ValueError, r"x: expected shape .*; got \[\]", {"x": torch.tensor(1.0)}),
        ("values dtype", TypeError, "values: expected dtype int8; got float32",
         {"weight": good._replace(values=good.values.float())}),
        ("values shape", ValueError, r"values: expected shape \[blocks, 4\]; got \[5, 3\]",
         {"weight": good._replace(values=good.values[:, :3])}),
        ("index", ValueError, r"index: expected shape \[5\]; got \[4\]",
         {"weight": good._replace(index=good.index[:4])}),
        ("panel_ptr", ValueError, r"panel_ptr: expected shape \[6\] .*; got \[5\]",
         {"weight": good._replace(panel_ptr=good.panel_ptr[:5])}),
        ("device", ValueError, "index: expected device cpu, that of x; got meta",
         {"weight": good._replace(index=good.index.to("meta"))}),
        ("bias shape", ValueError, r"bias: expected shape \[5\]; got \[4\]",
         {"bias": torch.randn(4)}),
        ("residual dtype", TypeError, "residual: expected dtype float32, that of x; got float16",
         {"residual": torch.randn(3, 5).half()}),
    ]  # fmt: skip


@pytest.mark.parametrize("graph", [False, True], ids=["inference", "graph"])
@pytest.mark.parametrize(
    ("kind", "message", "change"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()]
)
def test_errors_name_argument_expected_and_got(
    kind: type[Exception], message: str, change: dict[str, Any], graph: bool
) -> None:
    w = torch.randn(5, 4)
    arguments: dict[str, Any] = {
        "x": torch.randn(3, 4),
        "weight": sparsify_weight(w, block_mask(w, 0), True),
        "residual": torch.randn(3, 5).requires_grad_(graph),
    }
    arguments.update(change)
    if "x" in change:
        arguments.pop("residual")
    with pytest.raises(kind, match=message):
        sparse_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(5, 3).char()}, r"values: expected shape \[blocks, 4\]"),
        ({1: torch.zeros(5, 4)}, "values: expected dtype s8"),
        ({2: torch.zeros(4).byte()}, "index: expected shape"),
        ({3: torch.zeros(3).int()}, "panel_ptr: expected shape"),
        ({3: torch.zeros(6)}, "panel_ptr: expected dtype s32"),
        ({4: torch.ones(3)}, "panel_ptr: expected shape"),
        ({5: torch.ones(3)}, "bias: expected shape"),
        ({6: torch.ones(1, 5)}, "residual: expected x's shape"),
        ({7: "swiglu"}, "activation: expected one that is no gated pair"),
    ],
)
def test_raw_op_checks_again(change: dict[int, Any], message: str) -> None:
    w = torch.randn(5, 4)
    args: list[Any] = [torch.randn(3, 4), *sparsify_weight(w, block_mask(w, 0), True)[:4]]
    args += [None, None, "none"]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        raw(*args)


# planted faults ----------------------------------------------------------------------------


def test_a_stand_in_is_seen() -> None:
    case = make("s8", 3, 5, 4)

    def stand_in() -> None:
        with expect(".sparse_linear.f32.s8_columns"):
            module._op._serve(case.x, *case.storage, None, None, "none")

    with pytest.raises(AssertionError, match=r"no '.sparse_linear.f32.s8_columns' among"):
        stand_in()


@pytest.mark.parametrize("values", VALUES)
def test_a_wrong_kernel_is_seen(values: str) -> None:
    """One element off by 0.1 %, and one block left out, both fail the rule."""
    case = make(values, 5, 37, 83, "f32", "gelu")
    off = case.public(*case.inputs)
    off.view(-1)[int(off.abs().argmax())] *= 1.001
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(off)
    missing: Tensor = case.weight.values.clone()
    missing[missing.shape[0] // 2] = 0
    fewer = sparse_linear(
        case.x, case.weight._replace(values=missing), case.bias, case.residual, "gelu"
    )
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(fewer)
