"""SparseLinear with the pattern 2:4t: pruned along rows and columns at once, and trained on; where
the kernels of csrc/cuda would serve, by them, on the CPU by csrc/hostrun.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bigops import backend
from bigops.compress import Sparse, compress_
from bigops.formats.patterns import Pattern, n_m_mask, transposable_mask
from bigops.formats.sparse24 import Sparse24Weight, to_dense
from bigops.nn import Linear, SparseLinear
from bigops.ops.sparse_linear import sparse24 as op
from bigops.ops.sparse_linear import sparse24_pack as packing
from tests.support import hostrun
from tests.support.backends import serve_by
from tests.support.cases.sparse24 import Trained24
from tests.support.kernels_ran import expect, named

KERNELS = (
    "cuda.sparse24_pack.f32.bf16",
    "cuda.sparse24_linear.bf16.bf16",
    "cuda.sparse24_linear_grad_x.bf16.bf16",
    "cuda.sparse24_gradient.bf16",
)


def layer24(
    n: int = 20, k: int = 72, activation: str = "gelu", values: str = "bf16"
) -> SparseLinear:
    return SparseLinear.from_linear(Linear(k, n, activation=activation), None, "2:4t", values)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training as on a GPU that the kernels serve."""
    if hostrun.lacks():
        pytest.skip(hostrun.lacks())
    pytest.importorskip("triton")
    from tests.support import triton_interpreter

    triton_interpreter.install()
    for stem in ("sparse24_linear", "sparse24_pack", "sparse24_gradient"):
        hostrun.schedule(hostrun.load_op(stem), 0, False)
    serve_by(monkeypatch, op.op, op.product, op.gradients)
    monkeypatch.setattr(op, "serves", lambda stored, k, target: True)
    monkeypatch.setattr(packing, "serves", lambda w, stored: True)


def test_the_pattern() -> None:
    pattern = Pattern.parse("2:4t")
    assert (pattern.n, pattern.m, pattern.transposable, str(pattern)) == (2, 4, True, "2:4t")
    assert pattern != Pattern.parse("2:4")
    w = torch.randn(8, 12)
    assert torch.equal(pattern.mask(w, None), transposable_mask(w))
    assert Sparse(pattern="2:4t").sparsity == 0.5
    for text in ("1:4t", "2:4T", "1x4t"):
        with pytest.raises(ValueError, match="pattern: expected HxW"):
            Pattern.parse(text)


def test_a_mask_of_the_callers_is_held_to_the_pattern() -> None:
    linear = Linear(8, 8)
    mask = transposable_mask(torch.randn(8, 8))
    layer = SparseLinear.from_linear(linear, pattern="2:4t", mask=mask)
    assert torch.equal(layer.mask, mask)
    with pytest.raises(ValueError, match="mask: expected 2 of each 4 .* in column"):
        SparseLinear.from_linear(linear, pattern="2:4t", mask=n_m_mask(linear.weight.cumsum(1)))
    narrow = SparseLinear.from_linear(linear, pattern="2:4")
    with pytest.raises(ValueError, match="mask: expected 2 of each 4"):
        SparseLinear.from_linear(narrow, pattern="2:4t")


def test_saved_and_made_again() -> None:
    for layer in (layer24(), layer24().freeze()):
        again = SparseLinear.from_arguments(layer.arguments()).to_empty(device="cpu")
        again.load_state_dict(layer.state_dict())
        assert again.pattern == Pattern.parse("2:4t")
        assert torch.equal(again.dense_weight(), layer.dense_weight())


def test_a_model_is_compressed_and_trains_anywhere() -> None:
    """Ten classes do not divide by 4: the last layer keeps the pattern, and no kernel packs it."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10))
    compress_(model, Sparse(pattern="2:4t", values="bf16"), freeze=False)
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert [str(layer.pattern) for layer in layers] == ["2:4t", "2:4t"]
    masks = [layer.mask.clone() for layer in layers]
    x, y = torch.randn(64, 16), torch.randint(10, (64,))
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for layer, mask in zip(layers, masks, strict=True):
        assert torch.equal(layer.mask, mask)
        assert not layer.freeze().dense_weight()[~mask].any()


def gradients(layer: SparseLinear, x: Tensor, residual: Tensor, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_(), layer.weight, layer.bias, residual.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(leaves[0], leaves[3])
    assert y.dtype == torch.bfloat16
    return list(torch.autograd.grad(y, leaves, grad))  # type: ignore[arg-type]


@pytest.mark.usefixtures("on_gpu")
def test_a_step_on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 masters under autocast: gradients of all of them by the rule, the weight's dense."""
    layer = layer24()
    assert layer.bias is not None
    x, residual, grad = (torch.randn(9, size).bfloat16() for size in (72, 20, 20))
    with expect(*KERNELS):
        gx, gw, gb, gr = gradients(layer, x, residual, grad)
    assert gw.dtype == torch.float32
    assert not gw[~layer.mask].any()
    weight = Sparse24Weight.from_sparse(layer.storage())
    bias = layer.bias.detach().bfloat16()
    case = Trained24(
        x,
        weight,
        weight.to_dense(torch.float64),
        False,
        bias,
        residual.detach(),
        grad,
        "gelu",
        True,
    )
    case.check_gradients([gx, case.at_stored(gw).bfloat16(), gb.bfloat16(), gr])
    assert torch.equal(to_dense(case.at_stored(gw), weight.meta, 72), gw)
    monkeypatch.setattr(packing, "serves", lambda w, stored: False)
    with pytest.raises(AssertionError, match="sparse24_pack"), expect(*KERNELS):
        gradients(layer, x, residual, grad)


@pytest.mark.usefixtures("on_gpu")
def test_training_on_tensor_cores() -> None:
    torch.manual_seed(1)
    layer = layer24(activation="none").bfloat16()
    target = torch.randn(20, 72).bfloat16()
    x = torch.randn(24, 72).bfloat16()
    want, mask, losses = x @ target.t() / 8, layer.mask.clone(), []
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05, momentum=0.9)
    for _ in range(8):
        optimiser.zero_grad()
        with expect("cuda.sparse24_pack.bf16.bf16", "cuda.sparse24_gradient.bf16"):
            loss = (layer(x) - want).float().square().mean()
            loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert torch.equal(layer.mask, mask)
    with torch.no_grad():  # a mask that is broken is loud
        layer.mask[0] = True
        assert bool(layer(x)[:, 0].isnan().all())


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("kind", ["fp32 values", "float32 x", "2:4", "uneven"])
def test_what_stays_on_the_dense_product(kind: str) -> None:
    n = 21 if kind == "uneven" else 20
    pattern, values = "2:4" if kind == "2:4" else "2:4t", "fp32" if kind[0] == "f" else "bf16"
    layer = SparseLinear.from_linear(Linear(72, n), None, pattern, values)
    x = torch.randn(5, 72)
    if kind != "float32 x":
        layer, x = layer.bfloat16(), x.bfloat16()
    with backend.record() as names:
        layer(x).float().sum().backward()
    assert any(named("fused_linear", ".fused_linear.") in name for name in names), names
    assert not any("sparse24" in name for name in names), names
