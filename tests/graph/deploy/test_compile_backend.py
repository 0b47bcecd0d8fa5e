"""torch.compile(backend="bigops"): our ops in the graph, one compilation for all sizes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import backend
from bigops.graph.deploy import compile_backend
from tests.graph.deploy.encoder import Encoder, inputs
from tests.graph.deploy.test_deploy import check
from tests.support import tolerance


def _compiled(model: nn.Module, dynamic: bool | None = True) -> nn.Module:
    torch._dynamo.reset()
    compiled: nn.Module = torch.compile(  # by the function: the entry point is of an installation
        model, backend=compile_backend.bigops, dynamic=dynamic
    )
    return compiled


def test_the_entry_point_is_declared() -> None:
    from importlib.metadata import entry_points

    found = entry_points(group="torch_dynamo_backends")
    names = {point.name: point.value for point in found}
    assert names.get("bigops") == "bigops.graph.deploy.compile_backend:bigops"


@pytest.mark.slow
def test_our_ops_run_and_other_sizes_compile_nothing_anew() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    bigops.compress_(model, {"up": bigops.Int8(), "down": bigops.Int8()})
    compiled = _compiled(model)
    with torch.no_grad(), backend.record() as ran:
        compiled(**inputs(3, 7))
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for size in ((5, 9), (2, 20)):
            given = inputs(*size)
            got, wanted = compiled(**given), model(**given)
            assert tolerance.snr_db(got["last"], wanted["last"]) > 45
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == count
    names = " ".join(ran)
    for op in ("quantized_linear", "norm", "attention"):
        assert op in names
    assert "gelu" not in names or "quantized_linear" in names


@pytest.mark.slow
def test_a_float_model_is_right() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    compiled = _compiled(model, dynamic=False)
    with torch.no_grad():
        check(compiled, model, inputs(3, 7))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(self.a(x)))


@pytest.mark.slow
def test_what_needs_gradients_is_left_to_inductor_with_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Two()
    compiled = _compiled(model)
    x = torch.randn(3, 64)
    with caplog.at_level(logging.INFO), backend.record() as ran:
        compiled(x).sum().backward()
    assert "needs gradients" in caplog.text
    assert "backend.left" in ran
    assert not any("norm" in name for name in ran)
    got = [p.grad for p in model.parameters()]
    plain = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    wide = copy.deepcopy(model).double()
    truth = torch.autograd.grad(wide(x.double()).sum(), list(wide.parameters()))
    for mine, old, ref in zip(got, plain, truth, strict=True):
        assert mine is not None
        tolerance.check(mine, ref, old, ref.abs().max() + 1)


@pytest.mark.slow
def test_eval_without_no_grad_is_left_and_an_unknown_op_goes_on() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(self.two(x)).abs()

    model = Odd().eval()
    x = torch.randn(3, 64)
    with torch.no_grad(), backend.record() as ran:
        compiled = _compiled(model)
        got, plain = compiled(x), model(x)
        truth = copy.deepcopy(model).double()(x.double())
        tolerance.check(got, truth, plain, truth.abs().max() + 1)
    assert any("norm" in name for name in ran)
