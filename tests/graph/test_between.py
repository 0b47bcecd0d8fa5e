"""What may stand between a layer and the activation that is taken into it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bigops.graph import fuse_
from bigops.nn import Linear


def _same(old: nn.Module, new: nn.Module) -> None:
    """Both give the same in either mode, with the same random numbers."""
    for mode in (True, False):
        given = []
        for model in (old.train(mode), new.train(mode)):
            torch.manual_seed(0)
            given.append(model(torch.ones(4, 8)))
        torch.testing.assert_close(*given)


class Between(nn.Module):
    """Linear, something, GELU; not a Sequential, so that it is traced."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)
        self.between = nn.ModuleList(between)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for module in self.between:
            x = module(x)
        return self.b(self.act(x))


class Untraced(nn.Module):
    """Calls a Sequential as a whole, by a rule that is not traced."""

    def __init__(self, row: nn.Sequential) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Linear(8, 8), *list(row)[1:-1], nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x) if x.sum() > 0 else self.row(-x)


class Doubling(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda m, args, y: 2 * y)
    return module


PASS = {
    "p = 0": lambda: [nn.Dropout(0.0)],
    "in place": lambda: [nn.Dropout(0.0, inplace=True)],
    "identity": lambda: [nn.Identity(), nn.Dropout(0)],
}
STOP = {
    "p > 0": lambda: [nn.Dropout(0.5)],
    "one of two": lambda: [nn.Dropout(0.0), nn.Dropout(0.5)],
    "hooked": lambda: [_hooked(nn.Dropout(0.0))],
    "hooked identity": lambda: [_hooked(nn.Identity())],
    "subclass": lambda: [Doubling(0.0)],
    "alpha": lambda: [nn.AlphaDropout(0.5)],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", PASS)
def test_an_activation_is_taken_past_what_gives_on_what_it_is_given(
    kind: str, training: bool
) -> None:
    row = nn.Sequential(nn.Linear(8, 8), *PASS[kind](), nn.GELU())
    for model, layer in ((Between(*PASS[kind]()), "a"), (row, "0"), (Untraced(row), "row.0")):
        old = copy.deepcopy(model)
        fuse_(model.train(training))
        assert model.get_submodule(layer).activation == "gelu"
        _same(old, model)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", STOP)
def test_it_stays_behind_what_acts_in_training(kind: str, training: bool) -> None:
    for model in (Between(*STOP[kind]()), nn.Sequential(nn.Linear(8, 8), *STOP[kind](), nn.GELU())):
        old = copy.deepcopy(model)
        fuse_(model.train(training))
        assert all(m.activation == "none" for m in model.modules() if isinstance(m, Linear))
        _same(old, model)


def test_a_careless_fusion_is_seen() -> None:
    old = Between(nn.Dropout(0.5))
    wrong = copy.deepcopy(old)
    wrong.a, wrong.act = Linear.from_linear(wrong.a, "gelu"), nn.Identity()
    with pytest.raises(AssertionError):
        _same(old, wrong)
