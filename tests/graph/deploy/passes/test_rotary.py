"""Rotary embeddings that models write out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from bigops.graph.deploy.passes import clean, repeated, rotary
from tests.graph.deploy.passes.exported import rewritten

T, H, D = 6, 2, 16


def _run(graph: fx.GraphModule) -> int:
    clean.run(graph)
    repeated.run(graph)
    return rotary.run(graph)


class Rotated(nn.Module):
    """q and k of a projection, as Llama turns them; the first R columns of D, as Phi does."""

    def __init__(self, r: int = D, table: tuple[int, ...] = (1, 1, T), wide: bool = False) -> None:
        super().__init__()
        self.r, self.wide = r, wide
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.randn(*table, r))

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype of x, or as they are where `wide`."""
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        return (cos, sin) if self.wide else (cos.to(x.dtype), sin.to(x.dtype))

    def half(self, x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-b, a), dim=-1)

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.tables(x)
        return ((x * cos) + (self.half(x) * sin)).to(x.dtype)

    def one(self, x: Tensor) -> Tensor:
        if self.r == D:
            return self.turn(x)
        return torch.cat((self.turn(x[..., : self.r]), x[..., self.r :]), dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.unflatten(-1, (3 * H, D)).transpose(1, 2)
        return self.one(heads[:, :H]), self.one(heads[:, H : 2 * H])


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, T, 3 * H * D).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["own", "wide"])
@pytest.mark.parametrize("table", [(1, 1, T), (1, T), (T,)], ids=str)
@pytest.mark.parametrize("r", [D, 6])
def test_q_and_k_become_one_op_each(
    r: int, table: tuple[int, ...], wide: bool, dtype: torch.dtype
) -> None:
    found = rewritten(_run, Rotated(r, table, wide), _x(dtype))
    assert found.before["neg"] == 2
    assert found.count == found.after["rotary"] == 2
    assert not {"neg", "cat", "mul", "add"} & found.after.keys()


class Swapped(Rotated):
    """The same sum, written the other way round."""

    def turn(self, x: Tensor) -> Tensor:
        cos, sin = self.tables(x)
        return sin * self.half(x) + cos * x


def test_the_order_of_factors_and_terms_is_free() -> None:
    assert rewritten(_run, Swapped(), _x()).after["rotary"] == 2


class Viewed(Rotated):
    """Its result is viewed as rows, which memory of another order has to be copied for."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.unflatten(-1, (3 * H, D)).transpose(1, 2).contiguous()
        y = self.one(heads[:, :H].contiguous())
        return y.view(-1, T, D), y.transpose(2, 3).view(-1, H, D, T)


def test_a_view_of_the_result_may_become_a_copy() -> None:
    assert rewritten(_run, Viewed(), _x()).after["rotary"] == 1


# what only looks like it ---------------------------------------------------------------------


class Negated(Rotated):
    """The first half is negated."""

    def half(self, x: Tensor) -> Tensor:
        a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((b, -a), dim=-1)


class Uneven(Rotated):
    """Halves of different sizes."""

    def half(self, x: Tensor) -> Tensor:
        return torch.cat((-x[..., 6:], x[..., :6]), dim=-1)


class Neighbours(Rotated):
    """Pairs of neighbours, as GPT-J has them."""

    def half(self, x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


class Strided(Rotated):
    """Every other column."""

    def half(self, x: Tensor) -> Tensor:
        return torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1)


class Elsewhere(Rotated):
    """Tokens turn, not columns."""

    def half(self, x: Tensor) -> Tensor:
        return torch.cat((-x[..., T // 2 :, :], x[..., : T // 2, :]), dim=-2)


class OfAnother(Rotated):
    """The halves are those of another tensor."""

    def turn(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("cos") + self.half(x.sin()) * self.get_buffer("sin")


class Difference(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("cos") - self.half(x) * self.get_buffer("sin")


class Doubled(Rotated):
    def turn(self, x: Tensor) -> Tensor:
        straight = x * self.get_buffer("cos")
        return torch.add(straight, self.half(x) * self.get_buffer("sin"), alpha=2)


class Kept(Rotated):
    """What turned is read besides."""

    def turn(self, x: Tensor) -> Tensor:
        half = self.half(x)
        return x * self.get_buffer("cos") + half * self.get_buffer("sin") + half


OTHERS = [
    Negated(),
    Uneven(),
    Neighbours(),
    Strided(),
    Elsewhere(),
    OfAnother(),
    Difference(),
    Doubled(),
    Kept(),
    Rotated(table=(1, H, T)),
    Rotated(table=(H, T)),
    Rotated(table=(1, 1, 1)),
]


@pytest.mark.parametrize("module", OTHERS, ids=lambda m: type(m).__name__)
def test_formulas_that_only_look_like_it_stay(module: nn.Module) -> None:
    found = rewritten(_run, module, _x())
    assert found.count == found.after["rotary"] == 0


class Reversed(Rotated):
    """The columns that do not turn come first: two ops, and what puts them there."""

    def one(self, x: Tensor) -> Tensor:
        return torch.cat((x[..., self.r :], self.turn(x[..., : self.r])), dim=-1)


class Overlapping(Rotated):
    """What stands behind the columns that turn are not those that follow them."""

    def one(self, x: Tensor) -> Tensor:
        return torch.cat((self.turn(x[..., : self.r]), x[..., 4:14]), dim=-1)


@pytest.mark.parametrize("module", [Reversed(6), Overlapping(6)], ids=lambda m: type(m).__name__)
def test_other_columns_behind_are_not_taken_in(module: nn.Module) -> None:
    found = rewritten(_run, module, _x())
    assert found.after["rotary"] == found.after["cat"] == 2
