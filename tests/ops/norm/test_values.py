"""norm, norm_with_sum and norm_act_quant: every dtype by every way that serves it, by float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops.backend import machine
from bigops.formats.quantize import act_quant
from bigops.formats.quantized import QuantizedWeight
from bigops.ops.norm import reference
from tests.support.backends import CPU, REFERENCE, Way, covering
from tests.support.cases.norm import KINDS, NormCase, make
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, served_by, threads

# the latter: torch says so of weights in float32 beside a 16-bit x, which the cases are about
pytestmark = [needs_extension, pytest.mark.filterwarnings("ignore:Mismatch dtype")]
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
WAYS = [REFERENCE, *CPU]


def kernel(way: Way, op: str, case: NormCase) -> str:
    """The kernel that serves a case: AVX-512's extensions add nothing to a norm."""
    level = served_by(way.level) if way.level else ""
    return f"cpu.{level}.{op}.{SHORT[case.x.dtype]}.{case.kind}"


def quantised(case: NormCase, **flags: bool) -> Any:
    return bigops.norm_act_quant(*case.tensors, **case.options, **flags)


# kernels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True], ids=["own", "wide"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_kernel(way: Way, dtype: torch.dtype, kind: str, residual: bool, wide: bool) -> None:
    case = make([5, 7], 203, dtype, kind=kind, residual=residual, wide=wide)
    with way.serving("norm", kernel(way, "norm", case)):
        case.check(case.call(), str(way))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_sum_beside_the_norm(way: Way, dtype: torch.dtype, kind: str) -> None:
    case = make([5, 7], 203, dtype, kind=kind, residual=True)
    with way.serving("norm_with_sum", kernel(way, "norm_with_sum", case)):
        y, total = bigops.norm_with_sum(*case.tensors, **case.options)
    case.check(y, str(way))
    case.check_sum(total)


@pytest.mark.parametrize("symmetric", [False, True], ids=["dynamic", "symmetric"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_norm_as_u8(way: Way, dtype: torch.dtype, kind: str, symmetric: bool) -> None:
    case = make([5, 7], 203, dtype, kind=kind, residual=True)
    with way.serving("norm_act_quant", kernel(way, "norm_act_quant", case)):
        found = quantised(case, symmetric=symmetric, keep_float=True, keep_sum=True)
    case.check_quantised(found.values, found.scale, found.zero_point)
    assert all(t.is_contiguous() for t in found)
    case.check(found.y, str(way))
    case.check_sum(found.sum)
    if dtype == torch.float32:  # to the bit what a quantised layer would make of y
        rows = act_quant(found.y, "symmetric" if symmetric else "dynamic")
        assert torch.equal(found.values, rows.q.to(torch.uint8))
        assert torch.equal(found.scale, rows.scale.squeeze(-1))
        assert torch.equal(found.zero_point, rows.zero_point.squeeze(-1).int())


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_what_is_not_kept_changes_nothing(dtype: torch.dtype) -> None:
    case = make([9], 100, dtype, residual=True)
    full = quantised(case, keep_float=True, keep_sum=True)
    for keep_float, keep_sum in ((False, False), (True, False), (False, True)):
        some = quantised(case, keep_float=keep_float, keep_sum=keep_sum)
        assert all(torch.equal(a, b) for a, b in zip(some[:3], full[:3], strict=True))
        for kept, got, want in ((keep_float, some.y, full.y), (keep_sum, some.sum, full.sum)):
            assert torch.equal(got, want) if kept else got is None


@pytest.mark.parametrize("activations", ["dynamic", "symmetric"])
def test_a_quantised_layer_makes_the_same_of_it(activations: str) -> None:
    """scale * (values - zero_point) times the weight is what the layer gives on the norm."""
    case = make([6], 64)
    weight = QuantizedWeight.from_dense(torch.randn(32, 64), activations=activations)
    found = quantised(case, symmetric=activations == "symmetric", keep_float=True)
    codes, by, zero = weight.codes()
    assert zero is None
    whole = (found.values.int() - found.zero_point.unsqueeze(-1)).double() @ codes.double().t()
    want = whole.float() * (found.scale.unsqueeze(-1) * by[:, 0])
    assert torch.equal(bigops.quantized_linear(found.y, weight), want)


# shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype", "level"), covering(KINDS, SHORT, ISAS), ids=str)
def test_ragged_rows(kind: str, dtype: torch.dtype, level: str) -> None:
    for k in (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129):
        case = make([3], k, dtype, kind=kind, residual=k % 2 == 0)
        with isa(level):
            case.check(case.call(), f"K = {k}")
            found = quantised(case)
            case.check_quantised(found.values, found.scale, found.zero_point)


@pytest.mark.parametrize("lead", [[], [1], [4], [0], [3, 0, 2], [2, 3, 4], [1, 2, 1, 3]], ids=str)
@pytest.mark.parametrize("k", [0, 1, 20])
@pytest.mark.parametrize("way", [REFERENCE, *CPU[-1:]], ids=str)
def test_shapes(way: Way, k: int, lead: list[int]) -> None:
    for kind in KINDS:
        case = make(lead, k, kind=kind, residual=True)
        with way.serving("norm"):
            y = case.call()
            total = bigops.norm_with_sum(*case.tensors, **case.options)[1]
            found = quantised(case, keep_float=True, keep_sum=True)
        assert y.shape == total.shape == found.y.shape == (*lead, k)
        if k:
            case.check(y)
            case.check_sum(total)
        case.check_quantised(found.values, found.scale, found.zero_point)
        if not k:  # as act_quant has it
            assert torch.equal(found.scale, torch.ones(lead))
            assert not found.zero_point.any()


STRIDED = {
    "rows of a slice": lambda: torch.randn(6, 80)[:, 10:50],
    "every other row": lambda: torch.randn(12, 40)[::2],
    "one token": lambda: torch.randn(6, 5, 40)[:, 0],
    "all but one": lambda: torch.randn(6, 5, 40)[:, 1:],
    "two of the three": lambda: torch.randn(6, 5, 3, 40)[:, 1:, ::2],
    "permuted": lambda: torch.randn(5, 6, 2, 40).permute(2, 1, 0, 3),
    "expanded": lambda: torch.randn(1, 5, 40).expand(6, 5, 40),
    "columns apart": lambda: torch.randn(6, 80)[:, ::2],
    "transposed": lambda: torch.randn(40, 6).t(),
}


@pytest.mark.parametrize("view", STRIDED)
def test_strides_do_not_matter(view: str) -> None:
    x = STRIDED[view]()
    for other in (STRIDED[view]().contiguous(), STRIDED[view]()):
        for residual in (None, other):
            case = NormCase(x, torch.rand(80)[::2], torch.rand(40), residual)
            y = case.call()
            assert y.is_contiguous()
            case.check(y, view)
    NormCase(x.contiguous(), None, None, other).check(bigops.norm(x.contiguous(), residual=other))


@given(data=st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_call(data: st.DataObject) -> None:
    lead = data.draw(st.lists(st.integers(0, 6), max_size=3))
    flags = {
        name: data.draw(st.booleans(), label=name)
        for name in ("weight", "bias", "residual", "wide")
    }
    case = make(
        lead,
        data.draw(st.integers(1, 300), label="k"),
        data.draw(st.sampled_from(list(SHORT)), label="dtype"),
        kind=data.draw(st.sampled_from(KINDS), label="kind"),
        eps=data.draw(st.sampled_from([1e-12, 1e-5, 1.0]), label="eps"),
        mean=data.draw(st.sampled_from([0.0, 3.0]), label="mean"),
        **flags,
    )
    with isa(data.draw(st.sampled_from(ISAS), label="isa")), expect("norm"):
        case.check(case.call())
        found = quantised(case, symmetric=data.draw(st.booleans(), label="symmetric"))
        case.check_quantised(found.values, found.scale, found.zero_point)


@pytest.mark.parametrize("count", [1, 2])
def test_rows_over_threads(count: int) -> None:
    """Past the size from which on threads are woken; the same bits at every count."""
    case = make([3, 67], 384, residual=True)
    with threads(1):
        want = quantised(case, keep_float=True, keep_sum=True)
    with threads(count):
        found = quantised(case, keep_float=True, keep_sum=True)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    case.check(found.y)


# numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_mean_far_above_the_deviation(way: Way, kind: str) -> None:
    """Held to what the deviations allow: torch's own error is not in it (float64 stands in)."""
    for k in (33, 384, 4096):
        case = make([4], k, kind=kind, mean=1e4)
        truth, _, scale = case.truth()
        with way.serving("norm"):
            error = (case.call().double() - truth).abs()
        assert bool((error <= 32 * torch.finfo(torch.float32).eps * scale).all()), f"K = {k}"


@pytest.mark.parametrize("level", ISAS)
def test_long_rows(level: str) -> None:
    for kind in KINDS:
        case = make([2], 100_003, kind=kind)
        with isa(level):
            case.check(case.call(), level)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_of_one_number(way: Way) -> None:
    """A variance of 0: only the bias is left. Without eps it is 0 / 0, as in torch."""
    case = NormCase(torch.full((3, 50), 7.0), torch.rand(50), torch.rand(50))
    with way.serving("norm"):
        assert torch.equal(case.call(), case.bias.expand(3, 50))  # type: ignore[union-attr]
        assert bigops.norm(case.x, eps=0.0).isnan().all()
        assert bigops.norm(torch.zeros(3, 50), kind="rms", eps=0.0).isnan().all()
        assert not bigops.norm(torch.zeros(3, 50), kind="rms").any()


@pytest.mark.parametrize("level", ISAS)
def test_nothing_past_a_row_is_in_its_range(level: str) -> None:
    """A 0 that is not there would be the lowest number of these rows."""
    for k in range(2, 40):
        x = torch.ones(2, k)
        x[:, 0] = 1000.0
        with isa(level):
            found = bigops.norm_act_quant(x, keep_float=True)
        rows = act_quant(found.y)  # type: ignore[arg-type]
        assert torch.equal(found.scale, rows.scale.squeeze(-1)), f"K = {k}"
        assert torch.equal(found.values, rows.q.to(torch.uint8)), f"K = {k}"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_rows_that_are_not_finite(way: Way, bad: float) -> None:
    for kind in KINDS:
        for symmetric in (False, True):
            case = make([5], 50, kind=kind)
            case.x[1, 49], case.x[3, 0] = bad, bad
            with way.serving("norm"):
                y, found = case.call(), quantised(case, symmetric=symmetric, keep_float=True)
            rows = torch.tensor([1, 3])
            assert torch.equal(y.isnan(), case.plain().isnan())
            assert torch.equal(found.y.isnan(), y.isnan())
            assert torch.equal(found.scale.isnan(), torch.tensor([0, 1, 0, 1, 0]).bool())
            assert not found.values[rows].any()
            assert bool((found.zero_point[rows] == (128 if symmetric else 0)).all())
            good = NormCase(case.x[::2], case.weight, case.bias, kind=kind)
            good.check(y[::2])
            good.check_quantised(found.values[::2], found.scale[::2], found.zero_point[::2])


def test_the_norms_of_transformers() -> None:
    """As modeling_llama.LlamaRMSNorm and modeling_t5.T5LayerNorm compute them."""

    def llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        v = x.float()
        return weight * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)

    for dtype in SHORT:
        case = make([4, 3], 96, dtype, kind="rms", bias=False, eps=1e-6)
        assert case.weight is not None
        case.check(case.call())
        case.check(llama(case.x, case.weight, 1e-6), "theirs is held by the same rule")


def test_runs_agree_to_the_bit() -> None:
    for dtype in SHORT:
        case = make([70], 515, dtype, residual=True)
        first = case.call()
        assert all(torch.equal(case.call(), first) for _ in range(3))


# planted faults ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_a_result_that_is_off_is_seen(dtype: torch.dtype) -> None:
    case = make([5], 64, dtype, residual=True)
    with pytest.raises(AssertionError, match="y: element"):
        case.check(case.call() * (1 + 8 * torch.finfo(dtype).eps) + 1e-4)
    with pytest.raises(AssertionError, match="sum: element"):
        case.check_sum((case.x.double() * 1.02 + case.residual.double()).to(dtype))  # type: ignore[union-attr]
    found = quantised(case)
    case.check_quantised(found.values, found.scale, found.zero_point)
    with pytest.raises(AssertionError, match="of the allowed"):
        case.check_quantised(found.values, found.scale, found.zero_point + 1)


def test_a_mean_in_one_pass_is_seen() -> None:
    """The rule is tight enough for E[x^2] - E[x]^2 to fail it."""
    case = make([4], 384, mean=1e3, weight=False, bias=False)
    mean = case.x.mean(-1, keepdim=True)
    variance = case.x.square().mean(-1, keepdim=True) - mean.square()
    with pytest.raises(AssertionError, match="y: element"):
        case.check((case.x - mean) * torch.rsqrt(variance + case.eps))


# meaning, explain --------------------------------------------------------------------------


def test_the_reference_is_the_truth() -> None:
    for kind in KINDS:
        case = make([2, 11], 33, kind=kind, residual=True)
        case.check(reference(*case.tensors, **case.options))


@pytest.mark.parametrize("op", ["norm", "norm_with_sum", "norm_act_quant"])
def test_explain_names_the_kernel_that_runs(op: str) -> None:
    case = make([5], 33, torch.bfloat16, kind="rms", residual=True)
    explained = bigops.explain(op, *case.tensors, **case.options)
    with expect(explained.kernel):
        getattr(bigops, op)(*case.tensors, **case.options)
    assert "L1" in explained.reason
    shapes = bigops.explain(op, (5, 33), residual=(5, 33), dtype=torch.bfloat16, kind="rms")
    assert shapes == explained
    gpu = bigops.explain(op, *case.tensors, **case.options, device="sm_90")
    assert gpu.kernel == f"reference.{op}"
    assert "no GPU kernel" in gpu.reason
    with pytest.raises(ValueError, match="kind: expected one of layer, rms"):
        bigops.explain(op, case.x, kind="batch")
    with pytest.raises(TypeError, match=f"activation: no argument of {op}"):
        bigops.explain(op, case.x, activation="relu")


def test_explain_without_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "extension", None)
    monkeypatch.setattr(machine, "extension_error", "not built")
    assert str(bigops.explain("norm", torch.randn(2, 3))) == "norm: reference.norm; not built"


# errors ------------------------------------------------------------------------------------

X, K = torch.randn(4, 6), torch.randn(6)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": None}, TypeError, "x: expected a torch.Tensor; got NoneType"),
    ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor; got list"),
    ({"x": X.double()}, TypeError, "x: expected dtype float32, bfloat16, float16; got float64"),
    ({"x": X.int()}, TypeError, "x: expected dtype float32, bfloat16, float16; got int32"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[.., K\]; got \[\]"),
    ({"weight": K[:5]}, ValueError, r"weight: expected shape \[6\]; got \[5\]"),
    ({"weight": X}, ValueError, r"weight: expected shape \[6\]; got \[4, 6\]"),
    ({"weight": K.half()}, TypeError, "weight: expected dtype float32, float32; got float16"),
    ({"weight": 1.0}, TypeError, "weight: expected a torch.Tensor; got float"),
    ({"weight": K.to("meta")}, ValueError, "weight: expected device cpu, that of x; got meta"),
    ({"bias": K[:5]}, ValueError, r"bias: expected shape \[6\]; got \[5\]"),
    ({"bias": K.bfloat16()}, TypeError, "bias: expected dtype float32"),
    (
        {"x": X.half(), "residual": X.half(), "weight": K, "bias": K.half()},
        TypeError,
        "bias: expected dtype float32; got float16",
    ),
    ({"residual": X[:3]}, ValueError, r"residual: expected shape \[4, 6\]; got \[3, 6\]"),
    ({"residual": X.half()}, TypeError, "residual: expected dtype float32, that of x"),
    ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0; got -1"),
    ({"eps": math.nan}, ValueError, "eps: expected a number of at least 0; got nan"),
    ({"kind": "batch"}, ValueError, "kind: expected one of layer, rms; got 'batch'"),
    ({"kind": 0}, ValueError, "kind: expected one of layer, rms; got 0"),
]


@pytest.mark.parametrize("op", ["norm", "norm_with_sum", "norm_act_quant"])
@pytest.mark.parametrize(("other", "error", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments(
    op: str, other: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(bigops, op)(**{"x": X, "residual": X, **other})


def test_a_sum_needs_a_residual() -> None:
    for call in (
        lambda: bigops.norm_with_sum(X),
        lambda: bigops.norm_act_quant(X, keep_sum=True),
    ):
        with pytest.raises(ValueError, match="residual: expected a tensor, whose sum with x"):
            call()


def test_nested_tensors_are_refused_by_name() -> None:
    x = torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged)
    with pytest.raises(TypeError, match="x: expected a dense tensor; got a nested one"):
        bigops.norm(x)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X.double(), None, None, None, 1e-5, 0), "x: expected dtype f32, bf16 or f16; got f64"),
        ((X, K[:5], None, None, 1e-5, 0), r"weight: expected shape \[6\]; got \[5\]"),
        ((X, None, K.half(), None, 1e-5, 0), "bias: expected dtype f32; got f16"),
        ((X, None, None, X[:3], 1e-5, 0), r"residual: expected shape \[4, 6\].*got \[3, 6\]"),
        ((X, None, None, None, -1.0, 0), "eps: expected a number of at least 0"),
        ((X, None, None, None, 1e-5, 2), r"kind: expected a code from 0 to 1 \(layer to rms\)"),
    ],
)
def test_the_kernel_checks_again(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.bigops.norm.code(*args)


def test_torch_says_the_same_where_both_serve() -> None:
    """The bits differ, the call does not: weights of float32 beside a bf16 x, K of any size."""
    x, weight, bias = torch.randn(3, 40).bfloat16(), torch.randn(40), torch.randn(40)
    assert bigops.norm(x, weight, bias).dtype == F.layer_norm(x, [40], weight, bias).dtype
