"""The CPU kernels of sparse_linear on every instruction set: values, gradients, determinism.

Each is held to the numerics rule and named. What all ways of serving the op have in common is in
test_values.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops.formats.patterns import block_mask
from bigops.formats.sparse import SparseWeight
from bigops.ops.sparse_linear import op, sparse_linear
from tests.support.backends import covering
from tests.support.cases.compressed import (
    DTYPES,
    PATTERNS,
    SPARSE,
    VALUES,
    Case,
    check_runs_and_threads,
    served,
)
from tests.support.cases.compressed import make as make_case
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, served_by
from tests.support.tolerance import snr_db

pytestmark = needs_extension

FORMS = {values: form for form, values in SPARSE.items()}
KINDS = tuple(FORMS)
TRAINED = ("f32", "bf16")
SNR_FLOOR_DB = 38.0  # int8 values, normal weights and activations, K >= 256
# The instruction sets above AVX-512 that have kernels of their own for a kind of values.
ADDS = {"f32": [], "bf16": ["avx512bf16"], "s8": ["avx512vnni"]}


def make(kind: str, lead: int | list[int], n: int, k: int, *rest: Any, **options: Any) -> Case:
    return make_case(FORMS[kind], lead, n, k, *rest, **options)


def dtypes(kind: str) -> list[str]:
    return served(FORMS[kind])


def form_of(m: int) -> str:
    """The form that serves m rows of x, as the package says (tuning may move the hand-over)."""
    weight = SparseWeight.from_mask(torch.ones(1, 4), torch.ones(1, 1, dtype=torch.bool))
    on_meta = weight.map(lambda t: t.to("meta"))
    said = bigops.explain("sparse_linear", torch.empty(m, 4, device="meta"), on_meta)
    return said.kernel.rsplit("_", 1)[1]


# Most rows of x that the rows form takes.
ROWS_FORM = max(m for m in range(40) if form_of(m) == "rows") if ISAS else 0


def kernel(op: str, kind: str, level: str, dtype: str, form: str) -> str:
    return f"cpu.{served_by(level, *ADDS[kind])}.{op}.{dtype}.{kind}_{form}"


def forward_name(kind: str, level: str, dtype: str, m: int) -> str:
    form = "rows" if m <= ROWS_FORM else "columns"
    return kernel("sparse_linear", kind, level, dtype, form)


def run(case: Case, level: str, dtype: str, m: int) -> None:
    """Forward and backward of one case at one level, values and kernel names."""
    kind = SPARSE["sparse_int8" if case.quantised else "sparse_float"]
    if case.weight.values.dtype == torch.bfloat16:
        kind = "bf16"
    leaves = case.leaves()
    gradients = "transposed_sample" if case.trains else "transposed"
    with (
        isa(level),
        expect(
            forward_name(kind, level, dtype, m),
            kernel("sparse_linear_backward", kind, level, dtype, gradients),
        ),
    ):
        y = case.public(*leaves)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    case.check_gradients([None if t is None else next(grads) for t in leaves], level)


# values ------------------------------------------------------------------------------------


def test_the_form_is_chosen_by_the_rows_of_x() -> None:
    assert 1 <= ROWS_FORM < 16
    assert [form_of(m) for m in range(1, 40)] == [
        "rows" if m <= ROWS_FORM else "columns" for m in range(1, 40)
    ]


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PLAIN)
def test_activations_on_every_instruction_set(level: str, kind: str, name: str) -> None:
    for dtype in dtypes(kind):
        for m in (ROWS_FORM, 21):
            trains = kind in TRAINED and m == 21
            run(make(kind, m, 37, 83, dtype, name, values=trains), level, dtype, m)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_on_every_instruction_set(level: str, kind: str, pattern: str) -> None:
    """Two chunks, three panels, rows and columns that fill neither; every group of rows."""
    k = 2 * 64 * {"s8": 4, "bf16": 2, "f32": 1}[kind] + 7
    for m in (3, 20):
        case = make(
            kind, m, 83, k, dtypes(kind)[0], pattern=pattern, sparsity=0.8, values=kind in TRAINED
        )
        tall = {"4x1": 4, "16x1": 16, "16x16": 16, "32x32": 16}
        if kind == "s8":
            tall["2:4"] = 16  # touches every word of 4
        assert case.weight.group == tall.get(pattern, 1)
        run(case, level, dtypes(kind)[0], m)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 49, 64, 65, 130])
def test_every_number_of_rows(level: str, kind: str, m: int) -> None:
    """Tiles of 1 to 4 vectors, full and not, one and several; every count of the rows form."""
    for pattern in ("1x1", "16x1"):
        case = make(kind, m, 20, 70, dtypes(kind)[-1], pattern=pattern, values=kind in TRAINED)
        run(case, level, dtypes(kind)[-1], m)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 1, 1),
        (1, 300, 515),
        (2, 3, 16),
        (3, 49, 512),
        (17, 8, 513),
        (70, 1030, 31),
        (9, 5, 1100),
    ],
)
def test_ragged_shapes(level: str, kind: str, m: int, n: int, k: int) -> None:
    for dtype, name in ((dtypes(kind)[0], "gelu"), ("bf16", "none")):
        run(make(kind, m, n, k, dtype, name, values=kind in TRAINED), level, dtype, m)


@given(
    m=st.integers(0, 90),
    n=st.one_of(st.integers(0, 120), st.sampled_from([1030, 2050])),
    k=st.one_of(st.integers(0, 200), st.integers(500, 1040)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(PLAIN),
    pattern=st.sampled_from(PATTERNS),
    bias=st.booleans(),
    residual=st.booleans(),
    trains=st.booleans(),
    sparsity=st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
    level=st.sampled_from(ISAS or ["portable"]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(
    m: int,
    n: int,
    k: int,
    kind: str,
    dtype: str,
    name: str,
    pattern: str,
    bias: bool,
    residual: bool,
    trains: bool,
    sparsity: float,
    level: str,
) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    dtype = dtype if dtype in dtypes(kind) else "bf16"
    options = {"bias": bias, "residual": residual, "sparsity": sparsity, "pattern": pattern}
    case = make(kind, m, n, k, dtype, name, values=trains and kind in TRAINED, **options)
    run(case, level, dtype, m)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 4, 33])
def test_int8_kernels_at_widths_around_those_of_vectors(level: str, dtype: str, m: int) -> None:
    for k, pattern in ((1, "1x1"), (67, "4x1"), (515, "1x4"), (1030, "16x1")):
        case = make("s8", m, 50, k, dtype, pattern=pattern)
        with isa(level), expect(forward_name("s8", level, dtype, m)):
            y = case.raw(*case.inputs)
        case.check_forward(y)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("k", [64, 65536, 66000, 140000])
def test_integer_extremes(level: str, k: int) -> None:
    """All weights and activations at the ends: 16-bit sums would saturate, int32 ones wrap."""
    for sign in (1, -1):
        for height in (1, 4, 16):
            mask = torch.ones(-(-3 // height), k, dtype=torch.bool)
            weight = SparseWeight.from_mask(
                torch.full((3, k), float(sign)), mask, block=(height, 1)
            )
            weight = weight.replace(scale=torch.ones(3))
            for m in (2, ROWS_FORM + 3):
                x = torch.full((m, k), 255.0)
                x[1, 0] = 0
                with isa(level), expect(forward_name("s8", level, "f32", m)):
                    y = sparse_linear(x, weight)
                want = x.double().sum(1, keepdim=True) * 127 * sign
                assert torch.equal(y, want.float().expand(m, 3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 3, 2, 2]], ids=str)
def test_leading_dimensions(kind: str, lead: list[int]) -> None:
    case = make(kind, lead, 6, 7, dtypes(kind)[0], "silu", values=kind in TRAINED)
    run(case, ISAS[-1], dtypes(kind)[0], torch.Size(lead).numel())


@pytest.mark.parametrize(("kind", "level", "m"), covering(KINDS, ISAS, [1, 40]))
def test_empty_rows_and_uneven_rows(kind: str, level: str, m: int) -> None:
    """Rows without a value, one full row among empty ones, one full panel: all get the epilogue."""
    w = torch.randn(300, 1100)
    mask = torch.zeros(300, 275, dtype=torch.bool)
    mask[7] = True
    mask[200:, 128:256] = True
    for bias in (True, False):
        case = make(
            kind, m, 300, 1100, dtypes(kind)[0], "sigmoid", bias=bias, values=kind in TRAINED
        )
        case.weight = SparseWeight.from_mask(w, mask, VALUES[kind])
        case.dense = case.weight.to_dense(torch.float64)
        run(case, level, dtypes(kind)[0], m)
        if not bias:
            y = sparse_linear(case.x, case.weight, activation="sigmoid")
            assert bool((y[:, 8:200] == 0.5).all())


@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind: str) -> None:
    case = make(kind, 40, 10, 24, dtypes(kind)[0], "gelu")
    x, bias, residual = case.inputs
    assert bias is not None
    assert residual is not None
    want = case.public(x, bias, residual)
    weight = case.weight
    spread = bias.new_empty(10, 3)
    spread[:, 1] = bias
    stored = weight.replace(
        values=weight.values.transpose(0, 2).contiguous().transpose(0, 2),
        index=weight.index.repeat_interleave(2, 0)[::2],
        rows=weight.rows.t().contiguous().t(),
        ptr=weight.ptr.repeat_interleave(3)[::3],
    )
    if weight.values.shape[2] > 1:
        assert not stored.values.is_contiguous()
    assert not stored.index.is_contiguous()
    layouts = {
        "x": (x.t().contiguous().t(), weight, bias, residual),
        "storage": (x, stored, bias, residual),
        "bias": (x, weight, spread[:, 1], residual),
        "residual": (x, weight, bias, residual.repeat_interleave(2, 1)[:, ::2]),
    }
    for what, args in layouts.items():
        assert torch.equal(sparse_linear(*args, activation="gelu"), want), what


# NaN and infinity --------------------------------------------------------------------------


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 20])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(level: str, dtype: str, m: int) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        case = make("s8", m, 19, 37, dtype, "relu")
        case.x[1, 36] = bad
        with isa(level), expect(forward_name("s8", level, dtype, m)):
            y = case.public(*case.inputs)
        assert bool(y[1].isnan().all())
        others = torch.arange(m) != 1
        assert bool(y[others].isfinite().all())


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("m", [2, 20])
def test_nan_in_x_reaches_what_stores_its_column(level: str, kind: str, m: int) -> None:
    """Torch's dense product spreads it over the row. Here every output that stores the column has
    it; the others have it or are what they would be without it (padding reads a panel's first
    word); other rows of x never."""
    case = make(kind, m, 37, 150, "bf16", pattern="1x1", sparsity=0.9)
    stores = case.dense != 0
    for column in (0, 5, 149):
        clean, dirty = case.x.clone(), case.x.clone()
        clean[1, column], dirty[1, column] = 0, float("nan")
        with isa(level), expect(forward_name(kind, level, "bf16", m)):
            want, y = (sparse_linear(x, case.weight) for x in (clean, dirty))
        others = torch.arange(m) != 1
        assert torch.equal(y[others], want[others])
        assert bool(y[1, stores[:, column]].isnan().all())
        free = ~y[1].isnan()
        assert torch.equal(y[1, free], want[1, free])
        if column != 0:
            assert int(free.sum()) > 10


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("pattern", ["1x1", "16x1"])
def test_no_infinity_enters_the_padding_of_the_values_gradient(
    level: str, kind: str, pattern: str
) -> None:
    """An optimiser would write it into the storage: 0 * inf beside the matrix must stay 0."""
    case = make(kind, 20, 37, 149, "bf16", pattern=pattern, values=True)
    only_padding = case.at_stored(torch.ones(37, 149)) == 0
    assert only_padding.any()
    for bad in ("x", "grad"):
        x, grad = case.x.clone(), case.grad.clone()
        (x if bad == "x" else grad)[3] = float("inf")
        leaves = [x, *case.leaves()[1:]]
        with isa(level):
            (got,) = torch.autograd.grad(case.public(*leaves), [leaves[1]], grad)  # type: ignore[list-item, arg-type]
        assert not got[only_padding].any(), bad
        assert bool((~got.isfinite()).any())


# determinism -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [4, 130])
def test_bitwise_equal_from_run_to_run_at_every_thread_count(kind: str, m: int) -> None:
    check_runs_and_threads(
        make(kind, m, 700, 1200, dtypes(kind)[0], "gelu", values=kind in TRAINED)
    )


def test_a_row_of_x_has_the_same_result_in_every_tile() -> None:
    """Within a form the sums of a row do not depend on the rows beside it."""
    for kind in KINDS:
        case = make(kind, 100, 40, 300, dtypes(kind)[0], bias=False, residual=False)
        whole = case.public(*case.inputs)
        for first, last in ((0, 20), (37, 90), (84, 100)):
            part = sparse_linear(case.x[first:last], case.weight)
            assert torch.equal(part, whole[first:last])


def test_signal_to_noise_against_the_pruned_weight() -> None:
    for k in (256, 784, 2048):
        w, x = torch.randn(128, k), torch.randn(64, k)
        mask = block_mask(w, 0.8)
        pruned = w.double() * mask.repeat_interleave(4, 1)
        y = sparse_linear(x, SparseWeight.from_mask(w, mask))
        assert snr_db(y, x.double() @ pruned.t()) > SNR_FLOOR_DB


# planted faults ----------------------------------------------------------------------------


def test_a_stand_in_is_seen() -> None:
    case = make("s8", 3, 5, 4)

    def stand_in() -> None:
        with expect(".sparse_linear.f32.s8_rows"):
            op.serve(case.call)

    with pytest.raises(AssertionError, match=r"no '.sparse_linear.f32.s8_rows' among"):
        stand_in()


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_kernel_is_seen(kind: str) -> None:
    """One element off by 0.1 % (bf16: 3 %), and one word left out, both fail the rule."""
    case = make(kind, 5, 37, 83, dtypes(kind)[0], "gelu")
    off = case.public(*case.inputs)
    off.view(-1)[int(off.abs().argmax())] *= 1.03 if kind == "bf16" else 1.001
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(off)
    missing: Tensor = case.weight.values.clone()
    at = missing.abs().float().sum(-1).flatten().argmax()
    missing.flatten(0, 1)[at] = 0
    fewer = sparse_linear(
        case.x, case.weight.replace(values=missing), case.bias, case.residual, "gelu"
    )
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(fewer)


@pytest.mark.parametrize("kind", TRAINED)
def test_a_wrong_gradient_of_values_is_seen(kind: str) -> None:
    """One stored value's gradient off by 3 %, and one that fills padding."""
    case = make(kind, 20, 37, 83, dtypes(kind)[0], pattern="1x1", values=True)
    leaves = case.leaves()
    grads = list(torch.autograd.grad(case.public(*leaves), leaves, case.grad))  # type: ignore[arg-type]
    case.check_gradients(grads)
    for fault in ("off", "padding"):
        wrong = grads[1].clone()
        if fault == "off":
            wrong.view(-1)[int(wrong.abs().argmax())] *= 1.03
        else:
            wrong[case.at_stored(torch.ones(37, 83)) == 0] = 1e-30
        with pytest.raises(AssertionError, match=r"gradient of values: (element|not 0)"):
            case.check_gradients([grads[0], wrong, *grads[2:]])
