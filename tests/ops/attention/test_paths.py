"""attention along every path that torch has for an op, and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

import bigops
from bigops.ops.attention import attention, reference
from tests.support.cases.attention import Case, make
from tests.support.kernels_ran import expect, needs_extension

pytestmark = needs_extension
raw = torch.ops.bigops.attention
SIZES = (2, 2, 2, 9, 9, 16, 24)


class Attend(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        y = attention(q, k, v, mask, causal=self.causal)
        return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def inputs(case: Case) -> tuple[Any, ...]:
    return case.q, case.k, case.v, case.mask


@pytest.mark.parametrize("mask", ["none", "padding", "bias", "infinite"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_opcheck(mask: str, dtype: str) -> None:
    case = make(SIZES, dtype, mask)
    for causal in (False, True):
        torch.library.opcheck(raw.default, (*inputs(case), causal, None))
    torch.library.opcheck(raw.default, (*inputs(case), False, 0.3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(Attend(), fullgraph=True, backend=backend)
    with torch.no_grad(), expect(".attention.f32.rows"):
        for mask in ("none", "padding"):
            case = make(SIZES, mask=mask)
            assert torch.equal(run(*inputs(case)), Attend()(*inputs(case)))


def test_compiled_for_sizes_of_the_run() -> None:
    torch._dynamo.reset()
    run = torch.compile(Attend(), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for b, t, s in ((3, 9, 11), (5, 7, 10), (6, 33, 70)):  # none is as large as another
            case = make((b, 2, 2, t, s, 16, 16), mask="padding")
            assert torch.equal(run(*inputs(case)), Attend()(*inputs(case)))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "rows"])
def test_exported(mask: str, strict: bool) -> None:
    case, module = make(SIZES, mask=mask), Attend(causal=True)
    with torch.no_grad():
        program = torch.export.export(module, inputs(case), strict=strict)
        assert torch.equal(program.module()(*inputs(case)), module(*inputs(case)))
        batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=512)
        qkv = {0: batch, 2: length}
        of_mask = {"none": None, "padding": {0: batch, 3: length}}.get(
            mask, {0: batch, 2: length, 3: length}
        )
        program = torch.export.export(
            module, inputs(case), dynamic_shapes=(qkv, qkv, qkv, of_mask), strict=strict
        )
        assert "bigops.attention" in str(program.graph)
        for b, t in ((1, 1), (3, 70)):
            other = make((b, 2, 2, t, t, 16, 24), mask=mask)
            assert torch.equal(program.module()(*inputs(other)), module(*inputs(other)))


def test_meta_and_fake_tensors() -> None:
    case = make(SIZES, mask="padding")
    want = case.run()
    y = attention(*(t.to("meta") for t in inputs(case)))
    assert (y.shape, y.stride(), y.device.type) == (want.shape, want.stride(), "meta")
    with FakeTensorMode() as mode:
        y = attention(*(mode.from_tensor(t) for t in inputs(case)))
    assert (y.shape, y.stride(), y.dtype) == (want.shape, want.stride(), want.dtype)


@pytest.mark.parametrize("mask", ["none", "padding", "2-D", "by head"])
def test_vmap(mask: str) -> None:
    cases = [make(SIZES, mask=mask) for _ in range(3)]
    want = torch.stack([case.run() for case in cases])
    q, k, v = (torch.stack([getattr(c, n) for c in cases], 1) for n in "qkv")
    masks = None if mask == "none" else torch.stack([c.mask for c in cases])  # type: ignore[misc]
    dims = (1, 1, 1, None if masks is None else 0)
    with expect(".attention.f32.rows"):
        torch.testing.assert_close(torch.vmap(attention, dims)(q, k, v, masks), want)
    # one mask, and then one k and v, for all
    first = cases[0]
    want = torch.stack([Case(c.q, c.k, c.v, first.mask).run() for c in cases])
    got = torch.vmap(attention, (1, 1, 1, None))(q, k, v, first.mask)
    torch.testing.assert_close(got, want)
    want = torch.stack([Case(c.q, first.k, first.v, first.mask).run() for c in cases])
    got = torch.vmap(attention, (1, None, None, None))(q, first.k, first.v, first.mask)
    torch.testing.assert_close(got, want)


def test_forward_mode() -> None:
    case = make(SIZES, mask="rows")
    q, k, v = (t.double() for t in (case.q, case.k, case.v))

    def f(q: Tensor) -> Tensor:
        return attention(q, k, v, case.mask)

    def plain(q: Tensor) -> Tensor:
        return reference(q, k, v, case.mask)

    tangent = torch.randn_like(q)
    _, got = torch.func.jvp(f, (q,), (tangent,))
    step = 1e-6
    want = (plain(q + step * tangent) - plain(q - step * tangent)) / (2 * step)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_traced_by_fx() -> None:
    class Model(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, causal=True).relu()

    graph, case = fx.symbolic_trace(Model()), make(SIZES)
    y = graph(case.q, case.k, case.v)
    assert torch.equal(y, attention(case.q, case.k, case.v, causal=True).relu())


def test_the_reference_is_its_meaning() -> None:
    for mask in ("none", "rows", "infinite", "lowest", "by head"):
        for causal in (False, True):
            case = make(SIZES, mask=mask, causal=causal)
            y = reference(case.q, case.k, case.v, case.mask, causal=causal)
            assert y.transpose(1, 2).is_contiguous()
            case.check(y, mask)


def test_autocast() -> None:
    case = make(SIZES, mask="infinite")
    with torch.autocast("cpu", torch.bfloat16), expect(".attention.bf16.rows"):
        y = case.run()
    assert y.dtype == torch.bfloat16
    q, k, v = (t.bfloat16() for t in (case.q, case.k, case.v))
    assert torch.equal(y, attention(q, k, v, case.mask))


# what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["q", "k", "v", "mask"])
def test_a_gradient_is_refused_by_name(of: str) -> None:
    case = make(SIZES, mask="bias")
    getattr(case, of).requires_grad_()
    with pytest.raises(RuntimeError, match="attention: inference only, and a gradient was asked"):
        case.run()
    y = raw(*inputs(case), False, None)
    with pytest.raises(RuntimeError, match="attention: inference only"):
        y.sum().backward()
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            case.check(case.run())
    with pytest.raises(RuntimeError, match="attention: inference only"):
        torch.func.grad(lambda q: attention(q, case.k, case.v).sum())(case.q.detach())


def refused(kind: type[Exception], match: str, *args: Any, **options: Any) -> None:
    with pytest.raises(kind, match=re.escape(match)):
        attention(*args, **options)


def test_errors_name_argument_expected_and_got() -> None:
    q, k, v, _ = inputs(make(SIZES))  # [2, 4, 9, 16], [2, 2, 9, 16], [2, 2, 9, 24]
    refused(TypeError, "q: expected a torch.Tensor; got list", [1], k, v)
    refused(TypeError, "v: expected a torch.Tensor; got None", q, k, None)
    refused(ValueError, "q: expected 4 dimensions; got shape [4, 9, 16]", q[0], k, v)
    refused(ValueError, "k: expected shape [2, 2, 9, 16]; got [2, 2, 9, 8]", q, k[..., :8], v)
    refused(ValueError, "k: expected shape [2, 2, 9, 16]; got [1, 2, 9, 16]", q, k[:1], v)
    refused(ValueError, "k: expected heads that divide the 3 of q; got 2", q[:, :3], k, v)
    refused(ValueError, "k: expected heads that divide the 4 of q; got 0", q, k[:, :0], v[:, :0])
    refused(ValueError, "v: expected shape [2, 2, 9, 24]; got [2, 1, 9, 24]", q, k, v[:, :1])
    refused(ValueError, "v: expected shape [2, 2, 9, 24]; got [2, 2, 5, 24]", q, k, v[:, :, :5])
    refused(TypeError, "k: expected dtype float32, that of q; got float16", q, k.half(), v)
    ints = [t.int() for t in (q, k, v)]
    refused(TypeError, "q: expected dtype float32, bfloat16, float16, float64; got int32", *ints)
    wrong = torch.ones(9, 8, dtype=torch.bool)
    message = "mask: expected one that broadcasts to [2, 4, 9, 9]; got [9, 8]"
    refused(ValueError, message, q, k, v, wrong)
    long = torch.ones(1, 1, 1, 9, 9, dtype=torch.bool)
    refused(ValueError, "mask: expected one that broadcasts to [2, 4, 9, 9]", q, k, v, long)
    refused(TypeError, "mask: expected dtype bool, float32", q, k, v, torch.ones(9, 9).int())
    refused(ValueError, "v: expected device cpu, that of q; got meta", q, k, v.to("meta"))
    refused(TypeError, "scale: expected a number or None; got str", q, k, v, scale="1")


def test_direct_callers_are_refused_too() -> None:
    q, k, v, _ = inputs(make(SIZES))
    for args, match in (
        ((q[0], k, v, None), "q: expected shape"),
        ((q, k[..., :8], v, None), "k: expected"),
        ((q, k, v[:, :, :5], None), "v: expected"),
        ((q, k.half(), v, None), "k: expected dtype f32; got f16"),
        ((q[:, :3], k, v, None), "k: expected heads that divide"),
        ((q, k, v, torch.ones(8, dtype=torch.bool)), "mask: expected one that broadcasts"),
        ((q, k, v, torch.ones(9).int()), "mask: expected dtype bool or a floating one"),
    ):
        with pytest.raises(RuntimeError, match=match):
            raw(*args, False, None)


def test_compiled_gradients_are_refused() -> None:
    torch._dynamo.reset()
    case = make(SIZES)
    run = torch.compile(lambda q: attention(q, case.k, case.v), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="inference only"):
        run(case.q.requires_grad_())
    assert "attention" in bigops.report()["ops"]
