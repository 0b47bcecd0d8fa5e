"""bigops.pack_ and unpack_: what they swap, what they leave and why; all of it or nothing."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.compress import measure
from bigops.formats.packed import PackedWeight
from bigops.graph import pack
from bigops.graph.sites import Contest
from bigops.nn import (
    GatedMLP,
    Linear,
    LowRankLinear,
    PackedGatedMLP,
    PackedLinear,
    QuantLinear,
)
from bigops.timing import Ratio
from tests.support.cases.packed import make, same_state, state_of
from tests.support.kernels_ran import needs_extension

pytestmark = needs_extension


@pytest.fixture(autouse=True)
def _packing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AMX, where it does in every dtype."""
    monkeypatch.setattr(machine, "packs", lambda dtype: True)


# --- memory --------------------------------------------------------------------------------


def test_the_float_weights_are_freed() -> None:
    model = nn.Sequential(nn.Linear(256, 512), GatedMLP(512, 256, 512), LowRankLinear(512, 256, 64))
    before = measure.model_bytes(model)
    watched = [weakref.ref(p) for n, p in model.named_parameters() if not n.endswith("bias")]
    layers = [weakref.ref(layer) for layer in model]
    record = bigops.pack_(model)
    gc.collect()
    assert len(watched) == 5
    assert not any(ref() is not None for ref in (*watched, *layers))
    assert measure.model_bytes(model) == before == sum(layer.nbytes for layer in model)
    with torch.inference_mode():
        model(torch.randn(4, 256))
    assert measure.model_bytes(model) == before  # nor is anything kept of a call
    assert [(d.bytes_before, d.bytes_after) for d in record.done] == [
        (layer.nbytes, layer.nbytes) for layer in model
    ]
    packed = [weakref.ref(layer.panels) for layer in model.modules() if type(layer) is PackedLinear]
    bigops.unpack_(model)
    gc.collect()
    assert not any(ref() is not None for ref in packed)
    assert measure.model_bytes(model) == before


def test_state_values_hold_no_more_than_themselves() -> None:
    """Of padded panels, too: a view of them would be saved whole."""
    model = make(torch.bfloat16)
    bigops.pack_(model)
    for name, value in model.state_dict().items():
        assert value.untyped_storage().nbytes() in (value.nbytes, 2 * 67 * 2), name
        assert value.is_contiguous()


# --- what is left, and why -------------------------------------------------------------------


class _Head(nn.Linear):
    scale = 2


def test_every_layer_that_is_left_has_its_reason() -> None:
    k = 96
    tied = nn.Linear(k, k)
    shared, hooked, once = nn.Linear(k, k), nn.Linear(k, k), nn.Linear(k, k)
    shared.weight = tied.weight
    hooked.register_forward_hook(lambda layer, x, y: y + layer.weight.sum())
    mlp, hollow = GatedMLP(k, k), GatedMLP(k, k)
    mlp.down_proj.register_forward_hook(lambda *args: None)
    hollow.gate_up_weight = mlp.gate_up_weight
    held = nn.Linear(k, k)
    parametrize.register_parametrization(held, "weight", nn.Identity())
    model = nn.ModuleDict(
        {
            "tied": tied,
            "shared": shared,
            "hooked": hooked,
            "first": once,
            "second": once,
            "head": _Head(k, k),
            "wide": nn.Linear(k, k).double(),
            "small": nn.Linear(k, 63),
            "few": nn.Linear(8, 128),
            "hollow_one": nn.Linear(k, k, device="meta"),
            "mlp": mlp,
            "hollow": hollow,
            "rank": LowRankLinear(160, 160, 32),
            "held": held,
            "quant": QuantLinear(k, k).freeze(),
            "packed": PackedLinear(k, k).freeze(),
            "thawed": PackedLinear(k, k),
            "narrow": GatedMLP(160, 32),
            "attention": nn.MultiheadAttention(k, 1),
            "norm": nn.LayerNorm(k),
        }
    )
    state = {n: v.data_ptr() for n, v in model.named_parameters()}
    record = bigops.pack_(model)
    assert record.done == []
    wanted = {
        "tied": "its weight is shared with shared.weight",
        "shared": "its weight is shared with tied.weight",
        "hooked": "it has a forward hook",
        "first": "the same module is also reachable as second",
        "head": "it is a tests.graph.test_pack._Head",
        "wide": "no packed kernel takes torch.float64",
        "small": "weight: 63 x 96 is too small",
        "few": "weight: 128 x 8 is too small",
        "hollow_one": "it is on meta; panels are for the CPU",
        "mlp": "shared with hollow.gate_up_weight",
        "hollow": "shared with mlp.gate_up_weight",
        "rank": "v: 32 x 160 is too small",
        "held": "parametrized",
        "quant": "it is a QuantLinear, which has a storage of its own",
        "packed": "it is packed already",
        "thawed": "it is thawed; freeze_ packs it",
        "narrow": "gate_up_weight: 32 x 160 is too small",
        "attention.out_proj": "MultiheadAttention uses its weight without calling it",
    }
    assert {s.name for s in record.skipped} == set(wanted)
    for name, reason in wanted.items():
        assert reason in (record.reason(name) or ""), (name, record.reason(name))
    assert {n: v.data_ptr() for n, v in model.named_parameters()} == state


def test_hooks_below_a_block_and_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(GatedMLP(96, 96), nn.Linear(96, 96).bfloat16(), nn.Linear(96, 96))
    model[0].down_proj.register_forward_hook(lambda *args: None)
    monkeypatch.setattr(machine, "packs", lambda dtype: dtype != torch.bfloat16)
    record = bigops.pack_(model)
    assert record.reason("0") == "down_proj: it has a forward hook, which a swap would lose"
    assert "panels do not pay for torch.bfloat16" in (record.reason("1") or "")
    assert [d.name for d in record.done] == ["2"]
    bigops.unpack_(model)
    monkeypatch.setattr(machine, "extension", None)
    monkeypatch.setattr(machine, "extension_error", "the C++ extension is not built")
    assert bigops.pack_(model).reason("2") == "weight: the C++ extension is not built"


def test_unpack_leaves_what_it_would_lose() -> None:
    model = make()
    bigops.pack_(model)
    model[0].register_backward_hook(lambda *args: None)
    model[2].up_proj.register_forward_pre_hook(lambda *args: None)
    record = bigops.unpack_(model)
    assert [done.name for done in record.done] == ["1", "3"]
    assert "backward hook" in (record.reason("0") or "")
    assert "forward pre-hook" in (record.reason("2") or "")
    assert [type(m) for m in model] == [PackedLinear, Linear, PackedGatedMLP, LowRankLinear]


def test_the_model_itself_is_not_swapped() -> None:
    layer = nn.Linear(96, 96)
    assert "it is the model itself" in (bigops.pack_(layer).reason("") or "")
    packed = PackedLinear(96, 96).freeze()
    assert "it is the model itself" in (bigops.unpack_(packed).reason("") or "")
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        bigops.pack_("model")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        bigops.unpack_(None)  # type: ignore[arg-type]
    assert bigops.unpack_(layer).done == []


# --- the contest, and all or nothing ---------------------------------------------------------


def test_losers_stay_and_winners_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, 128), nn.ReLU())
    asked = []

    def decided(old: nn.Module, new: nn.Module, x: Tensor, training: bool) -> Contest:
        asked.append((type(old), type(new), tuple(x.shape), training))
        speed = 0.5 if new.out_features == 128 else 2.0
        return Contest(10.0, 10.0 / speed, Ratio(speed, speed, speed))

    monkeypatch.setattr(pack, "contest", decided)
    record = bigops.pack_(model, torch.randn(3, 96))
    assert asked == [(nn.Linear, PackedLinear, (3, 96), False)] * 2  # "1" is as "0"
    assert [d.name for d in record.done] == ["0", "1"]
    assert record.done[0].speedup == Ratio(2.0, 2.0, 2.0)
    assert "the original is faster: measured 10 us" in (record.reason("2") or "")
    assert [type(m) for m in model] == [PackedLinear, PackedLinear, nn.Linear, nn.ReLU]
    assert record.notes == []


def test_layers_that_the_example_never_calls_stay() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.read.weight)

    model, x = Skips(), torch.randn(2, 64)
    record = bigops.pack_(model, x)
    assert "the example inputs never call it" in (record.reason("read") or "")
    want = model(x)
    record = bigops.pack_(model)
    assert "nothing was timed: no example_inputs" in record.notes
    with backend.record() as names:
        torch.testing.assert_close(model(x), want)  # unpacked where it is read
    assert "reference.PackedLinear.weight" in names


@pytest.mark.parametrize("where", ["call", "build", "contest", "interrupt"])
def test_an_exception_leaves_the_model_as_it_was(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    state = state_of(model)
    example = torch.randn(3, 65)
    calls = []

    def second(inner: Callable[..., object], error: BaseException) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) > 1:
                raise error
            return inner(*args, **kwargs)

        return call

    error: BaseException = KeyboardInterrupt() if where == "interrupt" else MemoryError("planted")
    if where == "call":
        example = torch.randn(3, 64)
        error = ValueError()
    elif where == "contest":
        monkeypatch.setattr(pack, "contest", second(pack.contest, error))
    else:
        monkeypatch.setattr(PackedWeight, "from_dense", second(PackedWeight.from_dense, error))
    with pytest.raises((type(error), RuntimeError)):
        bigops.pack_(model, example)
    assert all(dict(model.named_modules())[n] is m for n, m in modules.items())
    assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
    assert same_state(model, state)


def test_the_receipt_names_the_packed_kernels() -> None:
    model, x = make().eval(), torch.randn(4, 65)
    before = copy.deepcopy(model)
    bigops.pack_(model)
    rows = measure.layers(before, model, x, pairs=2)
    assert [row["name"] for row in rows] == ["0", "1", "2", "3"]
    assert all("packed_linear" in row["kernel"] for row in rows)
    assert [row["bytes_after"] for row in rows] == [layer.nbytes for layer in model]
    kernel = measure.kernel_of(model[0].thaw(), x)
    assert "packed" not in kernel
