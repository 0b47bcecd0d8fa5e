"""The wheel holds the whole package, and a machine without a compiler still gets a working one."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house.test_architecture import tracked

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
# Tests of a layer of each kind, of files and receipts, and of the commands, without Triton's ways.
ANYWHERE = (
    "cli/test_cli",
    "cli/test_doctor",
    "cli/test_explain",
    "ops/test_codes",
    "compress/test_choice",
    "compress/test_low_rank",
    "recipes/test_mlp",
    "nn/test_linear",
    "nn/test_quant_linear",
    "nn/test_quant_low_rank_linear",
    "compress/test_receipt",
    "compress/test_save_load",
    "nn/test_sparse_layer",
    "nn/test_thawed_layer",
    "train/test_train",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, symlinks as symlinks."""
    copy = tmp_path_factory.mktemp("source")
    for file in tracked(ROOT):
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    for room in ("kernels", "benches"):
        (copy / "bigops" / room).symlink_to(Path("..") / room)
    return copy


def build(
    source: Path, out: Path, *, path: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "-v",
            "-w",
            str(out),
            str(source),
        ],
        env={"PATH": path, "HOME": str(out), **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a machine without any compiler builds it."""
    out = tmp_path_factory.mktemp("wheel")
    done = build(source, out, path=str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler found" in done.stdout + done.stderr
    (file,) = out.glob("bigops-*.whl")
    return file


def test_the_wheel_holds_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for file in tracked(ROOT):
        room, *rest = file.relative_to(ROOT).parts
        if room in ("kernels", "benches"):
            expected.add("/".join(("bigops", room, *rest)))
        elif room == "bigops":
            expected.add("/".join((room, *rest)))
    assert expected - names == set()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"bigops"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_without_a_compiler_plain_torch_serves(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    probe = (
        "import torch, bigops\n"
        "from bigops import backend\n"
        f"assert bigops.__file__.startswith({str(tmp_path)!r}), bigops.__file__\n"
        "x, w = torch.randn(3, 8), torch.randn(4, 8)\n"
        "with backend.record() as names:\n"
        "    y = bigops.fused_linear(x, w, activation='relu')\n"
        "assert torch.equal(y, torch.relu(torch.nn.functional.linear(x, w)))\n"
        "assert names == ['reference.fused_linear'], names\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for command in (["-c", probe], ["-m", "bigops", "doctor"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert "extension is not built" in done.stdout
    assert "plain torch serves every op" in done.stdout


def test_the_suite_is_green_without_the_extension(source: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "not triton and not hostrun",
            *(f"tests/{file}.py" for file in ANYWHERE),
        ],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    assert "no C++ extension: the C++ extension is not built" in done.stdout  # it was hidden


def test_a_failed_build_is_an_error_where_a_compiler_is(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("c++", "g++", "cc", "gcc"):
        fake = tmp_path / "bin" / name
        fake.write_text("#!/bin/sh\necho planted failure >&2\nexit 1\n")
        fake.chmod(0o755)
    done = build(source, tmp_path, path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode != 0
    assert "planted failure" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_lost_symlink_is_an_error(source: Path, tmp_path: Path) -> None:
    link = source / "bigops" / "kernels"
    link.unlink()
    link.write_text("../kernels")  # what git writes where symlinks are off
    try:
        done = build(source, tmp_path, path=str(tmp_path))
    finally:
        link.unlink()
        link.symlink_to("../kernels")
    assert done.returncode != 0
    assert "lost its symlink to kernels/" in done.stdout + done.stderr


def test_a_request_for_cuda_is_checked(source: Path, tmp_path: Path) -> None:
    done = build(source, tmp_path, path=str(tmp_path), BIGOPS_CUDA="maybe")
    assert done.returncode != 0
    assert "BIGOPS_CUDA: expected 0 or 1, got 'maybe'" in done.stdout + done.stderr
    done = build(source, tmp_path, path=str(tmp_path), BIGOPS_CUDA="1", BIGOPS_CUDA_ARCHS="70")
    assert done.returncode != 0
    assert "BIGOPS_CUDA_ARCHS: expected some of 80 86" in done.stdout + done.stderr
    done = build(source, tmp_path, path=str(tmp_path), BIGOPS_CUDA="1", BIGOPS_CUDA_ARCHS="90a")
    assert done.returncode == 0
    assert "there is no nvcc on the path" in done.stdout + done.stderr
