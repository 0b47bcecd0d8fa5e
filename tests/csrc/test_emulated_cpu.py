"""The instruction-set files on CPUs that this machine is not: qemu-user runs a small binary.

All files are linked, so code that leaked from one of them would end an older CPU with SIGILL.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigops.backend import machine
from tests.csrc.test_extension import ROOT, isa_flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-user here"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here"),
]


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    folder_of_sets = ROOT / "csrc" / "cpu" / "simd"
    simd = [
        path
        for op in ("fused_linear", "sparse_linear")
        for path in sorted(folder_of_sets.glob(f"*_{op}.cpp"))
    ]
    sources = [
        *simd,
        ROOT / "csrc" / "common" / "isa.cpp",
        Path(__file__).with_name("emulated_cpu.cpp"),
    ]
    objects = []
    for source in sources:
        flags = isa_flags()[source.stem.split("_")[0]] if source in simd else []
        objects.append(folder / f"{source.stem}.o")
        command = ["c++", "-std=c++17", "-O2", "-ffp-contract=off", "-w", *flags]
        command += [f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(objects[-1])]
        subprocess.run(command, check=True)
    out = folder / "emulated_cpu"
    subprocess.run(["c++", "-static", *map(str, objects), "-o", str(out)], check=True)
    return out


@pytest.mark.parametrize(
    ("cpu", "level"),
    [("Nehalem", "portable"), ("SandyBridge", "portable"), ("Haswell", "avx2")],
)
def test_older_cpu_takes_its_own_kernels(binary: Path, cpu: str, level: str) -> None:
    run = subprocess.run(["qemu-x86_64", "-cpu", cpu, str(binary)], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.returncode}: {run.stdout}{run.stderr}"
    assert run.stdout.split()[0] == level


# Ops whose kernels the binary above does not hold, with torch around them: slow, so a few tests.
WITH_TORCH = {
    "quantized_linear": "ragged_shapes and avx2 and 27-66-130",
    "packed_linear": "ragged_shapes and avx2 and 6-80-31",
    "low_rank_linear": "every_kernel and avx2",
    "linear_cross_entropy": "every_kernel and avx2 and options0",
    "fused_adamw": "norm and avx2",
    "norm": "every_kernel and avx2 and own",
    "rotary": "every_kernel and avx2 and own",
}


@pytest.mark.skipif(machine.extension is None, reason="no C++ extension here")
def test_the_whole_extension_on_an_older_cpu() -> None:
    """Its own tests, each of which asserts the values and that the kernel of this level ran."""
    chosen = " or ".join(f"({of} and {op})" for op, of in WITH_TORCH.items())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    command += [str(ROOT / "tests" / "ops" / op / "test_values.py") for op in WITH_TORCH]
    run = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= 20


def test_a_wrong_sparse_kernel_is_seen(binary: Path) -> None:
    """The planted fault: one bit of one word of the weight flipped for one side."""
    command = ["qemu-x86_64", "-cpu", "Haswell", str(binary), "planted"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout.startswith("avx2 "), run.stdout + run.stderr


def test_code_above_the_cpu_is_seen(binary: Path, tmp_path: Path) -> None:
    """The planted fault: a file for AVX-512 that runs wherever it is linked."""
    source = tmp_path / "above.cpp"
    source.write_text(
        "#include <immintrin.h>\n"
        "int main(int argc, char**) {\n"
        "  volatile float out = _mm512_reduce_add_ps(_mm512_set1_ps(float(argc)));\n"
        "  return out == 16.0f ? 0 : 1;\n}\n"
    )
    out = tmp_path / "above"
    subprocess.run(["c++", "-O1", "-static", "-mavx512f", str(source), "-o", str(out)], check=True)
    run = subprocess.run(["qemu-x86_64", "-cpu", "Haswell", str(out)], capture_output=True)
    assert run.returncode != 0
