"""The contract of a torch op: no gradient by any path, compile, export, vmap, fake, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import bigops
from tests.support import paths
from tests.support.backends import REFERENCE
from tests.support.cases.norm import KINDS, NormCase, make
from tests.support.kernels_ran import expect, needs_extension

ops = torch.ops.bigops
pytestmark = needs_extension
OPS = ("norm", "norm_with_sum", "norm_act_quant")
FLAGS = {"norm": (), "norm_with_sum": (), "norm_act_quant": (True, True, True)}


def call(op: str, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """The public function with all results, those of u8 in full."""
    flags = {"symmetric": True, "keep_float": True, "keep_sum": True} if op == OPS[2] else {}
    found = getattr(bigops, op)(*tensors, **options, **flags)
    return (found,) if isinstance(found, Tensor) else tuple(found)


def raw(op: str, case: NormCase) -> tuple[Any, ...]:
    return (*case.tensors, case.eps, case.kind, *FLAGS[op])


def equal(found: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(found) == len(want)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


class Model(nn.Module):
    """A norm of each kind, with what they are given."""

    def __init__(self, op: str, k: int) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.rand(k), requires_grad=False)
        self.bias = nn.Parameter(torch.rand(k), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        first = call(self.op, x, self.weight, self.bias, residual)
        return *first, *call(self.op, x, self.weight, None, residual, kind="rms", eps=1e-6)


# no gradient -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("op", OPS)
def test_a_gradient_is_refused_by_name(op: str, name: str) -> None:
    case = make([3], 8, residual=True)
    getattr(case, name).requires_grad_()
    for run in (
        lambda: call(op, *case.tensors),
        lambda: getattr(ops, op)(*raw(op, case)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: norm is for inference only"):
            run()
    with torch.no_grad(), expect(op):
        assert not any(t.requires_grad for t in call(op, *case.tensors))
        equal(
            getattr(ops, op)(*raw(op, case)) if op != "norm" else (call(op, *case.tensors)[0],),
            call(op, *case.tensors),
        )
    with torch.inference_mode():
        call(op, *case.tensors)


def test_a_gradient_is_refused_in_a_graph() -> None:
    torch._dynamo.reset()
    x = torch.randn(3, 8, requires_grad=True)
    run = torch.compile(lambda x: bigops.norm(x).sum(), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="norm is for inference only"):
        run(x)
    with torch.no_grad():
        assert run(x).dim() == 0


def test_transforms_that_differentiate_are_refused() -> None:
    x = torch.randn(3, 8)
    for transform in (
        lambda: torch.func.grad(lambda x: bigops.norm(x).sum())(x),
        lambda: torch.vmap(torch.func.grad(lambda x: bigops.norm(x).sum()))(x),
        lambda: torch.func.jvp(bigops.norm, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="norm is for inference only"):
            transform()


# compile, export ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("op", OPS)
def test_compiled(op: str, backend: str) -> None:
    torch._dynamo.reset()
    model, x, r = Model(op, 40), torch.randn(6, 40), torch.randn(6, 40)
    with torch.no_grad(), expect(f"{op}.f32.layer", f"{op}.f32.rms"):
        equal(torch.compile(model, backend=backend, fullgraph=True)(x, r), model(x, r))


def test_one_dynamic_graph_serves_all_sizes() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(bigops.norm, fullgraph=True, backend=counter, dynamic=True)
    for m, k in ((2, 40), (3, 40), (17, 33), (64, 65)):
        x = torch.randn(m, k)
        assert torch.equal(run(x), bigops.norm(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_exported(op: str, strict: bool) -> None:
    model, x, r = Model(op, 24), torch.randn(4, 3, 24), torch.randn(4, 3, 24)
    batch, length = torch.export.Dim("batch", min=2, max=512), torch.export.Dim("length", max=99)
    for shapes in (None, ({0: batch, 1: length}, {0: batch, 1: length})):
        program = torch.export.export(model, (x, r), dynamic_shapes=shapes, strict=strict)
        calls = [n for n in program.graph.nodes if n.target is getattr(ops, op).code]
        assert len(calls) == 2, program.graph
        equal(program.module()(x, r), model(x, r))
    more, other = torch.randn(9, 5, 24), torch.randn(9, 5, 24)
    equal(program.module()(more, other), model(more, other))


@pytest.mark.parametrize("op", OPS)
def test_traced_by_fx(op: str) -> None:
    case = make([3], 8, residual=True)
    traced = fx.symbolic_trace(lambda x, r: getattr(bigops, op)(x, residual=r, kind="rms"))
    target = getattr(ops, op)
    assert any(n.target in (target, target.default) for n in traced.graph.nodes), traced.graph
    found = traced(case.x, case.residual)
    want = getattr(bigops, op)(case.x, residual=case.residual, kind="rms")
    equal((found,) if op == "norm" else tuple(found)[:2], (want,) if op == "norm" else want[:2])


# contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [[4], [2, 3], [0]], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, lead: list[int]) -> None:
    for kind in KINDS:
        paths.opcheck(getattr(ops, op), raw(op, make(lead, 9, kind=kind, residual=True)))
    if op != "norm_with_sum":
        case = make(lead, 9, torch.bfloat16, weight=False, bias=False)
        flags = (False, False, False) if op == OPS[2] else ()
        paths.opcheck(getattr(ops, op), (*case.tensors, case.eps, case.kind, *flags))


@pytest.mark.parametrize("op", OPS)
def test_meta_and_fake_tensors_say_the_same(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = make([2, 3], 9, dtype, residual=True)
        want = [(t.shape, t.dtype, t.stride()) for t in call(op, *case.tensors)]
        on_meta = call(op, *(None if t is None else t.to("meta") for t in case.tensors))
        assert [(t.shape, t.dtype, t.stride()) for t in on_meta] == want
        with FakeTensorMode() as mode:
            faked = call(op, *(None if t is None else mode.from_tensor(t) for t in case.tensors))
        assert [(t.shape, t.dtype, t.stride()) for t in faked] == want
        with pytest.raises(ValueError, match="kind: expected one of layer, rms"):
            call(op, *(None if t is None else t.to("meta") for t in case.tensors), kind="x")


@pytest.mark.parametrize(
    "dims",
    [
        (0, None, None, 0),
        (1, None, None, None),
        (None, None, None, 0),
        (0, 0, 0, 0),
        (None, 0, None, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_vmap(op: str, dims: tuple[int | None, ...]) -> None:
    sizes = [(5, 7), (7,), (7,), (5, 7)]
    batched = [
        torch.randn(size) if dim is None else torch.randn(*size[:dim], 3, *size[dim:])
        for size, dim in zip(sizes, dims, strict=True)
    ]
    with expect(op):
        found = torch.vmap(lambda *tensors: call(op, *tensors), dims)(*batched)
    for i in range(3):
        item = [
            t if dim is None else t.select(dim, i) for t, dim in zip(batched, dims, strict=True)
        ]
        equal(tuple(t[i] for t in found), call(op, *item))


@pytest.mark.parametrize("op", OPS)
def test_vmap_of_what_is_not_kept(op: str) -> None:
    case = make([3, 5], 7, residual=True)
    run: Callable[..., Any] = lambda x, r: tuple(  # noqa: E731
        t for t in getattr(bigops, op)(x, residual=r) if t is not None
    )
    if op == "norm":
        run = lambda x, r: (bigops.norm(x, residual=r),)  # noqa: E731
    equal(torch.vmap(run)(case.x, case.residual), run(case.x, case.residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compile_it", [False, True], ids=["eager", "compiled"])
def test_autocast_does_what_torch_does(dtype: torch.dtype, compile_it: bool) -> None:
    """torch's norms on a CPU take what comes; a sum of two dtypes has the wider one."""
    run: Any = bigops.norm
    if compile_it:
        torch._dynamo.reset()
        run = torch.compile(bigops.norm, backend="aot_eager", fullgraph=True)
    weight, bias = torch.rand(8), torch.rand(8)
    for x_dtype in (torch.float32, dtype):
        for residual_dtype in (torch.float32, dtype):
            x, r = torch.randn(3, 8).to(x_dtype), torch.randn(3, 8).to(residual_dtype)
            with torch.autocast("cpu", dtype=dtype):
                y, theirs = run(x, weight, bias, r), F.layer_norm(x + r, [8], weight, bias)
            assert y.dtype == theirs.dtype
            wide = torch.promote_types(x_dtype, residual_dtype)
            NormCase(x.to(wide), weight, bias, r.to(wide)).check(y)
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", dtype=dtype):
        assert run(torch.randn(3, 8).to(dtype), weight.to(other)).dtype == dtype


def test_without_kernels_the_reference_says_that_it_ran() -> None:
    case = make([3], 8, residual=True)
    with REFERENCE.serving("norm"):
        case.check(case.call())


def test_results_are_no_views_of_the_arguments() -> None:
    """Nor where nothing was to be done: what comes out may be written in place."""
    case = make([3], 8, residual=True)
    for way in ("cpu", "reference"):
        with REFERENCE.taken("norm") if way == "reference" else torch.no_grad():
            for op in OPS:
                for t in call(op, *case.tensors):
                    own = t.untyped_storage().data_ptr()
                    others = {u.untyped_storage().data_ptr() for u in case.tensors if u is not None}
                    assert own not in others
