"""The record: every byte of the model in one line, and a plan that reapplies exactly."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bigops
from bigops import W4A8, Fp8, Int4, Int8, LowRank, Sparse, compress_, freeze_
from bigops.compress import measure
from bigops.graph import sites as sites_module
from bigops.graph.record import account
from bigops.timing import Ratio
from tests.support.kernels_ran import needs_extension


class Conv1D(nn.Module):
    """A linear layer whose weight is [K, N], as transformers has it."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(k, n)), nn.Parameter(torch.zeros(n))


class Mixed(nn.Module):
    """One of everything that compress_ does not look at, and two layers that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 64)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm, self.batch = nn.LayerNorm(64), nn.BatchNorm2d(8)
        self.fc, self.out = nn.Linear(64, 64), nn.Linear(64, 32)
        self.experts = nn.ParameterList([nn.Parameter(torch.randn(4, 64, 64))])
        self.c_attn = Conv1D(64, 96)
        self.lora = bigops.nn.LoRALinear.from_linear(nn.Linear(64, 64), rank=4)
        self.attention = nn.MultiheadAttention(64, 2, add_zero_attn=True)
        self.cls = nn.Parameter(torch.zeros(1, 1, 64))
        self.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool))
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.table.weight
        self.rnn = nn.GRU(8, 8)


def test_every_byte_belongs_to_one_line() -> None:
    model = Mixed()
    whole = measure.model_bytes(model)
    record = compress_(model, {"fc": Int8()})
    lines = [
        *(d.bytes_before for d in record.done),
        *(s.bytes for s in record.skipped),
        *(u.bytes for u in record.unseen),
    ]
    assert sum(lines) == record.model_bytes == whole
    assert sum(record.shares().values()) == pytest.approx(1)
    names = {u.name for u in record.unseen}
    assert {
        "table.weight",
        "conv.weight",
        "experts.0",
        "c_attn.weight",
        "cls",
        "mask",
        "attention.in_proj_weight",
        "rnn.weight_hh_l0",
    } <= names
    assert any("lora" in name for name in names | {s.name for s in record.skipped})
    text = str(record)
    for name in names - {""}:
        assert name in text
    assert f"table.weight: not looked at: Embedding, 25,600 bytes ({25600 / whole:.1%})" in text
    assert "2 small vectors: not looked at: LayerNorm, 512 bytes" in text
    data = json.loads(json.dumps(record.to_dict()))
    assert data["model_bytes"] == whole
    assert len(data["unseen"]) == len(record.unseen)
    assert sum(data["shares"].values()) == pytest.approx(1)


def test_a_weight_of_a_class_of_your_own_cannot_be_forgotten() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Parameter(torch.randn(7, 5, 3))
            self.register_buffer("secret", torch.randn(40, 40), persistent=False)
            self.fc = nn.Linear(64, 64)

    record = compress_(Odd(), Int8())
    assert {u.name: u.bytes for u in record.unseen} == {"own": 420, "secret": 6400}
    assert {u.kind for u in record.unseen} == {"Odd"}


def test_many_weights_of_a_kind_share_a_line_of_text_only() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(64, 64)})
    for i in range(12):
        model[f"conv{i}"] = nn.Conv2d(2, 2, 3)
        model[f"norm{i}"] = nn.BatchNorm2d(2)
    record = compress_(model, Int8())
    convs = [u.name for u in record.unseen if u.kind == "Conv2d" and u.name]
    assert convs == [f"conv{i}.weight" for i in range(12)]
    (line,) = [text for text in str(record).splitlines() if "Conv2d" in text]
    assert all(name in line for name in convs)
    (norms,) = [u for u in record.unseen if u.kind == "BatchNorm2d"]
    assert (norms.name, norms.tensors) == ("", 60)


def test_shared_storage_counts_once_and_slices_by_themselves() -> None:
    flat = torch.zeros(2 * 64 * 64)
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    model["a"].weight = nn.Parameter(flat[: 64 * 64].view(64, 64))
    model["b"].weight = nn.Parameter(flat[64 * 64 :].view(64, 64))
    assert account(model, ["a", "b"]).layers == {"a": 16384, "b": 16384}
    tied = nn.ModuleDict({"e": nn.Embedding(64, 64), "h": nn.Linear(64, 64, bias=False)})
    tied["h"].weight = tied["e"].weight
    found = account(tied, ["h"])
    assert (found.layers, found.total) == ({"h": 0}, 16384)
    wide = nn.Module()
    wide.register_buffer("expanded", torch.zeros(1).expand(1000))
    assert account(wide, []).total == 4
    assert account(nn.ReLU(), []) == ({}, [], 0)


PACK = pytest.param(bigops.pack_, marks=needs_extension, id="pack_")  # plain torch has no panels


@pytest.mark.parametrize(
    "verb", [bigops.fuse_, PACK, lambda m: compress_(m, {"0": Int8()}, keep="all")]
)
def test_a_lazy_layer_has_no_bytes_yet(verb: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(64))
    record = verb(model)
    assert record.model_bytes == 4 * (64 * 64 + 64)
    assert record.shares() == {"done": 1.0, "skipped": 0.0, "unseen": 0.0}
    assert model(torch.ones(2, 64)).shape == (2, 64)


def test_freeze_counts_too() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Embedding(8, 64))
    compress_(model, Int8(), freeze=False)
    record = freeze_(model)
    assert record.model_bytes == 64 * 64 * 4 + 256 + 2048
    assert [u.name for u in record.unseen] == ["1.weight"]
    with pytest.raises(ValueError, match="plan: expected a record of compress_; got one of freeze"):
        record.plan()


# --- the plan -------------------------------------------------------------------------------


def stack() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.Linear(64, 10)).eval()


@pytest.fixture
def contested(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every third contest is lost."""
    calls: list[int] = []

    def contest(*args: Any, **kwargs: Any) -> sites_module.Contest:
        calls.append(1)
        ratio = 0.5 if len(calls) % 3 == 2 else 2.0
        return sites_module.Contest(ratio, 1.0, Ratio(ratio, ratio - 0.1, ratio + 0.1))

    monkeypatch.setattr("bigops.compress.apply.contest", contest)
    return calls


CONFIGS = [
    Sparse(0.8),
    Sparse(0.9, "4x1", "bf16"),
    Sparse(pattern="2:4"),
    Int8(),
    Int4(),
    W4A8,
    Fp8(),
    Int8(activations="static"),
    Int4(activations="static"),
    Int8(activations="none", group=32),
    Sparse(0.9) + Int8(),
    Sparse(0.2, "1x1") + Int8(),
    Sparse(0.9) + Int8(activations="static"),
    LowRank(5),
    LowRank(energy=0.4),
    LowRank(energy=0.4, exact=True),
    LowRank(9) + Int8(),
    LowRank(energy=0.3) + Int8(),
    {"0": LowRank(energy=0.3), "2": None, "*": Int8()},
]


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_plan_makes_the_same_layers_and_times_nothing(
    config: Any, freeze: bool, contested: list[int]
) -> None:
    first, x = stack(), torch.randn(4, 64)
    record = compress_(first, config, x, freeze=freeze, keep="faster")
    timed = len(contested)
    assert timed
    plan = json.loads(json.dumps(record.plan()))
    again = stack()
    repeated = compress_(again, plan)
    assert len(contested) == timed
    assert [type(m) for m in again.modules()] == [type(m) for m in first.modules()]
    state, want = again.state_dict(), first.state_dict()
    assert list(state) == list(want)
    for name, tensor in want.items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert [d.name for d in repeated.done] == [d.name for d in record.done]
    assert repeated.plan() == record.plan()
    for entry in record.skipped:
        assert repeated.reason(entry.name)
    for old, new in zip(first.modules(), again.modules(), strict=True):
        assert old.extra_repr() == new.extra_repr()


def test_choices_in_a_plan_are_resolved() -> None:
    model, x = stack(), torch.randn(16, 64)
    with torch.no_grad():
        model[3].weight.zero_()
    static = Int8(activations="static")
    record = compress_(
        model, {"0": static, "2": Sparse(0.1, "1x1") + Int8(), "3": LowRank(energy=0.5)}, data=[x]
    )
    layers = record.plan()["layers"]
    assert layers["0"]["config"] == {"int8": {"activations": "static"}}
    assert layers["0"]["x_qparams"] == model[0].x_qparams.tolist()
    assert layers["2"] == {"config": {"int8": {}}}
    assert layers["3"] == {"config": {"low_rank": {"energy": 0.5}}, "rank": 0}
    older = copy.deepcopy(record.plan())  # named it otherwise
    older["layers"]["0"]["x_grid"] = older["layers"]["0"].pop("x_qparams")
    again = stack()
    compress_(again, older)
    assert torch.equal(again[0].x_qparams, model[0].x_qparams)
    left = compress_(stack(), {"0": Int8()}).plan()
    assert left["layers"]["2"] is left["layers"]["3"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(bigops_plan=2), "plan: expected version 1; got 2"),
        (lambda p: p.pop("layers"), "plan: expected 'layers' and 'freeze'"),
        (lambda p: p.update(freeze=1), "plan: expected 'layers' and 'freeze'"),
        (
            lambda p: p["layers"].update({"0": {"rank": 3}}),
            "expected config, x_qparams and rank for 0",
        ),
        (lambda p: p["layers"].update({"0": {"config": {"int9": {}}}}), "config: expected"),
        (lambda p: p["layers"]["0"].update(rank=-1), "expected a rank of at least 0 for 0"),
        (lambda p: p["layers"]["0"].update(rank=True), "expected a rank of at least 0 for 0"),
        (lambda p: p["layers"]["0"].update(x_qparams=[0.0, 3.0]), "a scale and a zero point for 0"),
        (lambda p: p["layers"]["0"].update(x_qparams=[1.0]), "a scale and a zero point for 0"),
        (
            lambda p: p["layers"].update({"9": {"config": {"int8": {}}}}),
            r"layers to compress; no 9 \(no linear layer is there\)",
        ),
        (
            lambda p: p["layers"].update({"1": {"config": {"int8": {}}}}),
            r"layers to compress; no 1 \(no linear layer",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    plan = copy.deepcopy(compress_(stack(), Int8()).plan())
    change(plan)
    model = stack()
    with pytest.raises(ValueError, match=message):
        compress_(model, plan)
    assert not any(isinstance(m, bigops.nn.QuantLinear) for m in model)


def test_a_plan_takes_no_inputs_and_names_what_it_does_not_know() -> None:
    plan = compress_(stack(), Int8()).plan()
    with pytest.raises(ValueError, match="example_inputs, data: expected None with a plan"):
        compress_(stack(), plan, torch.randn(4, 64))
    with pytest.raises(ValueError, match="example_inputs, data: expected None with a plan"):
        compress_(stack(), plan, data=[torch.randn(4, 64)])
    larger = stack().append(nn.Linear(10, 64))
    assert compress_(larger, plan).reason("4") == "not in the plan"


def test_a_plan_of_forced_layers_forces_them() -> None:
    record = compress_(stack(), Fp8(), keep="all")
    again = stack()
    compress_(again, record.plan())
    assert isinstance(again[0], bigops.nn.Fp8Linear)


def test_a_record_of_times_has_them_as_plain_data(contested: list[int]) -> None:
    record = compress_(stack(), Int8(), torch.randn(4, 64))
    data = json.loads(json.dumps(record.to_dict()))
    assert data["done"][0]["speedup"] == [2.0, 1.9, 2.1]
    assert data["decided"] == record.plan()


# --- the other verbs, and packed layers --------------------------------------------------------


@pytest.mark.parametrize("verb", [bigops.fuse_, PACK])
@pytest.mark.parametrize("timed", [False, True])
def test_fuse_and_pack_account_for_every_byte(
    verb: Any, timed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", same)
    shared = nn.Linear(80, 80)
    model = nn.Sequential(
        nn.Linear(64, 80), nn.ReLU(), shared, nn.BatchNorm1d(80), shared, bigops.nn.GatedMLP(80, 96)
    )
    model.add_module("idle", nn.Identity())
    model.idle.register_parameter("table", nn.Parameter(torch.zeros(9, 9)))
    whole = measure.model_bytes(model)
    record = verb(model, torch.randn(3, 64) if timed else None)
    lines = [
        *(d.bytes_before for d in record.done),
        *(s.bytes for s in record.skipped),
        *(u.bytes for u in record.unseen),
    ]
    assert sum(lines) == record.model_bytes == whole
    assert "idle.table" in {u.name for u in record.unseen}
    assert record.done
    assert "not looked at: Identity, 324 bytes" in str(record)


CONFIGS_OF_THAWED = [Int8(), LowRank(8), LowRank(8) + Int8(), Sparse(0.9), W4A8, Fp8()]


@pytest.mark.parametrize("config", CONFIGS_OF_THAWED, ids=str)
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_thawed_packed_layer_is_compressed_as_its_drop_in(config: Any, low_memory: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 80), nn.Linear(80, 64))
    other = copy.deepcopy(model)
    other[0] = bigops.nn.PackedLinear.from_linear(other[0]).freeze().thaw()
    other[1] = bigops.nn.PackedLinear.from_linear(other[1])
    compress_(model, config, keep="all")
    record = compress_(other, config, keep="all", low_memory=low_memory)
    assert record.done[0].what.startswith("PackedLinear -> ")
    state, mine = model.state_dict(), other.state_dict()
    assert list(state) == list(mine)
    assert all(torch.equal(state[n].float(), mine[n].float()) for n in state)


def test_packed_layers_are_left_with_the_way_back() -> None:
    factors = bigops.nn.PackedLowRankLinear(64, 64, 4)
    model = nn.Sequential(
        bigops.nn.PackedLinear(64, 64).freeze(),
        bigops.nn.PackedGatedMLP(64, 64),
        bigops.nn.PackedGatedMLP(64, 64).thaw(),
        factors,
        nn.Linear(64, 64),
    )
    record = compress_(model, Int8())
    for name in ("0", "1.gate_proj", "1.down_proj"):
        assert record.reason(name) == "it is packed already; unpack_ gives the float weight back"
    assert "unpack_ makes a GatedMLP of it" in (record.reason("2.down_proj") or "")
    assert [d.name for d in record.done] == ["3", "4"]
    assert freeze_(model).reason("0") == "it is packed already"
    with pytest.raises(ValueError, match=r"matched, but left: 0 \(it is packed already; unpack_"):
        compress_(nn.Sequential(bigops.nn.PackedLinear(64, 64).freeze()), Int8())
    again = nn.Sequential(bigops.nn.PackedLowRankLinear(64, 64, 4))
    skipped = compress_(again, LowRank(2), low_memory=True)
    assert skipped.reason("0") == "it has its factors already"


@pytest.mark.parametrize("config", [Sparse(0.3) + Int8(), LowRank(35) + Int8()], ids=str)
def test_what_is_trained_first_says_that_int8_alone_is_smaller(config: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 80))
    (done,) = compress_(model, config, freeze=False).done
    assert "once frozen it would take" in done.why
    assert "where 6,080 will do" in done.why
