"""What every format owes: sizes, round trips, an empty one, parts and where they lie."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bigops.formats import Format, LowRankWeight, QuantizedWeight
from bigops.ops.family import op_of
from tests.formats.cases import FLAT, KINDS, SPLIT, WEIGHTS, same, weight_of
from tests.support.cases.compressed import FP8, QUANTISED, Case, make


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
    weight.check()
    weight.check_structure()
    assert weight.shape == (weight.n, weight.k) == (36, 88)
    assert weight.to_dense().shape == (36, 88)
    stored = [t for t in weight.tensors().values() if t is not None]
    assert weight.nbytes == sum(t.numel() * t.element_size() for t in stored)
    assert 0 < weight.density <= 1
    assert not any(isinstance(size, Tensor) for size in pytree.tree_leaves(weight.sizes))
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
    assert all(a is b for a, b in zip(leaves, weight.tensors().values(), strict=True))
    assert pytree.tree_structure(weight_of(name, 36, 96)) != spec
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


@pytest.mark.parametrize("name", WEIGHTS)
def test_copies(name: str) -> None:
    weight = weight_of(name)
    # torch does not pickle float8 by itself
    pickled = [] if name in FP8 else [pickle.loads(pickle.dumps(weight))]
    for again in (copy.deepcopy(weight), *pickled):
        assert same(again, weight)
        for leaf, t in again.tensors().items():
            assert t is None or t is not weight.tensors()[leaf], leaf


# torch 2.13 writes guards by replacing names in a text, and finds "meta" in "meta_t".
@pytest.mark.parametrize("name", [name for name in FLAT if name != "24_both"])
def test_a_weight_is_an_input_of_an_exported_program(name: str) -> None:
    weight = weight_of(name)
    op, x = op_of(type(weight)), torch.randn(3, 88, dtype=weight.x_dtypes[0])

    class Product(torch.nn.Module):
        def forward(self, x: Tensor, weight: Format) -> Tensor:
            return op.run(x, weight.arguments, weight.k)

    program = torch.export.export(Product(), (x, weight), strict=False)
    want = op.run(x, weight.arguments, weight.k)
    assert torch.equal(program.module()(x, weight), want)
    assert torch.equal(program.module()(x, weight.map(Tensor.clone)), want)


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
    case = make(name, 5, 2 * rows, 140, "f32", "gelu")
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
    with pytest.raises(
        ValueError,
        match=f"parts: expected a number into which 36 rows of a "
        f"{type(weight).__name__} split; got {parts}",
    ):
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
