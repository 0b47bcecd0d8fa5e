"""csrc/ built with Address-, Leak- and UndefinedBehaviorSanitizer, run over ragged shapes.

The build is this checkout's own list of sources and flags (setup.py) in a temporary folder. torch's
allocations are surrounded by the sanitizer too, so a read past the end of a tensor is seen.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).parent / "sanitized_driver.py"
SUPPRESSIONS = Path(__file__).parent / "leaks_of_others.txt"  # by function, each with its reason
# Full debug information of the portable kernels takes gcc over 5 minutes in one file: line numbers.
DEBUG = ["-O1", "-g1", "-fno-var-tracking"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
PARTS = (
    "fused_linear",
    "packed_linear",
    "fused_adamw",
    "linear_cross_entropy",
    "norm",
    "rotary",
    "quantized_linear",
    "sparse_linear",
    "broken_storage",
    "meters",
)

# The planted faults, built and loaded with the rest: a read past a tensor's end, a sum that wraps,
# an op whose kernel takes a string.
FAULTS = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <string>

torch::stable::Tensor takes_word(const torch::stable::Tensor& x, const std::string& word) {
  return x;
}
STABLE_TORCH_LIBRARY(bigops_planted, m) { m.def("takes_word(Tensor x, str word) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(bigops_planted, CPU, m) { m.impl("takes_word", TORCH_BOX(&takes_word)); }

extern "C" __attribute__((visibility("default"))) float bigops_reads_past(const float* p, long n) {
  return p[n];
}
extern "C" __attribute__((visibility("default"))) int bigops_wraps(int v) { return v + 1; }
"""


def library(name: str) -> str:
    """Path of a library of the compiler's, or "" where it has none."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return found if os.path.isabs(found) and Path(found).exists() else ""


def lacks() -> str:
    """Why this machine cannot run this file, or ""."""
    if shutil.which("g++") is None:
        return "no g++ here"
    missing = [n for n in ("libasan.so", "libubsan.so", "libstdc++.so") if not library(n)]
    return f"g++ comes without {', '.join(missing)}" if missing else ""


pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(lacks()), reason=lacks())]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension with sanitizers, compiled as setup.py says."""
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        setup = runpy.run_path(str(ROOT / "setup.py"))
    folder = tmp_path_factory.mktemp("sanitized")
    faults = folder / "faults.cpp"
    faults.write_text(FAULTS)
    include = [ROOT / "csrc", pybind11.get_include(), *include_paths()]
    include.append(sysconfig.get_paths()["include"])

    def compile_one(source: str) -> str:
        obj = folder / (source.replace("/", "_") + ".o")
        isa = setup["ISA_FLAGS"][setup["isa_of"](source) or "portable"]
        flags = [*setup["FLAGS"], *DEBUG, *SANITIZE, *isa, *(f"-I{path}" for path in include)]
        subprocess.run(["g++", *flags, "-c", source, "-o", str(obj)], check=True, cwd=ROOT)
        return str(obj)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, [*setup["sources"](), str(faults)]))
    out = folder / "_C.so"
    libraries = [f"-L{path}" for path in library_paths()]
    command = ["g++", "-shared", *SANITIZE, *objects, *libraries, *setup["LINK"], "-o", str(out)]
    subprocess.run(command, check=True)
    return out


# What it says where its own thread crashed while it stopped the others: nothing was looked at.
TRACER_CRASHED = "LeakSanitizer has encountered a fatal error"


def drive(built: Path, part: str) -> subprocess.CompletedProcess[str]:
    """`run_part`, again where LeakSanitizer itself crashed, three times at most.

    Its tracer reads the stacks of all threads, and those of OpenMP may be at their end just then
    (after a change of their number; seen in CI as "Tracer caught signal 11").
    """
    for _ in range(2):
        run = run_part(built, part)
        if TRACER_CRASHED not in run.stderr:
            return run
    return run_part(built, part)


def run_part(built: Path, part: str) -> subprocess.CompletedProcess[str]:
    """Run one part of sanitized_driver.py with this build as bigops._C."""
    return subprocess.run(
        [sys.executable, str(DRIVER), str(built), part],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
            "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0",
            "LSAN_OPTIONS": f"suppressions={SUPPRESSIONS}:print_suppressions=0",
            "PYTHONMALLOC": "malloc",  # the sanitizer does not look for pointers in CPython's pools
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
    )


def report(run: subprocess.CompletedProcess[str]) -> str:
    """What a failed run said, from the sanitizer's own first line on."""
    lines = (run.stdout + run.stderr).splitlines()
    marks = ("ERROR: AddressSanitizer", "ERROR: LeakSanitizer", "runtime error:", "Traceback")
    first = next((i for i, line in enumerate(lines) if any(m in line for m in marks)), 0)
    return "\n".join(lines[first : first + 40])


@pytest.mark.parametrize("part", PARTS)
def test_nothing_is_found(built: Path, part: str) -> None:
    run = drive(built, part)
    assert run.returncode == 0, report(run)
    assert f"{part}: done" in run.stdout


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("reads_past", "AddressSanitizer: heap-buffer-overflow"),
        ("wraps", "runtime error: signed integer overflow"),
        ("keeps_strings", "detail::ToImpl<std::"),
    ],
)
def test_a_planted_fault_is_found(built: Path, part: str, message: str) -> None:
    run = drive(built, part)
    assert run.returncode != 0
    assert message in run.stderr, report(run)
    assert "done" not in run.stdout
