"""`bigops doctor`: what it tells of this machine, and its advice."""

from __future__ import annotations

import json
from typing import Any

import pytest

import bigops
from bigops.backend import machine
from bigops.cli import doctor
from tests.cli.command import run

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
