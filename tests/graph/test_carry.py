"""A swap loses nothing that was set on a layer, or leaves the layer and says what it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.files import FormatError
from bigops.graph.carry import adds_nothing, extras
from tests.support.interrupts import check_every_line, state
from tests.support.kernels_ran import needs_extension
from tests.support.verbs import VERBS, level  # noqa: F401

pytestmark = pytest.mark.usefixtures("level")
Verb = Callable[[nn.Module], Any]
SWAPS: dict[str, Verb] = {
    "fuse_": bigops.fuse_,
    "fuse_ timed": lambda m: bigops.fuse_(m, X),
    "add_lora_": lambda m: bigops.add_lora_(m, rank=2),
    "compress_": lambda m: bigops.compress_(m, bigops.Int8(), keep="all"),
    "compress_ timed": lambda m: bigops.compress_(m, bigops.Int8(), X, keep="all"),
    "compress_ thrifty": lambda m: bigops.compress_(m, bigops.Int8(), keep="all", low_memory=True),
    "compress_ factors": lambda m: bigops.compress_(m, bigops.LowRank(4), keep="all"),
    "pack_": bigops.pack_,
}
PARAMETERS = [pytest.param(name, marks=needs_extension if "pack" in name else ()) for name in SWAPS]
X = torch.randn(3, 64)


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def swapped(model: nn.Sequential, verb: Verb) -> Any:
    """The layer that is at the place of the first one after a verb."""
    old = model[0]
    record = verb(model)
    assert record.reason("0") is None
    assert model[0] is not old
    return model[0]


# --- what is carried -----------------------------------------------------------------------------


def with_attributes(layer: nn.Linear) -> Callable[[nn.Module], None]:
    layer.gain, layer.is_loaded, layer._mark, layer.table = 3.0, True, "m", {"lr": 0.1}  # type: ignore[assignment]
    table = layer.table

    def check(new: Any) -> None:
        assert (new.gain, new.is_loaded, new._mark) == (3.0, True, "m")
        assert new.table is table

    return check


def with_buffers(layer: nn.Linear) -> Callable[[nn.Module], None]:
    seen, hidden = torch.ones(3), torch.zeros(2)
    layer.register_buffer("seen", seen)
    layer.register_buffer("hidden_one", hidden, persistent=False)

    def check(new: Any) -> None:
        assert new.seen is seen
        assert new.hidden_one is hidden
        assert "seen" in new.state_dict()
        assert "hidden_one" not in new.state_dict()

    return check


def with_children_and_parameters(layer: nn.Linear) -> Callable[[nn.Module], None]:
    probe, scale = nn.LayerNorm(4), nn.Parameter(torch.ones(2))
    layer.probe, layer.own_scale = probe, scale

    def check(new: Any) -> None:
        assert new.probe is probe
        assert new.own_scale is scale
        assert {"probe.weight", "own_scale"} <= set(new.state_dict())
        assert any(p is scale for p in new.parameters())

    return check


def with_hooks(layer: nn.Linear) -> Callable[[nn.Module], None]:
    said: list[str] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: said.append(f"pre {len(args)}"), with_kwargs=True
        ),
        layer.register_forward_pre_hook(lambda m, args: said.append("second"), prepend=True),
        layer.register_forward_hook(lambda *args: said.append("post"), always_call=True),
        layer.register_forward_hook(lambda m, args, y: y * 0),
        layer.register_full_backward_pre_hook(lambda m, grad: said.append("backward pre")),
        layer.register_full_backward_hook(lambda m, given, grad: said.append("backward")),
    ]

    def check(new: Any) -> None:
        said.clear()
        y = new(X.clone().requires_grad_())
        assert said == ["second", "pre 1", "post"]
        assert float(y.detach().abs().max()) == 0
        y.sum().backward()
        assert said[3:] == ["backward pre", "backward"]
        said.clear()
        with pytest.raises(Exception, match=r"."):
            new(torch.randn(3, 5))
        assert said == ["second", "pre 1", "post"]  # the one that is always called
        for handle in handles:
            handle.remove()
        said.clear()
        assert float(new(X).abs().max()) > 0
        assert not said

    return check


SET: dict[str, Callable[[nn.Linear], Callable[[nn.Module], None]]] = {
    "attributes": with_attributes,
    "buffers": with_buffers,
    "children and parameters": with_children_and_parameters,
    "hooks": with_hooks,
}


@pytest.mark.parametrize("kind", SET)
@pytest.mark.parametrize("name", PARAMETERS)
def test_what_was_set_on_a_layer_goes_with_it(name: str, kind: str) -> None:
    model = make()
    check = SET[kind](model[0])
    check(swapped(model, SWAPS[name]))


@pytest.mark.parametrize("kind", SET)
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_second_swap_takes_it_on(name: str, kind: str) -> None:
    model = make()
    check = SET[kind](model[0])
    bigops.fuse_(model)
    model[0].weight.data += 1  # another layer, or `fuse_` leaves it as it is
    model.insert(1, nn.Tanh())
    if "fuse_" in name or kind == "hooks":
        model[0].activation = "none"
    SWAPS[name](model)
    check(model[0])


@needs_extension
@pytest.mark.parametrize("kind", SET)
def test_unpacked_it_is_all_there(kind: str) -> None:
    model = make()
    check = SET[kind](model[0])
    bigops.pack_(model)
    assert type(model[0]).__name__ == "PackedLinear"
    bigops.unpack_(model)
    assert type(model[0]).__name__ == "Linear"
    check(model[0])


@pytest.mark.parametrize("kind", ["attributes", "hooks"])
def test_a_file_takes_it_from_the_model_that_is_given(kind: str, tmp_path: Path) -> None:
    model, other = make(), make()
    for each in (model, other):
        check = SET[kind](each[0])
    bigops.compress_(model, bigops.Int8(), keep="all")
    bigops.save(model, tmp_path / "m")
    bigops.load(tmp_path / "m", other)
    assert type(other[0]).__name__ == "QuantLinear"
    check(other[0])


def test_a_file_has_the_tensors_that_were_set(tmp_path: Path) -> None:
    model, other = make(), make()
    for each in (model, other):
        with_buffers(each[0])
        with_children_and_parameters(each[0])
    bigops.compress_(model, bigops.Int8(), keep="all")
    with torch.no_grad():
        model[0].seen += 6
        model[0].own_scale += 6
    bigops.save(model, tmp_path / "m")
    bigops.load(tmp_path / "m", other)
    assert type(other[0]).__name__ == "QuantLinear"
    assert other[0].seen.tolist() == [7, 7, 7]
    assert other[0].own_scale.tolist() == [7, 7]
    assert list(other.state_dict()) == list(model.state_dict())


def test_hooks_of_the_state_go_along_where_its_keys_stay() -> None:
    model, said = make(), []
    layer = model[0]
    layer.register_state_dict_pre_hook(lambda m, prefix, keep: said.append(("save", m)))
    layer.register_load_state_dict_pre_hook(lambda m, *rest: said.append(("load", m)))
    layer.register_load_state_dict_post_hook(lambda m, keys: said.append(("loaded", m)))
    handle = layer._register_state_dict_hook(lambda m, *rest: said.append(("saved", m)))
    new = swapped(model, bigops.fuse_)
    del layer
    new.load_state_dict(new.state_dict())
    assert said == [(what, new) for what in ("save", "saved", "load", "loaded")]
    handle.remove()
    said.clear()  # which holds the layer
    record = SWAPS["compress_"](model)
    assert "state_dict" in record.reason("0")
    assert model[0] is new


def test_a_hook_never_sees_the_activation() -> None:
    model, seen = make(), []
    want = model[0](X).detach()
    model[0].register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    new = swapped(model, bigops.fuse_)
    assert new.activation == "none"
    assert type(model[1]) is nn.ReLU
    model(X)
    torch.testing.assert_close(seen, [want])


@pytest.mark.parametrize("name", [p for p in PARAMETERS if "timed" in p.values[0]])
def test_hooks_do_not_see_what_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "bigops.timing.interleave",
        lambda sides, **_: {
            n: [float(side() is None) for _ in range(30)] for n, side in sides.items()
        },
    )
    monkeypatch.setattr("bigops.timing.median", lambda samples: 1.0)
    monkeypatch.setattr("bigops.timing.speedup", lambda old, new: bigops.timing.Ratio(1, 1, 1))
    model = make()
    model[0].register_forward_hook(lambda *args: calls.append(1))
    SWAPS[name](model.eval())
    assert len(calls) == 1  # the example inputs, once


def test_bytes_of_what_goes_along_are_in_the_record() -> None:
    model, plain = make(), make()
    model[0].register_buffer("seen", torch.ones(100))
    got, want = (bigops.compress_(m, bigops.Int8(), keep="all") for m in (model, plain))
    assert got.done[0].bytes_before == want.done[0].bytes_before + 400
    assert got.done[0].bytes_after == want.done[0].bytes_after + 400
    assert sum(t.nbytes for t in (*model[0].parameters(), *model[0].buffers())) == (
        got.done[0].bytes_after
    )


@pytest.mark.parametrize("name", VERBS)
def test_a_layer_of_ours_has_nothing_that_was_not_set(name: str) -> None:
    build, verb = VERBS[name]
    model = build()
    ours = [m for m in model.modules() if bigops.nn.layer.layer_of(m) is not None]
    assert not any(extras(m).names for m in ours)
    verb(model)
    ours = [m for m in model.modules() if bigops.nn.layer.layer_of(m) is not None]
    assert ours or "lora" in name or "smooth" in name
    assert not any(extras(m).names for m in ours)


# --- what is left --------------------------------------------------------------------------------


def _replaces_forward(layer: nn.Linear) -> None:
    layer._old_forward = layer.forward  # type: ignore[assignment]
    layer.forward = lambda x: layer._old_forward(x)  # type: ignore[method-assign, operator]


def _of_the_layer(layer: nn.Linear) -> None:
    layer.register_forward_hook(lambda m, args, y: y + m.weight.sum())


LEFT: dict[str, tuple[Callable[[nn.Linear], Any], str, set[str]]] = {
    "forward": (_replaces_forward, "its forward was replaced", set()),
    "name of ours": (lambda m: setattr(m, "activation", "relu"), "its activation was set", set()),
    "module of that name": (lambda m: setattr(m, "activation", nn.ReLU()), "activation", set()),
    "method": (lambda m: setattr(m, "reset_parameters", int), "its reset_parameters", set()),
    "legacy": (lambda m: m.register_backward_hook(print), "it has a backward hook", set()),
    "reads weight": (_of_the_layer, "may read the weight", {"fuse_", "fuse_ timed", "add_lora_"}),
    "no function": (
        lambda m: m.register_forward_pre_hook(functools.partial(lambda *args: None)),
        "may read the weight",
        {"fuse_", "fuse_ timed", "add_lora_"},
    ),
    "state": (
        lambda m: m.register_state_dict_pre_hook(print),
        "state_dict pre-hook",
        {"fuse_", "fuse_ timed"},
    ),
}


@pytest.mark.parametrize("kind", LEFT)
@pytest.mark.parametrize("name", PARAMETERS)
def test_what_a_swap_would_change_is_left(name: str, kind: str) -> None:
    change, reason, taken = LEFT[kind]
    model = make()
    change(model[0])
    old = model[0]
    record = SWAPS[name](model)
    assert (model[0] is old) is (name not in taken)
    if name not in taken:
        assert reason in record.reason("0")
        assert model[2] is not old
        assert [done.name for done in record.done] == ["2"]


def test_a_foreign_activation_attribute_changes_no_number() -> None:
    for value in ("relu", nn.ReLU()):
        model = make()
        model[2].activation = value
        want = model(X).detach()
        for verb in (bigops.fuse_, SWAPS["add_lora_"]):
            verb(model)
            torch.testing.assert_close(model(X).detach(), want)


def test_a_file_is_refused_where_a_layer_would_lose_its_forward(tmp_path: Path) -> None:
    model, other = make(), make()
    bigops.compress_(model, bigops.Int8(), keep="all")
    bigops.save(model, tmp_path / "m")
    _replaces_forward(other[2])
    before = state(other)
    with pytest.raises(FormatError, match=r"2: .* forward"):
        bigops.load(tmp_path / "m", other)
    assert state(other) == before


# --- all or nothing ------------------------------------------------------------------------------


def hung() -> nn.Sequential:
    model = make()
    for layer in (model[0], model[2]):
        for change in SET.values():
            change(layer)
    model.steps = [model[0], {"last": model[2]}]  # type: ignore[assignment]
    return model


def lines(count: int) -> list[int]:
    return sorted({*range(1, count + 1, count // 6 + 1), *range(max(1, count - 80), count + 1)})


@pytest.mark.parametrize("name", ["fuse_", "compress_"])
def test_interrupted_while_it_is_carried_all_is_as_before(name: str) -> None:
    assert check_every_line(hung, SWAPS[name], lines) > 40


def test_hooks_that_name_the_new_layer_name_the_old_one_again() -> None:
    model = hung()
    model[0].register_load_state_dict_pre_hook(lambda m, *rest: None)
    hooks = dict(model[0]._load_state_dict_pre_hooks)

    def fails(model: nn.Module) -> None:
        SWAPS["fuse_"](model)
        raise MemoryError("planted")

    before = state(model)
    with pytest.raises(MemoryError):
        bigops.graph.atomic.atomic(fails)(model)
    assert state(model) == before
    assert dict(model[0]._load_state_dict_pre_hooks) == hooks


# --- classes of others ---------------------------------------------------------------------------


class Named(nn.Linear):
    """Adds an ``__init__`` and its print."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lr_scale = 2.0

    def extra_repr(self) -> str:
        return "named"


class Doubles(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return 2 * super().__call__(*args)


class Looked(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)


class Loads(nn.Linear):
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)


class State(nn.Linear):
    def get_extra_state(self) -> Any:
        return 1


class Asked(nn.Linear):
    def merge(self) -> None:
        pass


class Mixed(Named, nn.modules.lazy.LazyModuleMixin):
    pass


class Grandchild(Doubles):
    pass


def test_a_class_that_adds_nothing_is_plain() -> None:
    empty = type("Empty", (Named,), {})
    for cls in (nn.Linear, Named, empty, nn.modules.linear.NonDynamicallyQuantizableLinear):
        assert adds_nothing(cls, nn.Linear), cls
    for cls in (Doubles, Called, Looked, Loads, State, Asked, Mixed, Grandchild, nn.Bilinear):
        assert not adds_nothing(cls, nn.Linear), cls


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_layer_of_such_a_class_is_taken_with_what_it_set(name: str) -> None:
    model = make()
    model[0] = Named(64, 64)
    assert swapped(model, SWAPS[name]).lr_scale == 2.0


@pytest.mark.parametrize("cls", [Doubles, Called, Looked, Loads, State, Asked, Grandchild])
@pytest.mark.parametrize("name", PARAMETERS)
def test_any_other_is_left_by_its_whole_name(name: str, cls: type[nn.Linear]) -> None:
    model = make()
    model[0] = old = cls(64, 64)
    record = SWAPS[name](model)
    assert model[0] is old
    assert f"it is a tests.graph.test_carry.{cls.__name__}," in record.reason("0")
