"""The `bigops` command: exit codes, one clear line for a mistake, nothing half-written."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

import bigops
from bigops import cli, save
from bigops.backend import machine
from bigops.benches import harness, rows
from bigops.cli import doctor
from tests.benches.test_harness import COLUMNS, ROW
from tests.support.kernels_ran import named

ROOT = Path(__file__).resolve().parents[2]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command in this process."""
    try:
        code = cli.main(argv)
    except SystemExit as leave:  # argparse
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


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
    "unknown op": (("bench", "--op", "conv"), "op: expected one of bert_layer, fp8_linear"),
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


# --- doctor and explain --------------------------------------------------------------------------


def test_doctor_tells_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    report = bigops.report()
    for op, served in report["ops"].items():
        assert op in out
        assert served["cpu"] in out
        assert served["gpu"] in out
    assert report["torch"] in out
    if machine.extension is not None:
        assert f"instruction set  {machine.extension.isa()} " in out


def test_doctor_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "doctor", "--json")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(bigops.report()))


def fake_report(**more: Any) -> dict[str, Any]:
    report: dict[str, Any] = {
        "bigops": "0.1.0",
        "python": "3.11.7",
        "platform": "linux x86_64",
        "cpu": {
            "threads": 2,
            "features": ["avx2"],
            "isa": "avx2",
            "isas": ["portable", "avx2"],
            "forced": None,
        },
        "extension": "loaded",
        "compiler": "g++",
        "torch": "2.13.0",
        "triton": "3.9.0",
        "triton_error": "",
        "triton_limits": "",
        "tiles": [{"device": "One GPU", "source": "gpu-tuned.json", "tiles": 9, "ignored": ""}],
        "cuda": {"built": "13.0", "available": True, "devices": ["One GPU"], "kernels": "loaded"},
        "crossovers": {"source": "cpu-tuned.json", "ignored": ""},
        "ops": {"fused_linear": {"cpu": "cpu.avx2.fused_linear", "gpu": "triton.fused_linear"}},
    }
    return {**report, **more}


def test_doctor_has_no_advice_where_nothing_is_missing() -> None:
    text = doctor.text(fake_report())
    assert "What would help" not in text
    assert "avx2 (of portable, avx2)" in text
    assert "torch built for 13.0; One GPU" in text
    assert "One GPU: gpu-tuned.json, 9 tuned" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"extension": "not built"}, "pip install --no-build-isolation"),
        ({"extension": "not built", "compiler": None}, "install a C++17 compiler"),
        ({"triton": None, "triton_error": "triton is not installed"}, "pip install -U triton"),
        (
            {"tiles": [{"device": "One GPU", "source": "committed", "tiles": 0, "ignored": ""}]},
            "`bigops tune --device cuda`",
        ),
        (
            {
                "tiles": [
                    {"device": "One GPU", "source": "committed", "tiles": 0, "ignored": "g: cut"}
                ]
            },
            "tuned tiles are ignored: g: cut",
        ),
        ({"crossovers": {"source": "committed", "ignored": ""}}, "`bigops tune`"),
        ({"crossovers": {"source": "committed", "ignored": "f: cut off"}}, "ignored: f: cut off"),
        (
            {"cuda": {"built": None, "available": False, "devices": [], "kernels": "not built"}},
            "built without CUDA",
        ),
        (
            {
                "cpu": {
                    "threads": 1,
                    "features": [],
                    "isa": "portable",
                    "isas": ["portable"],
                    "forced": "portable",
                }
            },
            "BIGOPS_ISA=portable",
        ),
    ],
)
def test_doctor_says_what_would_help(change: dict[str, Any], expected: str) -> None:
    advice = doctor.text(fake_report(**change)).partition("What would help:")[2]
    assert expected in advice


def test_doctor_without_the_extension_says_so() -> None:
    cpu = {"threads": 1, "features": [], "isa": "none", "isas": [], "forced": None}
    text = doctor.text(fake_report(extension="not built", cpu=cpu))
    assert "instruction set  none (needs the extension)" in text
    assert "crossovers       none (needs the extension)" in text


@pytest.mark.parametrize("op", sorted(bigops.report()["ops"]))
def test_explain_names_a_kernel_and_a_reason(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "explain", op, "--k", "64", "--n", "32", "--activation", "relu")
    assert code == 0, err
    assert out.startswith(f"{op}: ")
    kernel = out.removeprefix(f"{op}: ").split(";")[0]
    assert "." in kernel, "a kernel's name says where it runs: cpu.<isa>.., triton.., reference.."


@pytest.mark.parametrize("values", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize("pattern", ["1x1", "16x1", "2:4"])
def test_explain_of_sparse_weights(
    pattern: str, values: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--k", "64", "--n", "32", "--pattern", pattern, "--values", values, "--dtype", "bf16")
    code, out, err = run(capsys, "explain", "sparse_linear", *argv)
    assert code == 0, err
    kernel = {"int8": ".s8", "bf16": ".bf16.bf16", "fp32": ".f32"}[values]
    assert named("sparse_linear", kernel) in out.split(";")[0]


def test_explain_of_int8_factors(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "low_rank_linear", "--k", "64", "--n", "32", "--rank", "8")
    code, out, err = run(capsys, *argv, "--values", "int8")
    assert code == 0, err
    assert "quantized_linear" in out.split(";")[0]
    assert "quantized_linear" not in run(capsys, *argv)[1]


def test_show_draws_the_sparse_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    save(model, tmp_path / "dense")
    bigops.compress_(model, {"0": bigops.Sparse(0.5, "16x16"), "2": bigops.Int8()})
    save(model, tmp_path / "small")
    code, out, _ = run(capsys, "show", str(tmp_path / "small"))
    assert code == 0
    assert out.startswith("0: SparseLinear(in_features=64")
    assert model[0].storage().picture() in out
    assert "\n2: QuantLinear(in_features=32" in out
    code, out, _ = run(capsys, "show", str(tmp_path / "small"), "--layer", "2")
    assert (code, out.count("\n")) == (0, 1)
    code, _, err = run(capsys, "show", str(tmp_path / "small"), "--layer", "1")
    assert code == cli.MISUSE
    assert "--layer: expected one of 0, 2; got '1'" in err
    code, _, err = run(capsys, "show", str(tmp_path / "dense"))
    assert code == cli.MISUSE
    assert "expected a model with compressed layers; it has none" in err


def test_show_names_low_rank_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    low_rank = bigops.LowRank(4)
    bigops.compress_(model, {"0": low_rank, "1": low_rank + bigops.Int8()})
    save(model, tmp_path / "small")
    code, out, _ = run(capsys, "show", str(tmp_path / "small"))
    assert code == 0
    for i, layer in enumerate(model):
        assert f"{i}: {layer}, {layer.nbytes:,} bytes" in out


def test_explain_of_a_gpu_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "fused_linear", "--k", "4096", "--n", "4096", "--dtype", "bf16", "--device")
    code, out, err = run(capsys, *argv, "sm_90")
    assert (code, err) == (0, "")
    assert out.startswith("fused_linear: triton.fused_linear.bf16 [")
    assert "configs/sm_90.json" in out
    code, out, _ = run(capsys, *argv, "sm_75")
    assert (code, "expected sm_80 or later" in out) == (0, True)
    code, _, err = run(capsys, *argv, "sm")
    assert (code, "got 'sm'" in err) == (2, True)


def test_explain_of_a_gated_pair(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("explain", "fused_linear", "--k", "64", "--n", "32", "--activation", "swiglu")
    assert run(capsys, *argv)[0] == 0


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
