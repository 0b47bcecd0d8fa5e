"""bigops.nn.Linear: a drop-in for nn.Linear with activation and residual."""

import copy
import pickle
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bigops.nn import GatedMLP, Linear, LinearCrossEntropy
from bigops.ops import activation as act
from tests.support import tolerance


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
    layer = Linear(20, 12, bias, activation=activation)
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


# --- called and made as torch's own -------------------------------------------------------------

MADE = {
    "Linear": lambda *a, **k: Linear(*a, **k),
    "LinearCrossEntropy": lambda *a, **k: LinearCrossEntropy(*a, **k),
    "GatedMLP": lambda i, o, bias=True, device=None, dtype=None: GatedMLP(
        i, o, bias=bias, device=device, dtype=dtype
    ),
}
SIZES = {
    "int": 6,
    "numpy.int64": np.prod((2, 3)),
    "numpy.int8": np.int8(6),
    "tensor": torch.tensor(6),
    "IntEnum": IntEnum("Size", {"SIX": 6}).SIX,  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("name", MADE)
def test_device_and_dtype_by_position_as_in_torch(name: str) -> None:
    layer = MADE[name](4, 3, True, "meta", torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    assert {p.dtype for p in MADE[name](4, 3, False, "cpu").parameters()} == {torch.float32}


@pytest.mark.parametrize("name", MADE)
def test_default_dtype_and_device_are_torchs(name: str) -> None:
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            layer = MADE[name](4, 3)
    finally:
        torch.set_default_dtype(before)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


def test_what_torch_has_not_comes_by_keyword_alone() -> None:
    with pytest.raises(TypeError, match="positional"):
        Linear(4, 3, True, "cpu", torch.float32, "relu")  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        LinearCrossEntropy(4, 3, True, "cpu", torch.float32, None)  # type: ignore[misc]


def test_forward_takes_input_by_its_name() -> None:
    x, residual = torch.randn(2, 4), torch.randn(2, 3)
    layer, mlp, loss = Linear(4, 3), GatedMLP(4, 8, 3), LinearCrossEntropy(4, 3)
    assert torch.equal(layer(input=x, residual=residual), layer(x, residual))
    assert torch.equal(mlp(input=x, residual=residual), mlp(x, residual))
    target = torch.tensor([0, 2])
    assert torch.equal(loss(input=x, target=target), loss(x, target))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", MADE)
def test_sizes_of_any_integer_type(name: str, size: Any) -> None:
    layer = MADE[name](size, size)
    assert type(layer.in_features) is type(layer.out_features) is int
    assert [p.shape for p in layer.parameters()] == [p.shape for p in MADE[name](6, 6).parameters()]


@pytest.mark.parametrize(
    "size", [True, np.bool_(True), torch.tensor(True), torch.tensor(2.0), np.float32(2), "2"]
)
@pytest.mark.parametrize("name", MADE)
def test_sizes_that_are_no_integer(name: str, size: Any) -> None:
    with pytest.raises(TypeError, match=r"in_features: expected an int; got "):
        MADE[name](size, 4)


def test_from_linear_of_a_layer_whose_sizes_are_numpys() -> None:
    old = nn.Linear(np.int64(4), np.int64(3))
    for cls in (Linear, LinearCrossEntropy):
        new = cls.from_linear(old)
        assert type(new.in_features) is type(new.out_features) is int
        assert new.weight is old.weight


@pytest.mark.parametrize("value", ["relu", nn.ReLU(), torch.relu])
def test_an_attribute_of_another_layer_is_not_taken_for_our_activation(value: Any) -> None:
    old = nn.Linear(4, 3)
    old.activation = value
    new = Linear.from_linear(old)
    assert new.activation == "none"
    x = torch.randn(2, 4)
    torch.testing.assert_close(new(x), old(x))
    assert Linear.from_linear(Linear(4, 3, activation="relu")).activation == "relu"
