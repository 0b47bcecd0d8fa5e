"""quantized_embedding: values on every instruction set and in plain torch, paths, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bigops
from bigops import backend
from bigops.formats.quantized import QuantizedWeight
from tests.support import tolerance
from tests.support.backends import REFERENCE
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension, threads

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
FORMS = {
    "int8": {"bits": 8},
    "int8 zero": {"bits": 8, "symmetric": False},
    "int8 groups": {"bits": 8, "group": 128, "symmetric": False},
    "int8 dynamic": {"bits": 8, "activations": "dynamic"},
    "int4": {"bits": 4},
    "int4 groups": {"bits": 4, "group": 64},
    "int4 zero": {"bits": 4, "group": 32, "symmetric": False},
    "w4a8": {"bits": 4, "group": 32, "activations": "dynamic"},
}
op = torch.ops.bigops.quantized_embedding


def weight_of(form: str, n: int, k: int) -> QuantizedWeight:
    w = torch.randn(n, k) * torch.rand(n, 1).add(0.1)
    return QuantizedWeight.from_dense(w, **{"activations": "none", **FORMS[form]})  # type: ignore[arg-type]


def check(got: Tensor, ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Held to the rule: one number, and no sum."""
    truth = weight.to_dense(torch.float64)[ids.long()]
    plain = F.embedding(ids, weight.to_dense()).to(dtype)
    tolerance.check(got, truth, plain, truth.abs())


def raw(ids: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> list[object]:
    return [
        ids,
        weight.values,
        weight.scale,
        weight.zero_point,
        weight.pad,
        weight.k,
        weight.bits,
        weight.group,
        dtype,
    ]


@needs_extension
@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("form", FORMS)
def test_values_on_every_instruction_set(level: str, form: str) -> None:
    torch.manual_seed(0)
    for dtype, to in DTYPES.items():
        for n, k in ((1, 1), (16, 64), (33, 77), (50, 129), (40, 384)):
            weight, ids = weight_of(form, n, k), torch.randint(0, n, (3, 7))
            at = level if level in ("portable", "avx2") else "avx512"
            width = "w8" if weight.bits == 8 else "w4"
            with isa(level), expect(f"cpu.{at}.quantized_embedding.{dtype}.{width}"):
                got = bigops.quantized_embedding(ids, weight, to)
            check(got, ids, weight, to)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference(form: str, dtype: str) -> None:
    torch.manual_seed(1)
    for n, k in ((5, 9), (33, 130)):
        weight, ids = weight_of(form, n, k), torch.randint(0, n, (2, 4))
        with REFERENCE.serving("quantized_embedding"):
            got = bigops.quantized_embedding(ids, weight, DTYPES[dtype])
        check(got, ids, weight, DTYPES[dtype])
        with REFERENCE.taken("quantized_embedding"), pytest.raises(IndexError, match=f"got {n}$"):
            bigops.quantized_embedding(ids * 0 + n, weight)


@given(
    n=st.integers(1, 70),
    k=st.integers(0, 300),
    lead=st.lists(st.integers(0, 5), max_size=4),
    form=st.sampled_from(sorted(FORMS)),
    narrow=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(n: int, k: int, lead: list[int], form: str, narrow: bool) -> None:
    torch.manual_seed(n * 101 + k)
    weight = weight_of(form, n, k)
    ids = torch.randint(0, n, lead, dtype=torch.int32 if narrow else torch.int64)
    got = bigops.quantized_embedding(ids, weight)
    assert got.shape == (*lead, k)
    check(got, ids, weight, torch.float32)


def test_layouts_of_ids_and_threads() -> None:
    torch.manual_seed(2)
    weight, ids = weight_of("int4 groups", 200, 256), torch.randint(0, 200, (60, 40))
    want = bigops.quantized_embedding(ids, weight)
    for count in (1, 2, 3):
        with threads(count):
            assert torch.equal(bigops.quantized_embedding(ids.t(), weight).transpose(0, 1), want)
    assert torch.equal(bigops.quantized_embedding(ids[:, ::3], weight), want[:, ::3])


def test_a_head_and_its_embedding_read_one_storage() -> None:
    """Row i of the look-up is what the product gives of the i-th unit row, at any activations."""
    torch.manual_seed(3)
    for form in ("int8 dynamic", "w4a8", "int4"):
        weight = weight_of(form, 20, 64)
        rows = bigops.quantized_embedding(torch.arange(20), weight)
        assert torch.equal(rows, weight.to_dense())
        by_product = bigops.quantized_linear(torch.eye(64), weight)
        torch.testing.assert_close(by_product.t(), rows, rtol=0.01, atol=0.01)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stored = weight_of("int8", 30, 48)

    def forward(self, ids: Tensor) -> Tensor:
        return bigops.quantized_embedding(ids, self.stored, torch.bfloat16).float() * 2


def test_paths() -> None:
    torch.manual_seed(4)
    model, ids = Model(), torch.randint(0, 30, (4, 5))
    want = model(ids)
    for dynamic in (False, True):
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        assert torch.equal(run(ids), want)
    assert torch.equal(torch.export.export(model, (ids,), strict=False).module()(ids), want)
    for dim in (0, 1):
        assert torch.equal(torch.vmap(model, dim, dim)(ids), want)
    assert bigops.quantized_embedding(ids, model.stored.map(lambda t: t)).requires_grad is False
    torch.library.opcheck(op.default, tuple(raw(ids, model.stored, torch.float32)))
    many = torch.stack([model.stored.scale, model.stored.scale * 2])
    batched = torch.vmap(
        lambda s: op(*raw(ids, model.stored.replace(scale=s), torch.float32)),  # type: ignore[arg-type]
    )(many)
    assert torch.equal(batched[1], 2 * batched[0])
    empty = torch.vmap(lambda i: bigops.quantized_embedding(i, model.stored))(ids[:0])
    assert empty.shape == (0, 5, 48)


def test_on_meta() -> None:
    weight = weight_of("int8", 30, 48).map(lambda t: t.to("meta"))
    y = bigops.quantized_embedding(torch.zeros(2, 3, dtype=torch.long, device="meta"), weight)
    assert (y.shape, y.device.type) == ((2, 3, 48), "meta")


@pytest.mark.parametrize("bad", [-1, 30, 2**40])
def test_an_id_outside(bad: int) -> None:
    weight = weight_of("int8", 30, 8)
    with pytest.raises(IndexError, match=f"^ids: expected rows of the weight, 0 to 29; got {bad}$"):
        bigops.quantized_embedding(torch.tensor([0, bad, 3]), weight)


def test_errors() -> None:
    weight, ids = weight_of("int8", 30, 8), torch.tensor([1])
    for call, kind, said in (
        (lambda: bigops.quantized_embedding(ids.float(), weight), TypeError, "ids: expected dtype"),
        (lambda: bigops.quantized_embedding([1], weight), TypeError, "ids: expected a torch.T"),  # type: ignore[arg-type]
        (lambda: bigops.quantized_embedding(ids, torch.ones(3, 3)), TypeError, "weight: expected"),  # type: ignore[arg-type]
        (
            lambda: bigops.quantized_embedding(ids, weight, torch.float64),
            TypeError,
            "dtype: expected float32, bfloat16, float16; got torch.float64",
        ),
        (
            lambda: bigops.quantized_embedding(ids.to("meta"), weight),
            ValueError,
            "ids: expected device cpu, that of the weight; got meta",
        ),
    ):
        with pytest.raises(kind, match=said):
            call()
    for changed, said in (
        ({"pad": 16}, "pad"),
        ({"group": 8}, "group"),
        ({"k": 9}, "values"),
        ({"dtype": torch.float64}, "dtype"),
    ):
        names = ("ids", "values", "scale", "zero_point", "pad", "k", "bits", "group", "dtype")
        given = dict(zip(names, raw(ids, weight, torch.float32), strict=True))
        with pytest.raises(RuntimeError, match=f"{said}: expected"):
            op(**{**given, **changed})


def test_explain() -> None:
    weight = weight_of("int4 groups", 30, 64)
    ids = torch.zeros(3, dtype=torch.long)
    with backend.record() as names:
        bigops.quantized_embedding(ids, weight, torch.float16)
    assert [bigops.explain("quantized_embedding", ids, weight, torch.float16).kernel] == names
    choice = bigops.explain("quantized_embedding", ids, weight, device="sm_90")
    assert choice.kernel == "reference.quantized_embedding"
