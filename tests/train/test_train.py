"""Mixed precision and checkpoints: skipped steps leave no trace, resumed runs are bitwise equal."""

import copy
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import Tensor, nn

from bigops.train import SGD, AdamW, MixedPrecision, load_checkpoint, save_checkpoint

PRECISIONS = ("fp32", "tf32", "bf16-mixed", "fp16-mixed")  # of float32 weights, on a CPU
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "own_adamw": lambda p: AdamW(p, lr=1e-3),
    "own_sgd": lambda p: SGD(p, lr=0.1, momentum=0.9),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small only wait for each other's threads, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 4))


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(32, 8, generator=generator)
    return x, torch.randint(0, 4, (32,), generator=generator)


def _backward(
    model: nn.Module, optimizer: torch.optim.Optimizer, precision: MixedPrecision, step: int = 0
) -> Tensor:
    x, y = _batch(step)
    with precision.autocast():
        loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    precision.backward(loss)
    return loss.detach()


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every weight and every tensor and number of the optimiser's state."""
    tensors = [value.clone() for value in model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [torch.as_tensor(v).clone() for _, v in sorted(state.items()) if v is not None]
    return tensors


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------- skipped steps


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_bad_gradient_skips_the_step(name: str, value: float, clip_norm: float | None) -> None:
    model = _model()
    optimizer = OPTIMIZERS[name](model.parameters())
    precision = MixedPrecision("fp16-mixed", init_scale=1024.0)
    for step in range(3):
        _backward(model, optimizer, precision, step)
        assert precision.step(optimizer, clip_norm)
    before, scale = _snapshot(model, optimizer), precision.scale
    assert scale == 1024.0

    _backward(model, optimizer, precision, 3)
    model[3].weight.grad[1, 2] = value
    assert not precision.step(optimizer, clip_norm)
    assert precision.scale == scale / 2
    assert _same(_snapshot(model, optimizer), before)

    _backward(model, optimizer, precision, 3)
    assert precision.step(optimizer, clip_norm)
    assert precision.scale == scale / 2
    assert not _same(_snapshot(model, optimizer), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_check_sees_a_step_that_was_not_skipped(name: str) -> None:
    model = _model()
    optimizer = OPTIMIZERS[name](model.parameters())
    precision = MixedPrecision("fp16-mixed")
    _backward(model, optimizer, precision)
    precision.step(optimizer)
    before = _snapshot(model, optimizer)
    _backward(model, optimizer, precision)
    model[3].weight.grad[1, 2] = float("inf")
    optimizer.step()  # the planted fault: nobody asks the scaler
    assert not _same(_snapshot(model, optimizer), before)


def test_a_first_step_can_be_skipped() -> None:
    model = _model()
    optimizer = OPTIMIZERS["adamw_fused"](model.parameters())
    precision = MixedPrecision("fp16-mixed")
    weights = [p.clone() for p in model.parameters()]
    _backward(model, optimizer, precision)
    model[0].bias.grad.fill_(float("inf"))
    assert not precision.step(optimizer)
    assert _same([p.detach() for p in model.parameters()], weights)
    assert precision.scale == 2.0**15


def test_an_overflow_finds_the_scale_by_itself() -> None:
    model = _model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    precision = MixedPrecision("fp16-mixed", init_scale=2.0**40)
    stepped = []
    for step in range(40):
        _backward(model, optimizer, precision, step)
        stepped.append(bool(precision.step(optimizer)))
    skips = stepped.index(True)
    # fp16 ends at 65504 and the loss gradient is above 2^-10: between these the scale must land.
    assert 14 <= skips <= 35
    assert precision.scale <= 2.0 ** (40 - skips)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_scale_grows_after_enough_good_steps() -> None:
    model = _model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    precision = MixedPrecision("fp16-mixed", init_scale=8.0, growth_interval=3)
    scales = []
    for step in range(7):
        _backward(model, optimizer, precision, step)
        assert precision.step(optimizer)
        scales.append(precision.scale)
    assert scales == [8, 8, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_clipping_an_inf_skips_in_the_other_precisions(precision: str) -> None:
    model = _model()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    amp = MixedPrecision(precision)
    _backward(model, optimizer, amp)
    assert amp.step(optimizer, clip_norm=1.0)
    before = _snapshot(model, optimizer)
    _backward(model, optimizer, amp)
    model[0].weight.grad[0, 0] = float("inf")
    assert not amp.step(optimizer, clip_norm=1.0)
    assert _same(_snapshot(model, optimizer), before)
    assert amp.scale == 1.0


# ------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_the_scale_does_not_change_the_step(clip_norm: float | None) -> None:
    """Powers of two scale fp16 exactly as long as nothing leaves its normal range."""
    weights = []
    for scale in (256.0, 1024.0):
        model = _model().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        precision = MixedPrecision("fp16-mixed", init_scale=scale)
        x, y = _batch(0)
        with precision.autocast():
            loss = (model(x)[:, 0] * (1.0 + y)).mean()
        precision.backward(loss)
        assert precision.step(optimizer, clip_norm)
        weights.append([p.detach() for p in model.parameters()])
    assert _same(*weights)
    assert not _same(weights[0], [p.detach() for p in _model().parameters()])


def test_scaling_saves_small_gradients() -> None:
    def weight_gradient(precision: MixedPrecision) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(8, 4, bias=False)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        with precision.autocast():
            loss = layer(torch.ones(2, 8)).float().sum() * 2.0**-30
        precision.backward(loss)
        assert precision.step(optimizer)
        return layer.weight.grad

    # fp16 ends at 2^-24: unscaled, the gradient is lost; scaled, it is exact.
    assert weight_gradient(MixedPrecision("fp16-mixed", init_scale=1.0)).eq(0).all()
    assert weight_gradient(MixedPrecision("fp16-mixed")).eq(2.0**-29).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_dtypes(precision: str) -> None:
    model = _model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    amp = MixedPrecision(precision)
    with amp.autocast():
        out = model(_batch(0)[0])
    assert out.dtype == (amp.dtype or torch.float32)
    amp.backward(out.float().mean())
    assert amp.step(optimizer)
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_of_several_backwards_add_up(precision: str) -> None:
    model = _model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    amp = MixedPrecision(precision)
    x, _ = _batch(0)
    grads = []
    for passes in (1, 2):
        optimizer.zero_grad()
        for _ in range(passes):
            with amp.autocast():
                loss = model(x).float().mean()
            amp.backward(loss)
        assert amp.step(optimizer)
        grads.append([p.grad.clone() for p in model.parameters()])
    assert _same([2 * g for g in grads[0]], grads[1])


# ------------------------------------------------------------------------------------------ errors


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="precision: expected one of fp32, .*; got 'fp8'"):
        MixedPrecision("fp8")
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda'; got 'tpu'"):
        MixedPrecision("fp32", device="tpu")
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda'; got 'meta'"):
        MixedPrecision("fp32", device="meta")
    with pytest.raises(ValueError, match="init_scale: expected a finite number above 0; got inf"):
        MixedPrecision("fp16-mixed", init_scale=float("inf"))
    with pytest.raises(ValueError, match="growth_factor: expected a number above 1; got 1"):
        MixedPrecision("fp16-mixed", growth_factor=1)
    with pytest.raises(ValueError, match="backoff_factor: expected between 0 and 1; got 1.5"):
        MixedPrecision("fp16-mixed", backoff_factor=1.5)
    with pytest.raises(ValueError, match="growth_interval: expected at least 1; got 0"):
        MixedPrecision("fp16-mixed", growth_interval=0)


def test_a_missing_gpu_is_named() -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with pytest.raises(RuntimeError, match=f"'cuda:{count}' asked for, this torch sees {count}"):
        MixedPrecision("fp16-mixed", device=f"cuda:{count}")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_misuse(precision: str) -> None:
    model = _model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    amp = MixedPrecision(precision)
    with pytest.raises(RuntimeError, match=r"expected a call of backward\(\)"):
        amp.step(optimizer)
    with pytest.raises(ValueError, match=r"loss: expected a scalar; got shape \(32, 4\)"):
        amp.backward(model(_batch(0)[0]))
    _backward(model, optimizer, amp)
    with pytest.raises(ValueError, match="clip_norm: expected a number above 0; got 0"):
        amp.step(optimizer, clip_norm=0)
    foreign = torch.optim.SGD(_model().parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="expected gradients, no parameter"):
        amp.step(foreign)
    assert amp.step(optimizer)
    with pytest.raises(RuntimeError, match="several optimizers per backward step in one call"):
        amp.step(optimizer)


def test_state_of_another_precision() -> None:
    amp = MixedPrecision("fp16-mixed")
    with pytest.raises(ValueError, match="state: expected precision fp16-mixed; got fp32"):
        amp.load_state_dict(MixedPrecision("fp32").state_dict())
    with pytest.raises(ValueError, match="state: expected keys precision and scaler; got"):
        amp.load_state_dict({"scale": 1.0})


# ------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_bitwise_equal(precision: str, name: str, tmp_path: Path) -> None:
    def parts(interval: int) -> dict:
        model = _model()
        amp = MixedPrecision(precision, growth_interval=interval)
        return {
            "model": model,
            "optimizer": OPTIMIZERS[name](model.parameters()),
            "precision": amp,
        }

    def run(model: nn.Module, optimizer: torch.optim.Optimizer, precision: MixedPrecision, steps):
        losses = []
        for step in steps:
            losses.append(_backward(model, optimizer, precision, step))
            if step == 4 and precision.precision == "fp16-mixed":
                model[0].weight.grad.fill_(float("nan"))
            precision.step(optimizer, clip_norm=1.0)
        return losses

    first = parts(3)
    run(**first, steps=range(5))
    save_checkpoint(tmp_path / "a.pt", **first, epoch=2, note={"lr": [0.1, 0.2]})
    losses = run(**first, steps=range(5, 11))

    torch.manual_seed(99)
    second = parts(3)
    values = load_checkpoint(tmp_path / "a.pt", **second)
    assert values == {"epoch": 2, "note": {"lr": [0.1, 0.2]}}
    assert _same(run(**second, steps=range(5, 11)), losses)
    assert _same(
        _snapshot(second["model"], second["optimizer"]),
        _snapshot(first["model"], first["optimizer"]),
    )
    assert second["precision"].state_dict() == first["precision"].state_dict()


def test_resume_without_the_random_state_differs(tmp_path: Path) -> None:
    model = _model()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    save_checkpoint(tmp_path / "a.pt", model=model)
    loss = _backward(model, optimizer, MixedPrecision())  # draws a dropout mask
    load_checkpoint(tmp_path / "a.pt", model=model, rng=False)
    assert not torch.equal(_backward(model, optimizer, MixedPrecision()), loss)
    load_checkpoint(tmp_path / "a.pt", model=model)
    assert torch.equal(_backward(model, optimizer, MixedPrecision()), loss)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, model=_model(), step=1)
    old = path.read_bytes()

    def full_disk(file: BinaryIO, tensor: Tensor) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("bigops.files.tensors._put", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, model=_model(), step=2)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a.pt"]
    monkeypatch.undo()
    with pytest.raises(TypeError, match="step: expected an object with state_dict, or numbers"):
        save_checkpoint(path, step=object())
    assert load_checkpoint(path) == {"step": 1}


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_damaged_and_foreign_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(ValueError, match="a.pt does not exist"):
        load_checkpoint(path)
    save_checkpoint(path, model=_model())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"hello", pickle.dumps({"format": 1}, 2)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path: .*a\.pt is no readable checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="expected a file of format bigops.checkpoint.1"):
        load_checkpoint(path)
    torch.save({"format": _Touch(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match="is no readable checkpoint"):
        load_checkpoint(path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    model = _model()
    save_checkpoint(path, model=model)
    other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 5))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"model: 3.weight expected shape \(5, 16\); got \(4, 16"):
        load_checkpoint(path, model=other)
    assert _same(list(other.state_dict().values()), list(before.values()))
    with pytest.raises(ValueError, match="model: only the file has '0.bias'"):
        load_checkpoint(path, model=nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"holds \['model'\], not \['optimizer'\]"):
        load_checkpoint(path, model=model, optimizer=OPTIMIZERS["sgd"](model.parameters()))
