"""bigops.nn.QuantEmbedding: int8 and int4 rows, recovery, what it shares with a head."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bigops
from bigops import backend
from bigops.formats.quantized import QuantizedWeight
from bigops.nn import QuantEmbedding, QuantLinear
from bigops.nn.stored_parameter import StoredParameter

FORMS: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"group": 32},
    {"bits": 4},
    {"bits": 4, "group": 64, "symmetric": False},
]
IDS = torch.tensor([[0, 3, 39, 3], [7, 1, 1, 20]])


def _layer(form: dict[str, Any] | None = None) -> QuantEmbedding:
    torch.manual_seed(0)
    return QuantEmbedding(40, 72, 3, **(form or {}))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_frozen_it_looks_up_what_it_stores(form: dict[str, Any]) -> None:
    layer = _layer(form)
    dense = layer.weight.detach().clone()
    before = layer(IDS)
    stored = QuantizedWeight.from_dense(dense, activations="none", **form)
    layer.freeze()
    with backend.record() as names:
        rows = layer(IDS)
    assert len(names) == 1
    assert "quantized_embedding" in names[0]
    assert torch.equal(rows, stored.to_dense()[IDS])
    assert torch.equal(rows, before)  # recovery computes on what will be stored
    assert not rows[0, 1].any()  # the row of padding_idx
    assert layer.nbytes == stored.nbytes == QuantEmbedding(40, 72, 3, **form).least_bytes()
    assert not rows.requires_grad


def test_recovery_has_a_straight_through_gradient() -> None:
    layer = _layer({"bits": 4, "group": 32})
    upstream = torch.randn(2, 4, 72)
    layer(IDS).backward(upstream)
    assert layer.weight.grad is not None
    twin = nn.Embedding(40, 72, 3)
    twin(IDS).backward(upstream)
    assert torch.equal(layer.weight.grad, twin.weight.grad)  # type: ignore[arg-type]
    assert not layer.weight.grad[3].any()


def test_it_is_an_embedding_by_type() -> None:
    layer = _layer().freeze()
    assert isinstance(layer, nn.Embedding)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (40, 72, 3)
    assert (layer.max_norm, layer.sparse, layer.scale_grad_by_freq) == (None, False, False)
    weight = layer.weight
    assert (weight.shape, weight.dtype) == ((40, 72), torch.float32)
    assert torch.equal(F.embedding(IDS, weight), layer(IDS))
    assert "frozen" in repr(layer)
    assert all(isinstance(p, StoredParameter) for p in layer.parameters())
    for write in (weight.zero_, lambda: nn.init.normal_(layer.weight), layer.reset_parameters):
        with pytest.raises(RuntimeError, match=r"QuantEmbedding\.weight: expected to be read only"):
            write()
    with pytest.raises(AttributeError, match="frozen"):
        layer.weight = nn.Parameter(torch.zeros(40, 72))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    layer = _layer().freeze()
    want = layer(IDS).to(dtype)
    scale = layer.scale.dtype
    moved = copy.deepcopy(layer).to(dtype)
    assert torch.equal(moved(IDS), want)
    assert (moved.weight.dtype, moved.scale.dtype) == (dtype, scale)
    made = QuantEmbedding(40, 72, dtype=dtype).freeze()
    assert made(IDS).dtype == dtype
    again = QuantEmbedding.from_arguments(made.arguments())
    again.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(again(IDS), made(IDS))


def test_copies_states_and_graphs() -> None:
    layer = _layer({"bits": 4}).freeze()
    want = layer(IDS)
    other = QuantEmbedding(40, 72, 3, bits=4).freeze()
    other.load_state_dict(layer.state_dict())
    model = nn.Sequential(layer, nn.ReLU())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(IDS), want)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(IDS), want)
    assert torch.equal(torch.export.export(layer, (IDS,), strict=False).module()(IDS), want)
    assert torch.equal(torch.fx.symbolic_trace(model)(IDS), want.relu())
    assert torch.equal(torch.vmap(layer)(IDS), want)
    assert layer.to("meta")(IDS.to("meta")).shape == want.shape


def test_shared_storage_stays_shared() -> None:
    """As `compress_` leaves an embedding and its head: copied, moved, loaded."""
    model = nn.ModuleDict({"table": _layer().freeze(), "head": nn.Linear(72, 40, bias=False)})
    table: Any = model["table"]
    model["head"].weight = nn.Parameter(torch.randn(40, 72))
    table = QuantEmbedding.from_embedding(nn.Embedding.from_pretrained(model["head"].weight.data))
    head = QuantLinear.from_linear(model["head"]).freeze()
    assert table.freeze() is table
    gone = head.share(table)
    assert gone == table.values.nbytes + table.scale.nbytes
    assert head.share(table) == 0
    model = nn.ModuleDict({"table": table, "head": head})
    x, ids = torch.randn(3, 72), IDS
    want = model["head"](x), model["table"](ids)
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    for twin in (model, copied, copied.to(torch.bfloat16).to(torch.float32)):
        own: Any = twin
        assert own.head.values is own.table.values
        assert own.head.scale is own.table.scale
        assert torch.equal(own.head(x), want[0])
        assert torch.equal(own.table(ids), want[1])
    assert copied.head.values is not head.values  # type: ignore[union-attr]


def test_errors() -> None:
    layer = _layer().freeze()
    with pytest.raises(IndexError, match="ids: expected rows of the weight, 0 to 39; got 40"):
        layer(torch.tensor([40]))
    with pytest.raises(ValueError, match="padding_idx: expected a row, -40 to 39; got 40"):
        QuantEmbedding(40, 8, 40)
    with pytest.raises(ValueError, match="num_embeddings"):
        QuantEmbedding(-1, 8)
    with pytest.raises(ValueError, match="group: expected None, 32, 64 or 128"):
        QuantEmbedding(4, 8, group=7)
    for given, said in (
        (nn.Embedding(4, 8, max_norm=1.0), "max_norm writes to the weight"),
        (nn.Embedding(4, 8, sparse=True), "its sparse is about a gradient"),
        (nn.Embedding(4, 8, scale_grad_by_freq=True), "its scale_grad_by_freq"),
        (layer, "got a frozen one"),
    ):
        with pytest.raises(ValueError, match=said):
            QuantEmbedding.from_embedding(given)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Embedding; got Linear"):
        QuantEmbedding.from_embedding(nn.Linear(2, 2))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="values: expected"):
        layer.load_state_dict({**state, "values": state["values"][:1]})
    assert bigops.nn.QuantEmbedding is QuantEmbedding
