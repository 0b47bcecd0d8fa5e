"""The ops of the family under torch.func's transforms inside torch.compile, under fx, on the meta
device and on fake tensors: held against what eager gives.

On torch 2.13 a traced `autograd.Function` over a raw op gives a gradient of exactly zero without a
word, so these are compared by their numbers (bigops/ops/family/gradients.py, `traced`).
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bigops.formats.quantize import static_qparams
from bigops.ops.sparse_linear import sparse_linear
from tests.ops.family.problems import ALL, PUBLIC, TRAINED, K, M, compiled, hold, problem


@pytest.mark.parametrize("form", ALL)
def test_compiled_grad(form: str) -> None:
    case = problem(form)
    want = case.gradients(*case.inputs)
    f = torch.func.grad(case.loss, argnums=(0, 1, 2))
    hold(f(*case.inputs), want)
    hold(compiled(f)(*case.inputs), want)


@pytest.mark.parametrize("form", ALL)
def test_compiled_vmap_of_grad(form: str) -> None:
    """Gradients of each row by itself, those of the bias too."""
    case = problem(form)

    def one(x: Tensor, bias: Tensor, residual: Tensor, g: Tensor) -> Tensor:
        return (case.call(x, bias, residual) * g).float().sum()

    rows = []
    for x, r, g in zip(case.x, case.residual, case.grad, strict=True):
        leaves = [t.detach().clone().requires_grad_() for t in (x, case.bias, r)]
        rows.append(torch.autograd.grad(one(*leaves, g), leaves))
    want = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    f = torch.vmap(torch.func.grad(one, argnums=(0, 1, 2)), in_dims=(0, None, 0, 0))
    hold(f(*case.inputs, case.grad), want)
    hold(compiled(f)(*case.inputs, case.grad), want)


@pytest.mark.parametrize("form", ALL)
def test_compiled_grad_of_vmap(form: str) -> None:
    case = problem(form)
    want = case.gradients(*case.inputs)

    def loss(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        y = torch.vmap(case.call, in_dims=(0, None, 0))(x, bias, residual)
        return (y * case.grad).float().sum()

    hold(compiled(torch.func.grad(loss, argnums=(0, 1, 2)))(*case.inputs), want)


@pytest.mark.parametrize("form", TRAINED)
def test_compiled_grad_of_values(form: str) -> None:
    case = problem(form)
    values = case.weight.tensors()["values"]
    assert values is not None
    leaf = values.detach().clone().requires_grad_()
    want = torch.autograd.grad(case.of_values(leaf), leaf)
    f = torch.func.grad(case.of_values)
    hold([f(values)], want)
    hold([compiled(f)(values)], want)
    hold(
        [compiled(lambda v: torch.func.vjp(case.of_values, v)[1](torch.ones(()))[0])(values)], want
    )
    stacked = torch.stack([values, values * 2])
    hold(compiled(torch.vmap(f))(stacked), [f(v) for v in stacked])


@pytest.mark.parametrize("form", ALL)
def test_a_weight_is_an_argument_of_a_compiled_function(form: str) -> None:
    """By its class, whatever the tensors: another weight of the same form makes no other graph."""
    # not that of the case, which is known to be the same object
    case = problem(form)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    f = torch.compile(lambda w, *rest: case.call(*rest, w), fullgraph=True, backend=counter)
    for weight in [case.weight.map(Tensor.clone) for _ in range(3)]:
        assert torch.equal(f(weight, *case.inputs), case.call(*case.inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ALL)
def test_traced_by_fx(form: str) -> None:
    case = problem(form)

    def f(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return case.call(x, bias, residual)

    traced = torch.fx.symbolic_trace(f)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert case.op.forward._overloadpacket.default in called, called
    assert torch.equal(traced(*case.inputs), case.call(*case.inputs))
    leaves = [t.detach().clone().requires_grad_() for t in case.inputs]
    y = traced(*leaves)
    grads = torch.autograd.grad((y * case.grad).float().sum(), leaves)
    hold(grads, case.gradients(*case.inputs))


@pytest.mark.parametrize("form", ["int8_static", "sparse_int8"])
def test_qparams_by_fx_meta_and_fake_tensors(form: str) -> None:
    """x and the result in u8."""
    case = problem(form)
    qparams, q = static_qparams(-2.0, 3.0), torch.randint(0, 256, (M, K), dtype=torch.uint8)
    own = {"x_qparams": qparams} if form == "sparse_int8" else {}
    public = PUBLIC.get(case.op.name, sparse_linear)

    def f(x: Tensor) -> Tensor:
        return public(x, case.weight, case.bias, None, "relu", y_qparams=qparams, **own)

    traced = torch.fx.symbolic_trace(f)
    assert case.op.u8 is not None
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert case.op.u8.forward._overloadpacket.default in called, called
    want = f(q)
    assert want.dtype == torch.uint8
    assert torch.equal(traced(q), want)
    assert torch.equal(compiled(f)(q), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = f(mode.from_tensor(q))
    weight, onto = case.weight.map(lambda t: t.to("meta")), lambda t: t.to("meta")
    own = {name: onto(t) for name, t in own.items()}
    meta = public(onto(q), weight, onto(case.bias), None, "relu", y_qparams=onto(qparams), **own)
    for y in (fake, meta):
        assert (y.shape, y.dtype) == (want.shape, want.dtype)
    assert meta.device.type == "meta"


class Seen(torch.Tensor):
    """A subclass that sees what is called on it."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Seen.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("form", ALL)
def test_modes_and_subclasses_change_no_number_and_no_refusal(form: str) -> None:
    """A default device is a mode, too."""
    case = problem(form)
    want, grads = case.call(*case.inputs), case.gradients(*case.inputs)
    low = want if want.dtype == torch.bfloat16 else None
    if low is None and torch.bfloat16 in case.weight.x_dtypes:
        with torch.autocast("cpu", torch.bfloat16):
            low = case.call(*case.inputs)
        assert low.dtype == torch.bfloat16

    def hold_all(x: Tensor) -> None:
        rest = (case.bias, case.residual)
        assert torch.equal(case.call(x, *rest).as_subclass(Tensor), want)
        if low is not None:
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(case.call(x, *rest).as_subclass(Tensor), low)
        for wrong in (x[:, : K - 2], x[:, : K - 1]):
            with pytest.raises(ValueError, match=rf"x: expected shape \[.., {K}\] "):
                case.call(wrong, *rest)

    with torch.device("cpu"):
        hold_all(case.x)
        hold(case.gradients(*case.inputs), grads)
    Seen.calls.clear()
    hold_all(case.x.as_subclass(Seen))
    assert case.op.forward._overloadpacket.default in Seen.calls


@pytest.mark.parametrize("form", ALL)
def test_meta_tensors(form: str) -> None:
    case = problem(form)
    weight = case.weight.map(lambda t: t.to("meta"))
    x, bias, residual = (t.to("meta").requires_grad_() for t in case.inputs)
    y = case.call(x, bias, residual, weight)
    want = case.call(*case.inputs)
    assert (y.shape, y.dtype, y.device.type) == (want.shape, want.dtype, "meta")
    grads = torch.autograd.grad(y, (x, bias, residual), torch.empty_like(y))
    assert [g.shape for g in grads] == [t.shape for t in case.inputs]
    assert {g.device.type for g in grads} == {"meta"}
    with pytest.raises(ValueError, match=rf"x: expected shape \[.., {K}\] .*; got \[5, {K - 1}\]"):
        case.call(x[:, 1:], bias, residual, weight)


@pytest.mark.parametrize("form", ALL)
def test_fake_tensors(form: str) -> None:
    case = problem(form)
    want = case.call(*case.inputs)
    with FakeTensorMode() as mode:
        weight = case.weight.map(mode.from_tensor)
        x, bias, residual = (mode.from_tensor(t).requires_grad_() for t in case.inputs)
        y = case.call(x, bias, residual, weight)
        assert (y.shape, y.dtype, y.device) == (want.shape, want.dtype, want.device)
        grads = torch.autograd.grad(y, (x, bias, residual), torch.empty_like(y))
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in case.inputs]
        with pytest.raises(ValueError, match=r"x: expected shape \[.., "):
            case.call(x[:, 1:], bias, residual, weight)
        with pytest.raises(TypeError, match=r"bias: expected dtype "):
            case.call(x, bias.double(), residual, weight)


@pytest.mark.parametrize("form", ["int8", "sparse_float", "24", "packed"])
def test_a_gradient_of_zero_would_be_seen(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the transforms are traced through a Function over the raw op, as torch has it."""
    case = problem(form)
    want = case.gradients(*case.inputs)
    gradients = case.op.gradients
    monkeypatch.setattr(gradients, "traced", lambda *args: gradients.functorch(*args))
    f = torch.func.grad(case.loss, argnums=(0, 1, 2))
    with pytest.raises((AssertionError, RuntimeError, torch._dynamo.exc.TorchDynamoException)):
        hold(compiled(f)(*case.inputs), want)
    torch._dynamo.reset()
