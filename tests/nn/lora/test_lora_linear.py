"""bigops.nn.LoRALinear: values of every path, merging to the bit, state, and add_lora_."""

import copy

import pytest
import torch
from torch import nn

from bigops.graph import add_lora_
from bigops.nn import Linear, LoRALinear
from bigops.ops import activation as act
from tests.support import tolerance


def _layer(activation: str = "none", dtype: torch.dtype = torch.float32) -> LoRALinear:
    """14 -> 10 with the adapters "one" (rank 3) and "two" (rank 2), both with values."""
    torch.manual_seed(0)
    base = Linear(14, 10, activation=activation, dtype=dtype)
    layer = LoRALinear.from_linear(base, 3, alpha=6.0, name="one")
    layer.add_adapter("two", 2, alpha=1.0)
    with torch.no_grad():
        for name in ("one", "two"):
            layer.adapters[name].b.normal_()
    return layer


def _truth(layer: LoRALinear, x: torch.Tensor, residual: torch.Tensor | None = None):
    """(float64 truth, plain torch in x's dtype, scale), from the factors alone."""
    adapters = [layer.adapters[name] for name in layer.active]

    def run(dtype: torch.dtype) -> torch.Tensor:
        def cast(t: torch.Tensor) -> torch.Tensor:
            return t.detach().to(dtype)

        z = cast(x) @ cast(layer.base_weight).t() + cast(layer.bias)
        for one in adapters:
            z = z + one.scale * (cast(x) @ cast(one.a).t() @ cast(one.b).t())
        y = act.apply(layer.activation, z)
        return y if residual is None else y + cast(residual)

    x64 = x.detach().abs().double()
    scale = x64 @ layer.base_weight.abs().double().t() + layer.bias.abs().double()
    for one in adapters:
        inner = x64 @ one.a.detach().abs().double().t()
        scale = scale + abs(one.scale) * inner @ one.b.detach().abs().double().t()
    scale = scale * tolerance.LIPSCHITZ[layer.activation]
    if residual is not None:
        scale = scale + residual.abs().double()
    return run(torch.float64), run(x.dtype), scale


@pytest.mark.parametrize("activation", sorted(tolerance.LIPSCHITZ))
@pytest.mark.parametrize("names", [[], ["one"], ["two"], ["one", "two"], ["two", "one"]])
def test_forward(activation: str, names: list[str]) -> None:
    layer = _layer(activation)
    layer.set_active(names)
    x, residual = torch.randn(3, 4, 14), torch.randn(3, 4, 10)
    with torch.no_grad():
        tolerance.check(layer(x, residual), *_truth(layer, x, residual))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_forward_in_other_dtypes(dtype: torch.dtype) -> None:
    layer = _layer(dtype=dtype)
    x = torch.randn(5, 14, dtype=dtype)
    with torch.no_grad():
        tolerance.check(layer(x), *_truth(layer, x))


def test_rule_fails_on_a_lost_scale() -> None:
    layer = _layer()
    x = torch.randn(5, 14)
    truth = _truth(layer, x)
    layer.adapters["one"].scale = 1.0
    with pytest.raises(AssertionError, match="float64 says"), torch.no_grad():
        tolerance.check(layer(x), *truth)


def test_a_new_adapter_changes_nothing() -> None:
    base = Linear(14, 10)
    x = torch.randn(5, 14)
    want = base(x).detach()
    layer = LoRALinear.from_linear(base, 4)
    with torch.no_grad():
        tolerance.check(layer(x), *_truth(layer, x))
    layer.set_active([])
    assert torch.equal(layer(x), want)


def test_adapters_that_together_exceed_the_smaller_side() -> None:
    layer = LoRALinear.from_linear(Linear(6, 4, activation="relu"), 3, name="one")
    layer.add_adapter("two", 3)
    with torch.no_grad():
        for name in layer.active:
            layer.adapters[name].b.normal_()
    x, residual = torch.randn(5, 6), torch.randn(5, 4)
    with torch.no_grad():
        tolerance.check(layer(x, residual), *_truth(layer, x, residual))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_against_float64(activation: str, dropout: float) -> None:
    layer = _layer(activation).double()
    for name in layer.active:
        layer.adapters[name].dropout = dropout
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    factors = [p for p in layer.parameters() if p.requires_grad]
    assert len(factors) == 4

    def run(*_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(7)  # one mask for all evaluations
        return layer(x, residual)

    assert torch.autograd.gradcheck(run, (x, residual, *factors))


def test_dropout_is_seen_by_the_adapters_in_training_only() -> None:
    layer = _layer()
    for name in layer.active:
        layer.adapters[name].dropout = 0.5
    x = torch.randn(64, 14)
    layer.eval()
    with torch.no_grad():
        still = layer(x)
        tolerance.check(still, *_truth(layer, x))
        layer.train()
        torch.manual_seed(1)
        first = layer(x)
        assert not torch.equal(first, still)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
        layer.set_active([])
        tolerance.check(layer(x), *_truth(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_right_and_unmerge_exact(dtype: torch.dtype) -> None:
    layer = _layer("silu", dtype).eval()
    before = layer.base_weight.detach().clone()
    version = layer.base_weight._version
    want = before.double() + sum(layer.adapters[n].delta() for n in layer.active)
    layer.merge()
    assert layer.merged
    assert layer.base_weight._version > version
    assert torch.equal(layer.base_weight, want.to(dtype))
    once = layer.base_weight.detach().clone()
    layer.merge()
    assert torch.equal(layer.base_weight, once)
    x = torch.randn(5, 14, dtype=dtype)
    with torch.no_grad():
        dense = layer.to_linear()
        assert torch.equal(layer(x), dense(x))
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.base_weight, before)


def test_train_unmerges_and_eval_does_not() -> None:
    layer = _layer().eval()
    before = layer.base_weight.detach().clone()
    layer.merge()
    layer.eval()
    assert layer.merged
    layer.train()
    assert not layer.merged
    assert torch.equal(layer.base_weight, before)


def test_state_dict_never_counts_an_adapter_twice() -> None:
    layer = _layer().eval()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    state = layer.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[k], before[k]) for k in before)
    other = _layer().eval()
    other.merge()
    with torch.no_grad():
        other.adapters["one"].a.zero_()
    other.load_state_dict(state)
    x = torch.randn(3, 14)
    layer.unmerge()
    assert not other.merged
    assert torch.equal(other(x), layer(x))


def test_a_merged_copy_can_be_moved_and_unmerged() -> None:
    layer = _layer().eval()
    layer.merge()
    twin = copy.deepcopy(layer).double()
    layer.unmerge()
    twin.unmerge()
    assert twin.base_weight.dtype == torch.float64
    assert torch.equal(twin.base_weight, layer.base_weight.double())


def test_training_moves_the_adapter_alone() -> None:
    torch.manual_seed(0)
    layer = LoRALinear.from_linear(nn.Linear(8, 6), 2)
    frozen = [layer.base_weight.detach().clone(), layer.bias.detach().clone()]
    x = torch.randn(32, 8)
    target = layer(x).detach() + x @ torch.randn(8, 1) @ torch.randn(1, 6)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.05)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.01 * losses[0]
    assert torch.equal(layer.base_weight, frozen[0])
    assert torch.equal(layer.bias, frozen[1])


def test_rank_stabilized_scale_and_repr() -> None:
    layer = LoRALinear.from_linear(nn.Linear(9, 9), 4, alpha=8.0, rank_stabilized=True)
    assert layer.adapters["default"].scale == 4.0
    layer.add_adapter("more", 4, alpha=8.0)
    assert layer.adapters["more"].scale == 2.0
    layer.remove_adapter("default")
    assert layer.active == ("more",)
    assert "active=['more']" in repr(layer)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda m: m.add_adapter("one", 2), ValueError, "name: expected a new name"),
        (lambda m: m.add_adapter("a.b", 2), ValueError, "name: expected a name without a dot"),
        (lambda m: m.add_adapter("new", 0), ValueError, "rank: expected 1 to 10"),
        (lambda m: m.add_adapter("new", 11), ValueError, "rank: expected 1 to 10"),
        (lambda m: m.add_adapter("new", 2, dropout=1.0), ValueError, "dropout: expected at least"),
        (lambda m: m.add_adapter("new", 2, alpha=float("inf")), ValueError, "alpha: expected"),
        (lambda m: m.set_active(["three"]), ValueError, "name: expected one of one, two"),
        (lambda m: m.set_active(["one", "one"]), ValueError, "names: expected each name once"),
        (lambda m: m.remove_adapter("three"), ValueError, "name: expected one of one, two"),
        (lambda m: (m.merge(), m.set_active([])), RuntimeError, "call unmerge"),
        (lambda m: LoRALinear.from_linear(nn.ReLU(), 1), TypeError, "linear: expected a torch"),
    ],
)
def test_errors_leave_the_layer_as_it_was(call, kind, text) -> None:
    layer = _layer()
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(kind, match=text):
        call(layer)
    layer.unmerge()
    after = layer.state_dict()
    assert list(after) == list(before)
    assert layer.active == ("one", "two")
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_merging_nan_is_refused() -> None:
    layer = _layer().eval()
    before = layer.base_weight.detach().clone()
    with torch.no_grad():
        layer.adapters["two"].a[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf in 'two'"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base_weight, before)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.q_proj(x) * self.v_proj(x)))


def test_add_lora_swaps_what_matches_and_freezes_the_rest() -> None:
    model = _Block()
    x = torch.randn(3, 8)
    record = add_lora_(model, 2, ["q_proj", "v_*"])
    assert {entry.name for entry in record.done} == {"q_proj", "v_proj"}
    assert type(model.q_proj) is LoRALinear
    assert type(model.out) is nn.Linear
    with torch.no_grad():
        tolerance.check(model.q_proj(x), *_truth(model.q_proj, x))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{q}.adapters.default.{f}" for q in ("q_proj", "v_proj") for f in "ab"}
    add_lora_(model, 1, "q_proj", name="second")
    assert model.q_proj.active == ("default", "second")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rank": 99}, "expected a layer that can be swapped; got .*rank: expected 1 to 4"),
        ({"rank": 2, "targets": "*.k_proj"}, "targets: expected a layer that can be swapped"),
    ],
)
def test_add_lora_leaves_the_model_whole_on_an_error(arguments, text) -> None:
    model = _Block()
    with pytest.raises(ValueError, match=text):
        add_lora_(model, **arguments)
    assert type(model.q_proj) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())


def test_add_lora_names_what_it_leaves() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    record = add_lora_(model, 2)
    assert record.reason("attention.out_proj") is not None
    assert type(model["mlp"]) is LoRALinear
