"""What is carried to the first GPU, made and run here: the pack, and the script with stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.gpu import make_first_run as first_run

ROOT = Path(__file__).parents[2]
SCRIPT = first_run.HERE / "first_run.sh"

KEPT = (
    "triton/__init__.py",
    "triton/_instrumentation.py",
    "triton/backends/amd/compiler.py",
    "triton/backends/nvidia/include/cuda.h",
    "triton/backends/nvidia/include/crt/host_config.h",
    "triton/backends/nvidia/lib/libdevice.10.bc",
)
LEFT = (
    "triton/_C/libproton.so",
    "triton/_C/libtriton/__init__.pyi",
    "triton/FileCheck",
    "triton/include/a.h",
    "triton/instrumentation/libx.so",
    "triton/backends/amd/lib/ocml.so",
    "triton/backends/nvidia/lib/cupti/libcupti.so",
    "triton/backends/nvidia/bin/ptxas",
    "triton-3.9.0.dist-info/RECORD",
)


def _wheel(folder: Path, *names: str) -> Path:
    path = folder / "triton-3.9.0-cp312-cp312-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, f"text of {name}")
        archive.write(shutil.which("true") or "", "triton/_C/libtriton.so")
    return path


@pytest.mark.skipif(shutil.which("strip") is None, reason="no strip (binutils)")
def test_the_pack_holds_what_a_launch_needs(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    out = first_run.pack(_wheel(tmp_path, *KEPT, *LEFT), folder)
    with tarfile.open(out) as archive:
        names = {member.name for member in archive.getmembers() if member.isfile()}
        text = archive.extractfile("triton/__init__.py")
        assert text is not None
        assert text.read() == b"text of triton/__init__.py"
    assert names == {*KEPT, "triton/_C/libtriton.so"}
    assert {path.name for path in folder.iterdir()} == {"triton.tar.xz", "first_run.sh"}


@pytest.mark.skipif(shutil.which("strip") is None, reason="no strip (binutils)")
def test_a_pack_that_is_too_large_or_no_triton_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pack"
    wheel = _wheel(tmp_path, *KEPT)
    first_run.pack(wheel, folder)
    with pytest.raises(ValueError, match=r"triton.tar.xz: expected at most 4096 bytes; got \d+"):
        first_run.pack(wheel, folder, most=4096)
    assert not (folder / "triton.tar.xz").exists(), "an old pack stays in its place"
    with pytest.raises(ValueError, match=r"expected triton/backends/nvidia/lib/libdevice.10.bc in"):
        first_run.pack(_wheel(tmp_path, *KEPT[:-1]), folder)
    assert first_run.MOST == 64 << 20


# Notes its arguments; python3 says that the first products are right, and pytest fails.
STAND_IN = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case "$(basename "$0") $*" in
  "python3 -") cat > /dev/null; echo "smoke $SMOKE" ;;
  *pytest*) echo "1 failed"; exit 1 ;;
  *setup.py*) pwd; touch built ;;
esac
"""


class Machine:
    """A home, a tree and a path on which every program of the script is a stand-in."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.out, self.home = folder / "tree", folder / "out", folder / "home"
        self.calls = folder / "calls"
        programs = folder / "bin"
        for made in (self.tree / "gpu-first-run", self.out, self.home, programs):
            made.mkdir(parents=True)
        (self.tree / "setup.py").touch()
        (folder / "triton").mkdir()
        with tarfile.open(self.tree / "gpu-first-run" / "triton.tar.xz", "w:xz") as archive:
            archive.add(folder / "triton", "triton")
        shutil.copy(SCRIPT, self.tree / "gpu-first-run")
        for name in ("python3", "nvcc", "nvidia-smi", "compute-sanitizer"):
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "OUT": str(self.out),
            "HOME": str(self.home),
            "CALLS": str(self.calls),
            "SMOKE": "passed",
            "PATH": f"{programs}:{os.environ['PATH']}",
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "gpu-first-run/first_run.sh", *arguments],
            cwd=self.tree,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_script_asks_for_right_numbers_and_then_for_times(machine: Machine) -> None:
    done = machine.run("correct")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = re.findall(r"^-- (\w+): status (\d+)", done.stdout, re.MULTILINE)
    assert steps == [
        ("smoke", "0"),
        ("hostrun", "1"),
        ("triton", "1"),
        ("device", "1"),
        ("cuda", "1"),
        ("racecheck", "1"),
    ]
    copy = machine.home / "first-run" / "tree"
    assert (copy / "built").exists(), "the kernels are built in the copy"
    assert not (machine.tree / "built").exists()
    assert not (copy / "gpu-first-run").exists()
    with tarfile.open(machine.out / "correct.tar.gz") as archive:
        kept = {Path(name).name for name in archive.getnames()}
    assert kept == {f"{name}.txt" for name, _ in steps} | {"build.txt"}

    machine.calls.unlink()
    done = machine.run("fast")
    assert done.returncode == 0, done.stdout + done.stderr
    ladder, *benches = machine.called()
    assert "bigops.benches.gpu_ladder" in ladder
    assert len(benches) == 6
    assert all("bench --device cuda --op " in call and "--quick" in call for call in benches)
    assert {path.name for path in machine.out.iterdir()} == {"correct.tar.gz", "fast.tar.gz"}


def test_wrong_first_products_end_the_run(machine: Machine) -> None:
    done = machine.run("correct", SMOKE="error")
    assert done.returncode == 1
    assert not any("pytest" in call for call in machine.called())
    assert (machine.out / "correct.tar.gz").exists()


def test_times_without_a_built_tree_are_not_asked_for(machine: Machine) -> None:
    assert machine.run("fast").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "change", "said"),
    [
        ((), {}, "expected correct or fast; got ''"),
        (("quick",), {}, "expected correct or fast; got 'quick'"),
        (("correct",), {"OUT": ""}, "OUT: expected a folder; got ''"),
    ],
)
def test_what_the_script_is_not_told_is_said(
    arguments: tuple[str, ...], change: dict[str, str], said: str, machine: Machine
) -> None:
    done = machine.run(*arguments, **change)
    assert done.returncode == 2
    assert said in done.stderr
    assert not machine.calls.exists()


def test_what_the_script_names_is_there() -> None:
    """The test files, the cases that it selects, the modules, the ops of the benches."""
    text = SCRIPT.read_text()
    for pattern in re.findall(r"tests/[\w/*]+\.py", text):
        assert list(ROOT.glob(pattern)), pattern
    for op in re.findall(r"for op in ([\w\s\\]+);", text)[0].replace("\\", " ").split():
        assert (ROOT / "benches" / f"bench_{op}.py").exists(), op
    assert (ROOT / "benches" / "gpu_ladder.py").exists()
    assert "sanitizer" in (ROOT / "tests/gpu/test_gpu_device.py").read_text()


def test_both_calls_end_within_a_quarter_of_an_hour() -> None:
    """Whatever hangs: the limits of all steps, but for the build, which runs beside them."""
    correct, fast = SCRIPT.read_text().split("\nfast() {")
    seconds = [int(n) for n in re.findall(r"\brun \w+ (\d+)", correct)]
    assert len(seconds) == 6
    assert sum(seconds) <= 480
    ladder, bench = (int(n) for n in re.findall(r"\brun \S+ (\d+)", fast))
    assert sum(seconds) + ladder + 6 * bench <= 840  # a minute for the start of the machine


@pytest.mark.slow
def test_the_selected_cases_exist() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    for file, words in (
        ("tests/ops/sparse_linear/test_cuda_sparse24.py", "s8-bf16-7"),
        ("tests/gpu/test_gpu_device.py", "not sanitizer"),
        ("tests/csrc/test_hostrun.py", ""),
    ):
        asked = [*command, "-m", "gpu", file, *(("-k", words) if words else ())]
        done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{file} -k {words!r}: {done.stdout[-400:]}"
