"""What GPU dispatch does where no kernel can serve: torch does, and it is recorded and explained.

A GPU that is too old, a triton that is missing, broken or too old, config files that are broken, a
block that no tile reaches: never a crash, never another kernel than the one that `explain` names.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.cli import doctor
from bigops.formats.dense import DenseWeight
from bigops.formats.patterns import block_mask
from bigops.formats.quantized import QuantizedWeight
from bigops.formats.sparse import SparseWeight
from bigops.kernels.common import form_tiles, tiles
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from bigops.ops import targets
from bigops.ops.family import Call
from bigops.ops.fused_linear import triton as _triton_dense
from bigops.ops.linear_cross_entropy import triton as _triton_loss
from bigops.ops.report import triton_limits
from bigops.ops.sparse_linear import triton as _triton_sparse
from tests.support import triton_interpreter
from tests.support.cases.optimizer import Problem

triton_interpreter.install()

M, N, K = 20, 48, 32
Run = Callable[[], object]


def _module(op: str) -> Any:
    return sys.modules[f"bigops.ops.{op}"]


def _calls() -> dict[str, tuple[str, Run, Run]]:
    """Each op as a GPU takes it: (name that explain knows, call, explain of it on ``device``)."""
    x, w, bias = torch.randn(M, K), torch.randn(N, K), torch.randn(N)
    grad, u, v = torch.randn(M, N), torch.randn(N, 4), torch.randn(4, K)
    quantised = QuantizedWeight.from_dense(w)
    sparse = SparseWeight.from_mask(w, block_mask(w, 0.5, (16, 16)), torch.float32, (16, 16))
    logits, target = torch.randn(M, N), torch.randint(N, (M,))
    loss = (target, None, None, None, float(N), -100, 0.0, 0.0, 0.0, True, False)
    dense, low, adamw = (_module(f) for f in ("fused_linear", "low_rank_linear", "fused_adamw"))
    problem = Problem(torch.float32, shapes=[(7,)])
    needs = (True, True, True)

    def step() -> None:
        before, adamw.step_adamw = adamw.step_adamw, adamw.choose.adamw
        grads = problem.grads(0)
        problem.grads = lambda _: grads  # type: ignore[method-assign]
        try:
            with triton_interpreter.reachable([*problem.all(), *grads]):
                problem.adamw(0)
        finally:
            adamw.step_adamw = before

    def norm() -> None:
        with triton_interpreter.reachable([x]):
            adamw.choose.norm([x])

    def said(op: str, *args: Any) -> Callable[[], Any]:
        return lambda device="sm_90": bigops.explain(op, *args, device=device)

    return {
        "fused_linear": (
            lambda: dense.op._cuda(x, w, bias, None, "relu"),
            said("fused_linear", x, w, bias, None, "relu"),
        ),
        "fused_linear_with_parts": (
            lambda: dense.op._cuda_kept(x, w, bias, None, "relu"),
            said("fused_linear", x, w),
        ),
        "fused_linear_backward": (
            lambda: dense.op.gradients._cuda(grad, x, w, grad, "relu", *needs),
            said("fused_linear", x, w),
        ),
        "low_rank_linear": (
            lambda: low.op._cuda(x, u, v, None, 1.0, bias, None, "relu"),
            said("low_rank_linear", x, u, v, bias),
        ),
        "low_rank_linear_backward": (
            lambda: low.op.gradients._cuda(
                grad, x, u, v, None, 1.0, x @ v.t(), None, "none", True, True, True, False, True
            ),
            said("low_rank_linear", x, u, v, bias),
        ),
        "quantized_linear": (
            lambda: _module("quantized_linear").op._cuda(
                x, *quantised.arguments, bias, None, "relu"
            ),
            said("quantized_linear", x, quantised, bias),
        ),
        "sparse_linear": (
            lambda: _module("sparse_linear").op._cuda(x, *sparse.arguments, bias, None, "relu"),
            said("sparse_linear", x, sparse, bias),
        ),
        "sparse_linear_backward": (
            lambda: _module("sparse_linear").op.gradients._cuda(
                grad, x, *sparse.arguments, None, "none", True, True, False
            ),
            said("sparse_linear", x, sparse),
        ),
        "linear_cross_entropy": (
            lambda: _triton_loss.serve_chunk(logits.clone(), *loss),
            said("linear_cross_entropy", x, w),
        ),
        "fused_adamw": (step, said("fused_adamw", problem.params)),
        "fused_grad_norm": (norm, said("fused_grad_norm", [x])),
    }  # type: ignore[dict-item, return-value]


OPS = tuple(_calls())


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Nothing that was found out about triton or the config files outlives a test."""
    forget()
    yield
    forget()


def forget() -> None:
    memos = (
        targets.unserved,
        _triton_sparse._no_tile,
        machine._find_triton,
        tiles.tables,
        tiles.table_for,
        tiles.choose_config,
        form_tiles._tables,
        form_tiles.choose_config,
        quantized_tiles._tables,
        quantized_tiles.choose_config,
    )
    for memo in memos:
        memo.cache_clear()


def torch_serves(op: str, why: str, *, device: str = "sm_90") -> None:
    """The call gives what the reference gives, which is what ran, and explain says why."""
    call, explain = _calls()[op]
    with backend.record() as ran:
        call()
    assert ran, "nothing ran"
    assert all(name.startswith("reference.") for name in ran), ran
    said = explain(device=device)  # type: ignore[call-arg]
    assert said.kernel.startswith("reference."), said  # type: ignore[attr-defined]
    assert why in said.reason, said  # type: ignore[attr-defined]


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_serve_where_nothing_is_amiss(op: str) -> None:
    call, explain = _calls()[op]
    with backend.record() as ran:
        call()
    assert all(name.startswith("triton.") for name in ran), ran
    assert explain().kernel.startswith("triton.")  # type: ignore[attr-defined]


# --- a GPU that is too old -----------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["sm_75", "sm_61"])
@pytest.mark.parametrize("op", OPS)
def test_an_old_gpu_takes_torch(op: str, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "device_arch", lambda device: arch)
    torch_serves(op, f"no Triton kernel for {arch}: expected sm_80 or later", device=arch)


def test_a_name_of_no_architecture_is_refused() -> None:
    x, w = torch.randn(M, K), torch.randn(N, K)
    for device in ("h100", "sm_", "sm_9x"):
        with pytest.raises(ValueError, match=f"arch: expected sm_80 or later.*got '{device}'"):
            bigops.explain("fused_linear", x, w, device=device)
        for op, weight in (
            ("quantized_linear", QuantizedWeight.from_dense(w)),
            ("sparse_linear", SparseWeight.from_dense(w, torch.int8)),
        ):
            for qparams in (None, torch.tensor([0.1, 3.0])):
                said = f"arch: expected sm_80 or later.*got '{device}'"
                with pytest.raises(ValueError, match=said):
                    bigops.explain(op, x, weight, device=device, y_qparams=qparams)


# --- triton missing, broken, too old ----------------------


def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )


def _triton_is(found: object) -> Callable[[pytest.MonkeyPatch], None]:
    load = importlib.import_module

    def swap(monkeypatch: pytest.MonkeyPatch) -> None:
        def load_module(name: str, *rest: Any) -> Any:
            if name != "triton":
                return load(name, *rest)
            if isinstance(found, Exception):
                raise found
            return SimpleNamespace(__version__=found)

        monkeypatch.setattr(importlib, "import_module", load_module)

    return swap


BAD_TRITON: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "missing": (_no_triton, "triton is not installed"),
    "broken": (_triton_is(ImportError("libtriton.so: cannot open")), "triton does not load: libt"),
    "broken without a word": (_triton_is(RuntimeError()), "triton does not load: RuntimeError"),
    "too old": (_triton_is("3.7.1+git1"), "triton 3.7.1+git1 is too old: expected 3.8 or later"),
    "much too old": (_triton_is("2.10.0"), "triton 2.10.0 is too old"),
    "of no version": (_triton_is("unknown"), "triton unknown is too old"),
}


@pytest.mark.parametrize("bad", BAD_TRITON)
@pytest.mark.parametrize("op", ["fused_linear", "sparse_linear", "fused_adamw", "fused_grad_norm"])
def test_without_a_triton_that_serves_torch_does(
    op: str, bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    swap, why = BAD_TRITON[bad]
    swap(monkeypatch)
    torch_serves(op, why)
    report = bigops.report()
    assert why in report["triton_error"]
    assert why in report["ops"]["fused_linear"]["gpu"]
    assert why in doctor.text(report)
    assert report["triton_limits"] == triton_limits(report["triton"])
    report["cuda"]["available"] = True
    assert any(why in hint and "pip install -U triton" in hint for hint in doctor.advice(report))


@pytest.mark.parametrize("version", ["3.8.0", "3.9.0+rocm7", "3.10.1", "4.0.0"])
def test_later_versions_of_triton_serve(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _triton_is(version)(monkeypatch)
    assert machine.triton_error() == ""
    assert machine.triton_version() == version


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("3.4.0", "too old: expected 3.8 or later: it compiles no product"),
        (
            "3.6.0",
            "too old: expected 3.8 or later: it does not compile quantized_linear with int8 x",
        ),
        (
            "3.7.1+git1",
            "3.8 or later: it does not compile quantized_linear with int8 x (W8A8, W4A8",
        ),
        ("3.8.0", "3.8.0: all kernels serve; their registers and spills were read with 3.9"),
        ("3.9.0", ""),
        ("3.10.1", ""),
    ],
)
def test_doctor_says_what_a_triton_cannot_and_what_serves_instead(
    version: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _triton_is(version)(monkeypatch)
    report = bigops.report()
    old = bool(machine.triton_error())
    for kernels, instead in (
        ("loaded, for sm_90", "; torch serves what CUDA C++ kernels do not"),
        ("the CUDA C++ kernels are not built", "; torch serves every op on a GPU"),
    ):
        report["cuda"] |= {"available": True, "kernels": kernels}
        (line,) = (l for l in doctor.text(report).splitlines() if l.startswith("triton  "))
        assert said in line
        assert line.endswith(version) or said
        assert (instead in line) == old
        assert any("pip install -U triton" in hint for hint in doctor.advice(report)) == old


@pytest.mark.parametrize("version", ["unknown", None])
def test_no_limits_are_said_of_what_is_no_version(version: str | None) -> None:
    assert triton_limits(version) == ""


# --- config files ----------------------


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the config files that the kernels read from."""
    folder = tmp_path / "configs"
    shutil.copytree(tiles.CONFIG_DIR, folder)
    monkeypatch.setattr(tiles, "CONFIG_DIR", folder)
    monkeypatch.setattr(form_tiles, "CONFIG_DIR", folder)
    monkeypatch.setattr(quantized_tiles, "CONFIG_DIR", folder / "quantized_linear")
    return folder


def _cut(path: Path) -> None:
    path.write_text(path.read_text()[:200])


def _of_another_version(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "bigops-tiles-0"}))


def _away(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_cut, "expected a readable JSON file"),
        (_of_another_version, "format: expected 'bigops-"),
        (_away, "no config file"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_a_broken_config_file_is_named_and_torch_serves(
    op: str, spoil: Callable[[Path], None], why: str, configs: Path
) -> None:
    folder = op.removesuffix("_with_parts").removesuffix("_backward")
    folder = folder if (configs / folder).is_dir() else ""
    for device in ("interpreter", "sm_90"):
        spoil(configs / folder / f"{device}.json")
    if spoil is _away and not folder:
        pytest.skip("a device without a file of its own takes that of another")
    torch_serves(op, why)


def test_blocks_that_no_tile_reaches_take_torch(configs: Path) -> None:
    for device in ("interpreter", "sm_90"):
        path = configs / "sparse_linear" / f"{device}.json"
        data = json.loads(path.read_text())
        for entry in data["tiles"]:
            if entry["form"] == "sampled":
                entry["width"] = 16
        path.write_text(json.dumps(data))
    for op in ("sparse_linear", "sparse_linear_backward"):
        torch_serves(op, "no tile for sampled by blocks of 32 in the config file of sm_90")


# --- shapes ----------------------


def test_a_rank_that_no_tile_reaches_is_composed_of_dense_launches() -> None:
    x, u, v = torch.randn(3, 70), torch.randn(80, 60), torch.randn(60, 70)
    low = _module("low_rank_linear")
    with backend.record() as ran:
        y: Tensor = low.op._cuda(x, u, v, None, 1.0, None, None, "none")
    assert ran == ["triton.low_rank_linear.f32.composed"]
    assert y.shape == (3, 80)
    said = bigops.explain("low_rank_linear", x, u, v, device="sm_90")
    assert said.kernel.startswith("triton.low_rank_linear.f32.")


def test_a_size_past_32_bits_is_refused_by_name() -> None:
    long = torch.empty(1, device="meta").expand(2**31, 1)
    with pytest.raises(ValueError, match="x: expected sizes up to"):
        _triton_dense.forward(Call(long, DenseWeight(torch.empty(1, 1, device="meta"))), False)


def test_more_columns_than_a_qparams_holds_are_refused_by_name() -> None:
    from bigops.kernels import fused_linear as kernels

    wide = torch.zeros(1, 1).expand(1, 65535 * 32 + 1)  # blocks of 32 in the interpreter
    with pytest.raises(ValueError, match=r"grad: expected at most 2097120 columns; got 2097121"):
        kernels.preact_gradient(wide, None, 0, False, True)
