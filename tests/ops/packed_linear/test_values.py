"""packed_linear on the CPU: values on every instruction set, layout, determinism, errors.

Gradients on every path are in tests/ops/family/test_paths.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bigops
from bigops import backend
from bigops.formats.packed import PackedWeight
from bigops.ops.family import Call
from bigops.ops.packed_linear import op, packed_linear
from tests.support.cases.compressed import DTYPES, Case, make
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, served_by, threads

pytestmark = needs_extension
raw = torch.ops.bigops.packed_linear


def kernel_of(level: str, dtype: str) -> str:
    """Name of the kernel of a dtype at a level: VNNI adds nothing, BF16 only its own dtype."""
    isa = served_by(level, *(["avx512bf16"] if dtype == "bf16" else []))
    return f"cpu.{isa}.packed_linear.{dtype}.panels"


def run(case: Case, level: str, dtype: str) -> None:
    """Forward and backward of one case at one level, values and kernel names."""
    x, bias, residual = leaves = case.leaves()
    kernel = kernel_of(level, dtype)
    with isa(level), expect(kernel, kernel.replace("packed_linear", "packed_linear_backward")):
        y = packed_linear(x, case.weight, bias, residual, case.name)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    case.check_gradients([None if t is None else next(grads) for t in leaves], level)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 130, 65), (2, 3, 16), (3, 64, 128), (4, 65, 129), (6, 80, 31), (29, 200, 300)],
)
def test_ragged_shapes(level: str, dtype: str, m: int, n: int, k: int) -> None:
    """Every rest of the register block, panels cut by N, blocks and words cut by K."""
    for name in ("none", "gelu"):
        run(make("packed", m, n, k, dtype, name), level, dtype)


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("name", PLAIN)
def test_activations_on_every_instruction_set(level: str, name: str) -> None:
    for dtype in DTYPES:
        run(make("packed", 5, 37, 83, dtype, name), level, dtype)


@given(
    m=st.integers(0, 40),
    n=st.integers(0, 200),
    k=st.integers(0, 400),
    dtype=st.sampled_from(sorted(DTYPES)),
    bias=st.booleans(),
    residual=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(m: int, n: int, k: int, dtype: str, bias: bool, residual: bool) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    case = make("packed", m, n, k, dtype, "silu", bias=bias, residual=residual)
    case.check_forward(packed_linear(case.x, case.weight, case.bias, case.residual, "silu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_in_tasks_of_their_own(dtype: str) -> None:
    """Rows are split over tasks, by the number of threads."""
    case = make("packed", 1001, 70, 260, dtype, residual=False)
    for count in (1, 2, 3):
        with threads(count):
            y, again = (packed_linear(case.x, case.weight, case.bias) for _ in range(2))
        assert torch.equal(y, again)
        case.check_forward(y, f"of many rows, {count} threads")


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout(dtype: str) -> None:
    """Panels of 64 rows, word by word; what fills up is zero; unpacking gives the matrix back."""
    to = DTYPES[dtype]
    w = torch.arange(70.0 * 5).view(70, 5).remainder(200).to(to)
    weight = PackedWeight.from_dense(w)
    per = 2 if dtype == "bf16" else 1
    assert weight.panels.shape == (2, -(-5 // per), 64, per)
    assert weight.panels.dtype == to
    assert weight.panels[1, 1, 3].tolist() == w[67, per : 2 * per].tolist()
    assert not weight.panels[1, :, 6:].any()
    if per == 2:
        assert not weight.panels[:, 2, :, 1].any()
    assert torch.equal(weight.to_dense(), w)
    assert weight.shape == (70, 5)
    assert weight.nbytes == weight.panels.numel() * weight.panels.element_size()
    w.zero_()
    assert weight.to_dense().any(), "the pack shares memory with the matrix"


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_x(dtype: str) -> None:
    case = make("packed", 6, 20, 34, dtype, residual=False)
    wide = torch.randn(6, 68).to(case.x.dtype)
    wide[:, ::2] = case.x
    for x in (wide[:, ::2], case.x.t().contiguous().t(), case.x.view(2, 1, 3, 34)):
        y = packed_linear(x, case.weight, case.bias)
        assert y.shape == (*x.shape[:-1], 20)
        case.check_forward(y.view(6, 20))
    alone = packed_linear(case.x[0], case.weight, case.bias)
    assert alone.shape == (20,)
    case.rows(1).check_forward(alone.unsqueeze(0))


@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for dtype in DTYPES:
        case = make("packed", m, n, k, dtype)
        y = packed_linear(case.x, case.weight, case.bias, case.residual)
        case.check_forward(y)


def test_nan_and_inf_of_a_row_stay_in_it() -> None:
    case = make("packed", 8, 70, 40, bias=False, residual=False)
    want = packed_linear(case.x, case.weight)
    case.x[3, 5], case.x[6, 0] = float("nan"), float("inf")
    y = packed_linear(case.x, case.weight)
    assert y[3].isnan().all()
    assert not y[6].isfinite().any()
    rest = [0, 1, 2, 4, 5, 7]
    assert torch.equal(y[rest], want[rest])


def test_explain_names_the_kernel() -> None:
    case = make("packed", 4, 20, 34)
    with backend.record() as names:
        packed_linear(case.x, case.weight)
    assert bigops.explain("packed_linear", case.x, case.weight).kernel in names


def test_autocast_keeps_the_dtype_of_the_weight() -> None:
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    weight = PackedWeight.from_dense(w.bfloat16())
    with torch.autocast("cpu", torch.float16):
        y = packed_linear(x, weight)
    assert torch.equal(y, packed_linear(x.bfloat16(), weight))
    for dtype in (torch.float32, torch.bfloat16):
        layer = bigops.nn.PackedLinear(8, 5).to(dtype).freeze()
        with torch.autocast("cpu", torch.float16), torch.no_grad():
            y = layer(x, torch.ones(3, 5))
        assert torch.equal(y, layer(x.to(dtype), torch.ones(3, 5, dtype=dtype)))


def test_a_word_left_out_is_seen() -> None:
    """Planted: the last column, which an odd K leaves alone in its pair, is dropped."""
    case = make("packed", 4, 20, 33, "bf16", residual=False)
    panels = case.weight.panels.clone()
    panels[:, -1] = 0
    y = packed_linear(case.x, case.weight.replace(panels=panels), case.bias)
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"panels": torch.zeros(1, 4, 64)}, "panels: expected 4 dimensions"),
        ({"panels": torch.zeros(1, 5, 64, 1)}, r"panels: expected shape \[1, 4, 64, 1\]"),
        ({"panels": torch.zeros(1, 4, 32, 1)}, r"panels: expected shape \[1, 4, 64, 1\]"),
        ({"pad": 64}, "pad: expected the rows that fill up"),
        ({"pad": -1}, "pad: expected the rows that fill up"),
        ({"k": -1}, "n, k: expected at least 0; got 10, -1"),
        ({"x": torch.zeros(2, 5)}, r"x: expected shape \[.., 4\]"),
    ],
)
def test_errors_of_values(change: dict[str, object], message: str) -> None:
    panels, pad, k = PackedWeight.from_dense(torch.zeros(10, 4)).arguments
    given = {"x": torch.zeros(2, 4), "panels": panels, "pad": pad, "k": k, **change}
    with pytest.raises(RuntimeError):
        raw(*given.values(), None, None, "none")  # the kernel checks again
    x, *arguments = given.values()

    def named() -> None:
        Call(x, PackedWeight.of(4, *arguments)).check()  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=message):
        named()
    with pytest.raises(ValueError, match=message):
        op.run(x, tuple(arguments), 4)  # type: ignore[arg-type]


def test_errors_of_types() -> None:
    x, weight = torch.zeros(2, 4), PackedWeight.from_dense(torch.zeros(10, 4))
    with pytest.raises(TypeError, match="x: expected dtype float16; got bfloat16"):
        packed_linear(
            x.bfloat16(), PackedWeight.from_dense(torch.zeros(10, 4, dtype=torch.float16))
        )
    with pytest.raises(TypeError, match="x: expected"):
        packed_linear(x.double(), weight)
    with pytest.raises(TypeError, match="w: expected"):
        PackedWeight.from_dense(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="w: expected 2 dimensions"):
        PackedWeight.from_dense(torch.zeros(3))
    with pytest.raises(ValueError, match="activation: expected one of"):
        packed_linear(x, weight, activation="swiglu")
    with pytest.raises(ValueError, match="panels: expected a tensor that needs no gradient"):
        packed_linear(x, weight.replace(panels=weight.panels.requires_grad_()))


def test_reference_is_the_meaning() -> None:
    case = make("packed", 5, 70, 33, "bf16", "gelu")
    case.check_forward(op.reference(case.x, case.weight, case.bias, case.residual, "gelu"))
