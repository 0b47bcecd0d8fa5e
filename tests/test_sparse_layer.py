"""bigops.nn.SparseLinear: 1x4 blocks, a kept pattern, storage of any size in one state_dict."""

import copy

import pytest
import torch
from torch import nn

import bigops.backend as backend
from bigops.nn import Linear, QuantLinear, SparseLinear
from bigops.ops.sparse_linear import block_mask, sparse_linear, sparsify_weight
from tests import tolerance


def _layer(int8: bool = True, k: int = 40, sparsity: float = 0.75) -> SparseLinear:
    return SparseLinear.from_linear(Linear(k, 24, activation="relu"), sparsity, int8)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("k", [40, 38, 1100])
def test_inference_runs_the_sparse_op(int8: bool, k: int) -> None:
    layer = _layer(int8, k).eval()
    x, residual = torch.randn(5, k), torch.randn(5, 24)
    storage = sparsify_weight(layer.weight, layer.mask, int8)
    expected = sparse_linear(x, storage, layer.bias, residual, "relu").detach()
    with torch.inference_mode(), backend.record() as names:
        out = layer(x, residual)
    assert torch.equal(out, expected)
    assert names
    assert all("sparse_linear" in name for name in names), names
    assert torch.equal(layer.freeze()(x, residual).detach(), expected)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("k", [40, 38])
def test_gradient_and_forward_stay_on_the_pattern(int8: bool, k: int) -> None:
    layer = _layer(int8, k)
    pattern = layer.mask.repeat_interleave(4, 1)[:, :k]
    assert layer.mask.sum() == round(0.25 * layer.mask.numel())
    dense = sparsify_weight(layer.weight, layer.mask, int8).to_dense()
    assert torch.equal(layer.trained_weight(), dense)
    assert not dense[~pattern].any()
    layer(torch.randn(6, k)).square().sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[~pattern].any()
    assert layer.weight.grad[pattern].any()


def test_gradient_is_that_of_the_masked_dense_layer() -> None:
    layer = _layer(int8=False)
    x = torch.randn(6, 40)
    layer(x).sum().backward()

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        w = layer.masked_weight().detach().to(dtype).requires_grad_()
        assert layer.bias is not None
        y = nn.functional.linear(x.to(dtype), w, layer.bias.detach().to(dtype)).relu()
        return torch.autograd.grad(y.sum(), w)[0] * layer.mask.repeat_interleave(4, 1)

    assert layer.weight.grad is not None
    scale = x.abs().double().sum(0)
    tolerance.check(layer.weight.grad, gradient(torch.float64), gradient(torch.float32), scale)
    wrong = layer.weight.grad * 77
    with pytest.raises(AssertionError):
        tolerance.check(wrong, gradient(torch.float64), gradient(torch.float32), scale)


def test_training_keeps_the_sparsity_and_lowers_the_loss() -> None:
    torch.manual_seed(1)
    layer = _layer()
    x, y = torch.randn(64, 40), torch.randn(64, 24).relu()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    before = layer.mask.clone()
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(layer.mask, before)
    assert layer.freeze().density == pytest.approx(0.25)
    frozen = (layer(x) - y).square().mean().item()
    assert frozen < 0.9 * losses[0]


def test_pack_follows_weight_and_mask() -> None:
    layer = _layer().eval()
    x = torch.randn(2, 40)
    with torch.no_grad():
        layer(x)
        layer.weight.add_(1)
        layer(x)
        assert torch.equal(layer.storage().values, layer.make_storage().values)
        layer.mask.logical_not_()
        layer(x)
    assert layer.storage().values.shape[0] == layer.mask.sum()


def test_frozen_state_dict_round_trips_into_another_size() -> None:
    sparse, denser = _layer(sparsity=0.9).freeze(), _layer(sparsity=0.5).freeze()
    x = torch.randn(4, 40)
    expected = sparse(x)
    denser.load_state_dict(sparse.state_dict())
    assert torch.equal(denser(x), expected)
    assert denser.values.shape == sparse.values.shape
    assert denser.values.data_ptr() != sparse.values.data_ptr()
    meta = SparseLinear.from_arguments(sparse.arguments())
    meta.load_state_dict(sparse.state_dict(), assign=True)
    assert torch.equal(meta(x), expected)
    both = nn.Sequential(_layer().freeze(), nn.ReLU())
    both.load_state_dict(nn.Sequential(sparse, nn.ReLU()).state_dict())
    assert torch.equal(both(x), expected.relu())


def _break_pointer(state: dict) -> None:
    state["panel_ptr"][3] = 10_000


def _break_end(state: dict) -> None:
    state["panel_ptr"][-1] += 1


def _break_index(state: dict) -> None:
    state["index"][0] = 127


def _break_dtype(state: dict) -> None:
    state["index"] = state["index"].int()


def _break_scale(state: dict) -> None:
    state["scale"][0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_pointer, "panel_ptr: expected values that rise"),
        (_break_end, "panel_ptr: expected values that rise"),
        (_break_index, "index: expected block columns below 10"),
        (_break_dtype, "index: expected dtype uint8; got int32"),
        (_break_scale, "scale: expected finite values above 0"),
    ],
)
def test_frozen_refuses_invalid_storage(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    layer = _layer().freeze()
    x = torch.randn(2, 40)
    expected = layer(x)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_recovery_state_dict() -> None:
    layer = _layer()
    assert sorted(layer.state_dict()) == ["bias", "mask", "weight"]
    twin = _layer(sparsity=0.5)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.mask, layer.mask)
    mask = twin.mask.clone()
    twin.load_state_dict(nn.Linear(40, 24).state_dict())  # no mask in it: the pattern stays
    assert torch.equal(twin.mask, mask)


def test_sources_and_patterns() -> None:
    linear = Linear(40, 24, activation="silu")
    layer = SparseLinear.from_linear(linear, 0.5)
    assert layer.weight is linear.weight
    assert layer.activation == "silu"
    assert torch.equal(layer.mask, block_mask(linear.weight, 0.5))
    harder = SparseLinear.from_linear(layer, 0.9)
    assert not (harder.mask & ~layer.mask).any()
    assert SparseLinear.from_linear(QuantLinear.from_linear(linear), 0.5).weight is linear.weight
    new = SparseLinear(40, 24, sparsity=0.5)
    assert new.density == 0.5
    assert copy.deepcopy(new).density == 0.5


def test_casts_leave_the_storage_alone() -> None:
    layer = _layer(int8=False).freeze().half()
    assert layer.values.dtype == torch.float32
    assert layer(torch.randn(2, 40, dtype=torch.float16)).dtype == torch.float16


def test_bytes_and_repr() -> None:
    layer = _layer().freeze()
    parts = (layer.values, layer.index, layer.panel_ptr, layer.scale, layer.bias)
    assert layer.nbytes == sum(t.nbytes for t in parts)
    assert "density=0.250" in repr(layer)
    assert "frozen" in repr(layer)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"sparsity: expected 0 <= sparsity < 1; got 1.0"):
        SparseLinear(4, 4, sparsity=1.0)
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear; got Conv2d"):
        SparseLinear.from_linear(nn.Conv2d(1, 1, 1))
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        SparseLinear.from_linear(linear)


def test_frozen_compiles_without_breaks() -> None:
    layer = _layer().freeze().eval()
    x = torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
