"""A format of somebody else's: one file and a line in `formats.FORMATS` is all it takes.

It is trained, frozen, saved, loaded, measured, explained and sharded, and no room of the package
names it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigops import FormatError, Receipt, backend, formats, freeze_, load, pack_, save
from bigops.compress import Int8, compress_, measure
from bigops.compress.store import load_compressed
from bigops.nn import CompressedLinear, Linear, QuantLinear
from tests.formats.ternary import TernaryWeight
from tests.support import tolerance
from tests.support.saved_models import rewrite


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, TernaryWeight))


class Net(nn.Module):
    """A class that a file cannot build."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.last = first, nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def ternary(activation: str = "relu") -> CompressedLinear:
    torch.manual_seed(0)
    return CompressedLinear(TernaryWeight, 16, 24, activation=activation)


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


def meets_the_numerics_rule(layer: CompressedLinear) -> None:
    """So does its result, and that of another bias does not."""
    weight, bias = layer.dense_weight(), layer.bias
    assert bias is not None
    plain = torch.relu(nn.functional.linear(X, weight, bias))
    truth = torch.relu(nn.functional.linear(X.double(), weight.double(), bias.double()))
    scale = X.double().abs() @ weight.double().abs().t() + bias.double().abs()
    tolerance.check(layer(X), truth, plain, scale)
    with pytest.raises(AssertionError):
        tolerance.check(layer(X) + 1e-4 * (truth > 0), truth, plain, scale)


def test_it_trains_straight_through() -> None:
    layer = ternary("none")
    dense = TernaryWeight.from_dense(layer.weight).to_dense()
    twin = Linear(16, 24)
    twin.weight, twin.bias = nn.Parameter(dense), nn.Parameter(layer.bias.detach().clone())
    for model in (layer, twin):
        model(X).square().sum().backward()
    assert torch.equal(layer(X), twin(X))
    assert torch.equal(layer.weight.grad, twin.weight.grad)
    before = layer.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert not torch.equal(layer.weight, before)


def test_frozen_it_keeps_its_storage_alone() -> None:
    layer = ternary()
    with torch.no_grad():
        recovery = layer.eval()(X)
    dense = layer.dense_weight()
    assert layer.least_bytes() == 16 * 24 + 24 * 4 + 24 * 4
    assert layer.freeze().nbytes == layer.least_bytes()
    assert set(layer.state_dict()) == {"values", "scale", "bias"}
    with backend.record() as ran:
        assert torch.equal(layer(X), recovery)
    assert ran == ["reference.ternary_linear"]
    assert torch.equal(layer.dense_weight(), dense)
    meets_the_numerics_rule(layer)
    found = layer.explain(X)
    assert (found.op, found.kernel) == ("ternary_linear", "reference.ternary_linear")


@pytest.mark.parametrize("freeze", [True, False])
def test_it_is_saved_and_loaded(freeze: bool, tmp_path: Path) -> None:
    layer = ternary().freeze() if freeze else ternary()
    model, path = nn.Sequential(layer, nn.Linear(24, 4)).eval(), tmp_path / "m"
    save(model, path)
    for again in (load(path), load(path, nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 4)))):
        assert type(again[0]) is CompressedLinear
        assert again[0].format is TernaryWeight
        assert torch.equal(again.eval()(X), model(X))
    save(Net(layer).eval(), path)
    assert torch.equal(load(path, Net(nn.Linear(16, 24))).eval()(X), load(path, Net(layer))(X))
    assert list(load_compressed(path)) == ["first"]


def test_a_file_cannot_bring_what_the_format_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    save(nn.Sequential(ternary().freeze()), path)
    rewrite(path, lambda header, tensors: tensors["0.values"].fill_(2))
    with pytest.raises(FormatError, match="values: expected -1, 0 and 1 alone"):
        load(path)
    save(nn.Sequential(ternary().freeze()), path)
    rewrite(path, lambda h, _: h["tree"]["children"]["0"]["args"].update(form={"bits": 8}))
    with pytest.raises(FormatError, match="TernaryWeight: expected no arguments"):
        load(path)
    save(nn.Sequential(ternary().freeze()), path)
    monkeypatch.undo()
    with pytest.raises(FormatError, match="format: expected one of .*; got 'TernaryWeight'"):
        load(path)


def test_it_is_in_the_receipt() -> None:
    before = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 4)).eval()
    after = copy.deepcopy(before)
    after[0] = CompressedLinear.from_linear(TernaryWeight, before[0]).freeze()
    rows = measure.layers(before, after, X, pairs=2)
    wanted: dict[str, Any] = {
        "kind": "CompressedLinear",
        "shape": [24, 16],
        "density": 1.0,
        "bytes_before": (16 + 1) * 24 * 4,
        "bytes_after": 16 * 24 + 2 * 24 * 4,
        "kernel": "reference.ternary_linear",
    }
    assert {name: rows[0][name] for name in wanted} == wanted
    assert rows[0]["us_after"] > 0
    receipt = Receipt.measure(before, after.eval(), X, with_compile=False, pairs=2)
    assert receipt.layers[0].kernel == "reference.ternary_linear"
    assert "ternary_linear" in str(receipt)


def test_verbs_ask_it_what_it_can() -> None:
    model = nn.Sequential(ternary("none"), nn.Linear(24, 4))
    record = pack_(model)
    assert record.reason("0") == "it is a CompressedLinear, which has a storage of its own"
    assert freeze_(model).done[0].what == "CompressedLinear frozen"
    record = compress_(model, {"1": Int8(), "0": None}, keep="all")
    assert record.reason("0") == "it is frozen already"
    model = nn.Sequential(ternary("none"))
    compress_(model, Int8(), keep="all")  # not frozen yet, it may be stored in another format
    assert type(model[0]) is QuantLinear


def test_its_rows_are_shared_out_and_put_together() -> None:
    whole = ternary().storage()
    parts = [whole.shard(rank, 3) for rank in range(3)]
    assert [part.shape for part in parts] == [torch.Size([8, 16])] * 3
    again = TernaryWeight.merge(parts)
    assert all(torch.equal(t, again.tensors()[n]) for n, t in whole.tensors().items())
    with pytest.raises(ValueError, match="24 rows of a TernaryWeight"):
        whole.shard(0, 5)


def test_codes_of_somebody_else_are_stored_as_they_are() -> None:
    """What a quantiser chose takes the place of rounding to nearest."""
    layer = ternary()
    codes = torch.zeros(24, 16, dtype=torch.int8)
    codes[:, ::2] = 1
    stored = TernaryWeight.from_codes(codes, torch.full((24,), 0.5))
    assert torch.equal(layer.freeze(stored).dense_weight(), codes * 0.5)
    meets_the_numerics_rule(layer)


def test_a_format_without_an_op_is_in_no_layer() -> None:
    with pytest.raises(TypeError, match="format: expected one that an op takes; got LowRankWeight"):
        CompressedLinear(formats.LowRankWeight, 16, 24)
