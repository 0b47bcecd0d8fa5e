"""rotary along every path that torch has for an op: no gradient by any, compile, export, vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from bigops.ops.rotary import reference, rotary
from tests.support.backends import REFERENCE
from tests.support.cases.rotary import make
from tests.support.kernels_ran import expect, needs_extension

pytestmark = needs_extension
raw = torch.ops.bigops.rotary


class Rotary(nn.Module):
    """Of a merged projection [B, T, H D] to the rows behind."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = rotary(x.unflatten(-1, (3, -1)).transpose(1, 2), cos, sin)
        return y.transpose(1, 2).flatten(2)


def inputs(b: int, t: int, batched: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    lead = b if batched else 1
    return torch.randn(b, t, 48), torch.randn(lead, t, 12), torch.randn(lead, t, 12)


@pytest.mark.parametrize("lead", [(), (1,), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_opcheck(dtype: str, lead: tuple[int, ...]) -> None:
    torch.library.opcheck(raw.default, make((2, 3, 5, 16, 12), dtype, lead=lead).tensors)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    run, given = torch.compile(Rotary(), fullgraph=True, backend=backend), inputs(2, 5)
    with torch.no_grad(), expect(".rotary.f32.half"):
        assert torch.equal(run(*given), Rotary()(*given))


def test_one_dynamic_graph_serves_all_sizes() -> None:
    torch._dynamo.reset()
    run = torch.compile(Rotary(), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for b, t in ((2, 5), (3, 7), (6, 65)):
            given = inputs(b, t)
            assert torch.equal(run(*given), Rotary()(*given))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, batched: bool) -> None:
    given = inputs(2, 5, batched)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=512)
    table = {0: batch, 1: length} if batched else {1: length}
    with torch.no_grad():
        program = torch.export.export(
            Rotary(), given, dynamic_shapes=({0: batch, 1: length}, table, table), strict=strict
        )
        assert "bigops.rotary" in str(program.graph)
        for b, t in ((2, 5), (1, 1), (3, 70)):
            more = inputs(b, t, batched)
            assert torch.equal(program.module()(*more), Rotary()(*more))


def test_meta_and_fake_tensors() -> None:
    for dtype in ("f32", "bf16"):
        case = make((2, 3, 5, 16, 12), dtype, wide=True)
        want = case.run()
        y = rotary(*(t.to("meta") for t in case.tensors))
        assert (y.shape, y.stride(), y.dtype) == (want.shape, want.stride(), want.dtype)
        with FakeTensorMode() as mode:
            y = rotary(*(mode.from_tensor(t) for t in case.tensors))
        assert (y.shape, y.stride(), y.dtype) == (want.shape, want.stride(), want.dtype)
    with pytest.raises(ValueError, match="cos: expected shape"):
        rotary(*(t.to("meta") for t in (case.x, case.cos[:, :4], case.sin)))


@pytest.mark.parametrize(
    "dims", [(0, None, None), (1, 0, 0), (4, None, 1), (None, 0, None)], ids=str
)
@pytest.mark.parametrize("lead", [(), (1,), (2,), (2, 1)], ids=str)
def test_vmap(dims: tuple[int | None, ...], lead: tuple[int, ...]) -> None:
    tensors = make((2, 3, 5, 16, 12), lead=lead).tensors
    given = [
        t if dim is None else torch.stack([t + i for i in range(4)], dim)
        for t, dim in zip(tensors, dims, strict=True)
    ]
    with expect(".rotary.f32.half"):
        found = torch.vmap(rotary, dims)(*given)
    for i in range(4):
        item = (t if dim is None else t.select(dim, i) for t, dim in zip(given, dims, strict=True))
        assert torch.equal(found[i], rotary(*item))


def test_traced_by_fx() -> None:
    graph, case = fx.symbolic_trace(lambda x, cos, sin: rotary(x, cos, sin).relu()), make()
    assert torch.equal(graph(*case.tensors), case.run().relu())


def test_forward_mode() -> None:
    x, cos, sin = (t.double() for t in make().tensors)
    _, got = torch.func.jvp(lambda x: rotary(x, cos, sin), (x,), (x.sin(),))
    torch.testing.assert_close(got, reference(x.sin(), cos, sin))  # it is linear in x


@pytest.mark.parametrize("of", ["x", "cos", "sin"])
def test_a_gradient_is_refused_by_name(of: str) -> None:
    case = make()
    getattr(case, of).requires_grad_()
    with pytest.raises(RuntimeError, match="rotary: inference only, and a gradient was asked"):
        case.run()
    with pytest.raises(RuntimeError, match="rotary: inference only"):
        raw(*case.tensors).sum().backward()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            case.check(case.run())
    with pytest.raises(RuntimeError, match="rotary: inference only"):
        torch.func.grad(lambda x: rotary(x, case.cos, case.sin).sum())(case.x.detach())


def test_autocast_changes_nothing() -> None:
    for dtype in ("f32", "bf16"):
        case = make(dtype=dtype)
        want = case.run()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(case.run(), want)


def test_results_are_no_views_of_the_arguments() -> None:
    """Nor where nothing turns: what comes out may be written in place."""
    case = make((2, 3, 5, 16, 0))
    for way in (None, REFERENCE):
        with REFERENCE.taken("rotary") if way else torch.no_grad():
            own = case.run().untyped_storage().data_ptr()
        assert own != case.x.untyped_storage().data_ptr()
