"""bigops.nn.QLoRALinear: adapters on a compressed layer of every kind."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.nn import Linear, LoRALinear, LowRankLinear, QLoRALinear, QuantLinear
from bigops.ops import activation as act
from tests.nn.stored_cases import LAYERS as STORED
from tests.nn.stored_cases import K, N, bits_of, check_same
from tests.support import tolerance

LAYERS: dict[str, Any] = {
    **{name: make for name, make in STORED.items() if name != "packed gated"},
    "factors": lambda: LowRankLinear(K, N, 16),
    "recovery": lambda: QuantLinear(K, N),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


def adapted(base: Any, names: tuple[str, ...] = ("one", "two"), dropout: float = 0.0) -> Any:
    layer = QLoRALinear(base)
    for rank, name in enumerate(names, 3):
        layer.add_adapter(name, rank, alpha=6.0, dropout=dropout)
        with torch.no_grad():
            layer.adapters[name].b.normal_()
    return layer


def check(layer: Any, base: Any, x: Tensor, residual: Tensor | None, got: Tensor) -> None:
    """Held by float64 on top of what the base itself answers."""
    with torch.no_grad():
        z = base(x)

    def run(dtype: torch.dtype, sizes: bool = False) -> Tensor:
        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype).abs() if sizes else t.detach().to(dtype)

        y = cast(z)
        for name in layer.active:
            one = layer.adapters[name]
            y = y + one.scale * (cast(x) @ cast(one.a).t() @ cast(one.b).t())
        y = y if sizes else act.apply(layer.activation, y)
        return y if residual is None else y + cast(residual)

    scale = run(torch.float64, sizes=True) * tolerance.LIPSCHITZ[layer.activation]
    tolerance.check(got.detach(), run(torch.float64), run(torch.float32), scale)


@KINDS
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("names", [(), ("two",), ("one", "two")], ids=str)
def test_forward(kind: str, activation: str, names: tuple[str, ...]) -> None:
    base = LAYERS[kind]().eval()
    plain = copy.deepcopy(base)
    base.activation = activation
    layer = adapted(base).eval()
    layer.set_active(names)
    assert layer.activation == activation
    x, residual = torch.randn(2, 3, K), torch.randn(2, 3, N)
    with torch.no_grad():
        check(layer, plain, x, None, layer(x))
        check(layer, plain, x, residual, layer(x, residual))
    assert base.activation == activation  # the layer that was given is as it was


def test_a_lost_scale_is_seen() -> None:
    base = LAYERS["int8"]()
    layer = adapted(base)
    layer.adapters["one"].scale *= 1.01
    got = layer(torch.ones(2, K))
    layer.adapters["one"].scale /= 1.01
    with pytest.raises(AssertionError, match="float64 says"):
        check(layer, base, torch.ones(2, K), None, got)


@KINDS
def test_a_step_moves_the_adapter_alone(kind: str) -> None:
    torch.manual_seed(0)
    layer = adapted(LAYERS[kind](), ("one",))
    layer._freeze()
    model = nn.Sequential(layer)
    before = bits_of(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.adapters.one.a", "0.adapters.one.b"}
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    optimizer = bigops.train.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    x = torch.randn(5, K, requires_grad=True)
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert x.grad is not None
    check_same(model, before)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)


@KINDS
def test_gradients_against_float64(kind: str) -> None:
    """Those of the layer with the dense weight that the base stands for."""
    base = LAYERS[kind]()
    layer = adapted(base, ("one",))
    x, grad = torch.randn(4, K, requires_grad=True), torch.randn(4, N)
    (layer(x) * grad).sum().backward()
    one = layer.adapters["one"]
    w, a, b = (t.detach().double() for t in (layer.base_weight, one.a, one.b))
    g, x64 = grad.double(), x.detach().double()
    want = {
        "x": g @ (w + one.scale * b @ a),
        "a": one.scale * (g @ b).T @ x64,
        "b": one.scale * g.T @ (x64 @ a.T),
    }
    for name, got in {"x": x.grad, "a": one.a.grad, "b": one.b.grad}.items():
        loose = 0.02 if kind == "sparse bf16" and name == "x" else 1e-4
        torch.testing.assert_close(got.double(), want[name], rtol=loose, atol=loose * 10)


def test_dropout_acts_in_training_only() -> None:
    layer = adapted(LAYERS["int8"](), ("one",), dropout=0.5)
    x = torch.randn(6, K)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


@KINDS
def test_states_and_copies(kind: str) -> None:
    layer = adapted(LAYERS[kind]()).eval()
    x = torch.randn(3, K)
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), want)
        other = adapted(LAYERS[kind]()).eval()
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), want)
    names = {n.partition(".")[0] for n in layer.state_dict()}
    assert names == {"base", "adapters"}
    assert layer.nbytes == sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))


@KINDS
def test_the_ways_out(kind: str) -> None:
    base = LAYERS[kind]().eval()
    layer, x = adapted(base).eval(), torch.randn(3, K)
    said = f"merge: expected a dense base; got a {type(base).__name__}"
    with pytest.raises(RuntimeError, match=said):
        layer.merge()
    with torch.no_grad():
        dense = layer.to_linear()
        torch.testing.assert_close(dense.weight, layer.weight.clone(), rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.to_base()(x), base(x))


def test_what_is_no_compressed_layer_is_refused() -> None:
    for module in (nn.Linear(3, 3), Linear(3, 3), nn.ReLU(), LoRALinear(3, 3)):
        with pytest.raises(TypeError, match="base: expected a compressed layer of bigops.nn; got"):
            QLoRALinear(module)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got QuantLinear \(QLoRALinear takes a compressed one\)"):
        LoRALinear.from_linear(QuantLinear(8, 8).freeze(), 2)


PLANS = [
    bigops.Int8(),
    bigops.Int4(),
    bigops.Fp8(),
    bigops.Sparse(0.8) + bigops.Int8(),
    bigops.LowRank(4),
    bigops.LowRank(4) + bigops.Int8(),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_add_lora_on_a_compressed_model(plan: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    bigops.compress_(model, plan, keep="all")
    x = torch.randn(5, 64)
    with torch.no_grad():
        want = model(x)
    record = bigops.add_lora_(model, rank=2)
    assert [done.name for done in record.done] == ["0", "2"]
    assert all("QLoRALinear, rank 2" in done.what for done in record.done)
    with torch.no_grad():
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)  # b is zero
    model(x).square().mean().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == {f"{i}.adapters.default.{f}" for i in (0, 2) for f in "ab"}
    record = bigops.add_lora_(model, rank=3, name="more")
    assert model[0].active == ("default", "more")


def test_a_model_that_is_refused_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    bigops.compress_(model, bigops.Int8(), keep="all")
    bigops.fuse_(model)
    layer, text = model[0], repr(model)
    with pytest.raises(ValueError, match=re.escape("alpha: expected a finite number")):
        bigops.add_lora_(model, rank=2, alpha=float("nan"))
    assert model[0] is layer
    assert repr(model) == text


def test_saved_and_loaded(tmp_path: Any) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8))
        bigops.compress_(model, bigops.Int8(), keep="all")
        bigops.add_lora_(model, rank=2)
        return model.eval()

    model, other, x = make(), make(), torch.randn(3, 64)
    with torch.no_grad():
        model[0].adapters["default"].b.normal_()
        torch.save(model.state_dict(), tmp_path / "m.pt")
        other.load_state_dict(torch.load(tmp_path / "m.pt"))
        assert torch.equal(other(x), model(x))
