"""What the README shows: its Python runs block by block, its output is what was kept of a run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bigops import cli
from bigops.backend import machine

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def _readme_output() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "readme_output", ROOT / "docs" / "readme_output.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


readme = _readme_output()
KEPT = json.loads(readme.KEPT.read_text())
BLOCKS: dict[str, str] = readme.blocks(TEXT)
SHOWN: dict[str, str] = readme.outputs_of(KEPT)


# --- Python --------------------------------------------------------------------------------------


BROKEN = {
    "a false assertion": ("assert 1 + 1 == 3", "AssertionError"),
    "another block's import": ("print(torch.ones(1))", "name 'torch' is not defined"),
    "another block's file": ("open('small.safetensors')", "FileNotFoundError"),
    "no such name": ("import bigops\nbigops.squash_", "has no attribute 'squash_'"),
    "a word to the shell": ("raise SystemExit('no')", "no"),
    "killed": ("import os\nos.kill(os.getpid(), 9)", ""),
}
WHOLE = "import torch\nopen('small.safetensors', 'w').write('x')\nprint(torch.ones(1))"


@pytest.fixture(scope="module")
def ran() -> Any:
    """How every block of the README ended, each in a process of its own, and the broken ones."""
    codes = {name: code for name, code in BLOCKS.items() if not readme.absent(code)}
    broken = {name: code for name, (code, _) in BROKEN.items()}
    return readme.run_blocks({"whole": WHOLE, **codes, **broken})


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_runs_alone_and_prints_what_is_shown(name: str, ran: Any) -> None:
    package = readme.absent(BLOCKS[name])
    if package is not None:
        assert package in ("transformers",)
        pytest.skip(f"{package} is not installed")
    assert ran[name].code == 0, ran[name].error
    assert bool(ran[name].out) == bool(SHOWN[name])
    if not _depends_on_the_machine(SHOWN[name]):
        assert _words("\n".join(readme.tidy(ran[name].out))) == _words(SHOWN[name])


def _depends_on_the_machine(shown: str) -> bool:
    """Whether times, or which kernel there is, are in an output or decide what is."""
    return machine.extension is None or bool(re.search(r"\d us\b|faster|cpu\.", shown))


def _words(text: str) -> str:
    """An output without its numbers, whose last digits belong to the machine, and its breaks."""
    return " ".join(re.sub(r"[-+]?\d[\d,.]*", "0", text).split())


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_block_is_seen(name: str, ran: Any) -> None:
    assert ran["whole"] == (0, "tensor([1.])\n", "")
    assert ran[name].code != 0
    assert BROKEN[name][1] in ran[name].error


def test_every_block_asserts_or_prints_what_is_shown() -> None:
    silent = [
        n for n, code in BLOCKS.items() if not re.search(r"^\s*assert |\bprint\(", code, re.M)
    ]
    assert silent == []
    shown = {name for name in BLOCKS if SHOWN[name]}
    assert shown == {name for name, code in BLOCKS.items() if "print(" in code}


# --- output --------------------------------------------------------------------------------------


def test_the_outputs_shown_are_those_kept_of_a_run() -> None:
    assert readme.render(TEXT, KEPT) == TEXT
    assert set(KEPT["blocks"]["lines"]) == set(BLOCKS)
    for part in readme.PARTS:
        assert re.match(r"\d{4}-\d\d-\d\d on \d+ cores of ", KEPT[part]["run"])


def test_an_output_edited_by_hand_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    monkeypatch.setattr(readme, "README", file)
    file.write_text(TEXT)
    assert readme.main(["--check"]) == 0
    for name, out in SHOWN.items():
        digit = re.search(r"\d", out)
        if digit is None:  # nothing is printed there
            continue
        at = TEXT.index(out) + digit.start()
        file.write_text(f"{TEXT[:at]}{9 - int(digit[0])}{TEXT[at + 1 :]}")
        assert readme.main(["--check"]) == 1, name


def test_a_fence_that_nothing_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="More: expected an output for its text fence"):
        readme.render(f"{TEXT}\n## More\n\n```text\n12 us\n```\n", KEPT)
    bare = {**KEPT, "blocks": {**KEPT["blocks"], "lines": {"Nowhere": ["12 us"]}}}
    with pytest.raises(ValueError, match="expected"):
        readme.render(TEXT, bare)
    with pytest.raises(ValueError, match="one python fence under a heading"):
        readme.blocks("## A\n\n```python\n1\n```\n\n```python\n2\n```\n")


def test_of_a_progress_bar_the_first_and_the_last_step_are_shown() -> None:
    steps = [f"  step {i}/9  loss 0.{i}" for i in range(10)]
    text = "\n".join(["1. train", *steps, "   12 s", *steps[:2], "done"])
    shown = ["1. train", steps[0], "  ...", steps[9], "   12 s", steps[0], steps[1], "done"]
    assert readme.few_steps(text).splitlines() == shown


SUITES = {
    "one process": "collected 9 items / 2 deselected / 7 selected\ntests/test_a.py .......  [100%]",
    "workers": "created: 2/2 workers\n2 workers [7 items]\n\n.......                  [100%]",
}


@pytest.mark.parametrize("kind", SUITES)
def test_of_the_suite_the_count_and_the_verdict_are_shown(kind: str) -> None:
    verdict = "======== 7 passed, 1 warning in 3.21s ========"
    text = f"c++ -c a.cpp\n==== test session starts ====\n{SUITES[kind]}\n{verdict}\n"
    shown = readme.ends_of_suite(text)
    assert (shown[0], shown[2:]) == ("==== test session starts ====", ["...", verdict])
    assert re.match(r"collected 9 items|2 workers \[7 items\]", shown[1])


# --- commands ------------------------------------------------------------------------------------

LINES = re.findall(r"^bigops .*$", dict(readme.sections(TEXT))["The command line"], re.MULTILINE)
CHEAP = ("bigops doctor", "bigops explain")


def test_the_command_lines_of_the_readme_parse() -> None:
    commands = {"demo", "bench", "doctor", "explain", "show", "tune"}
    assert {line.split()[1] for line in LINES} == commands
    for line in LINES:
        cli.parser().parse_args(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith(CHEAP)])
def test_a_cheap_command_line_runs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line, comments=True)[1:]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert (f"{words[1]}: " if words[0] == "explain" else "torch") in out


def test_every_target_that_the_readme_names_is_in_the_makefile() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    named = set(re.findall(r"`make ([a-z][a-z-]*)", TEXT))
    assert {"demo", "test"} <= named <= set(phony[1].split())


def test_every_environment_variable_of_the_readme_is_read_and_no_other() -> None:
    files = [ROOT / "setup.py", *ROOT.glob("bigops/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    files += ROOT.glob("csrc/**/*.py")
    read = re.compile(r"(?:environ\S*|getenv)[(\[]\s*\"(BIGOPS_[A-Z_]+)\"")
    found = {name for file in files for name in read.findall(file.read_text())}
    documented = set(re.findall(r"^\| `(BIGOPS_[A-Z_]+)", TEXT, re.MULTILINE))
    assert found == documented
