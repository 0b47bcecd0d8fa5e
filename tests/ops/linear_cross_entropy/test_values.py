"""linear_cross_entropy: every dtype by every way that serves it against float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.ops.linear_cross_entropy import chunked, linear_cross_entropy, schema
from bigops.ops.linear_cross_entropy.reference import serve_chunk
from tests.support.backends import CPU, REFERENCE, TRITON, Way
from tests.support.cases.cross_entropy import ALL, Case, make
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, served_by

module = importlib.import_module("bigops.ops.linear_cross_entropy")  # the name is the function's
ops = torch.ops.bigops
pytestmark = needs_extension
SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
DTYPES = [*SHORT, torch.float64]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the tokens of a small case up, as those of a large one are."""
    monkeypatch.setattr(chunked, "SMALL", 0)


# kernels -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on lanes past the last class
@pytest.mark.parametrize("options", ALL.values(), ids=list(ALL))
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("way", [REFERENCE, *CPU, TRITON], ids=str)
def test_every_kernel(
    way: Way, dtype: torch.dtype, options: dict[str, Any], small_chunks: None
) -> None:
    kernel = f"{way.name}.linear_cross_entropy.{SHORT[dtype]}."
    if way.name == "cpu":
        kernel = f"cpu.{served_by(way.level)}.linear_cross_entropy.{SHORT[dtype]}."
    shape = (5, 33, 9) if way is TRITON else (37, 203, 33)
    with way.serving("linear_cross_entropy", kernel + "loss", kernel + "gradient"):
        make(*shape, dtype, **options).check(str(way))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("shape", [(1, 1), (3, 512), (3, 513), (2, 1100), (0, 7)], ids=str)
def test_rows_of_several_blocks_in_triton(shape: tuple[int, int]) -> None:
    used = TRITON.serving if shape[0] else TRITON.taken
    with used("linear_cross_entropy"):
        make(shape[0], shape[1], 5, torch.float32, ignored=0.0, **ALL["all, none"]).check()


@pytest.mark.parametrize("options", ALL.values(), ids=list(ALL))
def test_float64_has_the_portable_kernel(options: dict[str, Any], small_chunks: None) -> None:
    with expect("cpu.portable.linear_cross_entropy.f64."):
        make(19, 37, 11, torch.float64, **options).check()


@pytest.mark.parametrize("v", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65])
@pytest.mark.parametrize("level", ISAS)
def test_ragged_classes(level: str, v: int) -> None:
    with isa(level):
        make(5, v, 9, torch.float32, **ALL["all"]).check(f"{v} classes")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lead", "k"),
    [([], 5), ([1], 5), ([2, 3], 5), ([2, 1, 2, 3], 5), ([4], 1), ([4], 0)],
    ids=str,
)
def test_shapes(dtype: torch.dtype, lead: list[int], k: int) -> None:
    make(lead, 6, k, dtype, ignored=0, label_smoothing=0.1).check()
    make(lead, 6, k, dtype, ignored=0, bias=False, reduction="none").check()


@pytest.mark.parametrize("m", [1, 7, 8, 9, 63, 64, 65])
def test_ragged_chunks(m: int, small_chunks: None) -> None:
    make(m, 50, 5, torch.float32, ignored=0).check(f"{m} tokens")


@pytest.mark.parametrize("dtype", SHORT, ids=str)
def test_many_blocks_of_classes(dtype: torch.dtype, small_chunks: None) -> None:
    case = make(40, 333, 7, dtype)
    assert chunked.block_columns(40, 333, 7, 5, dtype) < 333
    case.check()


def test_products_without_onednn(monkeypatch: pytest.MonkeyPatch, small_chunks: None) -> None:
    monkeypatch.setattr(chunked, "_onednn", lambda *a: False)
    for dtype in SHORT:
        make(40, 333, 7, dtype).check()


def test_no_tokens() -> None:
    for lead in ([0], [3, 0]):
        case = make(lead, 6, 5)
        leaves = case.leaves()
        loss = case.public()(*leaves)
        assert loss.isnan()
        assert F.cross_entropy(torch.randn(0, 6), torch.zeros(0, dtype=torch.int64)).isnan()
        for leaf, grad in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):  # type: ignore[arg-type]
            assert grad.shape == leaf.shape  # type: ignore[union-attr]
            assert torch.equal(grad, torch.zeros_like(grad))
        assert make(lead, 6, 5, reduction="none").public()(*leaves).shape == torch.Size(lead)


def test_no_classes() -> None:
    x, weight = torch.randn(3, 5), torch.empty(0, 5)
    target = torch.full((3,), -100)
    losses = linear_cross_entropy(x, weight, target, reduction="none")
    assert torch.equal(losses, torch.zeros(3))
    with pytest.raises(ValueError, match="target: expected classes 0 to -1 or ignore_index"):
        linear_cross_entropy(x, weight, target.clone().zero_())


def test_strides_do_not_matter() -> None:
    case = make(8, 12, 6)
    case.x = torch.randn(6, 8).t()
    case.weight = torch.randn(12, 12)[:, ::2]
    case.bias = torch.randn(24)[::2]
    case.target = torch.randint(0, 12, (16,))[::2]
    case.check("strided")


# what torch does at the edges --------------------------------------------------------------


def test_all_tokens_ignored() -> None:
    """The mean over no token is nan, its gradient 0; as torch has it."""
    for options in ({}, {"label_smoothing": 0.1}, {"class_weight": True}):
        case = make(5, 7, 3, ignored=1, **options)
        loss, grads = case.plain(torch.float32)
        ours = case.public()(*(leaves := case.leaves()))
        assert loss.isnan()
        assert ours.isnan()
        for got, want in zip(torch.autograd.grad(ours, leaves, case.grad), grads, strict=True):  # type: ignore[arg-type]
            assert torch.equal(got, want)  # type: ignore[arg-type]
            assert torch.equal(got, torch.zeros_like(got))
    assert make(5, 7, 3, ignored=1, reduction="sum").public()(*case.leaves()) == 0


def test_ignore_index_may_be_a_class() -> None:
    case = make(20, 7, 3, ignore_index=2)
    assert (case.target == 2).any()
    case.check()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("level", ISAS)
def test_logits_that_are_not_finite(level: str, bad: float) -> None:
    """Each token's loss and gradient of x as torch has them, wherever the logit stands."""
    for place in (0, 17, 32):
        case = make(9, 33, 33, reduction="none", ignored=0)
        case.x = torch.rand(9, 33) + 0.5
        case.target[:] = torch.arange(9) % 3 * 16
        case.bias = torch.randn(33)
        case.bias[place] = bad
        with isa(level):
            leaves = case.leaves()
            loss = case.public()(*leaves)
            grads = torch.autograd.grad(loss, leaves, case.grad)  # type: ignore[arg-type]
        want, want_grads = case.plain(torch.float32)
        assert torch.equal(loss.isfinite(), want.isfinite())
        torch.testing.assert_close(loss, want, equal_nan=True)
        for got, expected in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(got, expected, equal_nan=True)


def test_extreme_logits_stay_finite() -> None:
    for dtype in SHORT:
        case = make(6, 40, 4, dtype, ignored=0)
        case.weight = case.weight * 1000
        case.check(f"{dtype}")


def test_fp16_gradients_of_many_tokens_do_not_vanish() -> None:
    """d mean / d logits is below fp16's smallest number here; torch's own gradient is 0."""
    case = make(4096, 2048, 4, torch.float16, ignored=0)
    loss = case.public()(*(leaves := case.leaves()))
    scaled = torch.autograd.grad(loss, leaves, torch.tensor(65536.0))[1]  # type: ignore[arg-type]
    x, weight, bias = (t.double().requires_grad_() for t in leaves)  # type: ignore[union-attr]
    truth = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, bias), case.target), weight)[0]
    error = (scaled.double() / 65536 - truth).norm() / truth.norm()
    assert error < torch.finfo(torch.float16).eps


# gradients made in the forward pass --------------------------------------------------------


def test_frozen_inputs_cost_nothing() -> None:
    """Only what is asked for is made, and the result is the same."""
    case = make(9, 30, 5)
    full = ops.linear_cross_entropy_with_grad(
        case.x, case.weight, case.target, case.bias, *case.raw_options(), True, True, True, False
    )
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        some = ops.linear_cross_entropy_with_grad(
            case.x, case.weight, case.target, case.bias, *case.raw_options(), *needs, False
        )
        for need, got, want in zip(needs, some[1:4], full[1:4], strict=True):
            assert torch.equal(got, want) if need else got.numel() == 0
    x, weight, bias = case.leaves()
    weight.requires_grad_(False)  # type: ignore[union-attr]
    case.public()(x, weight, bias).backward()
    assert weight.grad is None  # type: ignore[union-attr]
    assert x.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradients_again(reduction: str) -> None:
    case = make(9, 30, 5, reduction=reduction)
    leaves = case.leaves()
    loss = case.public()(*leaves)
    for _ in range(3):
        grads = torch.autograd.grad(loss, leaves, case.grad, retain_graph=True)  # type: ignore[arg-type]
        case.check_gradients(grads)
    torch.autograd.grad(loss, leaves, case.grad)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves, case.grad)  # type: ignore[arg-type]


def test_results_are_the_same_from_run_to_run(small_chunks: None) -> None:
    for dtype in SHORT:
        case = make(200, 500, 16, dtype)
        runs = []
        for _ in range(3):
            loss = case.public()(*(leaves := case.leaves()))
            runs.append([loss, *torch.autograd.grad(loss, leaves)])  # type: ignore[arg-type]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("m", [512, 2048, 8192])
@pytest.mark.parametrize("v", [8192, 32000, 128256])
def test_the_plan_keeps_to_its_memory(m: int, v: int) -> None:
    """A chunk of logits and the two blocks of a product, as a part of all logits."""
    k = 768
    rows = chunked.chunk_rows(m, v, 2)
    held = rows * v + 2 * chunked.block_columns(m, v, k, rows, torch.bfloat16) * (k + rows)
    assert held <= 0.15 * m * v


# the pass in plain torch -------------------------------------------------------------------


@pytest.mark.parametrize("options", ALL.values(), ids=list(ALL))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_pass(
    dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "chunk_op", serve_chunk)
    with backend.record() as names:
        make(21, 33, 9, dtype, **options).check()
    assert set(names) == {"reference.linear_cross_entropy"}


def test_the_reference_is_the_truth() -> None:
    for options in ALL.values():
        case = make([2, 11], 33, 9, torch.float64, **options)
        x, weight, bias = case.leaves()
        loss = module.reference(x, weight, case.target, bias, **case.options)
        case.check_loss(loss)
        case.check_gradients(torch.autograd.grad(loss, (x, weight, bias), case.grad))  # type: ignore[arg-type]


def test_explain_names_the_kernel_that_runs() -> None:
    case = make(9, 30, 5, torch.bfloat16)
    explained = bigops.explain("linear_cross_entropy", case.x, case.weight, case.target, case.bias)
    with expect(explained.kernel):
        case.check()
    assert "chunks of 9 tokens" in explained.reason
    soft = bigops.explain("linear_cross_entropy", case.x, case.weight, torch.rand(9, 30))
    assert soft.kernel == "reference.linear_cross_entropy"
    gpu = bigops.explain("linear_cross_entropy", case.x, case.weight, device="sm_90")
    if machine.has_triton():
        assert gpu.kernel == "triton.linear_cross_entropy.bf16.gradient"


# errors ------------------------------------------------------------------------------------


def arguments(**other: Any) -> dict[str, Any]:
    case = make(4, 6, 5)
    base = {"x": case.x, "weight": case.weight, "target": case.target, "bias": case.bias}
    return {**base, **other}


LONG = torch.zeros(4, dtype=torch.int64)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": torch.randn(4, 3)}, ValueError, r"x: expected shape \[.., 5\].*got \[4, 3\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x: expected shape \[.., 5\]"),
    ({"x": LONG.view(4, 1)}, TypeError, "x: expected dtype float32.*got int64"),
    ({"x": None}, TypeError, "x: expected a torch.Tensor; got NoneType"),
    ({"weight": torch.randn(6)}, ValueError, "weight: expected 2 dimensions"),
    ({"weight": torch.randn(6, 5).double()}, TypeError, "weight: expected dtype float32"),
    ({"target": LONG[:3]}, ValueError, r"target: expected shape \[4\]; got \[3\]"),
    ({"target": LONG.int()}, TypeError, "target: expected dtype int64; got int32"),
    ({"target": [0, 1, 2, 3]}, TypeError, "target: expected a torch.Tensor; got list"),
    ({"target": LONG + 6}, ValueError, "target: expected classes 0 to 5.*-100; got 6"),
    ({"target": LONG - 1}, ValueError, "target: expected classes 0 to 5.*-100; got -1"),
    ({"bias": torch.randn(5)}, ValueError, r"bias: expected shape \[6\]; got \[5\]"),
    ({"bias": torch.randn(6).half()}, TypeError, "bias: expected dtype float32"),
    ({"reduction": "max"}, ValueError, "reduction: expected one of mean, sum, none; got 'max'"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 to 1; got 1.5"),
    ({"z_loss": -1.0}, ValueError, "z_loss: expected a finite number of at least 0; got -1"),
    ({"softcap": 0.0}, ValueError, "softcap: expected a positive finite number or None; got 0.0"),
    ({"softcap": float("nan")}, ValueError, "softcap: expected a positive finite number"),
    ({"class_weight": torch.rand(5)}, ValueError, r"class_weight: expected shape \[6\]"),
    ({"class_weight": torch.ones(6).long()}, TypeError, "class_weight: expected dtype"),
]


@pytest.mark.parametrize(("other", "kind", "message"), WRONG, ids=[w[2][:40] for w in WRONG])
def test_wrong_arguments(other: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        linear_cross_entropy(**arguments(**other))


def test_the_kernel_refuses_what_does_not_fit_and_writes_nothing() -> None:
    logits, options = torch.randn(4, 6), (6.0, -100, 0.0, 0.0, 0.0, True, True)

    def refused(message: str, target: Tensor = LONG, *parts: Tensor | None) -> None:
        bias, class_weight, scale = (*parts, None, None, None)[:3]
        before = logits.clone()
        with pytest.raises(RuntimeError, match=message):
            ops.linear_cross_entropy_chunk(logits, target, bias, class_weight, scale, *options)
        assert torch.equal(before, logits)

    refused("target: expected classes below 6 or ignore_index; got 6", LONG + 6)
    refused(r"target: expected shape \[4\]", LONG[:2])
    refused("target: expected dtype int64", LONG.int())
    refused(r"bias: expected shape \[6\]", LONG, torch.randn(5))
    refused("bias: expected dtype f32", LONG, torch.randn(6).double())
    refused(r"class_weight: expected shape \[6\]", LONG, None, torch.randn(5))
    refused(r"scale: expected shape \[4\]", LONG, None, None, torch.randn(5))
    logits = torch.randn(6, 4).t()
    refused("logits: expected contiguous")


# planted faults ----------------------------------------------------------------------------


def test_the_rule_fails_on_a_perturbed_result() -> None:
    for dtype, by in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float64, 1e-10)):
        case = make(9, 30, 5, dtype)
        loss, grads = case.plain(dtype)
        case.check_loss(loss)
        case.check_gradients(grads)
        with pytest.raises(AssertionError, match="float64 says"):
            case.check_loss(loss * (1 + by))
        for i in range(3):
            wrong = [g if i != j else g * (1 + by) for j, g in enumerate(grads)]  # type: ignore[operator]
            with pytest.raises(AssertionError, match="gradient of"):
                case.check_gradients(wrong)


def test_a_pass_that_forgets_an_option_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the numbers that the pass takes matters to the checks above."""
    true_chunk = schema.chunk_op
    for place, name in ((5, "weighted"), (7, "smoothed"), (8, "z_loss"), (9, "softcap")):

        def forgetful(*args: Any, place: int = place) -> Any:
            return true_chunk(*(0.0 if i == place else a for i, a in enumerate(args)))

        monkeypatch.setattr(schema, "chunk_op", forgetful)
        case: Case = make(21, 33, 9, **ALL[name])
        with pytest.raises(AssertionError, match="float64 says"):
            case.check(name)
