"""bigops.nn.Linear: a drop-in for nn.Linear with activation and residual."""

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bigops
from bigops import Fp8, Int4, Int8, LowRank, Sparse
from bigops.nn import Linear
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


@pytest.mark.parametrize("size", [np.int64, torch.tensor], ids=["numpy", "tensor"])
@pytest.mark.parametrize("config", [None, Int8(), Int4(), Sparse(0.5), LowRank(4), Fp8()], ids=str)
def test_sizes_that_a_host_computed(size: Any, config: Any, tmp_path: Path) -> None:
    """torch takes `nn.Linear(np.prod(shape), 64)`, and 0-dim tensors; here they become ints."""
    model = nn.Sequential(nn.Linear(size(64), size(32)), nn.Tanh(), nn.Linear(32, 4)).eval()
    if config is None:
        bigops.fuse_(model)
    else:
        bigops.compress_(model, config, keep="all")
    layer: Any = model[0]
    assert type(layer) is not nn.Linear
    assert [type(layer.in_features), type(layer.out_features)] == [int, int]
    bigops.save(model, tmp_path / "m")
    x = torch.randn(3, 64)
    assert torch.equal(bigops.load(tmp_path / "m")(x), model(x))
