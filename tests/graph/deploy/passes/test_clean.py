"""What does nothing in inference goes; what does something stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bigops.graph.deploy.passes import clean, fold, inline, repeated
from tests.graph.deploy.passes.exported import graph_of, rewritten


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(x.to(torch.float32), 0.5, self.training).contiguous()
        return (y[:] * 2.0).view(y.shape).to("cpu").clone()


def test_what_hands_on_its_input_goes() -> None:
    found = rewritten(clean.run, Idle(), torch.randn(4, 6), exact=True)
    assert set(found.after) == {"mul"}
    assert found.count >= 5


class Busy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.t().contiguous()  # another memory
        z = y.to(torch.float64).to(torch.float32)  # two casts
        return z[1:] + y[:-1].expand(-1, -1) * (x.sum() + 0.0)


def test_what_does_something_stays() -> None:
    found = rewritten(clean.run, Busy(), torch.randn(4, 6), exact=True)
    for name in ("contiguous", "slice"):
        assert found.after[name] == found.before[name] - (name == "slice") * 0
    assert found.after["to"] == 2
    assert found.after["add"] == 2  # -0.0 + 0.0 is another number


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = 1.0  # x must not change
        fresh = x * 2
        fresh.add_(1)
        return y + fresh


def test_a_copy_that_is_written_stays_and_a_fresh_result_is_written_out_of_place() -> None:
    x = torch.randn(4, 6)
    before = x.clone()
    found = rewritten(clean.run, Written(), x, exact=True)
    assert torch.equal(x, before)
    assert found.after["clone"] == 1
    assert found.before["add_"] == 1
    assert found.after["add_"] == 0


class Aliased(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        fresh = x * 2
        row = fresh[0]  # sees what is written below
        fresh.add_(1)
        return fresh + row


def test_a_write_that_a_view_sees_stays_in_place() -> None:
    found = rewritten(clean.run, Aliased(), torch.randn(4, 6), exact=True)
    assert found.after["add_"] == 1


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(12.0))
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        row = self.table[:6].exp() * self.weight.sigmoid()
        return x * row + torch.rand(()).mul(0.0)


def test_what_follows_from_weights_is_computed_once_and_random_numbers_are_not() -> None:
    graph = graph_of(Masked(), torch.randn(4, 6))
    assert fold.run(graph) == 1
    graph.recompile()
    names = {getattr(n.target, "_opname", "") for n in graph.graph.nodes}
    assert "exp" not in names
    assert "sigmoid" not in names
    assert "rand" in names


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x * (self.seen * 2)


def test_state_that_the_graph_writes_is_no_constant() -> None:
    graph = graph_of(Counting(), torch.randn(4, 6))
    assert fold.run(graph) == 0


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        return torch.arange(n) * 1.0 + torch.arange(n) * 1 + x.sum(1) + x.sum(1)


def test_repeated_calls_are_made_once_and_1_is_not_1_0() -> None:
    found = rewritten(repeated.run, Twice(), torch.randn(4, 6), exact=True)
    assert found.before["arange"] == found.before["sum"] == 2
    assert found.after["arange"] == found.after["sum"] == 1
    assert found.after["mul"] == 2


class Modes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = x @ x.t()
        return y.sum(1)


class Autocast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ x.t()
        return y.sum(1)


def test_a_graph_in_a_mode_that_says_nothing_is_inlined() -> None:
    found = rewritten(inline.run, Modes(), torch.randn(4, 6), exact=True)
    assert found.count == 1
    assert found.after == {"matmul": 1, "t": 1, "sum": 1} or "wrap_with_autocast" not in found.after
    graph = graph_of(Autocast(), torch.randn(4, 6))
    assert inline.run(graph) == 0  # its casts are in no graph
