"""fused_linear: values and gradients by every way that serves it, layouts, determinism, errors.

Gradients on every path are in test_paths.py; what is Triton's own, such as tiles and planted
faults, in test_triton.py.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops.backend import machine
from bigops.ops.fused_linear import fused_linear, reference
from tests.support.backends import CPU, REFERENCE, TRITON, Way, covering
from tests.support.cases.linear import ACTIVATIONS, Case, make
from tests.support.kernels_ran import crossover, expect, needs_extension, served_by, threads

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
}
module = importlib.import_module("bigops.ops.fused_linear")  # the name is the function's, too
pytestmark = needs_extension


def isa_of(level: str, dtype: str) -> str:
    """The kernel that serves a dtype at a level of the instruction set."""
    if dtype == "f64":
        return "portable"
    return served_by(level, *(["avx512bf16"] if dtype == "bf16" else []))


def run(case: Case, way: Way, dtype: str, form: str = "dot") -> None:
    """Forward and backward of one case by one way, values and kernel names.

    ``form``: of CPU kernels, "dot" or that of a library's product.
    """
    kernel, end = f"{way.name}.fused_linear", f".{dtype}"
    if way.name == "cpu":
        kernel, end = f"cpu.{isa_of(way.level, dtype)}.fused_linear", f".{dtype}.{form}"
    limit = 1 << 60 if form == "dot" else 0
    with crossover("fused_linear", dtype, limit, limit):
        with way.serving("fused_linear", kernel + end), torch.no_grad():
            y = fused_linear(*case.inputs, case.name)
        case.check_forward(y)
        leaves = case.leaves()
        saves = way.name == "cpu" and case.name != "none"
        saved = kernel + ("_with_parts" if saves else "") + end
        with way.serving("fused_linear", saved, f"{kernel}_backward.", gradients=True):
            y = fused_linear(*leaves, case.name)
            grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y, "y with graph")
    case.check_gradients([None if t is None else next(grads) for t in leaves], str(way))


# A level whose kernel of that dtype is an earlier level's is not run twice.
BY_CPU = [(way, dtype) for dtype in DTYPES for way in CPU if isa_of(way.level, dtype) == way.level]
BY_REFERENCE = [(REFERENCE, dtype) for dtype in DTYPES]
BY_TRITON = [(TRITON, dtype) for dtype in DTYPES if dtype != "f64"]
# The interpreter takes 5 to 10 ms a block: ragged against its tiles of 32 x 32 x 32 (gated: 16).
SMALL = [
    (1, 1, 1),
    (2, 33, 65),
    (31, 1, 32),
    (64, 64, 64),
    (70, 17, 40),
    (1, 70, 100),
    (5, 7, 0),
    (0, 7, 5),
    (5, 0, 7),
]
SHAPES = [(1, 1, 1), (1, 130, 65), (2, 3, 16), (3, 4, 17), (4, 8, 31), (65, 66, 33), (70, 5, 1100)]


@pytest.mark.parametrize(
    ("by", "name"),
    [(by, name) for by in BY_CPU + BY_REFERENCE for name in ACTIVATIONS]
    + covering(BY_TRITON, ACTIVATIONS),
    ids=str,
)
def test_every_activation(by: tuple[Way, str], name: str) -> None:
    way, dtype = by
    shape = (37, 45, 70) if way is TRITON else (5, 37, 83)
    run(make(*shape, DTYPES[dtype], name), way, dtype)


@pytest.mark.parametrize(
    ("way", "dtype", "m", "n", "k"),
    [(*by, *shape) for by in BY_CPU + BY_REFERENCE for shape in SHAPES]
    + [(TRITON, "bf16", *shape) for shape in SMALL],
    ids=str,
)
def test_ragged_shapes(way: Way, dtype: str, m: int, n: int, k: int) -> None:
    for name in ("gelu", "swiglu"):
        run(make(m, n, k, DTYPES[dtype], name), way, dtype)


@pytest.mark.parametrize("library", ["aten", "onednn"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["none", "silu", "geglu"])
def test_large_products_go_through_a_library(dtype: str, name: str, library: str) -> None:
    if library == "onednn" and not machine._has_onednn():
        pytest.skip("this torch has no fp32 product by oneDNN")
    by_onednn = library == "onednn" and dtype in ("f32", "f16")
    form = "onednn_linear" if by_onednn else "torch_linear"
    form += "_via_f32" if dtype == "f16" else ""
    machine.extension.set_float_product(library)  # crossover() sets the committed one again
    run(make(300, 70, 520, DTYPES[dtype], name), CPU[-1], dtype, form)


@given(
    m=st.integers(0, 20),
    n=st.integers(0, 140),
    k=st.integers(0, 150),
    dtype=st.sampled_from(sorted(DTYPES)),
    name=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    residual=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(
    m: int, n: int, k: int, dtype: str, name: str, bias: bool, residual: bool
) -> None:
    torch.manual_seed(m * 10007 + n * 101 + k)
    case = make(m, n, k, DTYPES[dtype], name, bias=bias, residual=residual)
    run(case, CPU[-1], dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64_gradcheck_in_the_portable_kernels(name: str) -> None:
    case = make(3, 4, 5, torch.float64, name)

    def f(*args: Tensor) -> Tensor:
        return fused_linear(*args, name)  # type: ignore[arg-type]

    with expect("cpu.portable.fused_linear", "cpu.portable.fused_linear_backward.f64"):
        assert torch.autograd.gradcheck(f, case.leaves())
    assert torch.autograd.gradgradcheck(f, case.leaves())


@pytest.mark.parametrize("name", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:], TRITON], ids=str)
def test_leading_dimensions(way: Way, lead: list[int], name: str) -> None:
    run(make(lead, 6, 7, torch.float32, name), way, "f32")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_any_strides(dtype: str) -> None:
    case = make(6, 10, 8, DTYPES[dtype], "gelu")
    x, weight, bias, residual = case.inputs
    assert bias is not None
    assert residual is not None
    spread = torch.empty(10, 3, dtype=bias.dtype)
    spread[:, 1] = bias
    layouts = {
        "x transposed": (x.t().contiguous().t(), weight, bias, residual),
        "weight transposed": (x, weight.t().contiguous().t(), bias, residual),
        "bias strided": (x, weight, spread[:, 1], residual),
        "residual sliced": (x, weight, bias, residual.repeat_interleave(2, 1)[:, ::2]),
    }
    for what, args in layouts.items():
        assert any(not t.is_contiguous() for t in args), what
        with expect(f".fused_linear.{dtype}.dot"):
            case.check_forward(fused_linear(*args, "gelu"), what)
    leaves = case.leaves()
    y = fused_linear(*leaves, "gelu")
    for grad in (case.grad.t().contiguous().t(), case.grad[:1].expand(6, 10)):
        got = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        replace(case, grad=grad).check_gradients(got)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on inf - inf and the like
@pytest.mark.parametrize("way", [*CPU, TRITON], ids=str)  # torch's own gelu(inf) is NaN in float32
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_and_infinity_come_through(way: Way, name: str) -> None:
    # (a gated pair sees the value in both halves)
    for value in (float("nan"), float("inf"), float("-inf")):
        x = torch.tensor([[value, 0.0], [1.0, 2.0]])
        weight = torch.ones(2 if name.endswith("glu") or "glu_" in name else 1, 2)
        weight[:, 1] = 0.5
        with way.serving("fused_linear", "fused_linear.f32"):
            got = fused_linear(x, weight, None, None, name)
        want = reference(x.double(), weight.double(), None, None, name).float()
        assert torch.equal(got.isnan(), want.isnan()), (value, got, want)
        assert torch.equal(got.isinf(), want.isinf()), (value, got, want)


def test_bitwise_equal_from_run_to_run_at_every_thread_count() -> None:
    case = make(130, 200, 700, torch.float32, "swiglu")
    for count in (1, 2):
        with threads(count):
            first, again = (fused_linear(*case.inputs, "swiglu") for _ in range(2))
        assert torch.equal(first, again)
        case.check_forward(first, f"of {count} threads")


def test_output_never_aliases_the_residual() -> None:
    x, weight, residual = torch.randn(3, 4), torch.zeros(5, 4), torch.randn(3, 5)
    y = fused_linear(x, weight, None, residual)
    y.add_(1)
    assert not torch.equal(y, residual)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    k, n = 2056, (1 << 20) + 3
    assert n * k > 1 << 31
    weight = torch.zeros(n, k, dtype=torch.bfloat16)
    weight[-1] = 1
    y = fused_linear(torch.ones(1, k, dtype=torch.bfloat16), weight)
    assert y[0, -1] == 2056
    assert not y[0, :-1].any()


def refusals() -> list[tuple[str, type[Exception], str, dict[str, object]]]:
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    return [
        (
            "activation",
            ValueError,
            "activation: expected one of none, .*; got 'swish'",
            {"activation": "swish"},
        ),
        ("x dtype", TypeError, "x: expected dtype float32, .*; got int64", {"x": x.long()}),
        ("x is no tensor", TypeError, "x: expected a torch.Tensor; got list", {"x": [1.0]}),
        (
            "x columns",
            ValueError,
            r"x: expected shape \[.., 4\] .*; got \[3, 7\]",
            {"x": torch.randn(3, 7)},
        ),
        ("x scalar", ValueError, r"x: expected shape .*; got \[\]", {"x": torch.tensor(1.0)}),
        (
            "weight dim",
            ValueError,
            r"weight: expected 2 dimensions .* \[4\]",
            {"weight": torch.randn(4)},
        ),
        (
            "weight dtype",
            TypeError,
            "weight: expected dtype float32, that of x; got bfloat16",
            {"weight": w.bfloat16()},
        ),
        (
            "weight rows",
            ValueError,
            "weight: swiglu needs an even number of rows .*; got 5",
            {"activation": "swiglu"},
        ),
        (
            "weight device",
            ValueError,
            "weight: expected device cpu, that of x; got meta",
            {"weight": w.to("meta")},
        ),
        (
            "bias shape",
            ValueError,
            r"bias: expected shape \[5\]; got \[4\]",
            {"bias": torch.randn(4)},
        ),
        (
            "bias dtype",
            TypeError,
            "bias: expected dtype float32, that of x; got float64",
            {"bias": torch.randn(5).double()},
        ),
        (
            "residual shape",
            ValueError,
            r"residual: expected shape \[3, 5\]; got \[1, 5\]",
            {"residual": torch.randn(1, 5)},
        ),
        (
            "residual dtype",
            TypeError,
            "residual: expected dtype float32, that of x; got float16",
            {"residual": torch.randn(3, 5).half()},
        ),
    ]


@pytest.mark.parametrize("graph", [False, True], ids=["inference", "graph"])
@pytest.mark.parametrize(
    ("kind", "message", "change"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()]
)
def test_errors_name_argument_expected_and_got(
    kind: type[Exception], message: str, change: dict[str, object], graph: bool
) -> None:
    arguments: dict[str, object] = {"x": torch.randn(3, 4), "weight": torch.randn(5, 4)}
    arguments.update(change)
    weight = arguments["weight"]
    assert isinstance(weight, Tensor)
    weight.requires_grad_(graph)
    with pytest.raises(kind, match=message):
        fused_linear(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(3, 7), torch.randn(5, 4), None, None, 0), r"x: expected shape"),
        ((torch.randn(3, 4), torch.randn(5, 4), None, None, 99), "activation: expected"),
        ((torch.randn(3, 4), torch.randn(5, 4), torch.randn(4), None, 0), "bias: expected"),
        ((torch.randn(3, 4), torch.randn(5, 4).half(), None, None, 0), "weight: expected"),
    ],
)
def test_raw_op_checks_again(args: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bigops.fused_linear.code(*args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 64, 5000])
def test_explain_names_the_kernel_that_runs(dtype: str, m: int) -> None:
    x = torch.randn(m, 64).to(DTYPES[dtype])
    weight = torch.randn(96, 64).to(DTYPES[dtype])
    said = bigops.explain("fused_linear", x, weight, activation="gelu")
    with bigops.backend.record() as ran, torch.no_grad():
        fused_linear(x, weight, activation="gelu")
    assert ran == [said.kernel]
    assert re.search("crossover table", said.reason)


def test_explain_answers_for_a_gpu_that_is_not_here() -> None:
    x, weight = torch.empty(64, 1024, device="meta"), torch.empty(4096, 1024, device="meta")
    said = bigops.explain("fused_linear", x.bfloat16(), weight.bfloat16(), device="sm_90")
    assert said.kernel == "triton.fused_linear.bf16"
    assert said.config["block_m"] > 0
    assert (
        "reference"
        in bigops.explain("fused_linear", x.double(), weight.double(), device="sm_90").kernel
    )
    with pytest.raises(ValueError, match="op: expected one of .*fused_linear.*; got 'nope'"):
        bigops.explain("nope")


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        ("fused_linear", [(64, 1024), (4096, 1024), (4096,)]),
        ("low_rank_linear", [(64, 1024), (4096, 128), (128, 1024)]),
        ("linear_cross_entropy", [(64, 1024), (4096, 1024)]),
        ("fused_adamw", [[(64, 1024), (7,)]]),
    ],
)
def test_explain_takes_shapes_in_place_of_tensors(op: str, shapes: list[Any]) -> None:
    def made(shape: Any) -> Any:
        if isinstance(shape, list):
            return [made(of) for of in shape]
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    for device in ("cpu", "sm_80", "sm_90", "gfx942"):
        said = bigops.explain(op, *shapes, dtype=torch.bfloat16, device=device)
        assert said == bigops.explain(op, *map(made, shapes), device=device)
        assert ("cpu." if device == "cpu" else "triton.") in said.kernel
    with pytest.raises(ValueError, match="dtype: expected a torch.dtype for the shape"):
        bigops.explain(op, *shapes, device="sm_90")


def test_a_stand_in_is_seen() -> None:
    """The planted fault: the reference answers, and `expect` says so."""

    def call() -> None:
        with expect(".fused_linear.f32.dot"):
            module.op._serve(torch.randn(3, 4), torch.randn(5, 4), None, None, "none")

    with pytest.raises(AssertionError, match="no '.fused_linear.f32.dot' among"):
        call()


def test_a_wrong_kernel_is_seen() -> None:
    """The planted fault: one element off by 0.1 % fails the rule, on every output."""
    case = make(5, 37, 83, torch.float32, "gelu")
    y = fused_linear(*case.inputs, "gelu").clone()
    y.view(-1)[int(y.abs().argmax())] *= 1.001
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(y)
