"""Gradients of low_rank_linear along every path against float64, and the contract of a torch op."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from bigops.ops.low_rank_linear import low_rank_linear
from tests.support import paths
from tests.support.backends import covering
from tests.support.cases.low_rank import NAMES, LowRankCase, make
from tests.support.kernels_ran import expect, needs_extension

module = importlib.import_module("bigops.ops.low_rank_linear")  # the name is the function's, too
ops = torch.ops.bigops
pytestmark = needs_extension
KINDS = {"factors": {}, "lora": {"base": True, "scale": 0.5}}


def public(case: LowRankCase) -> paths.Op:
    # x first and the residual last: `grad_of_vmap` gives these two a row for each of its calls
    def f(x, u, v, bias, base, residual):  # type: ignore[no-untyped-def]
        return low_rank_linear(x, u, v, bias, residual, case.name, base=base, scale=case.scale)

    return f


def raw_call(case: LowRankCase) -> paths.Op:
    def f(x, u, v, bias, base, residual):  # type: ignore[no-untyped-def]
        return ops.low_rank_linear(x, u, v, base, case.scale, bias, residual, case.name)

    return f


def travel(path: str, case: LowRankCase) -> None:
    f = raw_call(case) if path == "raw" else public(case)
    go = paths.eager if path == "raw" else paths.PATHS[path]
    x, u, v, bias, residual, base = case.leaves()
    with expect("low_rank_linear"):
        gx, gu, gv, gb, gbase, gr = go(f, [x, u, v, bias, base, residual], case.grad)
    case.check_gradients([gx, gu, gv, gb, gr, gbase], path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
@pytest.mark.parametrize("name", ["none", "gelu", "relu2"])
def test_float64_gradients(path: str, name: str, kind: str) -> None:
    travel(path, make(3, 4, 5, 2, torch.float64, name, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_every_dtype(path: str, dtype: torch.dtype, kind: str) -> None:
    for name in ("none", "silu"):
        travel(path, make(7, 20, 33, 9, dtype, name, **KINDS[kind]))


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_gradients_of_factors_alone_and_of_rank_zero(path: str) -> None:
    travel(path, make(3, 4, 5, 2, torch.float64, "tanh", extras=False))
    travel(path, make(3, 4, 5, 0, torch.float64, "tanh"))


def test_inductor_computes_the_same() -> None:
    case = make(5, 12, 9, 4, torch.float32, "gelu", base=True)
    x, u, v, bias, residual, base = case.leaves()
    with expect(".low_rank_linear.", ".low_rank_linear_backward."):
        gx, gu, gv, gb, gbase, gr = paths.inductor(
            public(case), [x, u, v, bias, base, residual], case.grad
        )
    case.check_gradients([gx, gu, gv, gb, gr, gbase], "inductor")


@pytest.mark.parametrize("frozen", range(6), ids=NAMES)
@pytest.mark.parametrize("kind", ["raw", "public"])
def test_an_input_without_gradient(frozen: int, kind: str) -> None:
    case = make(3, 4, 5, 2, torch.float64, "tanh", base=True)
    leaves = case.leaves()
    leaves[frozen].requires_grad_(False)  # type: ignore[union-attr]
    x, u, v, bias, residual, base = leaves
    y = (raw_call(case) if kind == "raw" else public(case))(x, u, v, bias, base, residual)
    got = list(torch.autograd.grad(y, [t for i, t in enumerate(leaves) if i != frozen], case.grad))
    got.insert(frozen, case.plain(torch.float64)[1][frozen])
    case.check_gradients(got, kind)


@pytest.mark.parametrize("path", ["raw", *paths.PATHS])
def test_a_wrong_gradient_is_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dict.fromkeys(module.op.gradients.needs, lambda g: g * 1.01)
    paths.plant(monkeypatch, module.op, **wrong)
    with pytest.raises(AssertionError, match="gradient of"):
        travel(path, make(3, 4, 5, 2, torch.float64, "gelu"))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["none", "gelu"])
def test_double_backward(name: str, kind: str) -> None:
    case = make(2, 3, 4, 2, torch.float64, name, **KINDS[kind])
    x, u, v, bias, residual, base = case.leaves()
    leaves = [x, u, v, bias, base, residual]
    for f in (public(case), raw_call(case)):
        assert torch.autograd.gradgradcheck(f, leaves)
    t = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True) if name != "none" else None
    needs = (True, True, True, base is not None, True)

    def backward(grad, x, u, v, base, t, z):  # type: ignore[no-untyped-def]
        made = ops.low_rank_linear_backward(grad, x, u, v, base, case.scale, t, z, name, *needs)
        return tuple(g for g, need in zip(made, needs, strict=True) if need)

    tensors = [case.grad.clone().requires_grad_(), x, u, v, base, t, z]
    assert torch.autograd.gradcheck(backward, tensors)


@pytest.mark.parametrize(
    ("name", "lead", "kind"), covering(["none", "relu"], [[4], [2, 3], [0]], KINDS), ids=str
)
def test_opcheck(name: str, lead: list[int], kind: str) -> None:
    case = make(lead, 6, 5, 3, torch.float32, name, **KINDS[kind])
    x, u, v, bias, residual, base = case.leaves()
    args = (x, u, v, base, case.scale, bias, residual, name)
    paths.opcheck(ops.low_rank_linear, args)
    # its t and z have no gradient, which "test_aot_dispatch" asks for
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    paths.opcheck(ops.low_rank_linear_with_parts, args, test_utils=checks)
    with torch.no_grad():
        y, t, z = ops.low_rank_linear_with_parts(*args)
    assert y.shape == case.grad.shape
    x, u, v, _, _, base = case.inputs
    for needs in ((True, True, True, base is not None, True), (False, True, False, False, True)):
        rest = (base, case.scale, t, None if name == "none" else z, name, *needs)
        paths.opcheck(ops.low_rank_linear_backward, (case.grad, x, u, v, *rest))


def test_parts_have_no_gradient_and_say_so() -> None:
    case = make(3, 4, 5, 2, torch.float64, "gelu")
    x, u, v, bias, residual, base = case.leaves()
    _, t, _ = ops.low_rank_linear_with_parts(x, u, v, base, 1.0, bias, residual, "gelu")
    with pytest.raises(RuntimeError, match="expected a gradient for y only"):
        t.sum().backward()


def test_one_dynamic_graph_serves_all_row_counts() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    case = make(1, 6, 5, 4, torch.float32, "gelu", extras=False)
    _, u, v, *_ = case.inputs
    compiled = torch.compile(
        lambda x: low_rank_linear(x, u, v, activation="gelu"),
        fullgraph=True,
        backend=counter,
        dynamic=True,
    )
    counts = []
    for m in (2, 3, 17, 64, 1, 0):
        x = torch.randn(m, 5)
        assert torch.equal(compiled(x), low_rank_linear(x, u, v, activation="gelu"))
        counts.append(counter.frame_count)
    # One compilation may hand over two graphs: torch tries the float `scale` as a symbol first.
    assert counts[0] <= 2
    assert counts[3] == counts[0]
    assert counts[5] <= 3 * counts[0]


@pytest.mark.parametrize("which", range(3), ids=NAMES[:3])
@pytest.mark.parametrize("call", ["public", "raw"])
def test_vmap_over_any_argument(which: int, call: str) -> None:
    case = make(4, 6, 5, 3, torch.float32, "relu", extras=False)
    batch = [torch.randn_like(case.inputs[which]) for _ in range(3)]
    first = list(case.inputs[:3])

    def f(t: Tensor) -> Tensor:
        x, u, v = (t if i == which else a for i, a in enumerate(first))
        if call == "raw":
            return ops.low_rank_linear(x, u, v, None, 1.0, None, None, "relu")
        return low_rank_linear(x, u, v, activation="relu")

    for t, y in zip(batch, torch.vmap(f)(torch.stack(batch)), strict=True):
        inputs = tuple(t if i == which else a for i, a in enumerate(case.inputs))
        LowRankCase(inputs, case.grad, "relu", 1.0).check_forward(y, "vmap")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_to_its_own_dtype(dtype: torch.dtype) -> None:
    case = make(4, 6, 5, 3, torch.float32, "gelu", base=True)
    x, u, v, bias, residual, base = case.leaves()
    with torch.autocast("cpu", dtype=dtype):
        y = low_rank_linear(x, u, v, bias, residual, "gelu", base=base)
    assert y.dtype == dtype
    low = tuple(None if t is None else t.to(dtype) for t in case.inputs)
    LowRankCase(low, case.grad.to(dtype), "gelu", 1.0).check_forward(y)
    y.sum().backward()
    assert u.grad.dtype == v.grad.dtype == base.grad.dtype == torch.float32
