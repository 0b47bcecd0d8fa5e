"""The `bigops` command: exit codes, one clear line for a mistake, nothing half-written."""

from __future__ import annotations

import contextlib
import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import bigops
from bigops import cli
from bigops.benches import harness, rows
from tests.benches.test_harness import COLUMNS, ROW
from tests.cli.command import run

ROOT = Path(__file__).resolve().parents[2]


# --- start ---------------------------------------------------------------------------------------


def test_version_and_help_start_without_torch() -> None:
    probe = (
        "import sys\n"
        "from bigops import cli\n"
        "try:\n    cli.main([sys.argv[1]])\n"
        "except SystemExit as leave:\n    assert not leave.code\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for option in ("--version", "--help"):
        done = subprocess.run(
            [sys.executable, "-c", probe, option], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "bigops" in done.stdout


def test_version_says_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"bigops {bigops.__version__}\n", "")


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bigops", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == cli.MISUSE
    assert "invalid choice: 'nonsense'" in done.stderr


# --- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "no command": ((), "required: COMMAND"),
    "unknown option": (("doctor", "--nonsense"), "unrecognized arguments: --nonsense"),
    "unknown op": (
        ("bench", "--op", "conv"),
        "op: expected one of act_quant, attention, bert_layer",
    ),
    "no case": (("bench", "--match", "zzz"), "has 'zzz' in its name"),
    "no folder": (("bench", "--csv", "no/such/folder/b.csv"), "expected an existing folder"),
    "no summary": (("bench", "--summary", "no/such/folder/b.md"), "expected an existing folder"),
    "no pairs": (("bench", "--pairs", "0"), "expected a positive number, got '0'"),
    "no json": (("bench", "--from-json", "missing.json"), "missing.json: No such file"),
    "unknown data": (("demo", "--data", "imagenet"), "invalid choice: 'imagenet'"),
    "no speed-up": (("demo", "--target-speedup", "-1"), "expected a positive number, got '-1'"),
    "not a number": (("demo", "--batch", "many"), "expected a positive number, got 'many'"),
    "unknown precision": (("demo", "--precision", "fp8"), "invalid choice: 'fp8'"),
    "no shape": (("explain", "fused_linear"), "--k and --n: expected"),
    "unknown explain": (("explain", "conv", "--k", "8", "--n", "8"), "op: expected one of"),
    "unknown activation": (
        ("explain", "fused_linear", "--k", "8", "--n", "8", "--activation", "mish"),
        "activation: expected one of",
    ),
    "bad pattern": (
        ("explain", "sparse_linear", "--k", "8", "--n", "8", "--pattern", "4:2"),
        "pattern: expected HxW such as '1x4', or N:M with N < M; got '4:2'",
    ),
    "two sparsities": (
        (
            "explain",
            "sparse_linear",
            "--k",
            "8",
            "--n",
            "8",
            "--pattern",
            "2:4",
            "--sparsity",
            ".8",
        ),
        "sparsity: expected 0.5 or None for 2:4; got 0.8",
    ),
    "bad values": (
        ("explain", "sparse_linear", "--k", "8", "--n", "8", "--values", "fp8"),
        "values: expected int8, bf16, fp32; got 'fp8'",
    ),
    "bad factors": (
        ("explain", "low_rank_linear", "--k", "8", "--n", "8", "--values", "bf16"),
        "--values: expected int8, or none for factors of --dtype; got 'bf16'",
    ),
    "unserved dtype": (
        ("explain", "sparse_linear", "--k", "8", "--n", "8", "--values", "bf16"),
        "x: expected dtype bfloat16; got float32",
    ),
    "nothing to show": (("show", "nothing.safetensors"), "nothing.safetensors: expected a file"),
    "full sparsity": (
        ("explain", "sparse_linear", "--k", "8", "--n", "8", "--sparsity", "1"),
        "from 0 up to below 1, got '1'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_exit_code_2_and_names_what_was_expected(
    mistake: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, expected = MISTAKES[mistake]
    code, out, err = run(capsys, *argv)
    assert code == cli.MISUSE
    assert expected in err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("bigops")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_keeps_the_traceback() -> None:
    with pytest.raises(ValueError, match="op: expected one of"):
        cli.main(["--debug", "bench", "--op", "conv"])


def test_a_fault_of_ours_is_not_dressed_up_as_a_mistake(monkeypatch: Any) -> None:
    def broken() -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(bigops, "report", broken)
    with pytest.raises(AssertionError, match="ours"):
        cli.main(["doctor"])


def test_a_missing_package_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def missing(_: Any) -> int:
        raise ModuleNotFoundError("No module named 'mnist'", name="mnist")

    stub_demo(monkeypatch, missing)
    code, _, err = run(capsys, "demo")
    assert code == cli.MISUSE
    assert "needs the package 'mnist'" in err


# --- demo ----------------------------------------------------------------------------------------


def stub_demo(monkeypatch: pytest.MonkeyPatch, main: Any) -> None:
    stub = ModuleType("bigops.recipes.demo")
    stub.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bigops.recipes.demo", stub)
    monkeypatch.setattr("bigops.recipes.demo", stub, raising=False)


def test_demo_gets_the_documented_defaults_and_its_exit_code_is_passed_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    seen: list[dict[str, Any]] = []

    def main(args: Any) -> int:
        seen.append(dict(vars(args)))
        return 1

    stub_demo(monkeypatch, main)
    assert run(capsys, "demo")[0] == 1
    assert {k: v for k, v in seen[0].items() if k not in ("command", "debug")} == {
        "data": "mnist",
        "target_speedup": 3.0,
        "max_drop": 0.5,
        "batch": 64,
        "epochs": None,
        "seed": 0,
        "precision": "bf16-mixed",
        "threads": None,
        "out": "demo-out",
        "no_latency_floor": False,
        "quick": False,
    }


def test_an_interrupt_is_130_and_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def interrupted(_: Any) -> int:
        raise KeyboardInterrupt

    stub_demo(monkeypatch, interrupted)
    assert run(capsys, "demo") == (130, "", "bigops: interrupted\n")


# --- bench ---------------------------------------------------------------------------------------


def test_bench_writes_the_csv_the_plots_and_the_summary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[Any] = []

    def measured(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return iter([ROW, rows.Row(**{**vars(ROW), "case": "d"})])

    monkeypatch.setattr(harness, "run", measured)
    out, png, summary = tmp_path / "b.csv", tmp_path / "b.png", tmp_path / "b.md"
    files = ("--csv", str(out), "--plot", str(png), "--summary", str(summary))
    code, text, _ = run(capsys, "bench", "--op", "fused_linear", "--quick", *files)
    assert code == 0
    assert asked == [
        ((["fused_linear"],), {"quick": True, "match": "", "device": "cpu", "pairs": 30})
    ]
    assert text.count("an_op c 1x2x3") == 1
    assert text.count("| an_op |") == 2
    assert "2 cells: 2 first" in text
    assert "2 cells: 2 first" in summary.read_text()
    assert out.read_text().splitlines()[0] == COLUMNS
    assert [row["case"] for row in csv.DictReader(out.open())] == ["c", "d"]
    assert (tmp_path / "b-an_op.png").exists()


def test_an_interrupted_bench_leaves_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        yield ROW
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", interrupted)
    code, _, err = run(capsys, "bench", "--csv", str(tmp_path / "b.csv"))
    assert (code, err) == (130, "bigops: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m bigops doctor | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_one_op_is_measured_for_real(tmp_path: Path) -> None:
    out = tmp_path / "b.csv"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "bigops",
            "bench",
            "--op",
            "fused_linear",
            "--quick",
            "--pairs",
            "3",
            "--csv",
            str(out),
        ],
        cwd=ROOT,
        check=True,
        timeout=600,
    )
    read = list(csv.DictReader(out.open()))
    assert {"bigops", "eager", "torch.compile"} <= {row["provider"] for row in read}
    assert all(float(row["median_us"]) > 0 for row in read)
    error = max(float(r["rel_error"]) for r in read if r["dtype"] == "fp32")
    assert error < 1e-5, "an fp32 provider computes something else"


@pytest.mark.slow
def test_control_c_in_the_middle_of_a_real_bench(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-u",
            "-m",
            "bigops",
            "bench",
            "--op",
            "fused_linear",
            "--csv",
            str(tmp_path / "b.csv"),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background job inherits an ignored SIGINT, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first table: the bench is under way
    time.sleep(0.1)
    err = ""
    for _ in range(6):  # the first may fall where a library swallows every exception
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, err = process.communicate(timeout=20)
            break
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_threads_are_set_for_the_run(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    seen: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", seen.append)
    stub_demo(monkeypatch, lambda _: 0)
    assert run(capsys, "demo", "--threads", "1")[0] == 0
    assert seen == [1]


def test_a_folder_as_csv_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, "bench", "--op", "fused_linear", "--csv", str(tmp_path))
    assert code == cli.MISUSE
    assert "expected a file" in err
