"""What every format owes: round trips, parts, codes that somebody else chose, refusals by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.formats import (
    BitmapWeight,
    Format,
    Fp8Weight,
    LowRankWeight,
    PackedWeight,
    QuantizedWeight,
    Sparse24Weight,
    SparseWeight,
)
from bigops.formats.patterns import n_m_mask
from bigops.formats.quantize import static_grid
from bigops.ops.family import op_of
from bigops.ops.sparse_linear.sparse24_pack import pack24, prune24
from tests.compressed_cases import FP8, QUANTISED, Case
from tests.compressed_cases import make as make_case

Make = Callable[[Tensor], Format]
KINDS = (
    QuantizedWeight,
    Fp8Weight,
    PackedWeight,
    SparseWeight,
    Sparse24Weight,
    BitmapWeight,
    LowRankWeight,
)


def _quantised(options: dict[str, Any]) -> Make:
    given = dict(options)
    if given.get("activations") == "static":
        given["x_grid"] = static_grid(-2.0, 3.0)
    return lambda w: QuantizedWeight.from_dense(w, **given)


def _fp8(options: dict[str, Any]) -> Make:
    return lambda w: Fp8Weight.from_dense(w, **options)


def _kept(w: Tensor) -> Tensor:
    return torch.arange(w.numel()).view(w.shape) % 3 == 0


def _factors(w: Tensor, form: type[Format], **options: Any) -> LowRankWeight:
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    return LowRankWeight.from_factors(u[:, :16] * s[:16], v[:16], form, **options)


# name -> a weight of a matrix whose sizes divide by 4
WEIGHTS: dict[str, Make] = {
    **{form: _quantised(options) for form, options in QUANTISED.items()},
    **{form: _fp8(options) for form, options in FP8.items()},
    "packed": PackedWeight.from_dense,
    "packed_bf16": lambda w: PackedWeight.from_dense(w.bfloat16()),
    "sparse": lambda w: SparseWeight.from_mask(w, _kept(w), torch.int8, (1, 1)),
    "sparse_f32": lambda w: SparseWeight.from_mask(w, _kept(w), torch.float32, (1, 1)),
    "sparse_rows": lambda w: SparseWeight.from_mask(w, _kept(w[::16]), torch.bfloat16, (16, 1)),
    "24": lambda w: pack24(w, n_m_mask(w), torch.bfloat16),
    "24_int8": lambda w: pack24(w, n_m_mask(w), torch.int8),
    "24_both": lambda w: prune24(w, torch.float16, transposable=True),
    "bitmap": lambda w: BitmapWeight.from_mask(w, _kept(w)),
    "bitmap_bf16": lambda w: BitmapWeight.from_mask(w, _kept(w), torch.bfloat16),
    "low_rank": lambda w: _factors(w, PackedWeight),
    "low_rank_int8": lambda w: _factors(w, QuantizedWeight),
}
SPLIT = (*QUANTISED, *FP8, "packed", "packed_bf16")  # whose rows are parts by themselves
FLAT = [name for name in WEIGHTS if not name.startswith("low_rank")]  # with a schema


def weight_of(name: str, n: int = 36, k: int = 88) -> Format:
    torch.manual_seed(0)
    return WEIGHTS[name](torch.randn(n, k))


def bits(t: Tensor | None) -> Any:
    """What compares equal where all bits are, dtype and shape included."""
    if t is None:
        return None
    flat = t.detach().flatten()
    return t.dtype, list(t.shape), flat.view(torch.uint8).tolist() if t.numel() else []


def same(a: Any, b: Any) -> bool:
    """Whether two weights are equal, tensors to the bit and the rest by ==."""
    if type(a) is not type(b):
        return False
    for field in dataclasses.fields(a):
        one, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, Format):
            equal = same(one, other)
        else:
            equal = bits(one) == bits(other) if isinstance(one, Tensor) else one == other
        if not equal:
            return False
    return True


def test_a_bit_that_differs_is_seen() -> None:
    weight = weight_of("int8_zero")
    assert same(weight, weight.map(Tensor.clone))
    assert not same(weight, weight_of("int8"))
    for name, t in weight.tensors().items():
        if t is not None:
            other = t.clone()
            other.view(torch.uint8).view(-1)[-1] ^= 1
            assert not same(weight, weight.replace(**{name: other})), name
    assert not same(weight, weight.replace(k=weight.k + 1))  # type: ignore[attr-defined]


# what a weight says of itself ----------------------------------------------------------------


def test_every_format_has_a_weight_here() -> None:
    assert {type(weight_of(name)) for name in WEIGHTS} == set(KINDS)


@pytest.mark.parametrize("name", WEIGHTS)
def test_sizes(name: str) -> None:
    weight = weight_of(name)
    weight.validate()
    assert weight.shape == (weight.n, weight.k) == (36, 88)
    assert weight.to_dense().shape == (36, 88)
    stored = [t for t in weight.tensors().values() if t is not None]
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in stored)
    assert 0 < weight.density <= 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        weight.values = None  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FLAT)
def test_arguments_make_it_again(name: str) -> None:
    weight = weight_of(name)
    again = type(weight).of(weight.k, *weight.arguments)
    assert type(again) is type(weight)
    assert vars(again) == vars(weight) or same(again, weight)
    for leaf, t in weight.tensors().items():
        assert getattr(again, leaf) is t, leaf


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not LowRankWeight])
def test_the_schema_has_the_names_and_the_order_of_of(kind: type[Format]) -> None:
    _, *parameters = inspect.signature(kind.of).parameters
    op = op_of(kind)
    assert list(op.fields) == parameters
    registered = [a.name for a in op.forward._schema.arguments]
    assert registered == ["x", *parameters, "bias", "residual", "activation"]
    assert list(kind.TENSORS) == [name for name in parameters if name in kind.TENSORS]
    optional = {a.name for a in op.forward._schema.arguments if "Optional" in str(a.type)}
    for name in kind.TENSORS:
        hint = str(kind.__dataclass_fields__[name].type)  # type: ignore[attr-defined]
        assert ("None" in hint) == (name in optional), name


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_pytree_there_and_back(name: str) -> None:
    weight = weight_of(name)
    leaves, spec = pytree.tree_flatten(weight)
    assert same(pytree.tree_unflatten(leaves, spec), weight)
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    wanted = [t for t in weight.tensors().values() if t is not None]
    assert all(a is b for a, b in zip(tensors, wanted, strict=True))
    moved = pytree.tree_map_only(Tensor, Tensor.clone, weight)
    assert same(moved, weight)
    assert all(t is None or t is not weight.tensors()[leaf] for leaf, t in moved.tensors().items())
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    keyed, _ = pytree.tree_flatten_with_path(weight)
    assert [leaf for _, leaf in keyed] == leaves
    assert len({pytree.keystr(path) for path, _ in keyed}) == len(leaves)


@pytest.mark.parametrize("name", WEIGHTS)
def test_map_and_replace_leave_the_original_as_it_was(name: str) -> None:
    weight = weight_of(name)
    before = weight.map(Tensor.clone)
    on_meta = weight.map(lambda t: t.to("meta"))
    assert {t.device.type for t in on_meta.tensors().values() if t is not None} == {"meta"}
    assert on_meta.shape == weight.shape
    assert same(weight, before)


EMPTY: dict[str, dict[str, Any]] = {
    **QUANTISED,
    **{form: {k: v for k, v in o.items() if k != "x_scale"} for form, o in FP8.items()},
    "packed": {},
    "packed_bf16": {"dtype": torch.bfloat16},
    "sparse": {"dtype": torch.int8},
    "sparse_f32": {"dtype": torch.float32},
    "sparse_rows": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_has_the_dtypes_and_shapes_of_a_real_one(name: str) -> None:
    weight, options = weight_of(name), EMPTY[name]
    if isinstance(weight, QuantizedWeight):
        options = {**options, "activations": weight.activations}
    empty = type(weight).empty(36, 88, **options)
    assert empty.shape == weight.shape
    own = [f.name for f in dataclasses.fields(weight) if f.name not in weight.TENSORS]  # type: ignore[arg-type]
    assert {f: getattr(empty, f) for f in own} == {f: getattr(weight, f) for f in own}
    for leaf, t in weight.tensors().items():
        other = getattr(empty, leaf)
        assert (other is None) == (t is None), leaf
        if t is None:
            continue
        assert other.device.type == "meta", leaf
        assert other.dtype == t.dtype, leaf
        kept = name.startswith("sparse") and leaf in ("values", "index")  # as many as are kept
        # rows that share their pattern share an index
        shared = getattr(weight, "group", 1) != 1 and leaf in ("index", "rows", "length")
        if not shared:
            assert other.shape[kept:] == t.shape[kept:], leaf
    if not name.startswith("sparse"):
        empty.check()


# parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("name", SPLIT)
def test_shards_merge_to_the_same_bits(name: str, parts: int) -> None:
    rows = 128 if "block" in name or "packed" in name else 16
    weight = weight_of(name, parts * rows, 140)
    assert weight.splits(parts)
    shards = [weight.shard(rank, parts) for rank in range(parts)]
    dense = weight.to_dense(torch.float64)
    for rank, shard in enumerate(shards):
        assert shard.shape == (rows, 140)
        shard.validate()
        assert torch.equal(shard.to_dense(torch.float64), dense[rank * rows : (rank + 1) * rows])
    assert same(type(weight).merge(shards), weight)


@pytest.mark.parametrize("name", [*QUANTISED, *FP8, "packed"])
def test_each_shard_computes_its_rows(name: str) -> None:
    rows = 128 if "block" in name or "packed" in name else 16
    case = make_case(name, 5, 2 * rows, 140, "f32", "gelu")
    assert case.bias is not None
    assert case.residual is not None
    for rank in (0, 1):
        own = slice(rank * rows, (rank + 1) * rows)
        part: Case = replace(
            case,
            weight=case.weight.shard(rank, 2),
            dense=case.dense[own],
            bias=case.bias[own],
            residual=case.residual[:, own],
            grad=case.grad[:, own],
        )
        part.check_forward(part.public(*part.inputs), f"of rank {rank}")
        leaves = part.leaves()
        part.check_gradients(eager(part, leaves))


def eager(case: Case, leaves: list[Tensor | None]) -> tuple[Tensor, ...]:
    y = case.public(*leaves)  # type: ignore[arg-type]
    return torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad)


@pytest.mark.parametrize("name", SPLIT)
def test_a_weight_of_no_rows_splits(name: str) -> None:
    weight = weight_of(name, 0, 88)
    shards = [weight.shard(rank, 2) for rank in (0, 1)]
    for shard in shards:
        assert shard.shape == (0, 88)
        shard.validate()
    assert same(type(weight).merge(shards), weight)


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_that_do_not_split_are_refused(name: str) -> None:
    weight = weight_of(name)  # 36 rows are no whole tiles, but three parts of single rows
    parts = 5 if name in FP8 else 2
    assert not weight.splits(parts)
    with pytest.raises(ValueError, match=f"parts: expected a number into which 36 rows of a "
                       f"{type(weight).__name__} split; got {parts}"):  # fmt: skip
        weight.shard(0, parts)
    assert same(type(weight).merge([weight]), weight)
    if name not in SPLIT:
        with pytest.raises(ValueError, match="parts: expected one, since a .* does not split"):
            type(weight).merge([weight, weight])


@pytest.mark.parametrize("name", ["int8", "fp8", "packed"])
def test_a_part_that_is_not_there_is_refused(name: str) -> None:
    weight = weight_of(name, 128, 88)
    for rank, parts in ((-1, 2), (2, 2), (0, 0), (0, -1)):
        with pytest.raises(ValueError, match="rank, parts: expected 0 <= rank < parts; got "):
            weight.shard(rank, parts)


@pytest.mark.parametrize("name", WEIGHTS)
def test_placements_follow_the_rows(name: str) -> None:
    from torch.distributed.tensor import Replicate, Shard

    weight = weight_of(name)
    whole = weight.placements(False)
    assert whole == {n: None if t is None else Replicate() for n, t in weight.tensors().items()}
    split = weight.placements(True)
    for leaf, t in weight.tensors().items():
        if t is None:
            assert split[leaf] is None
        elif leaf in weight.row_dims():
            assert split[leaf] == Shard(weight.row_dims()[leaf])
        else:
            assert split[leaf] == Replicate()


# codes that somebody else chose --------------------------------------------------------------


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
    """Numbers at both ends of the grid included, which no rounding of ours makes all of."""
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
        x_grid=static_grid(-1.0, 2.0) if activations == "static" else None,
    )
    weight.validate()
    grid = weight.grid()
    assert torch.equal(grid.q.long(), q)
    assert torch.equal(grid.scale, scale)
    whole = q.double()
    if point is None:
        assert grid.zero_point is None
    else:
        assert grid.zero_point is not None
        assert torch.equal(grid.zero_point.long(), point)
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
        q, scale, zero = weight.grid()
        again: Format = QuantizedWeight.from_codes(
            q, scale, zero, bits=weight.bits, group=weight.group or None,
            activations=weight.activations,
        )  # fmt: skip
    elif isinstance(weight, Fp8Weight):
        codes = weight.values.view(torch.uint8)[:, : weight.k].view(torch.float8_e4m3fn)
        again = Fp8Weight.from_codes(codes, weight.scale, weight.scales, weight.activations)
    else:
        assert isinstance(weight, SparseWeight)
        assert weight.scale is not None
        q = (weight.to_dense() / weight.scale[:, None]).round().to(torch.int8)
        again = SparseWeight.from_codes(q, weight.scale, _kept(q))
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
        (lambda: QuantizedWeight.from_codes(Q, S, activations="static"), ValueError, "x_grid: "),
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
            lambda: Fp8Weight.from_codes(
                torch.full((5, 40), torch.nan).to(torch.float8_e4m3fn), S
            ),
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
)  # fmt: skip
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
    ("int8_static", "x_grid", _set(0, torch.nan)),
    ("int8_static", "x_grid", _set(1, 256.0)),
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
