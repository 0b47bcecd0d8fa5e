"""`.weight` of layers that keep it in another form: what it says, what reads it, what writes it.

The layers are those of stored_cases, a `LowRankLinear`, and adapters on a dense and on a compressed
layer; each is an `nn.Linear` by type.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bigops
from bigops import backend
from bigops.nn import Linear, LoRALinear, LowRankLinear, QLoRALinear, QuantLinear, SparseLinear
from bigops.nn.computed_weight import ComputedWeight, is_dense
from tests.nn.stored_cases import LAYERS as STORED
from tests.nn.stored_cases import K, N


def _adapted(layer: Any) -> Any:
    adapter = layer.adapters["default"]
    with torch.no_grad():
        adapter.b.normal_()
    return layer


LAYERS: dict[str, Callable[[], Any]] = {
    **{name: make for name, make in STORED.items() if name != "packed gated"},
    "factors": lambda: LowRankLinear(K, N, 16),
    "int8 factors in recovery": lambda: bigops.nn.QuantLowRankLinear(K, N, 16),
    "adapter": lambda: _adapted(LoRALinear.from_linear(Linear(K, N), 4)),
    "adapter on int8": lambda: _adapted(QLoRALinear.from_linear(QuantLinear(K, N).freeze(), 4)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)
FROZEN = [k for k in STORED if k != "packed gated"]


def truth(layer: Any) -> Tensor:
    """The matrix that the layer multiplies by, from what it answers: float64, exact sums aside."""
    with torch.no_grad():
        bias = 0 if layer.bias is None else layer.bias
        return (layer(torch.eye(layer.in_features)) - bias).t()


@KINDS
def test_it_describes_itself_without_its_numbers(kind: str) -> None:
    layer = LAYERS[kind]()
    assert isinstance(layer, nn.Linear)
    assert not is_dense(layer)
    with backend.record() as names:
        w = layer.weight
        assert type(w) is ComputedWeight
        assert isinstance(w, Tensor)
        assert not isinstance(w, nn.Parameter)
        assert w.shape == (N, K)
        assert (w.ndim, w.dim(), w.numel(), len(w)) == (2, 2, N * K, N)
        assert (w.dtype, w.device.type) == (torch.float32, "cpu")
        assert (w.stride(), w.is_contiguous(), w.element_size()) == ((K, 1), True, 4)
        assert w.is_floating_point()
        assert w.grad is None
        assert w.requires_grad == any(
            p.requires_grad for n, p in layer.named_parameters() if "bias" not in n
        )
        assert type(layer).__name__ in repr(w)
        for view in (w.data, w.detach(), w.t(), w.T, w[0], w[:3], w.view(-1), w.chunk(2)[1]):
            assert type(view) is ComputedWeight
        assert w.T.shape == (K, N)
        assert w[:3].shape == (3, K)
        assert not w.data.requires_grad
        assert w.requires_grad_(False) is w
    assert names == []
    assert ("weight" in dict(layer.named_parameters())) == (kind == "adapter")
    assert not any(isinstance(t, ComputedWeight) for t in layer.state_dict().values())


@KINDS
def test_what_needs_numbers_makes_them_and_is_counted(kind: str) -> None:
    layer = LAYERS[kind]()
    want = layer.dense_weight() if hasattr(layer, "dense_weight") else truth(layer)
    x = torch.randn(3, K)
    reads: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "clone": (lambda w: w.clone(), want),
        "arithmetic": (lambda w: w + 0, want),
        "reflected": (lambda w: 1 * w, want),
        "linear": (lambda w: F.linear(x, w), F.linear(x, want)),
        "product of the transpose": (lambda w: x @ w.T, x @ want.T),
        "rows": (lambda w: w[2:5] * 1, want[2:5]),
        "part": (lambda w: w.chunk(2)[1].clone(), want[N // 2 :]),
        "cat": (lambda w: torch.cat([w, w[:2]]), torch.cat([want, want[:2]])),
        "norm": (lambda w: torch.linalg.norm(w, dim=1), torch.linalg.norm(want, dim=1)),
        "copied from": (lambda w: torch.empty(N, K).copy_(w), want),
        "assigned from": (lambda w: _assigned(w), want),
        "data": (lambda w: w.data.clone(), want),
        "dtype": (lambda w: w.to(torch.float64).float(), want),
        "numpy": (lambda w: torch.from_numpy(w.detach().numpy()), want),
        "list": (lambda w: torch.tensor(w.tolist()), want),
        "deepcopy": (lambda w: copy.deepcopy(w), want),
        "pickle": (lambda w: pickle.loads(pickle.dumps(w.detach())), want),
        "raw op": (lambda w: torch.ops.aten.add.Tensor(w, 0), want),
        "stack of a list": (lambda w: torch.stack([w, w])[1], want),
    }
    for name, (read, expected) in reads.items():
        with backend.record() as names:
            got = read(layer.weight)
        assert names, name
        assert set(names) == {f"reference.{type(layer).__name__}.weight"}, name
        assert type(got) is Tensor, name
        torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-4, msg=name)


def _assigned(w: Tensor) -> Tensor:
    new = torch.empty(N, K)
    new[:N] = w.data[:N]
    return new


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "copy_": lambda w: w.copy_(torch.ones(N, K)),
    "zero_": lambda w: w.zero_(),
    "init": lambda w: nn.init.normal_(w),
    "init by fan": lambda w: nn.init.xavier_uniform_(w),
    "item": lambda w: w.__setitem__(0, 1.0),
    "item of data": lambda w: w.data.__setitem__((0, 0), 1.0),
    "+=": lambda w: w.__iadd__(1),
    "data +=": lambda w: w.data.__iadd__(1),
    "data =": lambda w: setattr(w, "data", torch.ones(N, K)),
    "grad =": lambda w: setattr(w, "grad", torch.ones(N, K)),
    "requires_grad =": lambda w: setattr(w, "requires_grad", True),
    "requires_grad_": lambda w: w.requires_grad_(),
    "out": lambda w: torch.add(torch.ones(N, K), 1, out=w),
    "a row": lambda w: w[0].fill_(1),
    "a view": lambda w: w.view(-1)[3:].add_(1),
    "the transpose": lambda w: w.T.mul_(2),
    "a chunk": lambda w: w.chunk(2)[0].neg_(),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "raw op": lambda w: torch.ops.aten.add_.Tensor(w, torch.ones(N, K)),
    "Parameter": lambda w: nn.Parameter(w),
    "set_": lambda w: w.set_(torch.ones(N, K)),
    "below __torch_function__": lambda w: _below(w),
}


def _below(w: Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        w.add_(1)


@KINDS
@pytest.mark.parametrize("way", WRITES)
def test_every_write_is_refused_by_name(kind: str, way: str) -> None:
    layer = LAYERS[kind]()
    before = layer.weight.detach().clone()
    with torch.no_grad(), pytest.raises(RuntimeError) as told:
        WRITES[way](layer.weight)
    assert f"{type(layer).__name__}.weight: expected to be read only; got" in str(told.value)
    assert torch.equal(layer.weight.detach().clone(), before)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k != "adapter"])
def test_it_cannot_be_set(kind: str) -> None:
    layer, new = LAYERS[kind](), nn.Parameter(torch.ones(N, K))
    before = layer.weight.detach().clone()
    for act in (
        lambda: setattr(layer, "weight", new),
        lambda: setattr(layer, "weight", new.data),
        lambda: layer.register_parameter("weight", new),
    ):
        with pytest.raises(AttributeError, match=rf"{type(layer).__name__}\.weight: the "):
            act()
    assert torch.equal(layer.weight.detach().clone(), before)


@pytest.mark.parametrize("kind", ["thawed", "factors", "adapter", "adapter on int8"])
def test_gradients_reach_what_it_is_made_of(kind: str) -> None:
    """A model that multiplies by the weight itself trains as one that calls the layer."""
    called, read = LAYERS[kind](), None
    read = copy.deepcopy(called)
    x, grad = torch.randn(5, K), torch.randn(5, N)
    (called(x) * grad).sum().backward()
    (F.linear(x, read.weight, read.bias) * grad).sum().backward()
    found = 0
    for (name, p), q in zip(called.named_parameters(), read.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            found += 1
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4)
    assert found >= 2


@pytest.mark.parametrize("kind", FROZEN)
def test_its_dtype_follows_the_layer(kind: str) -> None:
    layer = LAYERS[kind]()
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert copy.deepcopy(layer).weight.dtype == torch.bfloat16
    if not kind.startswith("fp8"):  # whose tensors torch cannot load from a plain pickle
        assert pickle.loads(pickle.dumps(layer)).weight.dtype == torch.bfloat16
    assert layer.weight.clone().dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert layer.to("meta").weight.device.type == "meta"
    assert layer.weight.shape == (N, K)


@pytest.mark.parametrize("kind", FROZEN)
def test_its_dtype_is_saved(kind: str, tmp_path: Any) -> None:
    model = nn.Sequential(LAYERS[kind]().bfloat16())
    bigops.save(model, tmp_path / "m.safetensors")
    again = bigops.load(tmp_path / "m.safetensors")
    assert again[0].weight.dtype == torch.bfloat16
    assert torch.equal(again[0].weight.clone(), model[0].weight.clone())


@pytest.mark.parametrize(
    "kind", ["int8", "thawed", "factors", "packed", "int8 factors in recovery", "adapter on int8"]
)
def test_in_a_graph(kind: str) -> None:
    """A dtype that is read costs nothing there; numbers that are used are right."""
    layer = LAYERS[kind]().eval()

    def dtype(x: Tensor) -> Tensor:
        return layer(x.to(layer.weight.dtype))

    def numbers(x: Tensor) -> Tensor:
        return x @ layer.weight.T

    x = torch.randn(3, K)
    with torch.no_grad():
        for f in (dtype, numbers):
            torch._dynamo.reset()
            got = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
            if f is dtype:
                assert torch.equal(got, torch.compile(layer, backend="aot_eager")(x))
            else:
                torch.testing.assert_close(got, f(x), rtol=1e-4, atol=1e-4)


def test_a_thawed_layer_and_functional_call() -> None:
    layer = SparseLinear(K, N, values="fp32").freeze().thaw()
    state = {**dict(layer.named_parameters()), "values": layer.values.detach() * 2}
    x = torch.randn(3, K)
    got = torch.func.functional_call(layer, state, x) - layer.bias
    torch.testing.assert_close(got, 2 * (layer(x) - layer.bias))
    lora = LAYERS["adapter"]()
    zero = {"weight": torch.zeros(N, K), "bias": torch.zeros(N)}
    delta = lora.weight - lora.base_weight
    torch.testing.assert_close(torch.func.functional_call(lora, zero, x), x @ delta.T)


@pytest.mark.parametrize("kind", FROZEN)
def test_a_head_is_resized_by_it(kind: str) -> None:
    """As hosts do: a new nn.Linear of more rows takes those of the old one."""
    old = LAYERS[kind]()
    new = nn.Linear(K, N + 3, dtype=old.weight.dtype, device=old.weight.device)
    count = min(old.weight.size(0), new.weight.size(0))
    new.weight.data[:count] = old.weight.data[:count]
    assert torch.equal(new.weight[:N], old.weight.clone())
