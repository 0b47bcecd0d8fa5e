"""PackedLinear, PackedLowRankLinear, PackedGatedMLP: values, state, copies, thawing, files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.nn import (
    GatedMLP,
    Linear,
    LowRankLinear,
    PackedGatedMLP,
    PackedLinear,
    PackedLowRankLinear,
    QuantLinear,
)
from bigops.ops import activation as act
from tests.support import tolerance
from tests.support.cases.packed import make, same_state, state_of
from tests.support.kernels_ran import expect, needs_extension

pytestmark = needs_extension
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _packing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AMX, where it does in every dtype."""
    monkeypatch.setattr(machine, "packs", lambda dtype: True)


# --- values --------------------------------------------------------------------------------


def _plain(model: nn.Sequential, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The four layers of `_model` in plain torch."""
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = act.apply("gelu", linear(linear(x.to(dtype), "0"), "1"))
    x = linear(act.apply("silu", linear(x, "2.gate_proj")) * linear(x, "2.up_proj"), "2.down_proj")
    inner = nn.functional.linear(x, state["3.v"])
    return act.apply("silu", nn.functional.linear(inner, state["3.u"], state.get("3.bias")))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_model_gives_the_same(dtype: torch.dtype, bias: bool) -> None:
    model = make(dtype, bias).eval()
    x = torch.randn(3, 5, 65, dtype=dtype)
    ref64 = _plain(model, x, torch.float64)
    plain = _plain(model, x, dtype)
    record = bigops.pack_(model)
    assert [d.name for d in record.done] == ["0", "1", "2", "3"]
    assert record.skipped == []
    with torch.inference_mode(), backend.record() as ran:
        y = model(x)
    assert [name.split(".")[2] for name in ran if name.startswith("cpu")] == ["packed_linear"] * 7
    rounding = 0.0 if dtype == torch.float32 else float(x.abs().max())
    tolerance.check(y, ref64, plain, ref64.abs().max() + x.abs().max(), rounding=rounding)
    assert torch.equal(model.train()(x).detach(), y)  # frozen: the mode changes nothing


@pytest.mark.parametrize("activation", list(act.GATED))
def test_gated_pairs(activation: str) -> None:
    mlp = GatedMLP(65, 130, activation=activation, bias=True).eval()
    packed = PackedGatedMLP.from_mlp(mlp)
    x, residual = torch.randn(4, 65), torch.randn(4, 65)
    ref64 = copy.deepcopy(mlp).double()(x.double(), residual.double())
    with torch.no_grad():
        y = packed(x, residual)
        tolerance.check(y, ref64, mlp(x, residual), ref64.abs().max() + x.abs().max())
    assert torch.equal(packed(x, residual).detach(), y)  # out of place where gradients are wanted
    biases = torch.stack([torch.zeros(130), torch.ones(130)])  # of one factor alone: out of place
    with torch.no_grad():
        per = torch.vmap(
            lambda bias: torch.func.functional_call(packed, {"up_proj.bias": bias}, (x,))
        )(biases)
        for bias, got in zip(biases, per, strict=True):
            packed.up_proj.bias.copy_(bias)
            plain = packed(x)
            ref64 = copy.deepcopy(packed.unpacked()).double()(x.double())
            tolerance.check(got, ref64, plain, ref64.abs().max() + x.abs().max())


def test_the_rule_fails_on_a_lost_residual() -> None:
    layer = PackedLinear(65, 80).freeze()
    x, residual = torch.randn(3, 65), torch.randn(3, 80)
    ref64 = copy.deepcopy(layer.unpacked()).double()(x.double(), residual.double())
    plain = layer.unpacked()(x, residual)
    tolerance.check(layer(x, residual), ref64, plain, ref64.abs().max() + x.abs().max())
    with pytest.raises(AssertionError, match="float64 says"):
        tolerance.check(layer(x), ref64, plain, ref64.abs().max() + x.abs().max())


def test_x_and_bias_have_gradients_and_the_weight_none() -> None:
    model = make()
    bigops.pack_(model)
    x = torch.randn(4, 65, requires_grad=True)
    twin = make()
    twin.load_state_dict(model.state_dict())
    grad = torch.randn(4, 97)
    leaves = [p for n, p in model.named_parameters() if n in ("0.bias", "1.bias", "3.bias")]
    got = torch.autograd.grad(model(x), [x, *leaves], grad)
    wide = copy.deepcopy(twin).double()
    x64 = x.detach().double().requires_grad_()
    want = torch.autograd.grad(
        wide(x64), [x64, wide[0].bias, wide[1].bias, wide[3].bias], grad.double()
    )
    plain = torch.autograd.grad(twin(x), [x, twin[0].bias, twin[1].bias, twin[3].bias], grad)
    for g, w, p in zip(got, want, plain, strict=True):
        tolerance.check(g, w, p, w.abs().max() + grad.abs().max())


def test_the_bias_is_still_the_parameter_that_it_was() -> None:
    layer = nn.Linear(96, 80)
    model, x, bias = nn.Sequential(layer).eval(), torch.randn(4, 96), layer.bias
    bigops.pack_(model)
    assert model[0].bias is bias
    with torch.inference_mode():
        before = model(x)
    bias.data += 100  # no number is what it was: seen
    with torch.inference_mode():
        after = model(x)
    wide = [t.detach().double() for t in (x, layer.weight, layer.bias)]
    scale = wide[0].abs() @ wide[1].abs().t() + 101
    tolerance.check(after, nn.functional.linear(*wide), layer(x).detach(), scale)
    assert bool((after - before > 99).all())


def test_compiles_and_exports_without_breaks() -> None:
    model, x = make().eval(), torch.randn(4, 65)
    bigops.pack_(model)
    with torch.no_grad():
        want = model(x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), want)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), want)


# --- state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_and_unpack_give_every_bit_back(dtype: torch.dtype) -> None:
    model = make(dtype)
    with torch.no_grad():  # NaN of any payload, inf, -0 and subnormal numbers
        for parameter in model.parameters():
            kind = torch.int32 if dtype == torch.float32 else torch.int16
            info = torch.iinfo(kind)
            parameter.view(kind).random_(info.min, info.max)
    state = state_of(model)
    flags = [p.requires_grad_(i % 3 > 0).requires_grad for i, p in enumerate(model.parameters())]
    names = [n for n, _ in model.named_parameters()]
    bigops.pack_(model)
    assert same_state(model, state)
    record = bigops.unpack_(model)
    assert [d.name for d in record.done] == ["0", "1", "2", "3"]
    assert [type(m) for m in model] == [Linear, Linear, GatedMLP, LowRankLinear]
    assert model[1].activation == "gelu"
    assert same_state(model, state)
    assert [n for n, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == flags


def test_thaw_gives_the_parameter_back_in_place() -> None:
    layer = PackedLinear(70, 90, activation="relu")
    layer.weight.requires_grad_(False)
    state, x = state_of(layer), torch.randn(3, 70)
    names = [n for n, _ in layer.named_parameters()]
    with torch.inference_mode():  # what is made here can be trained later
        assert layer.freeze() is layer.freeze()
        packed = layer(x)
        assert layer.thaw() is layer.thaw()
    assert not layer.weight.requires_grad
    assert not layer.weight.is_inference()
    assert [n for n, _ in layer.named_parameters()] == names
    assert sorted(n for n, b in layer.named_buffers() if b is not None) == []
    assert same_state(layer, state)
    with expect("fused_linear"):
        layer(x)
    layer.weight.requires_grad_()
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.data += 1
    with torch.no_grad():
        assert not torch.equal(layer.freeze()(x), packed)


def test_thawed_low_rank_and_gated_layers_are_what_they_were() -> None:
    x = torch.randn(3, 101)
    low = LowRankLinear(101, 97, 65, activation="silu")
    packed = PackedLowRankLinear.from_low_rank(low).freeze()
    assert torch.equal(packed.dense_weight(), low.to_dense())
    assert packed.density == low.density
    assert torch.equal(packed.thaw()(x), low(x))
    mlp = GatedMLP(101, 67)
    block = PackedGatedMLP.from_mlp(mlp)
    assert block.frozen
    with expect("fused_linear"):
        block.thaw()(x)
    assert not block.frozen
    assert same_state(block, state_of(mlp))
    assert block.freeze().frozen


@pytest.mark.parametrize("assign", [False, True])
def test_dense_weights_are_packed_when_they_are_loaded(assign: bool) -> None:
    model, other, x = make().eval(), make().bfloat16().eval(), torch.randn(4, 65)
    bigops.pack_(model)
    model.load_state_dict(other.state_dict(), assign=assign)
    dtype = torch.bfloat16 if assign else torch.float32  # as a Parameter takes it
    state = {name: value.to(dtype) for name, value in other.state_dict().items()}
    assert same_state(model, state)
    twin = other.to(dtype)
    bigops.pack_(twin)
    with torch.inference_mode(), expect(".packed_linear."):
        assert torch.equal(model(x.to(dtype)), twin(x.to(dtype)))


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    model = make()
    bigops.pack_(model)
    state = state_of(model)
    for key, value, message in (
        ("0.weight", torch.zeros(131, 66), r"0: weight: expected shape \[131, 65\]; got \[131, 66"),
        ("3.v", torch.zeros(3), r"3: v: expected shape \[65, 101\]; got \[3\]"),
        ("2.up_proj.weight", None, r"2.up_proj: weight: expected shape.*got str"),
    ):
        broken = {key: "no tensor" if value is None else value}
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**state, **broken})
    del state["1.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"1.weight"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["1.weight"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0.panels"'):
        model.load_state_dict({**state_of(model), "0.panels": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"float32, bfloat16 or float16|got float64"):
        model.load_state_dict(
            {"0.weight": torch.zeros(131, 65).double()}, strict=False, assign=True
        )


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to("cpu"),
        lambda m: m.share_memory(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.train().eval(),
    ],
    ids=["deepcopy", "pickle", "to", "share_memory", "channels_last", "train"],
)
def test_copies_and_moves_stay_packed(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = make().eval(), torch.randn(4, 65)
    state = state_of(model)
    bigops.pack_(model)
    with torch.inference_mode():
        want = model(x)
    other = copied(model)
    assert same_state(other, state)
    assert other[0].panels.is_contiguous()
    with torch.inference_mode(), expect(".packed_linear."):
        assert torch.equal(other(x), want)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_casts_mean_the_weight(dtype: torch.dtype) -> None:
    model = make()
    want = state_of(copy.deepcopy(model).to(dtype))
    bigops.pack_(model)
    assert same_state(model.to(dtype), want)
    assert model(torch.randn(2, 65).to(dtype)).dtype == dtype
    with pytest.raises(TypeError, match=r"weight: expected a dtype.*got torch.float64.*thaw"):
        model[0].double()
    assert same_state(model, want)
    assert model[0].to("meta").state_dict()["weight"].is_meta


def test_save_and_load(tmp_path: Path) -> None:
    model, x = make().eval(), torch.randn(4, 65)
    plain = tmp_path / "plain.safetensors"
    bigops.save(model, plain)
    bigops.pack_(model)
    path = tmp_path / "packed.safetensors"
    bigops.save(model, path)
    alone = bigops.load(path)
    given = bigops.load(path, model=make())
    want = model(x)
    for loaded in (alone, given):
        assert [type(m) for m in loaded] == [type(m) for m in model]
        assert torch.equal(loaded(x), want)
    assert same_state(bigops.load(plain), state_of(model))  # the same tensors in either file
    meta = bigops.load(path, model=make().to("meta"))
    assert torch.equal(meta(x), want)


# --- reading the weight ----------------------------------------------------------------------


def test_the_weight_is_unpacked_where_it_is_read_and_cannot_be_set() -> None:
    model = make()
    dense = [model[0].weight.detach().clone(), model[3].u.detach() @ model[3].v.detach()]
    bigops.pack_(model)
    assert torch.equal(model[0].weight.clone(), dense[0])
    torch.testing.assert_close(model[3].weight.clone(), dense[1])
    for layer, name in ((model[2].up_proj, "v"), (model[3], "v")):
        assert not hasattr(layer, name)
    with pytest.raises(AttributeError, match=r"v: the layer is packed.*thaw\(\)"):
        model[3].v  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        model[0].weights  # noqa: B018
    for value in (nn.Parameter(torch.zeros(131, 65)), torch.zeros(131, 65)):
        with pytest.raises(AttributeError, match=r"weight: the layer is packed.*load_state_dict"):
            model[0].weight = value
    with pytest.raises(AttributeError, match=r"weight: the layer is packed"):
        model[0].register_parameter("weight", nn.Parameter(torch.zeros(131, 65)))
    with pytest.raises(AttributeError, match=r"v: the layer is packed"):
        model[3].register_parameter("v", None)
    frozen = QuantLinear(64, 64).freeze()
    with pytest.raises(AttributeError, match=r"QuantLinear.weight: the layer is frozen"):
        frozen.weight = nn.Parameter(torch.zeros(64, 64))
    with pytest.raises(AttributeError, match=r"QuantLinear.weight: the layer is frozen"):
        frozen.register_parameter("weight", nn.Parameter(torch.zeros(64, 64)))
    assert "weight" not in dict(frozen.named_parameters())


def test_other_layers_take_their_source_by_name() -> None:
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear; got ReLU"):
        PackedLinear.from_linear(nn.ReLU())
    with pytest.raises(ValueError, match=r"float weight; got a frozen one"):
        PackedLinear.from_linear(PackedLinear(64, 64).freeze())
    with pytest.raises(TypeError, match=r"layer: expected a LowRankLinear; got Linear"):
        PackedLowRankLinear.from_low_rank(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"mlp: expected a GatedMLP; got Linear"):
        PackedGatedMLP.from_mlp(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"w: expected .*got float64"):
        PackedLinear(64, 64, dtype=torch.float64).freeze()
    with pytest.raises(TypeError, match="float64"):
        PackedLinear(64, 64).freeze()(torch.randn(2, 64).double())
