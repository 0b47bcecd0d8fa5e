"""What the README shows runs: its Python in order, its command lines as the parser takes them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bigops import cli

TEXT = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, Any] = {}
    for block in blocks[:4]:
        exec(block, names)
    x = names["x"]
    with torch.inference_mode():
        assert torch.equal(names["small"](x), names["model"](x))
    assert names["layer"].thawed
    assert names["layer"].values.grad.any()
    # how full it is depends on no seed, the picture and its bytes do
    shown = re.search(r"^96 x 256, .*? stored as f32", TEXT, re.MULTILINE)
    assert shown is not None
    assert shown[0] in capsys.readouterr().out
    model = nn.Linear(784, 10)
    names.update(
        model=model,
        y=torch.zeros(64, dtype=torch.long),
        optimizer=torch.optim.SGD(model.parameters()),
    )
    exec(blocks[4], names)
    assert names["stepped"] is True
    exec(blocks[5], names)
    assert names["stepped"] is True
    assert names["loss"].item() > 1


def test_the_command_lines_of_the_readme_parse() -> None:
    lines = re.findall(r"^bigops .*$", TEXT, re.MULTILINE)
    commands = {"demo", "bench", "doctor", "explain", "show", "tune"}
    assert {line.split()[1] for line in lines} == commands
    for line in lines:
        cli._parser().parse_args(shlex.split(line, comments=True)[1:])


def test_every_environment_variable_of_the_readme_is_read_and_no_other() -> None:
    root = Path(__file__).resolve().parent.parent
    files = [root / "setup.py", *root.glob("bigops/**/*.py"), *root.glob("csrc/**/*.cpp")]
    files += root.glob("csrc/**/*.py")
    read = re.compile(r"(?:environ\S*|getenv)[(\[]\s*\"(BIGOPS_[A-Z_]+)\"")
    found = {name for file in files for name in read.findall(file.read_text())}
    documented = set(re.findall(r"^\| `(BIGOPS_[A-Z_]+)", TEXT, re.MULTILINE))
    assert found == documented
