"""bigops.nn.LowRankLinear: values, the factorisation of a dense layer, and the way back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bigops.nn import Linear, LowRankLinear
from bigops.ops import activation as act
from tests.support import tolerance


def _dense_truth(layer: LowRankLinear, x: torch.Tensor, residual: torch.Tensor | None):
    """(float64 truth, plain torch in x's dtype, scale) of the two products."""

    def run(dtype: torch.dtype) -> torch.Tensor:
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        inner = nn.functional.linear(x.to(dtype), layer.v.detach().to(dtype))
        z = nn.functional.linear(inner, layer.u.detach().to(dtype), bias)
        y = act.apply(layer.activation, z)
        return y if residual is None else y + residual.to(dtype)

    u, v = layer.u.detach().abs().double(), layer.v.detach().abs().double()
    scale = x.abs().double() @ v.t() @ u.t()
    for extra in (layer.bias, residual):
        if extra is not None:
            scale = scale + extra.detach().abs().double()
    return run(torch.float64), run(x.dtype), scale * tolerance.LIPSCHITZ[layer.activation]


@pytest.mark.parametrize("activation", sorted(tolerance.LIPSCHITZ))
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_forward(activation: str, rank: int) -> None:
    layer = LowRankLinear(13, 9, rank, activation=activation)
    x, residual = torch.randn(3, 4, 13), torch.randn(3, 4, 9)
    with torch.no_grad():
        tolerance.check(layer(x, residual), *_dense_truth(layer, x, residual))


def test_rule_fails_on_a_lost_residual() -> None:
    layer = LowRankLinear(13, 9, 4)
    x, residual = torch.randn(6, 13), torch.randn(6, 9)
    with pytest.raises(AssertionError, match="float64 says"), torch.no_grad():
        tolerance.check(layer(x), *_dense_truth(layer, x, residual))


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=30, deadline=None)
def test_from_linear_is_the_best_of_its_rank(k: int, n: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, min(k, n)))
    linear = nn.Linear(k, n).double()
    low = LowRankLinear.from_linear(linear, rank)
    weight = linear.weight.detach()
    # Eckart and Young: the squared error is the sum of the squared singular values left out.
    left_out = torch.linalg.svdvals(weight)[rank:].square().sum()
    error = (low.to_dense() - weight).square().sum()
    eps = torch.finfo(torch.float64).eps
    assert abs(error - left_out) <= 100 * eps * weight.square().sum()


@given(st.floats(0.01, 1.0))
@settings(max_examples=30, deadline=None)
def test_energy_takes_the_least_rank_that_keeps_it(energy: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(11, 7).double()
    low = LowRankLinear.from_linear(linear, energy=energy)
    squares = torch.linalg.svdvals(linear.weight.detach()).square()
    share = squares.cumsum(0) / squares.sum()
    slack = 1e-12  # sums of seven float64 numbers in another order
    assert share[low.rank - 1] >= energy - slack
    assert low.rank == 1 or share[low.rank - 2] < energy + slack


def test_energy_of_a_low_rank_weight_finds_its_rank() -> None:
    linear = nn.Linear(20, 30, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(30, 3) @ torch.randn(3, 20))
    assert LowRankLinear.from_linear(linear, energy=0.999999).rank <= 3
    with torch.no_grad():
        linear.weight.zero_()
    assert LowRankLinear.from_linear(linear, energy=0.5).rank == 0


def test_from_linear_keeps_activation_mode_flags_and_dtype() -> None:
    linear = Linear(8, 6, activation="gelu", dtype=torch.bfloat16).eval()
    linear.bias.requires_grad_(False)
    low = LowRankLinear.from_linear(linear, 2)
    assert low.activation == "gelu"
    assert not low.training
    assert low.u.dtype == low.v.dtype == torch.bfloat16
    assert low.u.requires_grad
    assert low.bias is not None
    assert not low.bias.requires_grad
    assert low.bias.data_ptr() != linear.bias.data_ptr()
    back = low.to_linear()
    assert type(back) is Linear
    assert back.activation == "gelu"
    assert not back.training
    assert torch.equal(back.weight, low.to_dense())


def test_new_layers_have_the_variance_of_nn_linear() -> None:
    torch.manual_seed(1)
    low = LowRankLinear(256, 512, 64)
    dense = nn.Linear(256, 512)
    ratio = float(low.to_dense().var() / dense.weight.var())
    assert 0.9 < ratio < 1.1  # 131,072 products of 64 terms: the spread of the ratio is about 2 %


def test_training_keeps_the_rank_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 10)
    target = x @ torch.randn(10, 2) @ torch.randn(2, 6)
    layer = LowRankLinear(10, 6, 2)
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
    assert int(torch.linalg.matrix_rank(layer.to_dense(), rtol=1e-5)) == 2


def test_state_dict_arguments_and_copies() -> None:
    layer = LowRankLinear(7, 5, 3, bias=False, activation="relu")
    assert list(layer.state_dict()) == ["u", "v"]
    again = LowRankLinear(**layer.arguments())
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 7)
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.density == pytest.approx((5 * 3 + 3 * 7) / 35)
    assert layer.nbytes == 4 * (15 + 21)
    assert "rank=3" in repr(layer)
    assert "activation=relu" in repr(layer)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: LowRankLinear(4, 3, 4), ValueError, "rank: expected 0 to 3"),
        (lambda: LowRankLinear(4, 3, -1), ValueError, "rank: expected at least 0; got -1"),
        (lambda: LowRankLinear(4, 3, 1.0), TypeError, "rank: expected an int; got float"),
        (lambda: LowRankLinear(4, 3, 1, activation="swiglu"), ValueError, "activation"),
        (lambda: LowRankLinear.from_linear(nn.ReLU(), 1), TypeError, "linear: expected a torch"),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 3)), ValueError, "one of the two"),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 3), 1, 0.5), ValueError, "one of the two"),
        (
            lambda: LowRankLinear.from_linear(nn.Linear(4, 3), 4),
            ValueError,
            "rank: expected 0 to 3",
        ),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 3), energy=0.0), ValueError, "energy"),
        (lambda: LowRankLinear.from_linear(nn.Linear(4, 3), energy=1.5), ValueError, "energy"),
    ],
)
def test_errors_name_the_argument(call, kind, text) -> None:
    with pytest.raises(kind, match=text):
        call()


def test_a_weight_with_nan_is_refused() -> None:
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weight"):
        LowRankLinear.from_linear(linear, 1)
