"""sparse_linear on the CPU: what it refuses, and that broken storage is never read through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.formats.bitmap import BitmapWeight
from bigops.formats.patterns import block_mask, n_m_mask
from bigops.formats.sparse import SparseWeight
from bigops.ops.family import Call
from bigops.ops.sparse_linear import op, sparse_linear
from bigops.ops.sparse_linear.sparse24_pack import pack24
from tests.support.kernels_ran import ISAS, isa, needs_extension

raw = torch.ops.bigops.sparse_linear
raw_backward = torch.ops.bigops.sparse_linear_backward
pytestmark = needs_extension


def small(dtype: torch.dtype = torch.int8) -> SparseWeight:
    """[5, 4], dense: with int8 values one word a row, so one step of one slice of 16 rows."""
    w = torch.randn(5, 4)
    return SparseWeight.from_mask(w, block_mask(w, 0), dtype)


# public function ---------------------------------------------------------------------------


def refusals() -> list[tuple[str, type[Exception], str, dict[str, Any]]]:
    good, bf16 = small(), small(torch.bfloat16)
    return [
        (
            "activation",
            ValueError,
            "activation: expected one of none, .*; got 'geglu'",
            {"activation": "geglu"},
        ),
        (
            "x dtype",
            TypeError,
            "x: expected dtype float32, bfloat16, float16; got int64",
            {"x": torch.ones(3, 4).long()},
        ),
        (
            "x beside bf16 values",
            TypeError,
            "x: expected dtype bfloat16; got float32",
            {"weight": bf16},
        ),
        (
            "x columns",
            ValueError,
            r"x: expected shape \[.., 4\] .*; got \[3, 7\]",
            {"x": torch.randn(3, 7)},
        ),
        ("x scalar", ValueError, r"x: expected shape .*; got \[\]", {"x": torch.tensor(1.0)}),
        (
            "values dtype",
            TypeError,
            "values: expected dtype float32, bfloat16, int8; got float16",
            {"weight": good.replace(values=good.values.half())},
        ),
        (
            "values shape",
            ValueError,
            r"values: expected shape \[steps, 16, 4\]; got \[1, 16, 3\]",
            {"weight": good.replace(values=good.values[..., :3])},
        ),
        (
            "scale beside floats",
            TypeError,
            "scale: expected a tensor with int8 values and None",
            {"weight": small(torch.float32).replace(scale=torch.ones(5))},
        ),
        (
            "no sums",
            TypeError,
            "sums: expected a tensor with int8 .*; got None with int8",
            {"weight": good.replace(sums=None)},
        ),
        (
            "index",
            ValueError,
            r"index: expected shape \[1, 16\], .*; got \[0, 16\]",
            {"weight": good.replace(index=good.index[:0].expand(0, 16))},
        ),
        (
            "rows",
            ValueError,
            r"rows: expected shape \[4, 16\]; got \[3, 16\]",
            {
                "weight": good.replace(
                    rows=good.rows[:3].expand(3, 16),
                    index=torch.zeros(1, 16, dtype=torch.uint8),
                    length=torch.zeros(4, 16, dtype=torch.uint8),
                )
            },
        ),
        (
            "ptr",
            ValueError,
            r"ptr: expected shape \[5\]; got \[4\]",
            {"weight": good.replace(ptr=good.ptr[:4])},
        ),
        (
            "chunk",
            ValueError,
            "chunk: expected 64, 128 or 256; got 32",
            {"weight": good.replace(chunk=32)},
        ),
        (
            "device",
            ValueError,
            "index: expected device cpu, that of x; got meta",
            {"weight": good.replace(index=good.index.to("meta"))},
        ),
        (
            "bias shape",
            ValueError,
            r"bias: expected shape \[5\]; got \[4\]",
            {"bias": torch.randn(4)},
        ),
        (
            "residual dtype",
            TypeError,
            "residual: expected dtype float32, that of x; got float16",
            {"residual": torch.randn(3, 5).half()},
        ),
    ]


@pytest.mark.parametrize("graph", [False, True], ids=["inference", "graph"])
@pytest.mark.parametrize(
    ("kind", "message", "change"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()]
)
def test_errors_name_argument_expected_and_got(
    kind: type[Exception], message: str, change: dict[str, Any], graph: bool
) -> None:
    arguments: dict[str, Any] = {
        "x": torch.randn(3, 4),
        "weight": small(),
        "residual": torch.randn(3, 5).requires_grad_(graph),
    }
    arguments.update(change)
    if "x" in change:
        arguments.pop("residual")
    with pytest.raises(kind, match=message):
        sparse_linear(**arguments)


def test_u8_rows_are_refused_by_name_where_no_weight_takes_them() -> None:
    """2:4 and bitmap weights take no qparams."""
    w, x = torch.randn(20, 64), torch.zeros(3, 64, dtype=torch.uint8)
    for weight in (
        pack24(w, n_m_mask(w), torch.bfloat16),
        pack24(w, n_m_mask(w), torch.int8),
        BitmapWeight.from_mask(w),
    ):
        names = ", ".join(str(d).removeprefix("torch.") for d in weight.x_dtypes)
        for call in (sparse_linear, lambda *args: bigops.explain("sparse_linear", *args)):
            with pytest.raises(TypeError, match=f"x: expected dtype {names}; got uint8"):
                call(x, weight)
        qparams = torch.tensor([1.0, 0.0])
        said = f"x_qparams, y_qparams: expected None with a {type(weight).__name__}"
        with pytest.raises(ValueError, match=said):
            sparse_linear(x, weight, x_qparams=qparams)
        with pytest.raises(ValueError, match=said):
            bigops.explain("sparse_linear", x, weight, y_qparams=qparams)


# raw op ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(1, 16, 3).char()}, r"values: expected shape \[steps, 16, 4\]"),
        ({"values": torch.zeros(1, 16, 4)}, "scale, sums: expected both with int8 values and"),
        ({"values": torch.zeros(1, 16, 4).half()}, "values: expected dtype f32, bf16 or s8; got"),
        ({"index": torch.zeros(2, 16).byte()}, "index: expected shape"),
        ({"index": torch.zeros(1, 16).int()}, "index: expected dtype u8"),
        ({"index": torch.zeros(1, 2).byte()}, "index: expected shape"),
        ({"rows": torch.zeros(4, 3).byte()}, r"rows: expected shape \[4, 16\]"),
        ({"rows": torch.zeros(4, 16)}, "rows: expected dtype u8"),
        ({"length": torch.zeros(3, 16).byte()}, r"length: expected shape \[4, 16\]"),
        ({"length": torch.zeros(4, 16).int()}, "length: expected dtype u8"),
        ({"ptr": torch.zeros(3).int()}, r"ptr: expected shape \[5\]"),
        ({"ptr": torch.zeros(5)}, "ptr: expected dtype s32"),
        ({"ptr": torch.zeros(5).int()}, "the storage is broken"),
        ({"scale": torch.ones(3)}, "scale: expected shape"),
        ({"scale": torch.ones(5).double()}, "scale: expected dtype f32"),
        ({"scale": None}, "scale, sums: expected both with int8 values"),
        ({"sums": torch.ones(5)}, "sums: expected dtype s32"),
        ({"n": -1}, "n: expected at least 0; got -1"),
        ({"n": 65}, r"rows: expected shape \[8, 16\]"),
        ({"chunk": 32}, "chunk: expected 64, 128 or 256; got 32"),
        ({"x": torch.ones(3, 260)}, "rows: expected shape"),
        ({"x": torch.tensor(1.0)}, "x: expected at least 1 dimension"),
        ({"bias": torch.ones(3)}, "bias: expected shape"),
        ({"residual": torch.ones(1, 5)}, "residual: expected x's shape"),
        ({"activation": "swiglu"}, "activation: expected one that is no gated pair"),
    ],
)
def test_raw_op_checks_again(change: dict[str, Any], message: str) -> None:
    weight = small().replace(
        index=torch.zeros(1, 16, dtype=torch.uint8),
        rows=torch.arange(64, dtype=torch.uint8).view(4, 16),
        length=torch.ones(4, 16, dtype=torch.uint8),
        values=torch.ones(1, 16, 4, dtype=torch.int8),
        ptr=torch.tensor([0, 1, 1, 1, 1], dtype=torch.int32),
    )
    values = (torch.randn(3, 4), *weight.arguments, None, None, "none")
    args = dict(zip(op.arguments, values, strict=True))
    raw(*args.values())
    args.update(change)
    with pytest.raises(RuntimeError, match=message):
        raw(*args.values())


def test_raw_op_refuses_bf16_values_beside_another_x() -> None:
    weight = small(torch.bfloat16)
    x, g = torch.randn(3, 4), torch.randn(3, 5)
    with pytest.raises(RuntimeError, match="x: expected dtype bf16, that of the values; got f32"):
        raw(x, *weight.arguments, None, None, "none")
    with pytest.raises(RuntimeError, match="x: expected dtype bf16, that of the values; got f32"):
        raw_backward(g, x, *weight.arguments, None, "none", True, True, False)


def test_raw_backward_checks_again() -> None:
    weight = small()
    x = torch.randn(3, 4)
    for grad, needs, message in (
        (torch.randn(3, 4), (True, False, False), "residual: expected x's shape with 5 columns"),
        (torch.randn(3, 5).half(), (True, False, False), "residual: expected dtype f32"),
        (torch.randn(3, 5), (True, True, False), "values: expected a floating-point dtype .* s8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw_backward(grad, x, *weight.arguments, None, "none", *needs)


# broken contents ---------------------------------------------------------------------------

Change = Callable[[Tensor], None]


def _set(at: Any, value: Any) -> Change:
    def change(t: Tensor) -> None:
        t[at] = value

    return change


# What breaks memory safety -> (tensor, its change, what validate() says). 70 rows are two chunks
# of 64 rows and 1030 columns 5 panels of int8, so 40 slices.
BROKEN: dict[str, tuple[str, Change, str]] = {
    "a pointer past the steps": ("ptr", _set(3, 1_000_000), "ptr: .*falling"),
    "a negative pointer": ("ptr", _set(2, -5), "ptr: .*falling"),
    "a late start": ("ptr", _set(0, 1), "ptr: .* got 1 to"),
    "a negative start": ("ptr", _set(0, -1), "ptr: .* got -1 to"),
    "an early end": ("ptr", lambda t: t[-1].sub_(1), "ptr: "),
    "an end past the steps": ("ptr", lambda t: t[-1].add_(1), "ptr: "),
    "a fall in the second chunk": ("ptr", _set(25, 0), "ptr: .*falling"),
    "an index past the panel": (
        "index",
        _set((3, 0), 64),
        "index: expected words below 64; got 64",
    ),
    "the last index": ("index", _set((-1, -1), 255), "index: expected words below 64; got 255"),
    "a row past the chunk": ("rows", _set((1, 0), 64), "rows: expected each of 0..63 once"),
    "the last row": ("rows", _set((-1, -1), 255), "rows: expected each of 0..63 once"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32], ids=str)
def test_broken_contents_raise_and_nothing_is_read_through_them(
    level: str, what: str, dtype: torch.dtype
) -> None:
    w = torch.randn(70, 1030)
    good = SparseWeight.from_mask(w, block_mask(w, 0.5, (1, 1)), dtype, (1, 1))
    name, change, message = BROKEN[what]
    if name == "ptr" and what == "a fall in the second chunk":
        assert good.ptr.shape[0] > 26
    tensor = getattr(good, name).clone()
    change(tensor)
    weight = good.replace(**{name: tensor})
    with pytest.raises(ValueError, match=message):
        weight.validate()
    with isa(level):
        for m in (1, 3, 70):
            x = torch.randn(m, 1030)
            with pytest.raises(RuntimeError, match="storage is broken"):
                sparse_linear(x, weight)
            for need_values in (False, dtype != torch.int8):
                with pytest.raises(RuntimeError, match="storage is broken"):
                    raw_backward(
                        torch.randn(m, 70),
                        x,
                        *weight.arguments,
                        None,
                        "none",
                        True,
                        need_values,
                        False,
                    )
    with pytest.raises(ValueError, match=message):
        op.serve(Call(torch.randn(2, 1030), weight))


@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("height", [4, 16])
def test_broken_groups_of_rows_raise(level: str, height: int) -> None:
    w = torch.randn(70, 200)
    good = SparseWeight.from_mask(w, block_mask(w, 0.5, (height, 1)), torch.float32, (height, 1))
    assert good.group == height
    rows = good.rows.clone()
    rows[-1, -1] = 64 // height
    with isa(level):
        for m in (1, 40):
            with pytest.raises(RuntimeError, match="storage is broken"):
                sparse_linear(torch.randn(m, 200), good.replace(rows=rows))
    with pytest.raises(ValueError, match=f"rows: expected each of 0..{64 // height - 1} once"):
        good.replace(rows=rows).validate()


@pytest.mark.parametrize("level", ISAS)
def test_wrong_sums_and_wrong_lengths_stay_inside_memory(level: str) -> None:
    """No check reads them on a call: a wrong number comes out, and no other row's memory."""
    weight = small().replace(sums=torch.full((5,), 2**31 - 1, dtype=torch.int32))
    floats = small(torch.float32)
    floats = floats.replace(length=torch.full_like(floats.length, 255))
    with isa(level):
        for m in (1, 40):
            assert sparse_linear(torch.randn(m, 4), weight).shape == (m, 5)
            values = floats.values.clone().requires_grad_()
            sparse_linear(torch.randn(m, 4), floats.replace(values=values)).sum().backward()
            assert values.grad is not None
