"""Models whose own code exchanges a module at their first call are saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.files import FormatError
from tests.support.interrupts import state

X = torch.randn(3, 64)


class Sparse(nn.Module):
    """An attention in name, as BigBird has it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.query(x))


class Full(Sparse):
    def __init__(self, old: Sparse, *late: nn.Module) -> None:
        super().__init__()
        self.query, self.value = old.query, old.value
        self.drop, self.late = nn.Dropout(0.1), nn.ModuleList(late)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x)) * 2


class Net(nn.Module):
    """Exchanges its attention, and with ``exchange`` whatever else, when it is called first."""

    def __init__(self, exchange: Callable[[Any], None] = lambda net: None) -> None:
        super().__init__()
        self.attention, self.act = Sparse(), nn.Identity()
        self.row = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.exchange, self.called = exchange, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.called:
            self.called = True
            self.attention = Full(self.attention).train(self.training)
            self.exchange(self)
        return self.row(self.act(self.attention(x)))


def to_gelu(net: Any) -> None:
    net.act = nn.GELU()


def in_a_row(net: Any) -> None:
    net.row[1] = nn.Tanh()


def to_norm(net: Any) -> None:
    net.act = nn.LayerNorm(64)
    nn.init.normal_(net.act.weight)


EXCHANGES = {"attention": lambda net: None, "act": to_gelu, "row": in_a_row, "norm": to_norm}
VERBS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda m: None,
    "fuse_": bigops.fuse_,
    "compress_": lambda m: bigops.compress_(m, bigops.Int8(), keep="all"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("what", EXCHANGES)
def test_a_fresh_model_takes_the_file_of_one_that_was_called(
    what: str, verb: str, tmp_path: Path
) -> None:
    model, fresh = Net(EXCHANGES[what]).eval(), Net(EXCHANGES[what]).eval()
    model(X)
    VERBS[verb](model)
    want = model(X)
    bigops.save(model, tmp_path / "m")
    bigops.load(tmp_path / "m", fresh)
    fresh.exchange = lambda net: None  # it has what the other one made
    torch.testing.assert_close(fresh(X), want, rtol=0, atol=0)


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_that_was_called_takes_the_file_of_a_fresh_one(verb: str, tmp_path: Path) -> None:
    model, called = Net().eval(), Net().eval()
    called(X)
    VERBS[verb](model)
    bigops.save(model, tmp_path / "m")
    bigops.load(tmp_path / "m", called)
    torch.testing.assert_close(called(X), model(X), rtol=0, atol=0)


def with_weights(net: Any) -> None:
    net.attention.late.append(nn.Linear(64, 64))


def narrow(net: Any) -> None:
    net.row[0] = nn.Linear(64, 32)


def in_the_list(net: Any) -> None:
    net.row.append(nn.Tanh())


@pytest.mark.parametrize("exchange", [with_weights, narrow, in_the_list])
def test_what_has_other_tensors_or_sizes_is_refused(
    exchange: Callable[[Any], None], tmp_path: Path
) -> None:
    model, fresh = Net(exchange).eval(), Net()
    model(X)
    bigops.save(model, tmp_path / "m")
    before = state(fresh)
    with pytest.raises(FormatError, match="the file h"):
        bigops.load(tmp_path / "m", fresh)
    assert state(fresh) == before


def test_torchs_own_containers_exchange_nothing(tmp_path: Path) -> None:
    bigops.save(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), tmp_path / "m")
    with pytest.raises(FormatError, match="holds a Tanh; the model a .*ReLU"):
        bigops.load(tmp_path / "m", nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
