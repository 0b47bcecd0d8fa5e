"""quantized_linear and sparse_linear: gradients on every path, and the contract of a torch op.

Both get their paths from bigops/ops/family, so both are held to them here. The gradient of
sparse values travels them in tests/ops/sparse_linear/test_trained_values.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.formats.patterns import block_mask
from bigops.formats.quantized import QuantizedWeight
from bigops.formats.sparse import SparseWeight
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.support import paths
from tests.support.backends import covering
from tests.support.cases.compressed import DTYPES, FORMATS, QUANTISED, Case, dtype_of, make, served
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension
from tests.support.tolerance import snr_db

pytestmark = needs_extension


BOTH = [(form, dtype) for form in FORMATS for dtype in served(form)]
# Of a double backward: float32 throughout, or results rounded to bfloat16 on the way.
SNR_FLOOR_DB = {"f32": 110, "bf16": 40}


def needs(case: Case, x: bool, bias: bool, values: bool = False) -> tuple[bool, ...]:
    """What the backward op is asked for."""
    return (x, values, bias) if case.sparse else (x, bias)


def travel(path: str, case: Case) -> None:
    """One path, one case: gradients by the rule, and a kernel of ours in the forward at least."""
    f = case.raw if path == "raw" else case.public
    go = paths.eager if path == "raw" else paths.PATHS[path]
    with expect(f".{case.op}."):
        grads = go(f, case.leaves(), case.grad)
    case.check_gradients(grads, path)


@pytest.mark.parametrize(("form", "dtype"), BOTH)
@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_gradients_on_every_path(form: str, path: str, dtype: str) -> None:
    travel(path, make(form, 7, 20, 33, dtype, "gelu"))
    travel(path, make(form, 3, 4, 5, dtype, "none", bias=False, residual=False))


@pytest.mark.parametrize("form", FORMATS)
def test_inductor_computes_the_same(form: str) -> None:
    case = make(form, 5, 12, 9, dtype_of(form), "gelu")
    with expect(f"{case.op}.", f"{case.op}_backward."):
        grads = paths.inductor(case.public, case.leaves(), case.grad)
    case.check_gradients(grads, "inductor")


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["x", "bias", "residual"])
@pytest.mark.parametrize("form", FORMATS)
def test_an_input_without_gradient(form: str, frozen: int) -> None:
    case = make(form, 3, 4, 5, dtype_of(form), "tanh")
    for f in (case.public, case.raw):
        leaves = case.leaves()
        leaves[frozen].requires_grad_(False)  # type: ignore[union-attr]
        wanted = [t for i, t in enumerate(leaves) if i != frozen]
        got: list[Any] = list(torch.autograd.grad(f(*leaves), wanted, case.grad))  # type: ignore[arg-type]
        got.insert(frozen, case.truth(torch.float64)[1][frozen].to(case.x.dtype))  # type: ignore[union-attr]
        case.check_gradients(got)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_a_wrong_gradient_is_seen(form: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: gradients 5 % off."""
    case = make(form, 3, 4, 5, dtype_of(form), "gelu")
    off = {need: lambda g: g * 1.05 for need in ("need_x", "need_bias")}
    paths.plant(monkeypatch, case.linear_op, **off)
    with pytest.raises(AssertionError, match="gradient of"):
        travel(path, case)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["none", "silu"])
@pytest.mark.parametrize("form", FORMATS)
def test_double_backward(form: str, name: str) -> None:
    """The gradient differentiated again, for dL/dy and x, against the expression in float64."""
    case = make(form, 4, 5, 6, dtype_of(form), name, residual=False)
    for f in (case.public, case.raw):
        x, bias, _ = case.leaves()
        assert x is not None
        assert bias is not None
        grad = case.grad.clone().requires_grad_()
        (gx,) = torch.autograd.grad(f(x, bias, None), x, grad, create_graph=True)
        got = torch.autograd.grad(gx.square().sum(), [grad, x, bias], allow_unused=True)
        x64, b64, g64 = (t.detach().double().requires_grad_() for t in (x, bias, grad))
        seen = x64 + (case.seen_x() - x64.detach())
        z = F.linear(seen, case.dense, b64)
        (gx64,) = torch.autograd.grad(
            F.silu(z) if name == "silu" else z, x64, g64, create_graph=True
        )
        want = torch.autograd.grad(gx64.square().sum(), [g64, x64, b64], allow_unused=True)
        for a, b in zip(got, want, strict=True):
            assert (a is None or not a.any()) == (b is None or not b.any())
            if a is not None and b is not None and b.any():
                assert snr_db(a, b) > SNR_FLOOR_DB[dtype_of(form)]


@pytest.mark.parametrize("form", FORMATS)
def test_backward_op_is_differentiable(form: str) -> None:
    case = make(form, 4, 5, 6, dtype_of(form), "gelu", residual=False)
    assert case.bias is not None
    tensors = [t.clone().requires_grad_() for t in (case.grad, case.x, case.bias)]
    backward = getattr(torch.ops.bigops, f"{case.op}_backward")

    def loss(f: Any) -> tuple[Tensor, ...]:
        g, x, b = tensors
        gx, *_, gb = f(g, x, *case.storage, b, "gelu", *needs(case, True, True))
        return torch.autograd.grad(gx.sum() + gb.square().sum(), tensors)

    for a, b in zip(loss(backward), loss(case.linear_op.gradients.reference), strict=True):
        # the kernel's gb enters through its square
        assert snr_db(a, b) > SNR_FLOOR_DB[dtype_of(form)]


@pytest.mark.parametrize("path", ["public", "raw", "functorch"])
@pytest.mark.parametrize("form", ["int8", "sparse_int8"])
def test_a_scale_that_wants_a_gradient_is_refused(form: str, path: str) -> None:
    case = make(form, 3, 5, 4)
    scale = case.weight.scale

    def call(scale: Tensor) -> Tensor:
        changed = replace(case, weight=case.weight.replace(scale=scale))
        return (changed.raw if path == "raw" else changed.public)(*case.inputs)

    def refused() -> None:
        if path == "functorch":
            torch.func.grad(lambda s: call(s).sum())(scale)
        else:
            call(scale.clone().requires_grad_())

    with pytest.raises(ValueError, match="scale: expected a tensor that needs no gradient"):
        refused()


@pytest.mark.parametrize("form", FORMATS)
def test_vmap_over_rows_and_biases(form: str) -> None:
    case = make(form, 6, 5, 9, dtype_of(form), "relu")
    assert case.bias is not None
    rows = torch.vmap(case.public, in_dims=(0, None, 0))(*case.inputs)
    assert torch.equal(rows, case.public(*case.inputs))
    columns = torch.vmap(case.raw, in_dims=(1, None, 1), out_dims=1)(
        case.x.view(3, 2, 9),
        case.bias,
        case.residual.view(3, 2, 5),  # type: ignore[union-attr]
    )
    assert torch.equal(columns.reshape(6, 5), rows)
    biases = torch.stack([case.bias, case.bias + 1])
    both = torch.vmap(case.public, in_dims=(None, 0, None))(case.x, biases, case.residual)
    assert torch.equal(both[1], case.public(case.x, biases[1], case.residual))


def test_vmap_over_weights() -> None:
    one, two = make("int8", 6, 5, 9), make("int8", 6, 5, 9)
    stacked = [
        torch.stack([getattr(c.weight, name) for c in (one, two)])
        for name in ("values", "scale", "row_sum")
    ]

    def f(values: Tensor, scale: Tensor, row_sum: Tensor) -> Tensor:
        changed = one.weight.replace(values=values, scale=scale, row_sum=row_sum)
        return quantized_linear(one.x, changed)

    got = torch.vmap(f)(*stacked)
    assert torch.equal(got[0], quantized_linear(one.x, one.weight))
    assert torch.equal(got[1], quantized_linear(one.x, two.weight))


@pytest.mark.parametrize("form", FORMATS)
def test_per_example_gradients(form: str) -> None:
    """vmap of the raw backward: gradients of bias and values of its own for every example."""
    case = make(form, 6, 5, 9, dtype_of(form), "gelu")
    wanted = needs(case, True, True, values=form in ("sparse_float", "sparse_bf16"))
    backward = getattr(torch.ops.bigops, f"{case.op}_backward")

    def one(g: Tensor, x: Tensor) -> Any:
        return backward(g, x, *case.storage, case.bias, "gelu", *wanted)

    together = torch.vmap(one)(case.grad, case.x)
    for i in range(6):
        for got, want in zip(together, one(case.grad[i], case.x[i]), strict=True):
            assert torch.equal(got[i], want)


# contract of a torch op --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "lead", "name"), covering(FORMATS, [[4], [2, 3], [0]], ["none", "relu"]), ids=str
)
def test_opcheck(form: str, lead: list[int], name: str) -> None:
    case = make(form, lead, 6, 5, dtype_of(form), name)
    x, bias, residual = case.leaves()
    ops = torch.ops.bigops
    paths.opcheck(getattr(ops, case.op), (x, *case.storage, bias, residual, name))
    for wanted in (needs(case, True, True), needs(case, False, True)):
        args = (case.grad, case.x, *case.storage, case.bias, name, *wanted)
        paths.opcheck(getattr(ops, f"{case.op}_backward"), args)


@pytest.mark.parametrize("form", FORMATS)
def test_one_dynamic_graph_serves_many_row_counts(form: str) -> None:
    case = make(form, 4, 5, 9, dtype_of(form), "relu")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def f(x: Tensor) -> Tensor:
        return case.public(x, case.bias, None)

    compiled = torch.compile(f, backend=counter, fullgraph=True, dynamic=True)
    for m in (7, 2, 17, 40):  # first one that no size of the weight shares: equal sizes are tied
        x = torch.randn(m, 9).to(case.x.dtype)
        assert torch.equal(compiled(x), f(x))
    assert counter.frame_count == 1


# packed_linear has a test of its own: its weight says what dtype is computed in
@pytest.mark.parametrize(("form", "dtype"), [b for b in BOTH if b[1] != "f32" and b[0] != "packed"])
def test_autocast(form: str, dtype: str) -> None:
    """From float32 to a lower dtype; bfloat16 values take x as float32 under bfloat16 autocast."""
    case = make(form, 4, 5, 9)
    x, bias, residual = case.leaves()
    assert x is not None
    with torch.autocast("cpu", DTYPES[dtype]):
        y = case.public(x, bias, residual)
    assert y.dtype == DTYPES[dtype]
    low = [None if t is None else t.to(DTYPES[dtype]) for t in case.inputs]
    assert torch.equal(y, case.public(*low))  # type: ignore[arg-type]
    y.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("m", [1, 8, 9, 100])
def test_explain_names_the_kernel_that_runs(level: str, form: str, m: int) -> None:
    case = make(form, m, 6, 40, "bf16")
    with isa(level):
        said = bigops.explain(case.op, case.x, case.weight)
        with bigops.backend.record() as ran:
            case.public(case.x, None, None)
    assert ran == [said.kernel]
    assert said.reason


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in QUANTISED])
def test_explain_says_that_no_gpu_kernel_serves(form: str) -> None:
    case = make(form, 4, 6, 40, dtype_of(form))
    said = bigops.explain(case.op, case.x, case.weight, device="sm_90")
    assert said.kernel == f"reference.{case.op}"
    assert "no GPU kernel" in said.reason
    with pytest.raises(ValueError, match="x: expected shape"):
        bigops.explain(case.op, case.x[:, 1:], case.weight)


def test_small_networks_train_through_frozen_layers() -> None:
    """What the gradients are for: a trainable layer before a frozen one learns its target."""
    w = torch.randn(8, 16) / 4
    for weight in (QuantizedWeight.from_dense(w), SparseWeight.from_mask(w, block_mask(w, 0.25))):
        torch.manual_seed(1)
        first = torch.nn.Linear(4, 16)
        x, target = torch.randn(32, 4), torch.randn(32, 8)
        optimizer = torch.optim.Adam(first.parameters(), lr=0.05)
        f: Any = quantized_linear if isinstance(weight, QuantizedWeight) else sparse_linear
        losses = []
        for _ in range(60):
            loss = F.mse_loss(f(F.relu(first(x)), weight), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
