"""bigops.nn.SparseLinear: every pattern, its three states, storage of any size to load."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import bigops.backend as backend
from bigops.formats.patterns import block_mask, n_m_mask
from bigops.formats.sparse import SparseWeight
from bigops.nn import Linear, QuantLinear, SparseLinear
from bigops.nn.sparse_linear import VALUES
from bigops.ops.sparse_linear import sparse_linear
from tests.support import tolerance

PATTERNS = ("1x1", "1x4", "4x1", "16x1", "16x16", "32x32", "2:4")


def sparse_layer(
    values: str = "int8", k: int = 40, sparsity: float | None = 0.75, pattern: str = "1x4"
) -> SparseLinear:
    return SparseLinear.from_linear(Linear(k, 24, activation="relu"), sparsity, pattern, values)


def _stored(layer: SparseLinear) -> Any:
    block = (layer.pattern.height, layer.pattern.width)
    return SparseWeight.from_mask(layer.weight, layer.mask, VALUES[layer.stored], block)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("k", [40, 38, 300])
def test_inference_runs_the_sparse_op(values: str, pattern: str, k: int) -> None:
    layer = sparse_layer(values, k, None if ":" in pattern else 0.75, pattern).eval()
    x, residual = torch.randn(5, k), torch.randn(5, 24)
    if values == "bf16":
        layer, x, residual = layer.bfloat16(), x.bfloat16(), residual.bfloat16()
    expected = sparse_linear(x, _stored(layer), layer.bias, residual, "relu").detach()
    with torch.inference_mode(), backend.record() as names:
        out = layer(x, residual)
    assert torch.equal(out, expected)
    assert names
    assert all("sparse_linear" in name for name in names), names
    assert torch.equal(layer.freeze()(x, residual).detach(), expected)


def test_bf16_values_take_float32_rows_there_and_back() -> None:
    layer = sparse_layer("bf16").freeze()
    x = torch.randn(3, 40, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    low = layer.bfloat16()(x.detach().bfloat16())
    assert torch.equal(low.float(), y)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("k", [40, 38])
def test_gradient_and_forward_stay_on_the_pattern(values: str, pattern: str, k: int) -> None:
    layer = sparse_layer(values, k, None if ":" in pattern else 0.75, pattern)
    full = layer.pattern.expand(layer.mask, 24, k)
    dense = _stored(layer).to_dense()
    assert torch.equal(layer.trained_weight(), dense)
    assert not dense[~full].any()
    layer(torch.randn(6, k)).square().sum().backward()
    assert layer.weight.grad is not None
    assert not layer.weight.grad[~full].any()
    if full.any():
        assert layer.weight.grad[full].any()


def test_gradient_is_that_of_the_masked_dense_layer() -> None:
    layer = sparse_layer("fp32")
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
    layer = sparse_layer()
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
    layer = sparse_layer().eval()
    x = torch.randn(2, 40)
    with torch.no_grad():
        layer(x)
        layer.weight.add_(1)
        layer(x)
        assert torch.equal(layer.storage().values, layer.make_storage().values)
        layer.mask.logical_not_()
        layer(x)
    assert int(layer.storage().length.sum()) == layer.mask.sum()


def test_frozen_state_dict_round_trips_into_another_size() -> None:
    sparse, denser = sparse_layer(sparsity=0.9).freeze(), sparse_layer(sparsity=0.5).freeze()
    x = torch.randn(4, 40)
    expected = sparse(x)
    denser.load_state_dict(sparse.state_dict())
    assert torch.equal(denser(x), expected)
    assert denser.values.shape == sparse.values.shape
    assert denser.values.data_ptr() != sparse.values.data_ptr()
    meta = SparseLinear.from_arguments(sparse.arguments())
    meta.load_state_dict(sparse.state_dict(), assign=True)
    assert torch.equal(meta(x), expected)
    both = nn.Sequential(sparse_layer().freeze(), nn.ReLU())
    both.load_state_dict(nn.Sequential(sparse, nn.ReLU()).state_dict())
    assert torch.equal(both(x), expected.relu())


def _break_pointer(state: dict) -> None:
    state["ptr"][3] = 10_000


def _break_end(state: dict) -> None:
    state["ptr"][-1] += 1


def _break_index(state: dict) -> None:
    state["index"][0, 0] = 10


def _break_dtype(state: dict) -> None:
    state["index"] = state["index"].int()


def _break_scale(state: dict) -> None:
    state["scale"][0] = torch.nan


def _break_sums(state: dict) -> None:
    state["sums"][5] += 1


def _break_rows(state: dict) -> None:
    state["rows"][0, 1] = state["rows"][0, 0]


def _break_values(state: dict) -> None:
    state["values"] = state["values"][:, :, :2].float()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_pointer, "ptr: expected values that rise"),
        (_break_end, "ptr: expected values that rise"),
        (_break_index, "index: expected words inside the 40 columns"),
        (_break_dtype, "index: expected dtype uint8; got int32"),
        (_break_scale, "scale: expected finite values above 0"),
        (_break_sums, "sums: expected the sum"),
        (_break_rows, "rows: expected each of"),
        (_break_values, "values: expected dtype int8"),
    ],
)
def test_frozen_refuses_invalid_storage(damage, message: str) -> None:  # type: ignore[no-untyped-def]
    layer = sparse_layer().freeze()
    x = torch.randn(2, 40)
    expected = layer(x)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), expected)


def test_recovery_state_dict() -> None:
    layer = sparse_layer()
    assert sorted(layer.state_dict()) == ["bias", "mask", "weight"]
    twin = sparse_layer(sparsity=0.5)
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
    layer = sparse_layer("fp32").freeze().half()
    assert layer.values.dtype == torch.float32
    assert layer(torch.randn(2, 40, dtype=torch.float16)).dtype == torch.float16


def test_bytes_and_repr() -> None:
    layer = sparse_layer().freeze()
    storage = layer.storage()
    assert layer.bias is not None
    assert layer.nbytes == storage.nbytes + layer.bias.nbytes
    assert "pattern=1x4, values=int8" in repr(layer)
    assert "density=0.250" in repr(layer)
    assert "frozen" in repr(layer)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"sparsity: expected 0 <= sparsity < 1; got 1.0"):
        SparseLinear(4, 4, sparsity=1.0)
    with pytest.raises(ValueError, match=r"sparsity: expected 0.5 or None for 2:4; got 0.8"):
        SparseLinear(4, 4, 0.8, pattern="2:4")
    for bad in ("0x4", "4:2", "x", "1x", ""):
        with pytest.raises(ValueError, match="pattern: expected HxW"):
            SparseLinear(4, 4, pattern=bad)
    with pytest.raises(ValueError, match="values: expected int8, bf16, fp32; got 'fp16'"):
        SparseLinear(4, 4, values="fp16")
    with pytest.raises(ValueError, match=r"values: expected int8, bf16, fp32; got \['fp32'\]"):
        SparseLinear(4, 4, values=["fp32"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="sparsity: expected a float; got str"):
        SparseLinear(4, 4, "0.5")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \[4, 2\]; got"):
        SparseLinear.from_linear(nn.Linear(8, 4), mask=torch.ones(4, 8).bool())
    with pytest.raises(TypeError, match=r"linear: expected a torch.nn.Linear; got Conv2d"):
        SparseLinear.from_linear(nn.Conv2d(1, 1, 1))
    linear = nn.Linear(8, 4)
    with torch.no_grad():
        linear.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="finite"):
        SparseLinear.from_linear(linear)


def test_frozen_compiles_without_breaks() -> None:
    layer = sparse_layer().freeze().eval()
    x = torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_what_a_pattern_dropped_does_not_come_back() -> None:
    linear = Linear(40, 32)
    layer = SparseLinear.from_linear(linear, 0.75)
    kept = layer.pattern.expand(layer.mask, 32, 40)
    for sparsity, pattern in ((0.2, "1x4"), (0.5, "1x1"), (None, "2:4")):
        again = SparseLinear.from_linear(layer, sparsity, pattern, "fp32")
        full = again.pattern.expand(again.mask, 32, 40)
        assert full.any()
        assert not (full & ~kept).any()
        assert torch.equal(again.freeze().dense_weight(), linear.weight.detach() * full)
    with pytest.raises(ValueError, match=r"pattern: expected 1x4, which the layer has, or one of"):
        SparseLinear.from_linear(layer, 0.5, "16x16")
    whole = SparseLinear.from_linear(linear, 0.0)  # nothing went, so nothing can come back
    assert SparseLinear.from_linear(whole, 0.5, "16x16").density < 1


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("n", [4, 24, 70])
def test_density_counts_no_rows_past_the_last(pattern: str, n: int) -> None:
    linear = Linear(40, n)
    layer = SparseLinear.from_linear(linear, None if ":" in pattern else 0.5, pattern, "fp32")
    full = layer.pattern.expand(layer.mask, n, 40)
    layer.freeze()
    assert torch.equal(layer.storage().pattern(), full)
    assert layer.density == pytest.approx(float(full.float().mean()))


@pytest.mark.parametrize("state", ["recovery", "frozen", "thawed"])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_state_copies_loads_and_runs(pattern: str, values: str, state: str) -> None:
    layer = sparse_layer(values, 38, None if ":" in pattern else 0.6, pattern).eval()
    x = torch.randn(7, 38)
    with torch.no_grad():
        expected = layer(x)
    if state != "recovery":
        layer.freeze()
    if state == "thawed" and values == "int8":
        with pytest.raises(ValueError, match="got int8"):
            layer.thaw()
    elif state == "thawed":
        layer.thaw()
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
            "bias",
            "values",
        ]
    thawed = layer.thawed
    empty = SparseLinear.from_arguments(layer.arguments())
    empty.load_state_dict(layer.state_dict(), assign=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty.eval()):
        assert (other.frozen, other.thawed) == (layer.frozen, thawed)
        assert other.arguments() == layer.arguments()
        assert set(other.state_dict()) == set(layer.state_dict())
        with torch.no_grad():
            assert torch.equal(other(x), expected)
    for word, told in (("thawed", thawed), ("frozen", layer.frozen and not thawed)):
        assert (f", {word}," in repr(layer)) is told
    for t, dtype in ((layer, torch.bfloat16), (layer, torch.float16)):
        cast = copy.deepcopy(t).to(dtype)
        assert cast.bias is not None
        assert cast.bias.dtype == dtype
        if layer.frozen:
            assert cast.values.dtype == VALUES[values]
        with torch.no_grad():
            assert cast(x.to(dtype)).dtype == dtype


def test_n_m_patterns_know_their_sparsity() -> None:
    linear = Linear(40, 24)
    layer = SparseLinear.from_linear(linear, pattern="2:4")
    assert torch.equal(layer.mask, n_m_mask(linear.weight, 2, 4))
    assert layer.density == 0.5
    assert SparseLinear(8, 4, pattern="1:4").density == 0.25
