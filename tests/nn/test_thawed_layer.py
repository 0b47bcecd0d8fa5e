"""The thawed state of bigops.nn.SparseLinear: training on the stored values themselves."""

import copy

import pytest
import torch
from torch import nn

import bigops.backend as backend
from bigops.backend import machine
from bigops.nn import Linear, SparseLinear
from tests.nn.test_sparse_layer import PATTERNS, sparse_layer
from tests.support import tolerance
from tests.support.kernels_ran import named


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_thawed_layer_trains_as_the_masked_dense_one(pattern: str) -> None:
    """The same steps of AdamW with weight decay, by the rule on the weights that come out."""
    k, n, steps = 70, 40, 3
    torch.manual_seed(2)
    linear = Linear(k, n, activation="gelu")
    sparsity = None if ":" in pattern else 0.6
    layer = SparseLinear.from_linear(linear, sparsity, pattern, "fp32")
    full = layer.pattern.expand(layer.mask, n, k)
    start = layer.masked_weight().detach().clone()
    layer.freeze().thaw()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias", "values"]
    x, target = torch.randn(30, k), torch.randn(30, n)
    padding = ~layer.storage().positions().stored

    def run(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        optimiser = torch.optim.AdamW([weight, bias], lr=1e-2, weight_decay=0.1)
        for _ in range(steps):
            y = nn.functional.gelu(nn.functional.linear(x.to(weight.dtype), weight * full, bias))
            loss = (y - target.to(weight.dtype)).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return weight.detach() * full

    assert linear.bias is not None
    truth = run(start.double(), linear.bias.detach().double())
    plain = run(start, linear.bias.detach())
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    with backend.record() as names:
        for _ in range(steps):
            loss = (layer(x) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            assert layer.values.grad is not None
            assert not layer.values.grad[padding].any()
            optimiser.step()
    if machine.extension is not None:
        assert not any(name.startswith("reference") for name in names), names
        assert any(name.endswith("f32_sample") for name in names), names
    assert not layer.values[padding].any()
    # an update of AdamW is lr wherever the gradient is: the scale of what a step may move
    tolerance.check(layer.dense_weight(), truth, plain, truth.abs() + steps * 1e-2)


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_a_thawed_layer_learns_and_freezes_again(values: str) -> None:
    torch.manual_seed(1)
    layer = sparse_layer(values).freeze().thaw()
    assert layer.thaw().thawed
    x, y = torch.randn(64, 40), torch.randn(64, 24).relu()
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-4)
    keys = set(layer.state_dict())
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    density = layer.density
    layer.freeze()
    assert not layer.thawed
    assert set(layer.state_dict()) == keys
    assert layer.density == density
    layer.storage().validate()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]


def test_thawed_state_moves_copies_and_loads() -> None:
    layer = sparse_layer("fp32").freeze().thaw()
    x = torch.randn(4, 40)
    expected = layer(x).detach()
    twin = copy.deepcopy(layer)
    assert twin.thawed
    assert torch.equal(twin(x), expected)
    parameter = twin.values
    half = twin.half()
    assert half.values is parameter
    assert half.values.dtype == torch.float32
    other = sparse_layer("fp32", sparsity=0.5).freeze().thaw()
    parameter = other.values
    other.load_state_dict(layer.state_dict())
    assert other.values is parameter
    assert torch.equal(other(x), expected)
    frozen = sparse_layer("fp32", sparsity=0.5).freeze()
    frozen.load_state_dict(layer.state_dict())
    assert torch.equal(frozen(x), expected)


def test_a_cast_keeps_values_and_their_gradient() -> None:
    layer = sparse_layer("fp32").freeze().thaw()
    layer(torch.randn(4, 40)).sum().backward()
    values, gradient = layer.values.detach().clone(), layer.values.grad
    assert gradient is not None
    optimiser = torch.optim.SGD([layer.values], lr=0.1)
    gradient = gradient.clone()
    layer.half()
    assert torch.equal(layer.values.detach(), values)
    assert torch.equal(layer.values.grad, gradient)
    optimiser.step()
    assert torch.equal(layer.values.detach(), values.add(gradient, alpha=-0.1))


def test_loading_another_size_drops_the_gradient_of_the_old() -> None:
    layer, other = sparse_layer("fp32").freeze(), sparse_layer("fp32", sparsity=0.5).freeze().thaw()
    other(torch.randn(4, 40)).sum().backward()
    assert other.values.grad is not None
    other.load_state_dict(layer.state_dict())
    assert other.values.grad is None
    other(torch.randn(4, 40)).sum().backward()
    assert other.values.grad.shape == layer.values.shape


@pytest.mark.parametrize("values", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_padding_stays_zero(optimiser: str, pattern: str, values: str) -> None:
    """Momentum and weight decay keep a 0 whose gradient is 0; odd sizes pad every way there is."""
    layer = sparse_layer(values, 37, None if ":" in pattern else 0.6, pattern).freeze().thaw()
    at = layer.storage().positions()
    below, right = at.row >= 24, at.word >= 37 / layer.values.shape[-1]
    padding = ~at.stored | below | right
    last = (at.word == 18) & ~padding  # bf16: column 37 fills the last word of a row
    step: torch.optim.Optimizer
    if optimiser == "sgd":
        step = torch.optim.SGD([layer.values], lr=0.1, momentum=0.9, weight_decay=0.1)
    else:
        step = torch.optim.AdamW([layer.values], lr=0.1, weight_decay=0.1)
    before = layer.values.detach().clone()
    for _ in range(4):
        step.zero_grad()
        layer(torch.randn(9, 37)).square().sum().backward()
        step.step()
    assert not layer.values[padding].any()
    if values == "bf16":
        assert not layer.values[last][:, 1].any()
    assert (layer.values != before).any()
    layer.storage().validate()


def test_a_planted_gradient_in_the_padding_moves_no_weight_and_no_file_may_hold_it() -> None:
    layer = sparse_layer("fp32", pattern="1x1").freeze().thaw()
    before, padding = layer.dense_weight(), ~layer.storage().positions().stored
    layer.values.grad = padding.unsqueeze(-1).float()
    torch.optim.SGD([layer.values], lr=0.1).step()
    assert torch.equal(layer.dense_weight(), before)
    layer.storage().validate()
    with pytest.raises(ValueError, match="values: expected 0 in the padding"):
        layer.storage().replace(values=layer.values).validate()


def test_freezing_a_thawed_layer_refuses_nan_and_leaves_it() -> None:
    layer = sparse_layer("fp32").freeze().thaw()
    with torch.no_grad():
        layer.values.view(-1)[0] = torch.nan
    parameter = layer.values
    with pytest.raises(ValueError, match="values: expected finite"):
        layer.freeze()
    assert layer.thawed
    assert layer.values is parameter


def test_values_loaded_under_inference_mode_can_be_thawed() -> None:
    source = sparse_layer("fp32").freeze()
    layer = SparseLinear.from_arguments(source.arguments())
    with torch.inference_mode():
        state = {k: v.clone() for k, v in source.state_dict().items()}
        layer.load_state_dict(state, assign=True)
    layer.thaw()
    assert not layer.values.is_inference()
    assert layer.values.requires_grad


def test_bf16_values_under_autocast_and_beside_a_float32_residual() -> None:
    layer = sparse_layer("bf16").freeze().thaw()
    x, residual = torch.randn(6, 40), torch.randn(6, 24) + 1000
    with torch.autocast("cpu", dtype=torch.bfloat16), backend.record() as names:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert names
    assert all(named("sparse_linear", ".bf16.bf16") in name for name in names), names
    y.float().sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.bfloat16
    # 1000 has a step of 4 in bfloat16: what is added in float32 is not rounded to it
    assert torch.equal(layer(x, residual), layer(x) + residual)
    with pytest.raises(ValueError, match=r"residual: expected shape \[6, 24\]"):
        layer(x, residual[:1])


def test_thaw_refuses() -> None:
    with pytest.raises(ValueError, match="thaw: expected a frozen layer"):
        sparse_layer("fp32").thaw()
    with pytest.raises(ValueError, match="thaw: expected floating values; got int8"):
        sparse_layer().freeze().thaw()
    with pytest.raises(ValueError, match="got a thawed one"):
        SparseLinear.from_linear(sparse_layer("fp32").freeze().thaw())
    with pytest.raises(ValueError, match="chunk: expected 64, 128 or 256; got 32"):
        SparseLinear(8, 4, chunk=32)


WRITERS = {
    "noise": lambda v: v.data.add_(torch.randn_like(v)),
    "data =": lambda v: setattr(v, "data", torch.randn_like(v)),
    "init": lambda v: nn.init.normal_(v),
    "vector": lambda v: nn.utils.vector_to_parameters(torch.randn(v.numel()).to(v.dtype), [v]),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("pattern", ["1x4", "1x1", "16x16", "2:4"])
@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_what_is_written_into_the_padding_is_no_weight(
    values: str, pattern: str, writer: str
) -> None:
    """Some values fill up rows of slices, or stand beside the matrix: nothing may come of them."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[values]
    linear = nn.Linear(71, 41).to(dtype)
    layer = SparseLinear.from_linear(linear, None if ":" in pattern else 0.7, pattern, values)
    layer.freeze().thaw()
    x = torch.randn(5, 71).to(dtype)
    layer(x)
    with torch.no_grad():
        WRITERS[writer](layer.values)
    dense = layer.dense_weight()
    assert layer.bias is not None
    bias = layer.bias.detach()

    def check(y: torch.Tensor) -> None:
        truth = x.double() @ dense.double().T + bias.double()
        plain = (x.float() @ dense.T + bias.float()).to(dtype)
        scale = x.double().abs() @ dense.double().abs().T + bias.double().abs()
        tolerance.check(y, truth, plain, scale)

    y = layer(x)
    check(y)
    y.float().sum().backward()
    assert not layer.values.grad[~layer.storage().inside()].any()
    twin = SparseLinear.from_arguments(layer.arguments()).to_empty(device="cpu")
    twin.load_state_dict(layer.state_dict(), assign=True)
    check(twin(x))
    check(layer.freeze()(x))
    layer.storage().validate()
