"""`bigops doctor`: what this machine has and which kernel serves which op here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

HELP = "what this machine has, which kernel serves what"
_NONE = "none (needs the extension)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(args: argparse.Namespace) -> int:
    import bigops

    report = bigops.report()
    if args.json:
        import json

        print(json.dumps(report, indent=2))
    else:
        print(text(report))
    return 0


def text(report: Mapping[str, Any]) -> str:
    """`bigops.report()` for a reader; ends with what could be better and how."""
    cpu, cuda = report["cpu"], report["cuda"]
    lines = [
        f"bigops {report['bigops']}, Python {report['python']}, {report['platform']}",
        "",
        _line("CPU features", " ".join(cpu["features"]) or "unknown (needs the extension)"),
        _line("instruction set", _instruction_set(cpu)),
        _line("threads", str(cpu["threads"])),
        _line("crossovers", report["crossovers"]["source"] if cpu["isas"] else _NONE),
        _line("extension", report["extension"]),
        _line("C++ compiler", report["compiler"] or "none found (c++, g++ or CXX)"),
        _line("torch", report["torch"]),
        _line("triton", _triton(report)),
        _line("CUDA", _cuda(cuda)),
        _line("CUDA C++", cuda["kernels"]),
        *(_line("GPU tiles", _tiles(of)) for of in report["tiles"]),
        "",
        "Which kernel serves which op here:",
    ]
    for op, served in report["ops"].items():
        lines += [f"  {op}", f"    CPU  {served['cpu']}", f"    GPU  {served['gpu']}"]
    hints = advice(report)
    if hints:
        lines += ["", "What would help:", *(f"  - {hint}" for hint in hints)]
    return "\n".join(lines)


def advice(report: Mapping[str, Any]) -> list[str]:
    """What is missing on this machine, each with the step that mends it."""
    hints: list[str] = []
    if report["extension"] != "loaded":
        step = "pip install --no-build-isolation --force-reinstall --no-deps of this package"
        if report["compiler"] is None:
            step = f"install a C++17 compiler and Python's headers, then {step}"
        hints.append(f"the CPU kernels are missing and plain torch serves every op: {step}")
    forced = report["cpu"]["forced"]
    if forced and report["extension"] == "loaded":
        hints.append(f"BIGOPS_ISA={forced} holds the kernels below what this CPU has; unset it")
    if report["crossovers"]["ignored"]:
        hints.append(f"tuned crossovers are ignored: {report['crossovers']['ignored']}")
    elif report["crossovers"]["source"] == "committed" and report["extension"] == "loaded":
        hints.append("the crossovers are another machine's: `bigops tune` measures this one's")
    for of in report["tiles"]:
        if of["ignored"]:
            hints.append(f"tuned tiles are ignored: {of['ignored']}")
        elif of["source"] == "committed":
            step = "`bigops tune --device cuda` measures them"
            hints.append(f"the tiles for {of['device']} are chosen by a model: {step}")
    if report["triton_error"] and report["cuda"]["available"]:
        step = "pip install -U triton, or a torch that brings a later one (2.14: 3.8)"
        hints.append(f"torch sees a GPU, but {report['triton_error']}, so torch serves: {step}")
    if report["cuda"]["built"] is None and sys.platform == "linux":
        hints.append("this torch is built without CUDA; for a GPU install a CUDA build of torch")
    return hints


def _line(name: str, value: str) -> str:
    return f"{name:<16} {value}"


def _triton(report: Mapping[str, Any]) -> str:
    """The version or why it does not serve, what it cannot, and what serves in its place."""
    said = report["triton_error"] or report["triton"]
    limits = report["triton_limits"]
    if not limits:
        return str(said)
    if not report["triton_error"]:
        return f"{said}: {limits}"
    instead = "torch serves what CUDA C++ kernels do not"
    if report["cuda"]["kernels"].partition(",")[0] != "loaded":
        instead = "torch serves every op on a GPU"
    return f"{said}: {limits}; {instead}"


def _instruction_set(cpu: Mapping[str, Any]) -> str:
    if not cpu["isas"]:
        return _NONE
    forced = f", forced by BIGOPS_ISA={cpu['forced']}" if cpu["forced"] else ""
    return f"{cpu['isa']} (of {', '.join(cpu['isas'])}{forced})"


def _tiles(of: Mapping[str, Any]) -> str:
    count = "" if of["source"] == "committed" else f", {of['tiles']} tuned"
    return f"{of['device']}: {of['source']}{count}"


def _cuda(cuda: Mapping[str, Any]) -> str:
    built = f"torch built for {cuda['built']}" if cuda["built"] else "torch built without it"
    devices = ", ".join(cuda["devices"]) if cuda["available"] else "no GPU seen"
    return f"{built}; {devices}"
