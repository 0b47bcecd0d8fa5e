"""low_rank_linear: values and gradients by every way that serves it, ragged shapes, ranks, errors.

What is Triton's own is in test_triton.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops import backend
from bigops.ops.low_rank_linear import low_rank_linear, reference
from tests.support import tolerance
from tests.support.backends import CPU, REFERENCE, TRITON, Way
from tests.support.cases.linear import PLAIN
from tests.support.cases.low_rank import LowRankCase, make
from tests.support.kernels_ran import crossover, needs_extension

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = [*SHORT, torch.float64]
pytestmark = needs_extension


def run(case: LowRankCase) -> Tensor:
    x, u, v, bias, residual, base = case.inputs
    return low_rank_linear(x, u, v, bias, residual, case.name, base=base, scale=case.scale)


def both(case: LowRankCase, way: Way, *fragments: str) -> None:
    """Forward without and with a graph and all gradients by one way, values and kernel names."""
    with way.serving("low_rank_linear", *fragments), torch.no_grad():
        y = run(case)
    case.check_forward(y)
    leaves = case.leaves()
    with way.serving("low_rank_linear", *fragments, gradients=True):
        y = run(replace(case, inputs=tuple(leaves)))
        found = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y, "y with graph")
    case.check_gradients([None if t is None else next(found) for t in leaves], str(way))


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:]], ids=str)
def test_every_activation(way: Way, dtype: torch.dtype, name: str, base: bool) -> None:
    both(make(9, 21, 35, 6, dtype, name, base=base, scale=0.75), way)


@pytest.mark.parametrize("name", PLAIN)
def test_every_activation_in_triton(name: str) -> None:
    both(make(5, 20, 40, 3, torch.float32, name, base=True, scale=2.0), TRITON, "f32.fused")


@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("way", CPU, ids=str)
def test_every_kernel(way: Way, dtype: torch.dtype) -> None:
    both(make(7, 33, 65, 17, dtype, "gelu", base=True, scale=1.5), way, f".{SHORT[dtype]}.dot")


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_every_dtype_in_triton(dtype: torch.dtype, base: bool) -> None:
    case = make(37, 45, 70, 9, dtype, "gelu", base=base, scale=0.75)
    both(case, TRITON, f"low_rank_linear.{SHORT[dtype]}.fused")


# Ragged against the 32 x 32 x 32 tile of configs/low_rank_linear/interpreter.json; ranks around
# the padded 16 and 32.
@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:], TRITON], ids=str)
@pytest.mark.parametrize(
    ("lead", "n", "k", "rank"),
    [
        ([1], 1, 1, 1),
        ([2, 3], 33, 65, 17),
        ([33], 16, 32, 16),
        ([3], 40, 70, 32),
        ([40], 32, 64, 32),
        ([2], 5, 4, 0),
        ([0], 7, 5, 2),
        ([3], 7, 0, 0),
    ],
    ids=str,
)
def test_shapes(lead: list[int], n: int, k: int, rank: int, way: Way) -> None:
    for base in (False, True):
        both(make(lead, n, k, rank, torch.float32, "tanh", base=base), way)


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_products_of_the_library(dtype: torch.dtype, base: bool) -> None:
    case = make(37, 21, 19, 7, dtype, "silu", base=base)
    with crossover("fused_linear", SHORT[dtype], 0, 0), torch.no_grad(), backend.record() as names:
        case.check_forward(run(case))
    assert names
    assert all("torch_linear" in name or "onednn_linear" in name for name in names)


@given(st.integers(0, 70), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
@settings(max_examples=40, deadline=None)
def test_ragged_shapes(m: int, n: int, k: int, base: bool, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(n, k)))
    case = make(m, n, k, rank, base=base, scale=2.0)
    leaves = case.leaves()
    x, u, v, bias, residual, b = leaves
    y = low_rank_linear(x, u, v, bias, residual, base=b, scale=2.0)
    case.check_forward(y)
    wanted = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(y, wanted, case.grad))
    case.check_gradients([None if t is None else next(found) for t in leaves])


@pytest.mark.parametrize("lead", [[], [0], [1], [2, 3], [2, 1, 3, 2]], ids=str)
@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:], TRITON], ids=str)
def test_leading_dimensions(way: Way, lead: list[int]) -> None:
    case = make(lead or [1], 6, 9, 4, name="relu")
    if not lead:
        x, u, v, bias, residual, _ = case.inputs
        with way.serving("low_rank_linear"):
            y = low_rank_linear(x[0], u, v, bias, residual[0], "relu")
        case.check_forward(y[None])
        return
    with torch.no_grad(), way.serving("low_rank_linear"):
        y = run(case)
    case.check_forward(y)


def test_strided_inputs() -> None:
    case = make(5, 8, 12, 3, base=True)
    x, u, v, bias, residual, base = case.inputs
    got = low_rank_linear(
        x.t().contiguous().t(),
        u.t().contiguous().t(),
        torch.cat([v, v], 1)[:, :12],
        bias.repeat_interleave(2)[::2],
        residual.t().contiguous().t(),
        base=base.t().contiguous().t(),
    )
    case.check_forward(got)


def test_rank_zero_is_the_epilogue_alone() -> None:
    case = make(3, 5, 4, 0, name="tanh")
    _, _, _, bias, residual, _ = case.inputs
    got = run(case)
    case.check_forward(got)
    tolerance.check(
        got,
        (torch.tanh(bias.double()) + residual.double()),
        torch.tanh(bias) + residual,
        bias.abs().double() + residual.abs().double(),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_row(bad: float) -> None:
    case = make(4, 5, 6, 3)
    x = case.inputs[0].clone()
    x[1, 2] = bad
    y = low_rank_linear(x, *case.inputs[1:3])
    assert not y[1].isfinite().any()
    assert y[[0, 2, 3]].isfinite().all()


def test_results_are_bitwise_repeatable() -> None:
    case = make(65, 130, 257, 33, base=True, name="gelu")
    assert torch.equal(run(case), run(case))


def test_a_lost_scale_is_seen() -> None:
    case = make(5, 8, 12, 3, scale=1.01)
    case.scale, wrong = 1.0, run(case)
    case.scale = 1.01
    with pytest.raises(AssertionError, match="float64 says"):
        LowRankCase(case.inputs, case.grad, case.name, 1.0).check_forward(wrong)


def test_a_perturbed_factor_is_seen() -> None:
    case = make(5, 8, 12, 3)
    x, u, v, bias, residual, _ = case.inputs
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(low_rank_linear(x, u * 1.001, v, bias, residual))


def test_reference_serves_where_there_is_no_kernel_and_says_so() -> None:
    case = make(5, 8, 12, 3, base=True, name="gelu")
    x, u, v, bias, residual, base = case.inputs
    case.check_forward(reference(x, u, v, bias, residual, "gelu", base=base))
    meta = [t.to("meta") for t in (x, u, v)]
    double = bigops.explain("low_rank_linear", *(t.double() for t in meta), device="sm_90")
    assert double.kernel == "reference.low_rank_linear"
    found = bigops.explain("low_rank_linear", *meta)
    assert found.kernel.startswith("cpu.")
    assert "low_rank_linear.f32" in found.kernel


def _call(**changes: object) -> None:
    x, u, v, bias, residual, base = make(3, 5, 4, 2, base=True).inputs
    arguments = {"x": x, "u": u, "v": v, "bias": bias, "residual": residual, "base": base}
    low_rank_linear(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"activation": "swiglu"}, ValueError, "activation"),
        ({"activation": "rellu"}, ValueError, "activation"),
        ({"x": torch.randn(3, 5)}, ValueError, r"x: expected shape \[.., 4\]"),
        ({"x": torch.randint(3, (3, 4))}, TypeError, "x: expected"),
        ({"x": [1.0]}, TypeError, "x: expected"),
        ({"u": torch.randn(5)}, ValueError, "u: expected"),
        ({"u": torch.randn(5, 3)}, ValueError, r"v: expected shape \[3, 4\]"),
        ({"u": torch.randn(5, 2).double()}, TypeError, "u: expected"),
        ({"v": torch.randn(2, 4, 1)}, ValueError, "v: expected"),
        ({"u": torch.randn(5, 5), "v": torch.randn(5, 4)}, ValueError, "a rank of at most 4"),
        ({"bias": torch.randn(4)}, ValueError, r"bias: expected shape \[5\]"),
        ({"residual": torch.randn(3, 4)}, ValueError, "residual: expected shape"),
        ({"base": torch.randn(4, 5)}, ValueError, r"base: expected shape \[5, 4\]"),
        ({"base": torch.randn(5, 4).half()}, TypeError, "base: expected"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
def test_errors_name_the_argument(changes, kind, text, grad) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(kind, match=text):
        _call(**changes)
