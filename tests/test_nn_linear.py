"""bigops.nn.Linear: a drop-in for nn.Linear with activation and residual."""

import copy
import pickle

import pytest
import torch
from torch import nn

from bigops import backend
from bigops.nn import Linear
from bigops.nn.pack import Pack
from bigops.ops import _activation as act
from bigops.ops.packed_linear import pack_weight
from tests import tolerance
from tests.kernels_ran import expect, needs_extension


@pytest.fixture(autouse=True)
def _packing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU without AMX, where it does in every dtype."""
    monkeypatch.setattr(backend, "packs", lambda dtype: True)


def _truth(layer: nn.Linear, x: torch.Tensor, residual: torch.Tensor | None, activation: str):
    def run(dtype: torch.dtype) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.to(dtype)
        y = act.apply(activation, nn.functional.linear(x.to(dtype), layer.weight.to(dtype), bias))
        return y if residual is None else y + residual.to(dtype)

    scale = x.abs().double() @ layer.weight.abs().double().t()
    if layer.bias is not None:
        scale = scale + layer.bias.abs().double()
    if residual is not None:
        scale = scale + residual.abs().double()
    return run(torch.float64), run(x.dtype), scale * tolerance.LIPSCHITZ[activation]


@pytest.mark.parametrize("activation", sorted(tolerance.LIPSCHITZ))
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_gradients(activation: str, bias: bool) -> None:
    layer = Linear(20, 12, bias, activation)
    x, residual = torch.randn(3, 5, 20, requires_grad=True), torch.randn(3, 5, 12)
    out = layer(x, residual)
    tolerance.check(out, *_truth(layer, x, residual, activation))
    parameters = [x, *layer.parameters()]
    got = torch.autograd.grad(out.sum(), parameters)
    double = copy.deepcopy(layer).double()
    x64 = x.detach().double().requires_grad_()
    y64 = act.apply(activation, nn.functional.linear(x64, double.weight, double.bias))
    want = torch.autograd.grad(y64.sum(), [x64, *double.parameters()])
    plain = act.apply(activation, nn.functional.linear(x, layer.weight, layer.bias))
    plain_grads = torch.autograd.grad(plain.sum(), parameters)
    for g, w, p, name in zip(got, want, plain_grads, ("x", "weight", "bias"), strict=False):
        tolerance.check(g, w, p, w.abs().max(), what=f"gradient of {name}")


def test_rule_fails_on_a_wrong_activation() -> None:
    layer = Linear(20, 12, activation="gelu")
    x = torch.randn(5, 20)
    with pytest.raises(AssertionError, match="float64 says"):
        tolerance.check(layer(x), *_truth(layer, x, None, "gelu_tanh"))


def test_state_dict_is_that_of_nn_linear_both_ways() -> None:
    ours, theirs = Linear(6, 4, activation="relu"), nn.Linear(6, 4)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    theirs.load_state_dict(Linear(6, 4).state_dict())
    assert not torch.equal(ours.weight, theirs.weight)


def test_initialisation_is_that_of_nn_linear() -> None:
    torch.manual_seed(3)
    theirs = nn.Linear(7, 5)
    torch.manual_seed(3)
    ours = Linear(7, 5, activation="silu")
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


def test_from_linear_shares_parameters_and_draws_no_random_number() -> None:
    linear = nn.Linear(6, 4).eval()
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    ours = Linear.from_linear(linear, "tanh")
    assert torch.equal(state, torch.get_rng_state())
    assert ours.weight is linear.weight
    assert ours.bias is linear.bias
    assert not ours.training
    assert not ours.weight.requires_grad
    assert Linear.from_linear(ours).activation == "tanh"


def test_copies_and_pickle_keep_the_activation() -> None:
    layer = Linear(4, 3, activation="gelu")
    x = torch.randn(2, 4)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_repr_names_the_activation() -> None:
    assert "activation=silu" in repr(Linear(2, 3, activation="silu"))
    assert repr(Linear(2, 3)) == repr(nn.Linear(2, 3))


def test_errors_name_argument_expected_and_given() -> None:
    with pytest.raises(ValueError, match=r"activation: expected one of none.*got 'swish'"):
        Linear(2, 3, activation="swish")
    with pytest.raises(ValueError, match=r"activation: .*got 'swiglu'"):
        Linear(2, 3, activation="swiglu")
    with pytest.raises(ValueError, match=r"in_features: expected at least 0; got -1"):
        Linear(-1, 3)
    with pytest.raises(TypeError, match=r"out_features: expected an int; got float"):
        Linear(2, 3.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear; got Conv2d"):
        Linear.from_linear(nn.Conv2d(1, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x: expected shape \[.., 2\]"):
        Linear(2, 3)(torch.randn(4, 3))


# --- the pack ------------------------------------------------------------------------------


def _wide() -> Linear:
    return Linear(96, 80, activation="gelu").eval()


def _kernels(layer: nn.Module, x: torch.Tensor) -> list[str]:
    with torch.inference_mode(), backend.record() as names:
        layer(x)
    return list(names)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_inference_runs_from_a_pack(dtype: torch.dtype) -> None:
    layer, x = _wide().to(dtype), torch.randn(5, 96).to(dtype)
    residual = torch.randn(5, 80).to(dtype)
    own = layer.nbytes
    with torch.inference_mode(), expect(".packed_linear."):
        y = layer(x, residual)
    tolerance.check(y, *_truth(layer, x, residual, "gelu"))
    assert layer.nbytes == own + pack_weight(layer.weight).nbytes


@needs_extension
@pytest.mark.parametrize(
    "how",
    [
        lambda layer: layer.train(),
        lambda layer: layer.double(),
        lambda layer: Linear(20, 12).eval(),
    ],
    ids=["training", "float64", "small"],
)
def test_what_is_not_packed(how) -> None:  # type: ignore[no-untyped-def]
    layer = how(_wide())
    x = torch.randn(3, layer.in_features).to(layer.weight.dtype)
    assert all(".fused_linear." in name for name in _kernels(layer, x))
    assert layer._pack is None


@needs_extension
def test_no_pack_with_gradients_or_autocast() -> None:
    layer, x = _wide(), torch.randn(3, 96)
    with torch.no_grad(), expect(".fused_linear."):  # may be called once only: not worth a copy
        layer(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), expect(".bf16."):
        layer(x)
    assert layer._pack is None


def _in_place(layer: Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def _step(layer: Linear) -> None:
    layer(torch.randn(4, 96)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _loaded(layer: Linear) -> None:
    layer.load_state_dict(_wide().state_dict())


def _data_replaced(layer: Linear) -> None:
    layer.weight.data = torch.randn(80, 96)


def _parameter_replaced(layer: Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(80, 96))


@needs_extension
@pytest.mark.parametrize("change", [_in_place, _step, _loaded, _data_replaced, _parameter_replaced])
def test_a_pack_is_never_stale(change) -> None:  # type: ignore[no-untyped-def]
    layer, x = _wide(), torch.randn(5, 96)
    with torch.inference_mode():
        layer(x)
    change(layer)
    with torch.inference_mode(), expect(".packed_linear."):
        y = layer(x)
    tolerance.check(y, *_truth(layer, x, None, "gelu"))


@needs_extension
def test_a_planted_stale_pack_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pack, "is_fresh", lambda self, sources: True)
    with pytest.raises(AssertionError, match="float64 says"):
        test_a_pack_is_never_stale(_in_place)


@needs_extension
@pytest.mark.parametrize(
    "drop",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: m.to(torch.float32),
        lambda m: m.train(),
        lambda m: m.eval(),
    ],
)
def test_the_pack_is_dropped(drop) -> None:  # type: ignore[no-untyped-def]
    layer = _wide()
    _kernels(layer, torch.randn(2, 96))
    assert layer._pack is not None
    assert drop(layer)._pack is None


@needs_extension
def test_a_weight_made_under_inference_mode_is_not_packed() -> None:
    """It counts no versions, so a pack of it could not be kept."""
    with torch.inference_mode():
        layer = _wide()
        assert all(".fused_linear." in name for name in _kernels(layer, torch.randn(2, 96)))
    assert layer._pack is None


def test_a_dtype_that_does_not_pay_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "packs", lambda dtype: dtype != torch.bfloat16)
    layer = Linear(256, 256).eval().bfloat16()
    with torch.inference_mode(), backend.record() as ran:
        layer(torch.randn(4, 256).bfloat16())
    assert not any("packed" in name for name in ran)
    assert layer._pack is None
