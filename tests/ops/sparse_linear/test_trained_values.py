"""The gradient of a sparse weight's floating values on every path, and its training.

The kernels are held to the rule at every instruction set in test_cpu.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats.patterns import block_mask
from bigops.formats.sparse import SparseWeight
from bigops.ops.sparse_linear import sparse_linear
from tests.ops.family.test_paths import SNR_FLOOR_DB, travel
from tests.support import paths
from tests.support.backends import covering
from tests.support.cases.compressed import Case, dtype_of, make, served
from tests.support.kernels_ran import expect, needs_extension

ops = torch.ops.bigops
pytestmark = needs_extension

FORMS = ("sparse_float", "sparse_bf16")
BOTH = [(form, dtype) for form in FORMS for dtype in served(form)]
PATHS = ["raw", *paths.PATHS]


def trained(form: str, *shape: int, name: str = "gelu", **options: Any) -> Case:
    dtype = options.pop("dtype", dtype_of(form))
    return make(form, *shape, dtype, name, values=True, **options)


@pytest.mark.parametrize(("form", "dtype"), BOTH)
@pytest.mark.parametrize("path", PATHS)
def test_gradients_on_every_path(form: str, path: str, dtype: str) -> None:
    travel(path, trained(form, 7, 20, 33, dtype=dtype, pattern="4x1"))
    travel(
        path,
        trained(form, 3, 4, 5, dtype=dtype, name="none", pattern="1x1", residual=False)
        if path != "grad_of_vmap"
        else trained(form, 3, 4, 5, dtype=dtype, pattern="1x1"),
    )


@pytest.mark.parametrize("form", FORMS)
def test_inductor_computes_the_same(form: str) -> None:
    case = trained(form, 5, 12, 9)
    with expect(".sparse_linear.", "sparse_linear_backward."):
        grads = paths.inductor(case.public, case.leaves(), case.grad)
    case.check_gradients(grads, "inductor")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_gradient_is_seen(form: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: gradients of the values, and no others, 5 % off."""
    case = trained(form, 3, 4, 5)
    paths.plant(monkeypatch, case.linear_op, need_values=lambda g: g * 1.05)
    with pytest.raises(AssertionError, match="gradient of values"):
        travel(path, case)
    torch._dynamo.reset()


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_wanted_is_computed(form: str) -> None:
    """Values alone, and x alone: one product each, and the gradient the same."""
    case = trained(form, 9, 20, 33)
    for wanted, kernel in (
        ((0,), "_transposed"),
        ((1,), "_sample"),
        ((0, 1), "_transposed_sample"),
    ):
        leaves = [
            None if t is None else t.detach().requires_grad_(i in wanted)
            for i, t in enumerate(case.leaves())
        ]
        with expect(f"{'f32' if form == 'sparse_float' else 'bf16'}{kernel}"):
            found = torch.autograd.grad(
                case.public(*leaves),  # type: ignore[arg-type]
                [leaves[i] for i in wanted],  # type: ignore[misc]
                case.grad,
            )
        truth = case.truth(torch.float64)[1]
        grads = [None if t is None else t.to(case.x.dtype) for t in truth]
        for i, g in zip(wanted, found, strict=True):
            grads[i] = g
        if 1 not in wanted:
            assert truth[1] is not None
            grads[1] = truth[1].to(case.weight.values.dtype)
        case.check_gradients(grads)


# second derivatives ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["none", "silu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("raw", [False, True], ids=["public", "raw"])
def test_double_backward(form: str, name: str, raw: bool) -> None:
    """Of the gradients of x and values, for dL/dy, x, values and bias, against float64."""
    case = trained(form, 4, 5, 6, name=name, residual=False, pattern="1x1")
    x, values, bias, _ = case.leaves()
    assert x is not None
    assert values is not None
    assert bias is not None
    grad = case.grad.clone().requires_grad_()
    f = case.raw if raw else case.public
    first = torch.autograd.grad(f(x, values, bias, None), [x, values], grad, create_graph=True)
    got = torch.autograd.grad(
        sum(g.square().sum() for g in first), [grad, x, values, bias], allow_unused=True
    )
    x64, w64, b64, g64 = (t.detach().double().requires_grad_() for t in (x, case.dense, bias, grad))
    z = F.linear(x64, w64, b64)
    gx, gw = torch.autograd.grad(
        F.silu(z) if name == "silu" else z, [x64, w64], g64, create_graph=True
    )
    kept = case.at_stored(torch.ones(5, 6)).bool()
    total = gx.square().sum() + case.at_stored(gw)[kept].square().sum()
    want = list(torch.autograd.grad(total, [g64, x64, w64, b64], allow_unused=True))
    if want[2] is not None:
        want[2] = case.at_stored(want[2])
    for a, b in zip(got, want, strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())
        if a is not None and b is not None and b.any():
            noise = (a.double() - b).square().sum()
            ratio = 10 * torch.log10(b.square().sum() / noise.clamp_min(1e-300))
            assert float(ratio) > SNR_FLOOR_DB[dtype_of(form)]


@pytest.mark.parametrize("form", FORMS)
def test_backward_op_is_differentiable(form: str) -> None:
    """The raw backward op, through all three of its results."""
    case = trained(form, 4, 5, 6, residual=False)
    leaves = case.leaves()
    grad = case.grad.clone().requires_grad_()
    wanted = [grad, *leaves[:3]]

    def loss(f: Any) -> tuple[Tensor, ...]:
        x, values, bias, _ = leaves
        arguments = case.weight.replace(values=values).arguments
        found = f(grad, x, *arguments, bias, "gelu", True, True, True)
        return torch.autograd.grad(sum(g.square().sum() for g in found), wanted)  # type: ignore[arg-type]

    reference = case.linear_op.gradients.reference
    for a, b in zip(loss(ops.sparse_linear_backward), loss(reference), strict=True):
        noise = (a.double() - b.double()).square().sum().clamp_min(1e-300)
        ratio = 10 * torch.log10(b.double().square().sum() / noise)
        assert float(ratio) > SNR_FLOOR_DB[dtype_of(form)]


# contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "pattern"), covering(FORMS, ("1x1", "16x1")))
def test_opcheck(form: str, pattern: str) -> None:
    case = trained(form, 4, 6, 5, name="relu", pattern=pattern)
    x, values, bias, residual = case.leaves()
    arguments = case.weight.replace(values=values).arguments
    paths.opcheck(ops.sparse_linear, (x, *arguments, bias, residual, "relu"))
    for wanted in ((True, True, True), (False, True, False)):
        paths.opcheck(
            ops.sparse_linear_backward,
            (case.grad, case.x, *case.storage, case.bias, "relu", *wanted),
        )


def test_values_that_are_not_trained_are_refused() -> None:
    int8 = make("sparse_int8", 3, 5, 4)
    with pytest.raises(RuntimeError, match="values: expected a floating-point dtype"):
        ops.sparse_linear_backward(
            int8.grad, int8.x, *int8.storage, None, "none", True, True, False
        )
    with pytest.raises(RuntimeError, match="only Tensors of floating point"):
        int8.weight.values.clone().requires_grad_()


@pytest.mark.parametrize("form", FORMS)
def test_vmap_over_values(form: str) -> None:
    """Many weights of one pattern."""
    case = trained(form, 6, 5, 9)
    x, values, bias, residual = (t.detach() for t in case.leaves() if t is not None)
    stacked = torch.stack([values, 2 * values])
    got = torch.vmap(case.public, in_dims=(None, 0, None, None))(x, stacked, bias, residual)
    for one, v in zip(got, stacked, strict=True):
        assert torch.equal(one, case.public(x, v, bias, residual))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["1x1", "16x1"])
def test_training_the_values_keeps_the_pattern(form: str, pattern: str) -> None:
    """The loss falls, what only pads stays 0 under momentum, and the storage stays valid."""
    height = int(pattern.split("x")[0])
    torch.manual_seed(1)
    w, x = torch.randn(37, 50) / 7, torch.randn(64, 50)
    target = x @ w.t()
    mask = block_mask(w, 0.5, (height, 1))
    dtype = torch.bfloat16 if form == "sparse_bf16" else torch.float32
    weight = SparseWeight.from_mask(w, mask, dtype, (height, 1))
    kept = weight.pattern()
    values = weight.values.requires_grad_()
    optimizer = torch.optim.SGD([values], lr=2.0, momentum=0.9)
    losses = []
    for _ in range(30):
        y = sparse_linear(x.to(dtype), weight.replace(values=values))
        loss = F.mse_loss(y.float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = weight.replace(values=values.detach())
    after.validate()
    assert not after.to_dense()[~kept].any()
