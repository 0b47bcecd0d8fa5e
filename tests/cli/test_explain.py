"""`bigops explain` and `bigops show`: a kernel with its reason, layers with their storage."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import bigops
from bigops import cli, save
from tests.cli.command import run
from tests.support.kernels_ran import named


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
