"""bigops.nn.GatedMLP: one op for gate and up, the state_dict of Llama-type blocks."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bigops.nn import GatedMLP
from bigops.ops import activation as act
from tests.support import tolerance


class LlamaStyle(nn.Module):
    """The block as models write it, with three projections."""

    def __init__(self, k: int, h: int, bias: bool, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(k, h, bias)
        self.up_proj = nn.Linear(k, h, bias)
        self.down_proj = nn.Linear(h, k, bias)
        self.inner = act.GATED[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(act.apply(self.inner, self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("activation", list(act.GATED))
@pytest.mark.parametrize("bias", [True, False])
def test_equals_three_projections(activation: str, bias: bool) -> None:
    plain = LlamaStyle(12, 20, bias, activation)
    ours = GatedMLP(12, 20, activation=activation, bias=bias)
    ours.load_state_dict(plain.state_dict())
    x, residual = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    truth = copy.deepcopy(plain).double()
    ref64 = truth(x.double()) + residual.double()
    scale = ref64.abs().max() + x.abs().max()
    tolerance.check(ours(x, residual), ref64, plain(x) + residual, scale)
    with pytest.raises(AssertionError, match="float64 says"):
        tolerance.check(ours(x, residual) + 1e-3, ref64, plain(x) + residual, scale)


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys_are_those_of_llama_both_ways(bias: bool) -> None:
    plain, ours = LlamaStyle(8, 12, bias, "swiglu"), GatedMLP(8, 12, bias=bias)
    assert sorted(ours.state_dict()) == sorted(plain.state_dict())
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(plain.up_proj.weight, ours.gate_up_weight[12:])
    wrapped = nn.ModuleDict({"mlp": GatedMLP(8, 12, bias=bias)})
    state = nn.ModuleDict({"mlp": plain}).state_dict()
    wrapped.load_state_dict(state)
    assert torch.equal(wrapped["mlp"].gate_up_weight, ours.gate_up_weight)
    meta = GatedMLP(8, 12, bias=bias, device="meta")
    meta.load_state_dict(plain.state_dict(), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(meta(x), ours(x))


def test_state_dict_of_a_trained_block_is_a_view() -> None:
    ours = GatedMLP(4, 6)
    with torch.no_grad():
        ours.state_dict()["up_proj.weight"].zero_()
    assert not ours.gate_up_weight[6:].any()
    assert ours.gate_up_weight[:6].any()


def test_load_errors_name_the_llama_keys() -> None:
    ours = GatedMLP(4, 6)
    before = ours.gate_up_weight.clone()
    state = dict(ours.state_dict())
    state.pop("up_proj.weight")
    with pytest.raises(RuntimeError, match=r'Missing key.*"up_proj.weight"') as caught:
        ours.load_state_dict(state)
    assert "gate_up_weight" not in str(caught.value)
    state = {**ours.state_dict(), "gate_proj.weight": torch.zeros(5, 4)}
    with pytest.raises(RuntimeError, match=r"size mismatch for gate_proj.weight"):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"gate_proj.bias"'):
        ours.load_state_dict({**ours.state_dict(), "gate_proj.bias": torch.zeros(6)})
    assert torch.equal(ours.gate_up_weight, before)


def test_from_modules() -> None:
    plain = LlamaStyle(8, 12, False, "geglu").eval()
    ours = GatedMLP.from_modules(plain.gate_proj, plain.up_proj, plain.down_proj, "geglu")
    assert ours.down_proj.weight is plain.down_proj.weight
    assert not ours.training
    x = torch.randn(3, 8)
    ref64 = copy.deepcopy(plain).double()(x.double())
    tolerance.check(ours(x), ref64, plain(x), ref64.abs().max() + x.abs().max())


def test_trains() -> None:
    ours = GatedMLP(8, 12, bias=True)
    ours(torch.randn(3, 8)).square().sum().backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"activation: expected a gated pair.*got 'relu'"):
        GatedMLP(4, 6, activation="relu")
    a, b = nn.Linear(4, 6), nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"up: expected a weight of \[6, 4\].*got \[5, 4\]"):
        GatedMLP.from_modules(a, b, nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"down: expected in_features 6.*got 7"):
        GatedMLP.from_modules(a, nn.Linear(4, 6), nn.Linear(7, 4))
    with pytest.raises(ValueError, match=r"bias: expected all three or none"):
        GatedMLP.from_modules(a, nn.Linear(4, 6), nn.Linear(6, 4, bias=False))
    with pytest.raises(TypeError, match=r"gate: expected a torch.nn.Linear; got ReLU"):
        GatedMLP.from_modules(nn.ReLU(), a, a)  # type: ignore[arg-type]
