"""fuse_: what is swapped, what is left with which reason, and nothing in between."""

import copy
import json
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import bigops
from bigops.graph import fuse_, plain
from bigops.graph import sites as sites_module
from bigops.nn import Linear
from bigops.timing import Ratio
from tests.support import tolerance


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Timing tiny layers on a busy machine: two spinning threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _snapshot(model: nn.Module) -> list:
    return [
        *((n, id(m), m.training, len(m._forward_pre_hooks)) for n, m in model.named_modules()),
        *((n, id(p), p._version, p.requires_grad) for n, p in model.named_parameters()),
    ]


def _same(model: nn.Module, fused: nn.Module, *args: Tensor) -> None:
    """Old and new model agree within the numerics rule."""
    ref64 = copy.deepcopy(model).double()(*(a.double() for a in args))
    scale = ref64.abs().max() + 1
    tolerance.check(fused(*args), ref64, model(*args), scale)


class Traced(nn.Module):
    """A forward of its own, with an activation module shared by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.act, self.gate = nn.GELU(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.c(self.act(self.b(self.act(self.a(x))))))


class TwoReaders(nn.Module):
    """The linear layer's output is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(8, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return h + self.act(h)


class SometimesTwo(nn.Module):
    """It is read twice only where an optional argument is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(8, 8), nn.GELU()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        h = self.a(x)
        return self.act(h) + (h if residual is None else residual)


class SometimesInTraining(TwoReaders):
    """It is read twice only in training."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.act(h) + h if self.training else self.act(h)


class ElsewhereToo(nn.Module):
    """The activation module also serves something that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(8, 8), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.a(self.act(x)))


class Peeks(nn.Module):
    """Walks through its Sequential and keeps what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.seq:
            x = layer(x)
            total = total + x
        return total


class Untraceable(nn.Module):
    """Control flow on values; a Sequential and a traceable part inside."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.part = Traced()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.part(self.seq(x) if x.sum() > 0 else x)


def test_sequential_neighbours_of_every_activation() -> None:
    kinds = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh()]
    model = nn.Sequential()
    for kind in kinds:
        model.append(nn.Linear(8, 8)).append(kind)
    old = copy.deepcopy(model)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    record = fuse_(model)
    assert [model[i].activation for i in range(0, 12, 2)] == [
        "relu",
        "gelu",
        "gelu_tanh",
        "silu",
        "sigmoid",
        "tanh",
    ]
    assert all(type(model[i]) is nn.Identity for i in range(1, 12, 2))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    _same(old, model, torch.randn(4, 8))
    assert len(record.done) == 6
    assert "0: bigops.nn.Linear with relu of 1 (traced: nothing else reads it; not timed" in str(
        record
    )
    assert json.loads(json.dumps(record.to_dict()))["verb"] == "fuse_"
    assert bigops.fuse_ is fuse_


def test_traced_activations_shared_by_layers() -> None:
    model = Traced()
    old = copy.deepcopy(model)
    fuse_(model)
    assert (model.a.activation, model.b.activation, model.c.activation) == ("gelu", "gelu", "silu")
    assert type(model.act) is type(model.gate) is nn.Identity
    _same(old, model, torch.randn(4, 8))


@pytest.mark.parametrize(
    "kind", [TwoReaders, SometimesTwo, SometimesInTraining, ElsewhereToo, Peeks]
)
def test_an_activation_that_is_not_the_only_reader_stays(kind: type) -> None:
    model = kind()
    old = copy.deepcopy(model)
    record = fuse_(model)
    assert all(m.activation == "none" for m in model.modules() if isinstance(m, Linear))
    assert record.done
    assert any(isinstance(m, nn.GELU) for m in model.modules())
    for mode in (True, False):
        _same(old.train(mode), model.train(mode), torch.randn(4, 8))


def test_a_wrong_pair_is_seen() -> None:
    """The check above fails on what a careless fusion would give."""
    old = TwoReaders()
    wrong = copy.deepcopy(old)
    wrong.a, wrong.act = Linear.from_linear(wrong.a, "gelu"), nn.Identity()
    with pytest.raises(AssertionError, match="float64 says"):
        _same(old, wrong, torch.randn(4, 8))


def test_parts_of_what_cannot_be_traced() -> None:
    model = Untraceable()
    old = copy.deepcopy(model)
    record = fuse_(model)
    assert model.calls == 0  # tracing ran on a twin
    assert model.seq[0].activation == "tanh"
    assert model.part.c.activation == "silu"
    assert "the model cannot be traced as a whole: TraceError" in record.notes[0]
    for x in (torch.ones(2, 8), -torch.ones(2, 8)):
        _same(old, model, x)


def test_functional_activations_and_their_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x))

    model = Net()
    old = copy.deepcopy(model)
    fuse_(model)
    assert type(model.a) is Linear
    assert model.a.activation == "none"
    _same(old, model, torch.randn(3, 8))


def test_what_is_left_is_named_with_the_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.shared = nn.Linear(8, 8)
            self.again = self.shared
            self.tied, self.embedding = nn.Linear(8, 10, bias=False), nn.Embedding(10, 8)
            self.embedding.weight = self.tied.weight
            self.hooked = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.hooked[0].register_backward_hook(lambda *a: None)
            self.acted = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.acted[1].register_forward_hook(lambda *a: None)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.pruned = nn.Linear(8, 8)
            prune.l1_unstructured(self.pruned, "weight", 0.5)
            self.patched = nn.Linear(8, 8)
            self.patched.forward = lambda x: x  # type: ignore[method-assign]
            self.lora = type("LoraLinear", (nn.Linear,), {"forward": torch.relu})(8, 8)
            self.ours = Linear(8, 8, activation="tanh")
            self.cplx = nn.Linear(8, 8, dtype=torch.complex64)

    model = Net()
    before = dict(model.named_modules())
    record = fuse_(model)
    reasons = {
        "attention.out_proj": "MultiheadAttention uses its weight without calling it",
        "shared": "the same module is also reachable as again",
        "tied": "its weight is shared with embedding.weight",
        "hooked.0": "backward hook",
        "normed": "parametrized",
        "pruned": "its weight is no plain parameter",
        "patched": "its forward was replaced",
        "lora": "it is a tests.graph.test_fuse.LoraLinear, which may do more",
        "ours": "it is a bigops.nn.Linear already",
        "cplx": "complex64",
    }
    for name, reason in reasons.items():
        assert reason in (record.reason(name) or ""), name
        assert model.get_submodule(name) is before[name]
    assert [d.name for d in record.done] == ["acted.0"]
    assert type(model.acted[1]) is nn.ReLU
    assert fuse_(nn.Linear(2, 2)).reason("") is not None


def test_fused_again_takes_the_activation() -> None:
    model = nn.Sequential(Linear(8, 8), nn.ReLU(), Linear(8, 8, activation="gelu"), nn.ReLU())
    old = copy.deepcopy(model)
    fuse_(model)
    assert model[0].activation == "relu"
    assert type(model[3]) is nn.ReLU
    _same(old, model, torch.randn(3, 8))


@pytest.mark.parametrize("training", [True, False])
def test_example_inputs_time_each_layer(training: bool) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Dropout(0.5)).train(training)
    x = torch.randn(8, 16)
    state = torch.get_rng_state()
    record = fuse_(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training is training for m in model.modules())
    if record.done:
        assert record.done[0].speedup is not None
        assert "measured" in record.done[0].why
    else:
        assert "the original is faster: measured" in (record.reason("0") or "")
        assert type(model[0]) is nn.Linear
        assert type(model[1]) is nn.GELU


@pytest.mark.parametrize(
    ("low", "high", "swapped"), [(0.5, 0.7, False), (0.7, 1.01, True), (1.2, 1.4, True)]
)
def test_the_original_stays_where_it_wins(monkeypatch, low, high, swapped) -> None:  # type: ignore[no-untyped-def]
    value = (low + high) / 2
    result = sites_module.Contest(10.0, 10.0 / value, Ratio(value, low, high))
    monkeypatch.setattr("bigops.graph.fuse.contest", lambda *a, **k: result)
    model = Traced()
    before = _snapshot(model)
    record = fuse_(model, (torch.randn(2, 8),))
    assert bool(record.done) is swapped
    assert (_snapshot(model) == before) is not swapped
    if not swapped:
        assert all("the original is faster" in entry.reason for entry in record.skipped)


def test_layers_that_share_an_activation_stay_together(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    calls = []

    def contest(old: nn.Module, *args: object, **kwargs: object) -> sites_module.Contest:
        calls.append(old)
        ratio = 0.5 if len(calls) == 2 else 2.0
        return sites_module.Contest(1.0, 1.0 / ratio, Ratio(ratio, ratio, ratio))

    monkeypatch.setattr("bigops.graph.fuse.contest", contest)
    model = Traced()
    model.b = nn.Linear(8, 8, bias=False)  # another shape of call than a
    old = copy.deepcopy(model)
    record = fuse_(model, torch.randn(2, 8))
    assert "the original is faster" in (record.reason("b") or "")
    assert "shares its activation" in (record.reason("a") or "")
    assert type(model.act) is nn.GELU
    assert model.c.activation == "silu"
    _same(old, model, torch.randn(3, 8))


@pytest.mark.parametrize("broken", ["build", "swap", "example"])
def test_a_failure_midway_changes_nothing(monkeypatch, broken: str) -> None:  # type: ignore[no-untyped-def]
    model = Traced().train()
    model.act.eval()
    model.b.weight.requires_grad_(False)
    inputs = None
    before = _snapshot(model)
    if broken == "build":
        real, calls = Linear.from_linear, []

        def from_linear(*args: object) -> Linear:
            calls.append(args)
            if len(calls) == 3:
                raise MemoryError("planted")
            return real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(Linear, "from_linear", from_linear)
    elif broken == "swap":

        class Full(dict):
            def __setitem__(self, key: str, value: object) -> None:
                if key == "act" and isinstance(value, nn.Identity):
                    raise MemoryError("planted")
                super().__setitem__(key, value)

        model._modules = Full(model._modules)
    else:
        inputs = torch.randn(2, 9)
    with pytest.raises((MemoryError, ValueError, RuntimeError)):
        fuse_(model, inputs)
    assert _snapshot(model) == before


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got list"):
        fuse_([])  # type: ignore[arg-type]


def test_plain_is_the_way_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 4))
    fused = copy.deepcopy(model)
    fuse_(fused)
    back = plain(fused)
    assert not any(type(m).__module__.startswith("bigops") for m in back.modules())
    x = torch.randn(3, 8)
    assert torch.equal(back(x), model(x))
    assert type(fused[0]) is Linear
    with pytest.raises(ValueError, match="relu2"):
        plain(nn.Sequential(Linear(2, 2, activation="relu2")))
