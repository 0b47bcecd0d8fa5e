"""fuse_ on models that cannot be traced: an activation moves only where no caller can tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bigops
from bigops import fuse_
from tests.graph.reaching import INDEXED, REACH, ByKeyword, ByList
from tests.graph.untraceable import (
    QUIET,
    UNTRACED,
    Around,
    Blocks,
    Mlp,
    Nested,
    block,
    untraceable,
)
from tests.support import tolerance

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))


def same(model: nn.Module, *calls: dict[str, Any]) -> Any:
    """Hold a model after `fuse_` to itself before, by every call; give the record."""
    calls = calls or ({}, {"hidden": True})
    model.eval()
    with torch.no_grad():
        plain = [model(X, **kwargs) for kwargs in calls]
        # No copy: a closure would go on with the modules of the original.
        ref64 = [model.double()(X.double(), **kwargs) for kwargs in calls]
        record = bigops.fuse_(model.float())
        for kwargs, want, eager in zip(calls, ref64, plain, strict=True):
            scale = want.abs().max() + 4
            tolerance.check(model(X, **kwargs), want, eager, scale, what=str(kwargs))
    return record


def epilogues(model: nn.Module) -> int:
    return sum(getattr(m, "activation", "none") != "none" for m in model.modules())


@pytest.mark.parametrize("part", [Mlp, Nested])
@pytest.mark.parametrize("way", QUIET)
def test_a_part_that_is_only_called_takes_its_activations(way: Any, part: Any) -> None:
    model = way(part())
    record = same(model)
    pairs = {Mlp: 1, Nested: 2}[part] * (2 if way is Blocks else 1)
    assert epilogues(model) == pairs, str(record)


@pytest.mark.parametrize("way", QUIET)
def test_so_does_a_sequential_unless_it_has_no_name(way: Any) -> None:
    model = way(block())
    record = same(model)
    if way is Blocks:
        assert epilogues(model) == 0
        assert "parts.0.1: relu is not taken into parts.0.0: ModuleList gives it" in str(record)
    else:
        assert epilogues(model) == 2, str(record)


@pytest.mark.parametrize("part", [block, Mlp, Nested])
@pytest.mark.parametrize("way", REACH)
def test_what_other_code_may_reach_stays_and_is_named(way: Any, part: Any) -> None:
    if way in INDEXED and part is not block:
        return  # such a part has no index
    model = way(part())
    record = same(model)
    # The list spares the second pair; a flag is traced with both values.
    assert epilogues(model) == (part is block and way in (ByList, ByKeyword))
    if way is ByKeyword:
        assert not record.notes
        return
    assert any("is not taken into" in note for note in record.notes), str(record)
    assert len(record.done) == 2  # the layers are swapped all the same


@pytest.mark.parametrize("kind", UNTRACED)
def test_code_that_a_trace_of_the_whole_does_not_run(kind: Any) -> None:
    model = kind()
    record = same(model, {})
    assert epilogues(model) == 0, str(record)
    assert record.done


@pytest.mark.parametrize("kind", [Mlp, block])
def test_a_hook_that_looks_on_costs_activations_only_where_they_have_no_names(kind: Any) -> None:
    model, seen = kind(), []
    model.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    assert kind is block or model.down.register_forward_hook(lambda *given: seen.append(len(given)))
    same(model, {})
    assert epilogues(model) == (kind is Mlp)
    assert seen


class OtherWay(Around):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        return self.part.before_bend(x) if hidden else self.part(x)


class OtherWayOfMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        for each in self.parts:
            x = each.before_bend(x) if hidden else each(x)
        return x


class ChildOfMany(OtherWayOfMany):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        for each in self.parts:
            x = each.up(x) if hidden else each(x)
        return x


class ActivationOfMany(OtherWayOfMany):
    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        for each in self.parts:
            x = each.bend(x) if hidden else each(x)
        return x


class Tree(nn.Module):
    """A class whose instances hold each other and call each other's children."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.up, self.bend, self.down = nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)
        self.peer = Tree(depth - 1) if depth else None

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        if self.peer is not None:
            untraceable(x)
            x = self.peer.up(x) + self.peer(x)
        return self.down(self.bend(self.up(x)))


@pytest.mark.parametrize("name", ["other way", "of many", "child", "activation", "tree"])
def test_another_way_into_a_part(name: str) -> None:
    model = {
        "other way": lambda: OtherWay(Mlp()),
        "of many": OtherWayOfMany,
        "child": ChildOfMany,
        "activation": ActivationOfMany,
        "tree": lambda: Tree(1),
    }[name]()
    record = same(model)
    assert epilogues(model) == 0, str(record)


def over_children(parts: Any, x: Tensor) -> Tensor:
    """As helpers of gradient checkpointing walk over blocks."""
    for each in list(parts.children()):
        x = each(x)
    return x


def over_two_levels(parts: Any, x: Tensor) -> Tensor:
    for each in parts.children():
        for inner in each.children():
            x = inner(x) + x
    return x


def down(part: Any, x: Tensor) -> Tensor:
    for each in part.children():
        x = down(each, x) + x
    return x if part._modules else part(x)


def while_there_are(part: Any, x: Tensor) -> Tensor:
    left = [part]
    while left:
        last = left.pop()
        found = list(last.children())
        x = x if found else last(x) + x
        left += found
    return x


class Walks(nn.Module):
    """Hands its parts to a function that walks over children."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(Mlp(), Mlp())

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        untraceable(x)
        if hidden:
            return self.parts(x)
        return self.call(x)

    def call(self, x: Tensor) -> Tensor:
        return over_children(self.parts, x)


class Holds(nn.Module):
    """A block whose layers are one level further down."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) + x


class WalksTwice(Walks):
    def call(self, x: Tensor) -> Tensor:
        return over_two_levels(self.parts, x)


class WalksDown(Walks):
    def call(self, x: Tensor) -> Tensor:
        return down(self.parts, x)


class WalksWhile(Walks):
    def call(self, x: Tensor) -> Tensor:
        return while_there_are(self.parts, x)


class WalksOne(Walks):
    """The walk is over the part itself, taken out of its container."""

    def call(self, x: Tensor) -> Tensor:
        return over_children(self.parts[0], x) + x


@pytest.mark.parametrize("kind", [WalksTwice, WalksDown, WalksWhile])
def test_a_walk_over_all_levels_leaves_activations(kind: Any) -> None:
    model = kind()
    assert "walks over children of children" in str(same(model))
    assert epilogues(model) == 0


def test_a_walk_over_blocks_reaches_nothing_in_them() -> None:
    model = Walks()
    model.parts = nn.Sequential(Holds(), Holds())
    record = same(model)
    assert epilogues(model) == 2, str(record)
    model = WalksOne()  # its children are those that were meant above
    assert "is not taken into parts.0.up" in str(same(model))
    assert epilogues(model) == 0


@pytest.mark.parametrize("read", [(True, False), (False, True), (True, True), (False, False)])
def test_a_flag_is_traced_with_both_values(read: tuple[bool, bool]) -> None:
    class Flags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act = nn.Linear(16, 16), nn.ReLU()

        def forward(self, x: Tensor, hidden: bool = False, twice: bool = True) -> Tensor:
            z = self.a(x)
            if hidden:
                return self.act(z) + z if read[0] else self.act(z)
            if twice:
                return self.act(z)
            return self.act(z) - z if read[1] else self.act(z)

    model = Flags()
    calls = [{"hidden": h, "twice": t} for h in (True, False) for t in (True, False)]
    record = same(model, *calls)
    assert epilogues(model) == (not any(read)), str(record)
    assert not record.notes


def test_code_without_source_is_trusted_with_nothing() -> None:
    scope: dict[str, Any] = {"Around": Around, "untraceable": untraceable}
    exec(  # as in an interpreter
        "class Typed(Around):\n"
        "    def forward(self, x, hidden=False):\n"
        "        untraceable(x)\n"
        "        return self.part(x)\n",
        scope,
    )
    model = scope["Typed"](block())
    assert "whose source is not there" in str(same(model))
    assert epilogues(model) == 0


class Options(nn.Module):
    """Reads the layer twice in one combination of its optional arguments."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.act = nn.Linear(16, 16), nn.ReLU()
        self.n = n

    def forward(
        self, x: Tensor, p: Tensor | None = None, q: Tensor | None = None, r: Tensor | None = None
    ) -> Tensor:
        z = self.a(x)
        given = (p is not None, q is not None, r is not None)
        if given == tuple(bool(self.n >> i & 1) for i in range(3)):
            return self.act(z) + z
        return self.act(z)


@pytest.mark.parametrize("n", range(8))
def test_every_combination_of_optional_arguments_is_traced(n: int) -> None:
    calls = [{k: X for i, k in enumerate("pqr") if m >> i & 1} for m in range(8)]
    model = Options(n)
    record = same(model, *calls)
    assert epilogues(model) == 0, str(record)


def test_more_optional_arguments_than_are_traced() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = block()

        def forward(
            self,
            x: Tensor,
            a: Any = None,
            b: Any = None,
            c: Any = None,
            d: Any = None,
            e: Any = None,
        ) -> Tensor:
            return self.net[0](x) if a is not None and e is None else self.net(x)

    model = Many()
    record = same(model, {}, {"a": X}, {"e": X})
    assert epilogues(model) == 0
    assert "5 optional arguments have more combinations than are traced" in str(record)


WAYS = st.lists(st.sampled_from([*QUIET, *REACH]), max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([block, Mlp, Nested]), WAYS)
def test_any_tree_of_these_gives_what_it_gave(part: Any, ways: list[Any]) -> None:
    torch.manual_seed(0)
    model = part()
    for way in ways:
        if way in INDEXED and not isinstance(model, nn.Sequential):
            continue
        model = way(model)
    same(model, *([{}] if isinstance(model, nn.Sequential | Mlp | Nested) else []))


class Exchanges(nn.Module):
    """Puts another module in the place of a child when it is called first."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(16, 8), nn.Identity() if where == "act" else nn.GELU()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "act":
            self.act = nn.GELU()
        elif self.where == "up":
            self.up = nn.Sequential(self.up, nn.Tanh())
        elif self.where == "new":
            self.late = nn.Tanh()
            x = self.late(x)
        self.where = ""
        return self.act(self.up(x))


@pytest.mark.parametrize("where", ["act", "up", "new"])
def test_a_model_that_exchanges_modules_keeps_its_activations(where: str) -> None:
    model = Exchanges(where)
    old = copy.deepcopy(model)
    record = fuse_(model)
    assert "the model cannot be traced as a whole: its forward exchanges modules" in record.notes
    assert model.up.activation == "none"
    for _ in range(2):
        torch.testing.assert_close(model(X), old(X))
