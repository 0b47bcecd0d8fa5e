"""Which channels may be scaled: read from what runs, with the reason where none may."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bigops
from bigops.graph.channels import Channels, Group
from bigops.graph.sites import Sites, evaluating, run_example

K = 6


def watched(model: nn.Module, *inputs: Any) -> Channels:
    with Channels(Sites(model), lambda *_: None) as channels, evaluating(model), torch.no_grad():
        for given in inputs:
            run_example(model, given)
    return channels


def groups(model: nn.Module, *inputs: Any) -> dict[str, Group]:
    """The group of each Parameter that products read, by its name."""
    channels = watched(model, *inputs or (torch.randn(4, 3, K),))
    return {side.name: group for group in channels.groups() for side in group.readers}


def why(model: nn.Module, name: str = "fc.weight", *inputs: Any) -> str | None:
    return groups(model, *inputs)[name].fixed


class Model(nn.Module):
    """A norm and layers, and a forward given as a function of it and x."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], norm: nn.Module | None = None):
        super().__init__()
        self.norm = nn.LayerNorm(K) if norm is None else norm
        self.fc, self.other, self.square = nn.Linear(K, 5), nn.Linear(K, 4), nn.Linear(K, K)
        self.gamma = nn.Parameter(torch.rand(K))
        self.emb = nn.Embedding(9, K)
        self.kept: list[Tensor] = []
        self._how = forward

    def forward(self, x: Tensor) -> Any:
        return self._how(self, x)


class OwnNorm(nn.Module):
    """An RMS norm as transformers has it, with a cast."""

    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(k))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class OwnLayerNorm(OwnNorm):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(K))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(-1, keepdim=True)) + self.bias


FREE: dict[str, Callable[[Any, Tensor], Any]] = {
    "at once": lambda m, x: m.fc(m.norm(x)),
    "relu": lambda m, x: m.fc(torch.relu(m.norm(x))),
    "relu in place": lambda m, x: m.fc(m.norm(x).relu_()),
    "dropout": lambda m, x: m.fc(F.dropout(F.leaky_relu(m.norm(x)), 0.5, m.training)),
    "views": lambda m, x: m.fc(m.norm(x).reshape(2, -1, K).transpose(0, 1)[1:].contiguous()),
    "one row": lambda m, x: m.fc(m.norm(x)[:, 0]),
    "parts": lambda m, x: [m.fc(part) for part in m.norm(x).split(1, dim=1)],
    "gate": lambda m, x: m.fc(torch.sigmoid(x) * m.norm(x)),
    "times a number": lambda m, x: m.fc(m.norm(x) * 0.5 / 3),
    "over a tensor": lambda m, x: m.fc(m.norm(x) / (1 + x.abs())),
    "cast": lambda m, x: m.fc(m.norm(x).bfloat16().float()),
    "functional": lambda m, x: F.linear(m.norm(x), m.fc.weight, m.fc.bias),
    "by a bare vector": lambda m, x: m.fc(m.gamma * x),
    "shape alone": lambda m, x: m.fc(m.norm(x)) + torch.zeros_like(m.norm(x)).sum(),
    "autocast": lambda m, x: _autocast(m, x),
}


def _autocast(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return m.fc(m.norm(x))


@pytest.mark.parametrize("name", FREE)
def test_what_lets_a_scale_through(name: str) -> None:
    group = groups(Model(FREE[name]))["fc.weight"]
    maker = ["gamma"] if "vector" in name else ["norm.bias", "norm.weight"]
    assert group.fixed is None
    assert sorted(side.name for side in group.makers) == maker


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(K), nn.LayerNorm(K, bias=False), nn.RMSNorm(K), OwnNorm(), OwnLayerNorm()]
)
def test_a_norm_is_what_multiplies_by_parameters(norm: nn.Module) -> None:
    group = groups(Model(FREE["at once"], norm))["fc.weight"]
    assert group.fixed is None
    assert sorted(s.name for s in group.makers) == sorted(f"norm.{n}" for n in norm.state_dict())


def test_siblings_share_and_a_chain_splits() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(x)
        return m.fc(h).sum() + m.other(torch.relu(m.square(h))).sum()

    found = groups(Model(forward))
    assert found["fc.weight"] is found["square.weight"]
    other = found["other.weight"]
    assert [sorted(s.name for s in side) for side in (other.makers, other.readers)] == [
        ["square.bias", "square.weight"],
        ["other.weight"],
    ]
    assert {s.dim for s in other.makers} == {0}
    assert {s.dim for s in other.readers} == {1}


def test_a_weight_that_is_used_as_it_lies() -> None:
    """As the Conv1D of transformers: x @ W with W [K, N]."""
    model = Model(lambda m, x: torch.addmm(m.fc.bias, m.norm(x).view(-1, K), m.fc.weight))
    model.fc.weight = nn.Parameter(torch.randn(K, 5))
    group = groups(model)["fc.weight"]
    assert group.fixed is None
    assert group.readers[0].dim == 0


def test_one_layer_called_twice_takes_one_scale() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.norm(x)) + m.fc(torch.relu(m.square(x)))

    group = groups(Model(forward))["fc.weight"]
    assert {s.name for s in group.makers} == {
        *("norm.weight", "norm.bias"),
        *("square.weight", "square.bias"),
    }
    assert "square" not in (group.fixed or "")
    assert "no norm or linear layer" in (why(Model(lambda m, x: m.fc(m.norm(x)) + m.fc(x))) or "")


FIXED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "gelu": (lambda m, x: m.fc(F.gelu(m.norm(x))), "aten.gelu makes it"),
    "residual": (lambda m, x: _residual(m, x), "aten.add reads it"),
    "bias of a product": (lambda m, x: m.fc(m.norm(x) + 1), "aten.add makes it"),
    "nothing before": (lambda m, x: m.fc(x), "no norm or linear layer: it comes from outside"),
    "softmax before": (lambda m, x: m.fc(x.softmax(-1)), "aten._softmax makes it"),
    "rows mixed": (lambda m, x: m.fc(m.norm(x).flip(-1)), "aten.flip makes it"),
    "square turned": (lambda m, x: m.fc(m.norm(x[0, 0].expand(K, K)).t()), "aten.t makes it"),
    "other width": (lambda m, x: m.fc(m.norm(x).view(-1, 3, 2).reshape(-1, K)), "aten.view"),
    "squared": (lambda m, x: m.fc(m.norm(x) * m.norm(x)), "aten.mul makes it"),
    "divides": (lambda m, x: m.fc(1 / m.norm(x) + 0 * x), "aten.add makes it"),
    "floor": (lambda m, x: m.fc(torch.div(m.norm(x), 2, rounding_mode="floor")), "aten.div"),
    "weight read": (lambda m, x: m.fc(m.norm(x)) + m.fc.weight.sum(), "aten.sum reads it"),
    "norm's weight read": (lambda m, x: m.fc(m.norm(x)) * m.norm.weight.max(), "aten.max reads"),
    "weight by data": (lambda m, x: m.fc(m.norm(x)) + m.fc.weight.data.sum(), "aten.sum reads it"),
    "value by data": (lambda m, x: m.fc(h := m.norm(x)) + h.data.sum(), "aten.sum reads it"),
    "norm's weight by data": (
        lambda m, x: m.fc(m.norm(x)) + m.norm.bias.data.sum(),
        "aten.sum reads it",
    ),
    "written": (lambda m, x: m.fc(_write(m.norm(x))), "aten.fill_ reads it"),
    "a number": (lambda m, x: m.fc(m.norm(x)) * m.norm(x)[0, 0, 0].item(), "aten.select reads it"),
    "into memory there is": (lambda m, x: m.fc(torch.mul(m.norm(x), 2, out=x.clone())), "aten.mul"),
    "returned": (lambda m, x: (m.fc(h := m.norm(x)), {"h": [h]}), "the model returns it"),
    "returned in an object": (lambda m, x: _Out(m.fc(h := m.norm(x)), h), "the model returns it"),
    "turned, too": (
        lambda m, x: (m.square(m.norm(x)) @ m.square.weight).sum() + m.fc(m.norm(x)),
        "used transposed, too",
    ),
    "a part of the weight": (lambda m, x: F.linear(m.norm(x), m.fc.weight[:2]), "aten.slice"),
    "parts of a weight": (
        lambda m, x: [F.linear(m.norm(x), w) for w in m.square.weight.chunk(2)] + [m.fc(m.norm(x))],
        "aten.mm reads it",
    ),
    "one plus weight": (lambda m, x: m.fc(x * (1 + m.gamma)), "aten.mul makes it"),
}


class _Out:
    def __init__(self, *held: Tensor) -> None:
        self.held = held


def _residual(m: Any, x: Tensor) -> Tensor:
    h = m.norm(x)
    return m.fc(h) + (h + x).sum()


def _write(h: Tensor) -> Tensor:
    h[0] = 0.0
    return h


@pytest.mark.parametrize("name", FIXED)
def test_what_does_not(name: str) -> None:
    forward, reason = FIXED[name]
    found = groups(Model(forward))
    fixed = found["fc.weight"].fixed if "fc.weight" in found else "aten.slice"
    assert reason in (fixed or "nothing")


def test_every_call_counts() -> None:
    model = Model(lambda m, x: m.fc(m.norm(x)) if len(x) > 2 else m.fc(m.norm(x)) * m.norm(x).sum())
    assert why(model, "fc.weight", torch.randn(3, K), torch.randn(5, K)) is None
    late = why(model, "fc.weight", torch.randn(3, K), torch.randn(2, K))
    assert late == "aten.sum reads it, too"


def test_a_value_that_leaves_its_module_may_be_returned_by_another_call() -> None:
    class Body(Model):
        pass

    def outer(body: nn.Module) -> nn.Module:
        return Model(lambda m, x: m.fc(m.norm(x)), body)

    assert (
        why(outer(Body(lambda m, x: m.norm(x)))) == f"a {__name__}.{Body.__qualname__} returns it"
    )
    assert why(outer(nn.Sequential(nn.Sequential(nn.LayerNorm(K)), nn.ReLU()))) is None
    assert why(nn.Sequential(nn.LayerNorm(K), nn.Linear(K, 3)), "1.weight") is None


@pytest.mark.parametrize("where", ["norm", "fc"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_numbers(where: str, kind: str) -> None:
    model = Model(FREE["at once"])
    getattr(model.get_submodule(where), kind)(lambda *_: None)
    unseen = (where, kind) == ("norm", "register_forward_pre_hook")
    assert ("hook of a" in (why(model) or "")) != unseen


def test_shared_memory_and_ties() -> None:
    model = Model(FREE["at once"])
    model.other.weight = nn.Parameter(model.fc.weight.detach()[:4])
    assert why(model) == "its memory is shared with another tensor"
    tied = Model(lambda m, x: m.square(m.norm(x)) + m.emb(torch.ones(1, dtype=torch.long)))
    tied.square.weight = tied.emb.weight = nn.Parameter(torch.randn(K, K))
    assert "aten.embedding reads it" in (why(tied, "square.weight") or "")
    slices = Model(FREE["at once"])  # of one storage, as files are mapped
    whole = torch.randn(100)
    slices.fc.weight = nn.Parameter(whole[:30].view(5, 6))
    slices.norm.weight = nn.Parameter(whole[30:36])
    assert why(slices) is None
    assert why(_reads(slices, whole)) == "a tensor that shares its memory is read"


def _reads(model: Any, whole: Tensor) -> nn.Module:
    model._how = lambda m, x: m.fc(m.norm(x)) + whole[:10].sum()
    return model


def test_attention_and_compressed_layers_read() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(32), nn.Linear(32, 32)
            self.attn = nn.MultiheadAttention(32, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.attn(h, h, h)[0] + self.fc(h)

    assert why(Block(), "fc.weight", torch.randn(2, 3, 32)) is not None
    frozen = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    bigops.compress_(frozen, {"3": bigops.Int8()}, keep="all")
    found = list(watched(frozen, torch.randn(2, 64)).groups())
    rows = next(g for g in found if g.makers and g.makers[0].name.startswith("1."))
    assert rows.fixed == "bigops.quantized_linear reads it, too"


def test_fused_layers_are_products() -> None:
    def after(square: nn.Module, *more: str) -> str | None:
        model = Model(lambda m, x: m.fc(m.square(m.norm(x), *[x for _ in more])))
        model.square, model.fc = square, bigops.nn.Linear(K, 5)
        assert groups(model)["square.weight"].fixed is None
        return why(model)

    assert after(bigops.nn.Linear(K, K, activation="relu")) is None
    made = "it is of no norm or linear layer: bigops.fused_linear makes it"
    assert after(bigops.nn.Linear(K, K), "residual") == made
    assert after(bigops.nn.Linear(K, K, activation="gelu")) is not None


def test_the_model_is_as_before() -> None:
    model = Model(FREE["relu in place"])
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    groups(model)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert model.training
