"""Calibration apart from timing: `data=` of `compress_`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import Int4, Int8, LowRank, Sparse, compress_
from bigops.compress.calibrate import calibrate
from bigops.formats import quantize
from bigops.graph import sites as sites_module
from bigops.timing import Ratio

STATIC = Int8(activations="static")


@pytest.fixture(autouse=True)
def _won(monkeypatch: pytest.MonkeyPatch) -> None:
    won = sites_module.Contest(2.0, 1.0, Ratio(2.0, 1.9, 2.1))
    monkeypatch.setattr("bigops.compress.apply.contest", lambda *a, **k: won)


class Twice(nn.Module):
    """Calls one layer twice in a forward pass, on inputs of other ranges, and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.never = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, scale: float = 10.0) -> Tensor:
        return self.out(torch.relu(self.fc(x) + self.fc(input=x * scale)))


def qparams_of(*inputs: Tensor) -> list[float]:
    seen = torch.cat([t.flatten() for t in inputs])
    return quantize.static_qparams(float(seen.min()), float(seen.max())).tolist()


def test_every_call_and_every_batch_is_in_the_range() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    batches = [torch.randn(3, 64), torch.randn(5, 64) * 4, torch.randn(1, 64)]
    record = compress_(model, {"fc": STATIC}, data=batches)
    assert [d.name for d in record.done] == ["fc"]
    assert model.fc.x_qparams.tolist() == qparams_of(*batches, *(10.0 * b for b in batches))
    from_example = Twice().eval()
    compress_(from_example, {"fc": STATIC}, batches[0])
    assert from_example.fc.x_qparams.tolist() == qparams_of(batches[0], 10.0 * batches[0])


@pytest.mark.parametrize(
    "config",
    [
        STATIC,
        Int4(activations="static"),
        Sparse(0.9) + STATIC,
        Int8(activations="static", symmetric=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("freeze", [True, False])
def test_data_is_for_calibration_and_example_inputs_for_timing(config: Any, freeze: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(4, 64)
    record = compress_(model, config, torch.zeros(4, 64), [x, 3 * x], freeze=freeze)
    assert record.done[0].speedup is not None
    assert model[0].x_qparams.tolist() == qparams_of(x, 3 * x)
    untimed = nn.Sequential(nn.Linear(64, 64))
    record = compress_(untimed, config, data=[x, 3 * x])
    assert record.done[0].speedup is None
    assert untimed[0].x_qparams.tolist() == qparams_of(x, 3 * x)


def test_batches_come_in_every_form_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 64)
    drawn = []

    def stream() -> Iterator[Any]:
        for batch in (x, (2 * x, 1.0), (3 * x,), {"x": 4 * x, "scale": 1.0}):
            drawn.append(batch)
            yield batch

    model = Twice()
    compress_(model, {"fc": STATIC}, data=stream())
    assert len(drawn) == 4
    assert model.fc.x_qparams.tolist() == qparams_of(x, 10 * x, 2 * x, 30 * x, 4 * x)
    assert model.training  # as it was
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=2)
    again = nn.Sequential(nn.Linear(64, 64))
    compress_(again, STATIC, data=loader)
    assert again[0].x_qparams.tolist() == qparams_of(x)


class Images(nn.Module):
    """Takes a list, as detection models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, images: list[Tensor], targets: Any = None) -> list[Tensor]:
        assert isinstance(images, list)
        return [self.fc(image) for image in images]


@pytest.mark.parametrize("verb", ["example_inputs", "data", "keyword", "tuple"])
def test_a_list_is_one_input(verb: str) -> None:
    images = [torch.rand(8, 64), 50 * torch.rand(4, 64)]
    given: dict[str, Any] = {
        "example_inputs": {"example_inputs": images},
        "data": {"data": [images]},
        "keyword": {"data": [{"images": images}]},
        "tuple": {"data": [(images, None)]},
    }[verb]
    model = Images()
    compress_(model, STATIC, keep="all", **given)
    assert model.fc.x_qparams.tolist() == qparams_of(*images)


def test_a_list_is_one_input_of_the_other_verbs_too() -> None:
    images = [torch.rand(8, 64), torch.rand(4, 64)]
    model = Images()
    bigops.fuse_(model, images)
    bigops.pack_(Images(), images)
    from bigops.compress import measure

    assert measure.peak_bytes(Images(), images) > 0
    loader = torch.utils.data.DataLoader([images], batch_size=None)  # no collation
    again = Images()
    compress_(again, STATIC, data=loader, keep="all")
    assert again.fc.x_qparams.tolist() == qparams_of(*images)


def test_no_batch_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[Tensor]:
        for _ in range(20):
            assert sum(ref() is not None for ref in alive) <= 1
            batch = torch.randn(2, 64)
            alive.append(weakref.ref(batch))
            yield batch
            del batch

    compress_(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), STATIC, data=stream())
    assert len(alive) == 20


@pytest.mark.parametrize("given", ["data", "example_inputs"])
def test_a_layer_without_a_range_is_left_by_name(given: str) -> None:
    zeros, model = torch.zeros(2, 64), Twice()
    with torch.no_grad():
        for p in (*model.fc.parameters(),):
            p.zero_()
    record = compress_(model, STATIC, **{given: [zeros] if given == "data" else zeros})
    assert not record.done
    for name in ("fc", "out"):
        assert record.reason(name) == (
            f"{given} gives it zeros alone, of which static activations take no range"
        )
    assert "never calls it" in (record.reason("never") or "")
    assert [type(m) for m in (model.fc, model.out, model.never)] == [nn.Linear] * 3


def test_zeros_say_nothing_of_a_layer_by_itself() -> None:
    for layer in (
        bigops.nn.QuantLinear(64, 64, activations="static"),
        bigops.nn.SparseLinear(64, 64, activations="static"),
        bigops.nn.QuantLinear(64, 64, bits=4, group=64, activations="static"),
    ):
        layer.calibrate(torch.zeros(3, 64))
        with pytest.raises(ValueError, match="x_qparams: expected a calibrated layer"):
            layer.freeze()
        layer.calibrate(torch.tensor([[0.0, 2.0]]))
        layer.calibrate(torch.zeros(3, 64))
        assert layer.freeze().x_qparams.tolist() == qparams_of(torch.tensor([0.0, 2.0]))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "data: expected at least one batch to calibrate with; got none"),
        (iter(()), ValueError, "data: expected at least one batch"),
        (torch.randn(2, 64), TypeError, "data: expected an iterable of batches.*got a Tensor"),
        ({"x": torch.randn(2, 64)}, TypeError, "data: expected an iterable.*got a dict"),
        (7, TypeError, "data: expected an iterable of batches.*got a int"),
        (
            [torch.randn(2, 64), torch.full((2, 64), torch.nan)],
            ValueError,
            "data: expected finite inputs .* NaN or inf for fc in batch 1",
        ),
        ([torch.full((2, 64), -torch.inf)], ValueError, "NaN or inf for fc in batch 0"),
        ([torch.randn(2, 63)], RuntimeError, "mat1 and mat2"),
    ],
)
def test_bad_data_is_refused_and_the_model_is_as_before(
    data: Any, error: type[Exception], message: str
) -> None:
    model = Twice()
    before = [(n, id(m), m.training) for n, m in model.named_modules()]
    with pytest.raises(error, match=message):
        compress_(model, STATIC, data=data)
    assert [(n, id(m), m.training) for n, m in model.named_modules()] == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_data_that_nobody_needs_is_not_read() -> None:
    drawn: list[int] = []
    data = (drawn.append(1) for _ in range(3))
    record = compress_(nn.Sequential(nn.Linear(64, 64)), LowRank(4), data=data)
    assert "data was not read: no layer has static activations" in record.notes
    assert not drawn


def test_the_range_is_that_of_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64))
    x = torch.rand(8, 64)
    found = calibrate(model, {"1": model[1]}, [x], "data")
    assert list(found.qparams["1"]) == qparams_of(x)
    assert not found.left
    assert model[0].training


def test_calibration_leaves_buffers_and_random_state_as_before() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.calls = nn.Linear(64, 64), 0
            self.register_buffer("mean", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.mean += x.mean(0)
            return self.fc(x + torch.rand(64))

    model = Counts()
    mean, drawn = model.mean, torch.get_rng_state()
    compress_(model, STATIC, data=[torch.ones(2, 64)] * 3)
    assert model.mean is mean
    assert not bool(mean.any())
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training
