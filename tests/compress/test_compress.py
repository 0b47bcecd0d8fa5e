"""compress_, freeze_ and their configs."""

import copy
import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import bigops
from bigops.compress import config as configs
from bigops.compress.apply import compress_, freeze_
from bigops.compress.config import W4A8, Int4, Int8, Sparse, SparseInt8
from bigops.graph import sites as sites_module
from bigops.nn import GatedMLP, Linear, QuantLinear, SparseLinear
from bigops.timing import Ratio


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Timing tiny layers on a busy machine: two spinning threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model() -> nn.Sequential:
    return nn.Sequential(
        Linear(16, 32, activation="gelu"), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16)
    )


def _snapshot(model: nn.Module) -> list:
    return [
        *((name, id(m), type(m), m.training) for name, m in model.named_modules()),
        *((name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters()),
    ]


# --- configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        Sparse(0.8),
        Int8(),
        Sparse(0.8) + Int8(),
        Int8() + Sparse(0.5),
        Sparse(pattern="2:4"),
        Sparse(0.9, "16x1", "bf16"),
        Sparse(0.7, "4x1") + Int8(),
        Sparse(pattern="1:4") + Int8(),
        Int4(),
        W4A8,
        Int8(activations="none", group=32, symmetric=False),
        Int4(group=None, symmetric=False),
        {"b": Int8(), "a*": Sparse(0.25), "*": Sparse(0.5) + Int8()},
    ],
)
def test_config_survives_json(plan) -> None:  # type: ignore[no-untyped-def]
    again = configs.from_json(configs.to_json(plan))
    assert again == plan
    if isinstance(plan, dict):
        assert list(again) == list(plan)  # first match wins: order is meaning


def test_config_is_data() -> None:
    assert Sparse(0.8) + Int8() == Int8() + Sparse(0.8) == SparseInt8(Sparse(0.8))
    assert str(Sparse(0.8) + Int8()) == "Sparse(0.8) + Int8()"
    assert str(Sparse(0.8, "4x1", "bf16")) == "Sparse(0.8, pattern=4x1, values=bf16)"
    assert Sparse(pattern="2:4").sparsity == 0.5
    assert bigops.Sparse is Sparse
    assert hash(Sparse(0.5)) == hash(Sparse(0.5))
    assert str(W4A8) == "Int4(activations='dynamic')"
    assert str(Int8(activations="none", group=32)) == "Int8(activations='none', group=32)"
    assert configs.from_json('{"int8": {}}') == Int8()
    assert bigops.Int4(group=64, activations="dynamic") == bigops.W4A8


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan")])
def test_sparsity_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match=r"sparsity: expected 0 <= sparsity < 1; got"):
        Sparse(bad)


def test_config_errors() -> None:
    with pytest.raises(TypeError, match=r"sparsity: expected a float; got str"):
        Sparse("0.8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"only Sparse \+ Int8 and LowRank"):
        Int8() + Int8()
    with pytest.raises(TypeError, match=r"Int4 \+ Sparse: only Sparse \+ Int8 and LowRank"):
        Int4() + Sparse(0.5)
    with pytest.raises(ValueError, match=r"int8: expected Int8\(\) or .* beside Sparse"):
        Sparse(0.5) + Int8(activations="none")
    with pytest.raises(ValueError, match=r"group: expected None, 32, 64 or 128; got 48"):
        Int4(group=48)
    with pytest.raises(ValueError, match=r"group: expected None with an int8 weight"):
        Int8(group=64)
    with pytest.raises(ValueError, match=r"activations: expected one of none, .*; got 'x'"):
        Int4(activations="x")
    with pytest.raises(TypeError, match=r"group: expected an int or None; got str"):
        Int4(group="64")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"symmetric: expected a bool; got int"):
        Int8(symmetric=1)  # type: ignore[arg-type]
    for text in (
        "",
        "[]",
        "{}",
        '{"int4": {}, "sparse": {"sparsity": 0.5}}',
        '{"int4": 4}',
        '{"int8": {"x": 1}}',
        '{"sparse": {}}',
        '{"sparse": {"sparsity": "a"}}',
        '{"patterns": {"a": {}}}',
        '{"sparse": {"sparsity": 0.5, "pattern": "0x4"}}',
        '{"sparse": {"sparsity": 0.8, "pattern": "2:4"}}',
        '{"sparse": {"sparsity": 0.8, "values": "fp8"}}',
    ):
        with pytest.raises(ValueError, match="expected"):
            configs.from_json(text)
    for bad in (
        lambda: Sparse(),
        lambda: Sparse(0.8, pattern="2:4"),
        lambda: Sparse(0.5, "4:2"),
        lambda: Sparse(0.5, values="int8"),
        lambda: Sparse(0.5, values="bf16") + Int8(),
        lambda: Int8() + Sparse(0.5, values="bf16"),
        lambda: SparseInt8(Sparse(0.5, values="bf16")),
        lambda: Sparse(0.5, "0x4"),
        lambda: Sparse(0.5, ""),
    ):
        with pytest.raises(ValueError, match="expected"):
            bad()


# --- compress_ -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Sparse(0.5), SparseLinear),
        (Int8(), QuantLinear),
        (Sparse(0.5) + Int8(), SparseLinear),
        (Sparse(0.5, "1x1"), SparseLinear),
        (Sparse(0.8, "4x1") + Int8(), SparseLinear),
        (Sparse(pattern="2:4", values="bf16"), SparseLinear),
    ],
)
def test_one_config_for_all(config, kind: type) -> None:  # type: ignore[no-untyped-def]
    # wide enough for 16 rows side by side: a layer of 4 rows is padded to them
    model = nn.Sequential(
        Linear(64, 128, activation="gelu"), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 80)
    ).eval()
    x = torch.randn(8, 64)
    before = model(x)
    record = compress_(model, config)
    assert [type(model[i]) for i in (0, 1, 3)] == [kind] * 3
    assert model[0].activation == "gelu"
    assert all(model[i].frozen and not model[i].training for i in (0, 1, 3))
    assert [d.name for d in record.done] == ["0", "1", "3"]
    assert all(d.bytes_after < d.bytes_before for d in record.done)
    assert all(d.bytes_after == model[int(d.name)].nbytes for d in record.done)
    density = 0.2 if "0.8" in str(config) else 0.5 if "Sparse" in str(config) else 1.0
    if "pattern" in str(config) and "1x1" not in str(config):  # zeros that fill a word are stored
        assert all(density < d.density < 1.0 for d in record.done)
    else:
        assert all(d.density == pytest.approx(density) for d in record.done)
    assert "0: Linear ->" in str(record)
    json.dumps(record.to_dict())
    correlation = torch.corrcoef(torch.stack([before.flatten(), model(x).flatten()]))[0, 1]
    assert correlation > (0.4 if "0.8" in str(config) else 0.7)


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        Int4(),
        W4A8,
        Int8(activations="none", group=32, symmetric=False),
        Int8(activations="static"),
        Int4(group=32, symmetric=False, activations="static"),
    ],
    ids=str,
)
def test_forms_of_quantised_layers(config, freeze: bool, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    result = sites_module.Contest(1.0, 1.0, Ratio(1.0, 0.9, 1.1))
    monkeypatch.setattr("bigops.compress.apply.contest", lambda *a, **k: result)
    model = _model().eval()
    x = torch.randn(64, 16)
    with torch.no_grad():
        before = model(x)
        compress_(model, config, example_inputs=x, freeze=freeze)
        for i in (0, 1, 3):
            layer = model[i]
            assert type(layer) is QuantLinear
            assert (layer.activations, layer.group) == (config.activations, config.group)
            assert layer.bits == (4 if isinstance(config, Int4) else 8)
            assert layer.symmetric == config.symmetric
            assert layer.frozen is freeze
        correlation = torch.corrcoef(torch.stack([before.flatten(), model(x).flatten()]))[0, 1]
        after = model(x)
        freeze_(model) if not freeze else None
        assert torch.equal(model(x), after)
    assert correlation > 0.97


def test_static_activations_need_example_inputs() -> None:
    model = _model()
    before = _snapshot(model)
    with pytest.raises(
        ValueError, match=r"example_inputs: expected inputs to calibrate .* 0, 1, 3"
    ):
        compress_(model, Int8(activations="static"))
    compress_(model, Sparse(0.5), freeze=False)
    with pytest.raises(ValueError, match=r"config: expected Int8\(\) or .* for a sparse layer"):
        compress_(model, Int8(activations="none"))
    assert _snapshot(_model())[0][0] == before[0][0]


def test_first_pattern_wins_and_the_rest_stays() -> None:
    model = _model()
    last = model[3]
    record = compress_(model, {"0": Int8(), "[01]": Sparse(0.5)})
    assert type(model[0]) is QuantLinear
    assert type(model[1]) is SparseLinear
    assert model[3] is last
    assert record.reason("3") == "no pattern matches it"


def test_recovery_then_freeze() -> None:
    model = _model()
    parameters = list(model.parameters())
    compress_(model, Sparse(0.5) + Int8(), freeze=False)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    optimiser = torch.optim.SGD(parameters, lr=0.1)  # an optimiser made before goes on working
    mask = model[1].mask.clone()
    before = model[1].trained_weight().detach().clone()
    model(torch.randn(8, 16)).square().sum().backward()
    optimiser.step()
    assert not torch.equal(model[1].trained_weight(), before)
    model.eval()
    x = torch.randn(4, 16)
    with torch.no_grad():
        expected = model(x)
    record = freeze_(model)
    assert torch.equal(model(x), expected)
    assert [d.name for d in record.done] == ["0", "1", "3"]
    assert int(model[1].storage().length.sum()) == mask.sum()
    assert freeze_(model).reason("0") == "it is frozen already"


def test_recovery_layers_are_compressed_again() -> None:
    model = _model()
    compress_(model, Sparse(0.5), freeze=False)
    mask = model[1].mask
    compress_(model, Int8(), freeze=False)
    assert type(model[1]) is SparseLinear
    assert model[1].stored == "int8"
    assert torch.equal(model[1].mask, mask)
    compress_(model, Sparse(0.75) + Int8())
    assert model[1].density == pytest.approx(0.25)


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_thawed_layers_are_trained_and_frozen_again(values: str) -> None:
    model = _model().eval()
    compress_(model, {"0": Sparse(0.5, "4x1", values), "1": Int8(), "3": Int4()})
    model[0].thaw()
    optimiser = torch.optim.AdamW(model[0].parameters(), lr=0.01)
    model(torch.randn(8, 16)).square().sum().backward()
    optimiser.step()
    x = torch.randn(4, 16)
    with torch.no_grad():
        model[0].bias[0] = torch.inf
    with pytest.raises(ValueError, match="0.bias: expected finite values"):
        freeze_(model)
    assert model[0].thawed
    with torch.no_grad():
        model[0].bias[0] = 0
        expected = model(x)
    record = freeze_(model)
    assert not model[0].thawed
    assert [d.name for d in record.done] == ["0"]
    assert record.reason("3") == "it is frozen already"
    assert torch.equal(model(x), expected)


def test_thawed_layers_are_left() -> None:
    model = _model()
    compress_(model, {"0": Sparse(0.5)})
    model[0].thaw()
    assert compress_(model, {"1": Int8()}).reason("0") == "it is thawed"


def test_a_pattern_that_would_bring_entries_back_changes_nothing() -> None:
    model = _model()
    compress_(model, Sparse(0.5), freeze=False)
    before = _snapshot(model)
    with pytest.raises(ValueError, match="pattern: expected 1x4, which the layer has"):
        compress_(model, Sparse(0.5, "16x16"), freeze=False)
    assert _snapshot(model) == before


def test_example_inputs_time_each_layer(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = _model().eval()
    record = compress_(model, {"*": Int8()}, example_inputs=torch.randn(8, 16))
    assert {e.name for e in record.done} | {e.name for e in record.skipped} == {"0", "1", "3"}
    for entry in record.done:
        assert entry.speedup is not None
        assert entry.us_before > 0
    for left in record.skipped:
        assert "the original is faster: measured" in left.reason
        assert type(model[int(left.name)]) in (nn.Linear, Linear)


@pytest.mark.parametrize(("ratio", "swapped"), [(0.5, False), (1.5, True)])
def test_where_the_original_wins_it_stays(monkeypatch, ratio: float, swapped: bool) -> None:  # type: ignore[no-untyped-def]
    result = sites_module.Contest(1.0, 1.0 / ratio, Ratio(ratio, ratio - 0.1, ratio + 0.1))
    monkeypatch.setattr("bigops.compress.apply.contest", lambda *a, **k: result)
    model = _model()
    before = _snapshot(model)
    record = compress_(model, Int8(), example_inputs=(torch.randn(8, 16),))
    assert (len(record.done) == 3) is swapped
    assert (_snapshot(model) != before) is swapped


def test_layers_that_are_left_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, add_zero_attn=True)
            self.first, self.shared = nn.Linear(8, 8), nn.Linear(8, 8)
            self.again = self.shared
            self.tied, self.embedding = nn.Linear(8, 10, bias=False), nn.Embedding(10, 8)
            self.embedding.weight = self.tied.weight
            self.hooked = nn.Linear(8, 8)
            self.hooked.register_forward_hook(lambda layer, x, y: y + layer.weight.sum())
            self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.old_norm = torch.nn.utils.spectral_norm(nn.Linear(8, 8))
            self.lora = type("LoraLinear", (nn.Linear,), {"forward": torch.relu})(8, 8)
            self.mlp = GatedMLP(8, 8)
            self.encoder = nn.TransformerEncoderLayer(8, 2, 16)
            self.double = nn.Linear(8, 8, dtype=torch.float64)

    model = Net()
    record = compress_(model, Int8())
    encoder = {"self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"}
    assert {d.name for d in record.done} == {
        *("first", "mlp.down_proj"),
        *(f"encoder.{name}" for name in encoder),
    }
    reasons = {
        "attention.out_proj": "MultiheadAttention uses its weight",
        "shared": "also reachable as again",
        "tied": "its weight is shared with embedding.weight",
        "hooked": "forward hook",
        "normed": "parametrized",
        "lora": "it is a tests.compress.test_compress.LoraLinear, which may do more",
        "mlp": "gated pairs have no compressed kernel",
        "double": "float64",
    }
    for name, reason in reasons.items():
        assert reason in (record.reason(name) or ""), name
    assert record.reason("old_norm")


def test_a_layer_that_is_never_called_is_left() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.raw = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.called(x) @ self.raw.weight

    model = Net()
    record = compress_(model, Int8(), example_inputs={"x": torch.randn(2, 8)})
    assert "never call it" in (record.reason("raw") or "")
    model(torch.randn(2, 8))


# --- errors leave the model as it was ------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize(
    "config", [Int8(), Sparse(0.5, "16x16"), Sparse(pattern="2:4", values="bf16")], ids=str
)
def test_nan_names_the_layer_and_changes_nothing(
    config: Int8 | Sparse, leaf: str, value: float
) -> None:
    model = _model()
    with torch.no_grad():
        getattr(model[3], leaf).view(-1)[0] = value
    before = _snapshot(model)
    for freeze in (True, False):
        with pytest.raises(ValueError, match=rf"3.{leaf}: expected finite values; got 1 NaN or"):
            compress_(model, config, freeze=freeze)
    assert _snapshot(model) == before


def test_no_match_names_patterns_and_layers() -> None:
    model = _model()
    before = _snapshot(model)
    with pytest.raises(ValueError, match=r"matches 'encoder\.\*'; layers.*: 0, 1, 3"):
        compress_(model, {"0": Int8(), "encoder.*": Int8()})
    with pytest.raises(ValueError, match=r"matches '\*'; layers that can be compressed: none"):
        compress_(nn.Sequential(nn.ReLU()), Int8())
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2, add_bias_kv=True)})
    with pytest.raises(ValueError, match=r"matched, but left: a.out_proj \(MultiheadAttention"):
        compress_(attention, Int8())
    with pytest.raises(TypeError, match=r"config: expected Sparse.*got 0.8"):
        compress_(model, 0.8)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"config\['0'\]: expected Sparse"):
        compress_(model, {"0": "int8"})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got dict"):
        compress_({}, Int8())  # type: ignore[arg-type]
    assert _snapshot(model) == before


@pytest.mark.parametrize("broken", ["build", "swap", "example"])
def test_a_failure_midway_changes_nothing(monkeypatch, broken: str) -> None:  # type: ignore[no-untyped-def]
    model = _model()
    model[1].eval()
    before = _snapshot(model)
    inputs = None
    if broken == "build":
        real, calls = QuantLinear.freeze, []

        def freeze(layer: QuantLinear, *storage: object) -> QuantLinear:
            calls.append(layer)
            if len(calls) == 3:
                raise MemoryError("planted")
            return real(layer, *storage)

        monkeypatch.setattr(QuantLinear, "freeze", freeze)
    elif broken == "swap":

        class Full(dict):
            def __setitem__(self, key: str, value: object) -> None:
                if key == "3" and isinstance(value, QuantLinear):
                    raise MemoryError("planted")
                super().__setitem__(key, value)

        model._modules = Full(model._modules)
    else:
        inputs = torch.randn(8, 15)
    with pytest.raises((MemoryError, ValueError, RuntimeError)):
        compress_(model, Int8(), example_inputs=inputs)
    assert _snapshot(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_freeze_needs_compressed_layers_and_finite_weights() -> None:
    with pytest.raises(ValueError, match=r"model: expected compressed layers.*found none"):
        freeze_(_model())
    model = _model()
    compress_(model, Int8(), freeze=False)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"3.weight: expected finite"):
        freeze_(model)
    assert not any(model[i].frozen for i in (0, 1, 3))


def test_deepcopy_of_the_original_is_untouched() -> None:
    model = _model()
    twin = copy.deepcopy(model)
    x = torch.randn(3, 16)
    expected = twin(x)
    compress_(model, Sparse(0.5))
    assert torch.equal(twin(x), expected)
