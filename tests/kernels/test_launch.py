"""Launches of Triton kernels: each says by itself what triton would else choose by its version."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from bigops.kernels.common.launch import launch_options

KERNELS = Path(__file__).parents[2] / "kernels"
SAID = ("num_warps", "num_stages", "enable_fp_fusion")


def _unsaid(source: str) -> list[int]:
    """The lines of launches, ``kernel[grid](...)``, that do not take `launch_options` once.

    By keyword, or by a dict of constants that is unpacked into the launch.
    """
    tree = ast.parse(source)

    def options(node: ast.AST) -> int:
        calls = (n for n in ast.walk(node) if isinstance(n, ast.Call))
        return sum(isinstance(c.func, ast.Name) and c.func.id == "launch_options" for c in calls)

    dicts = {
        target.id: options(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
            continue
        unpacked = [keyword.value for keyword in node.keywords if keyword.arg is None]
        said = sum(dicts.get(v.id, 0) if isinstance(v, ast.Name) else options(v) for v in unpacked)
        if said != 1 or any(keyword.arg in SAID for keyword in node.keywords):
            found.append(node.lineno)
    return found


def test_every_launch_says_its_options() -> None:
    files = sorted(KERNELS.rglob("*.py"))
    assert len([file for file in files if "launch_options(" in file.read_text()]) >= 7
    unsaid = {file.relative_to(KERNELS): _unsaid(file.read_text()) for file in files}
    assert {file: lines for file, lines in unsaid.items() if lines} == {}


@pytest.mark.parametrize(
    "launch",
    [
        "k[grid](a, A=1)",
        "k[(n,)](a, num_warps=4)",
        "k[grid](a, **launch_options(4), enable_fp_fusion=False)",
        "given = {'A': 1}\nk[grid](a, **given)",
        "k[grid](a, **launch_options(4), **launch_options(8))",
    ],
)
def test_a_launch_that_leaves_them_to_triton_is_seen(launch: str) -> None:
    assert _unsaid(launch) == [launch.count("\n") + 1]
    sound = "given = {'A': 1, **launch_options(4, 3)}\nk[grid](a, **given)"
    assert _unsaid(sound) == _unsaid("k[grid](a, **launch_options(4))") == []


@pytest.mark.parametrize("default", [None, "0", "1"])
@pytest.mark.parametrize(
    "target", [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
)
def test_no_default_of_triton_decides_over_fused_multiply_adds(
    target: GPUTarget, default: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the lack of a variable of the environment bring a warning, as in 3.9."""
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    if default is not None:
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wanted in (True, False):
            asked = launch_options(8, 2, fp_fusion=wanted)
            resolved = make_backend(target).parse_options(asked)
            assert resolved.enable_fp_fusion is wanted
            assert (resolved.num_warps, resolved.num_stages) == (8, 2)
    assert "num_stages" not in launch_options(4)
