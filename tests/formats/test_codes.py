"""Codes that somebody else chose are stored as they are, and no damage of a weight passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.formats import (
    Format,
    Fp8Weight,
    LowRankWeight,
    PackedWeight,
    QuantizedWeight,
    SparseWeight,
)
from bigops.formats.quantize import static_qparams
from bigops.ops.family import op_of
from tests.formats.cases import FLAT, WEIGHTS, kept, same, weight_of

QUANTIZED_CODES = [
    (bits, group, zero, activations)
    for bits in (8, 4)
    for group in (None, 32, 64, 128)
    for zero in (False, True)
    for activations in ("none", "dynamic", "static")
    if not (bits == 8 and group and activations != "none")
]


@pytest.mark.parametrize(("number", "group", "zero", "activations"), QUANTIZED_CODES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32], ids=str)
def test_quantized_codes_are_stored_as_they_are(
    number: int, group: int | None, zero: bool, activations: str, dtype: torch.dtype
) -> None:
    """Numbers at both ends of the range included, which no rounding of ours makes all of."""
    low, high = -(1 << number - 1), (1 << number - 1) - 1
    n, k = 21, 150
    groups = 1 if group is None else -(-k // group)
    q = torch.randint(low, high + 1, (n, k))
    q[:, 0], q[:, 1] = low, high
    scale = torch.rand(n, groups) + 1e-3
    point = torch.randint(low, high + 1, (n, groups)) if zero else None
    weight = QuantizedWeight.from_codes(
        q.to(dtype),
        scale,
        None if point is None else point.to(dtype),
        bits=number,
        group=group,
        activations=activations,
        x_qparams=static_qparams(-1.0, 2.0) if activations == "static" else None,
    )
    weight.validate()
    rounded = weight.codes()
    assert torch.equal(rounded.q.long(), q)
    assert torch.equal(rounded.scale, scale)
    whole = q.double()
    if point is None:
        assert rounded.zero_point is None
    else:
        assert rounded.zero_point is not None
        assert torch.equal(rounded.zero_point.long(), point)
        whole = whole - point.double().repeat_interleave(group or k, 1)[:, :k]
    dense = whole * scale.double().repeat_interleave(group or k, 1)[:, :k]
    assert torch.equal(weight.to_dense(torch.float64), dense)
    assert torch.equal(weight.to_dense(), dense.float())
    if activations != "none" and number == 8:
        assert weight.row_sum is not None
        assert weight.row_sum[:n].tolist() == q.sum(1).tolist()


@pytest.mark.parametrize("scales", ["row", "tensor", "block"])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_fp8_codes_are_stored_as_they_are(scales: str, activations: str) -> None:
    n, k = 140, 150
    byte = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    byte[byte & 127 == 127] = 0  # NaN
    codes = byte.view(torch.float8_e4m3fn)
    shape = {"row": (n, 1), "tensor": (1, 1), "block": (2, 2)}[scales]
    scale = torch.rand(shape) + 1e-3
    weight = Fp8Weight.from_codes(codes, scale, scales, activations)
    weight.validate()
    assert torch.equal(weight.values.view(torch.uint8)[:, :k], byte)
    assert torch.equal(weight.scale, scale)
    wide = scale.double()
    if scales == "block":
        wide = wide.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    dense = codes.float().double() * wide
    assert torch.equal(weight.to_dense(torch.float64), dense)
    assert torch.equal(weight.to_dense(), dense.float())


@pytest.mark.parametrize("chunk", [None, 64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_sparse_codes_are_stored_as_they_are(masked: bool, chunk: int | None) -> None:
    """-128 included; a mask may keep zeros and drop numbers."""
    n, k = 70, 150
    q = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    q[:, 3] = -128
    q[torch.rand(n, k) < 0.5] = 0
    scale = torch.rand(n) + 1e-3
    mask = torch.rand(n, k) < 0.5 if masked else None
    weight = SparseWeight.from_codes(q, scale, mask, chunk)
    weight.validate()
    kept = q if mask is None else torch.where(mask, q, 0)
    assert torch.equal(weight.to_dense(torch.float64), (kept.float() * scale[:, None]).double())
    assert weight.scale is not None
    assert torch.equal(weight.scale, scale)
    assert weight.sums is not None
    assert weight.sums.tolist() == kept.long().sum(1).tolist()
    assert bool(weight.pattern()[q != 0 if mask is None else mask].all())


@pytest.mark.parametrize("name", ["int8", "w4", "fp8", "fp8_block", "sparse"])
def test_codes_of_a_weight_make_it_again(name: str) -> None:
    weight = weight_of(name)
    if isinstance(weight, QuantizedWeight):
        q, scale, zero = weight.codes()
        again: Format = QuantizedWeight.from_codes(
            q,
            scale,
            zero,
            bits=weight.bits,
            group=weight.group or None,
            activations=weight.activations,
        )
    elif isinstance(weight, Fp8Weight):
        codes = weight.values.view(torch.uint8)[:, : weight.k].view(torch.float8_e4m3fn)
        again = Fp8Weight.from_codes(codes, weight.scale, weight.scales, weight.activations)
    else:
        assert isinstance(weight, SparseWeight)
        assert weight.scale is not None
        q = (weight.to_dense() / weight.scale[:, None]).round().to(torch.int8)
        again = SparseWeight.from_codes(q, weight.scale, kept(q))
    assert same(again, weight)


@pytest.mark.parametrize("name", ["int8", "fp8", "sparse"])
def test_a_write_into_the_given_tensors_later_changes_no_weight(name: str) -> None:
    n, k = 16, 64
    q, scale = torch.randint(-100, 100, (n, k), dtype=torch.int8), torch.rand(n, 1) + 1
    if name == "fp8":
        q = q.float().to(torch.float8_e4m3fn)
        weight: Format = Fp8Weight.from_codes(q, scale)
    elif name == "int8":
        weight = QuantizedWeight.from_codes(q, scale)
    else:
        scale = scale[:, 0]
        weight = SparseWeight.from_codes(q, scale)
    before = weight.to_dense()
    q.zero_()
    scale.mul_(2)
    assert torch.equal(weight.to_dense(), before)
    weight.validate()


Q, S = torch.zeros(5, 40, dtype=torch.int8), torch.ones(5, 1)
CODES = torch.zeros(5, 40).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: QuantizedWeight.from_codes(Q[0], S), ValueError, "q: expected 2 dimensions"),
        (lambda: QuantizedWeight.from_codes(Q.int() + 128, S), ValueError, "q: .* -128..127"),
        (lambda: QuantizedWeight.from_codes(Q - 9, S, bits=4), ValueError, "q: .* in -8..7"),
        (lambda: QuantizedWeight.from_codes(Q.float() + 0.5, S), ValueError, "q: .*whole"),
        (lambda: QuantizedWeight.from_codes(Q.float() + torch.nan, S), ValueError, "q: "),
        (lambda: QuantizedWeight.from_codes(Q, S[:4]), ValueError, r"scale: .* \[5, 1\]; got"),
        (lambda: QuantizedWeight.from_codes(Q, S, group=32), ValueError, r"scale: .* \[5, 2\]"),
        (lambda: QuantizedWeight.from_codes(Q, S * 0), ValueError, "scale: expected finite"),
        (lambda: QuantizedWeight.from_codes(Q, S * torch.inf), ValueError, "scale: expected fini"),
        (lambda: QuantizedWeight.from_codes(Q, S.double()), TypeError, "scale: expected dtype fl"),
        (lambda: QuantizedWeight.from_codes(Q, S, S[:4]), ValueError, r"zero_point: .* \[5, 1\]"),
        (lambda: QuantizedWeight.from_codes(Q, S, S * 200), ValueError, "zero_point: .*-128..127"),
        (lambda: QuantizedWeight.from_codes(Q, S, S / 2), ValueError, "zero_point: .*whole"),
        (lambda: QuantizedWeight.from_codes(Q, S, S * 8, bits=4), ValueError, "zero_point: .*-8.."),
        (lambda: QuantizedWeight.from_codes(Q, S, bits=3), ValueError, "bits: expected 8 or 4"),
        (lambda: QuantizedWeight.from_codes(Q, S, group=16), ValueError, "group: expected None"),
        (lambda: QuantizedWeight.from_codes(Q, S, activations="u8"), ValueError, "activations: "),
        (lambda: QuantizedWeight.from_codes(Q, S, activations="static"), ValueError, "x_qparams: "),
        (lambda: QuantizedWeight.from_codes([[1]], S), TypeError, "q: expected a torch.Tensor"),
        (lambda: QuantizedWeight.from_codes(Q, [1.0]), TypeError, "scale: expected a torch.Tens"),
        (lambda: Fp8Weight.from_codes(CODES[0], S), ValueError, "codes: expected 2 dimensions"),
        (lambda: Fp8Weight.from_codes(Q, S), TypeError, "codes: expected dtype float8_e4m3fn"),
        (lambda: Fp8Weight.from_codes([[1]], S), TypeError, "codes: expected a torch.Tensor"),
        (lambda: Fp8Weight.from_codes(CODES, [1.0]), TypeError, "scale: expected a torch.Tensor"),
        (lambda: Fp8Weight.from_codes(CODES, S[:4]), ValueError, r"scale: expected shape \[5, 1\]"),
        (lambda: Fp8Weight.from_codes(CODES, S, "tensor"), ValueError, r"scale: .*\[1, 1\]"),
        (lambda: Fp8Weight.from_codes(CODES, S.double()), TypeError, "scale: expected dtype"),
        (lambda: Fp8Weight.from_codes(CODES, -S), ValueError, "scale: expected finite values"),
        (lambda: Fp8Weight.from_codes(CODES, S, "lane"), ValueError, "scales: expected one of"),
        (lambda: Fp8Weight.from_codes(CODES, S, activations="static"), ValueError, "x_scale: "),
        (
            lambda: Fp8Weight.from_codes(torch.full((5, 40), torch.nan).to(torch.float8_e4m3fn), S),
            ValueError,
            "values: expected numbers; got NaN|codes: expected numbers; got NaN",
        ),
        (lambda: SparseWeight.from_codes(Q.int(), S[:, 0]), TypeError, "q: expected dtype int8"),
        (lambda: SparseWeight.from_codes(Q[0], S[:, 0]), ValueError, "q: expected 2 dimensions"),
        (lambda: SparseWeight.from_codes([[1]], S[:, 0]), TypeError, "q: expected a torch.Tensor"),
        (lambda: SparseWeight.from_codes(Q, S), ValueError, r"scale: expected shape \[5\]"),
        (lambda: SparseWeight.from_codes(Q, [1.0]), TypeError, "scale: expected a torch.Tensor"),
        (lambda: SparseWeight.from_codes(Q, S[:, 0] * 0), ValueError, "scale: expected finite"),
        (lambda: SparseWeight.from_codes(Q, S[:, 0], Q), TypeError, "mask: expected dtype bool"),
        (lambda: SparseWeight.from_codes(Q, S[:, 0], Q[:4] > 0), ValueError, r"mask: .*\[5, 40\]"),
        (lambda: SparseWeight.from_codes(Q, S[:, 0], chunk=7), ValueError, "chunk: expected 64"),
    ],
)
def test_refused_codes_name_the_argument(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^({message})"):
        call()


# damage --------------------------------------------------------------------------------------


def damages(t: Tensor) -> dict[str, Any]:
    """What no tensor of a weight may become, whatever it holds."""
    wider = torch.float64 if t.is_floating_point() else torch.int64
    shorter = {
        f"a cut along {d}": t.narrow(d, 0, t.shape[d] - 1) for d in range(t.dim()) if t.shape[d] > 0
    }
    return {
        **shorter,
        "another dtype": t.float().to(wider) if t.dtype == torch.float8_e4m3fn else t.to(wider),
        "one more dimension": t.unsqueeze(0),
        "no tensor": [1.0],
        "None": None,
    }


# What is left is another whole weight: a symmetric one, one that is not transposable; of formats
# whose rows are those of their values alone, one of fewer rows.
WHOLE = {("zero_point", "None"), ("meta_t", "None")}


@pytest.mark.parametrize("name", WEIGHTS)
def test_validate_refuses_damage_to_each_tensor(name: str) -> None:
    weight = weight_of(name)
    rows = "n" in {field.name for field in dataclasses.fields(weight)}  # type: ignore[arg-type]
    for leaf, t in weight.tensors().items():
        if t is None:
            continue
        for what, wrong in damages(t).items():
            if (leaf, what) in WHOLE or ((leaf, what) == ("values", "a cut along 0") and not rows):
                continue
            others = {n: other for n, other in weight.tensors().items() if n != leaf}
            with pytest.raises((ValueError, TypeError)) as caught:
                weight.with_tensors({**others, leaf: wrong}).validate()
            said = str(caught.value)
            named = said.split(":")[0].split(", ")
            assert set(named) <= {*weight.tensors(), "n", "k"}, f"{leaf}, {what}: {said}"


def test_factors_that_do_not_belong_together_are_refused() -> None:
    one, other = weight_of("low_rank"), weight_of("low_rank_int8")
    assert isinstance(one, LowRankWeight)
    assert isinstance(other, LowRankWeight)
    small = PackedWeight.from_dense(torch.randn(8, 88))
    for weight, kind, message in (
        (one.replace(v=other.v), TypeError, "v: expected a PackedWeight, as the other factor is"),
        (
            one.replace(v=small),
            ValueError,
            r"v: expected 16 rows for u of \[36, 16\]; got \[8, 88\]",
        ),
        (one.replace(v=one.v.replace(k=-1)), ValueError, "v_n, k: expected at least 0"),
    ):
        for ask in (weight.check, weight.validate):
            with pytest.raises(kind, match=message):
                ask()


@pytest.mark.parametrize("name", FLAT)
def test_a_call_names_what_is_no_tensor_of_a_weight(name: str) -> None:
    weight = weight_of(name)
    op, dtype = op_of(type(weight)), weight.x_dtypes[0]
    x = torch.randn(3, 88, dtype=dtype)
    for leaf in weight.TENSORS:
        for wrong in ([1.0], *(() if leaf in weight.OPTIONAL else (None,))):
            broken = weight.replace(**{leaf: wrong})
            got = "None" if wrong is None else "list"
            said = f"^{leaf}: expected a torch.Tensor; got {got}"
            for grad in (False, True):
                with pytest.raises(TypeError, match=said):
                    op.run(x.clone().requires_grad_(grad), broken.arguments, 88)
            with pytest.raises(TypeError, match=said):
                op.explain(x, broken)


def _set(at: Any, value: Any) -> Callable[[Tensor], None]:
    def change(t: Tensor) -> None:
        if t.dtype == torch.float8_e4m3fn:
            t.view(torch.uint8)[at] = value
        else:
            t[at] = value

    return change


CONTENTS: list[tuple[str, str, Callable[[Tensor], None]]] = [
    *(
        (form, "scale", _set((0, 3), value))
        for form in ("int8", "w8_group", "w4")
        for value in (0.0, -1.0, torch.nan, torch.inf)
    ),
    ("w4_zero", "zero_point", _set((0, 3), 8)),
    ("w4_zero", "zero_point", _set((0, 3), -9)),
    ("int8", "row_sum", lambda t: t[3].add_(1)),
    ("w4a8", "row_sum", lambda t: t[3].mul_(1.01)),
    ("int8_static", "x_qparams", _set(0, torch.nan)),
    ("int8_static", "x_qparams", _set(1, 256.0)),
    ("fp8", "values", _set((3, 4), 127)),
    ("fp8", "values", _set((3, 90), 1)),  # beyond the last column
    ("fp8", "scale", _set((3, 0), 0.0)),
    ("fp8_static", "x_scale", _set(0, torch.inf)),
    ("sparse", "scale", _set(3, -1.0)),
    ("sparse", "sums", lambda t: t[3].add_(1)),
    ("sparse", "index", _set((0, 0), 255)),
    ("sparse", "rows", _set((0, 0), 255)),
    ("sparse", "length", lambda t: t[0].add_(1)),
    ("sparse", "ptr", _set(1, 1 << 20)),
    ("sparse", "ptr", _set(0, -1)),
    ("sparse_f32", "values", _set((0, 0, 0), torch.nan)),
    ("24", "values", _set((3, 4), torch.inf)),
    ("24", "meta", _set((0, 0, 0), 0)),
    ("24_int8", "scale", _set(3, torch.nan)),
    ("24_int8", "sums", lambda t: t[3].add_(1)),
    ("24_int8", "meta", lambda t: t.bitwise_not_()),
    ("24_both", "meta_t", _set((0, 0, 0), 0)),
    ("24_both", "meta_t", lambda t: t.copy_(t.flip(0))),
    ("bitmap", "ptr", _set(1, 0)),
    ("bitmap", "bits", lambda t: t.bitwise_not_()),
]


@pytest.mark.parametrize(("name", "leaf", "change"), CONTENTS)
def test_validate_refuses_broken_contents(
    name: str, leaf: str, change: Callable[[Tensor], None]
) -> None:
    weight = weight_of(name)
    tensor = weight.tensors()[leaf]
    assert tensor is not None
    broken = tensor.clone()
    change(broken)
    weight.validate()
    with pytest.raises(ValueError, match="expected"):
        weight.replace(**{leaf: broken}).validate()
