"""What this machine has and which kernel serves which op: `bigops.report`, `bigops doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from bigops.backend import machine
from bigops.ops import tuned
from bigops.ops.explain import choosers

# What versions below a bound cannot, the lowest bound first; by compiling the kernels with them.
_TRITON_LIMITS = (
    ((3, 5), "it compiles no product: their epilogue is recursive"),
    (
        machine.MIN_TRITON,
        "it does not compile quantized_linear with int8 x (W8A8, W4A8: tl.dot of int8 into int32); "
        "the other kernels compile, but none was ever run by it",
    ),
    ((3, 9), "all kernels serve; their registers and spills were read with 3.9"),
)


def triton_limits(version: str | None) -> str:
    """What this triton cannot that the newest known can, or ""; "" for None."""
    number = machine.triton_number(version or "")
    if number == (0, 0):
        return ""
    return next((said for bound, said in _TRITON_LIMITS if number < bound), "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and (path := shutil.which(name)):
            return Path(path).name
    return None


_NOT_ON_CPU = ("fp8_linear",)
_NOT_ON_GPU = (
    "act_quant",
    "attention",
    "norm",
    "norm_act_quant",
    "norm_with_sum",
    "packed_linear",
    "quantized_embedding",
    "rotary",
)
_IN_CUDA = {  # which calls of them
    "quantized_linear": "for few rows",
    "sparse_linear": "for few rows",
    "fused_adamw": "without float64",
    "fused_grad_norm": "",
}


def _op_status() -> dict[str, dict[str, str]]:
    ops: dict[str, dict[str, str]] = {}
    for op in sorted(choosers):
        if op in _NOT_ON_CPU:
            cpu = f"reference.{op} (no CPU kernel of this op)"
        elif machine.extension is not None:
            cpu = f"cpu.{machine.extension.isa()}.{op}"
        else:
            cpu = f"reference.{op} ({machine.extension_error})"
        if op in _NOT_ON_GPU:
            gpu = f"reference.{op} (no GPU kernel of this op yet)"
        elif machine.triton_error():
            gpu = f"reference.{op} ({machine.triton_error()})"
        elif not torch.cuda.is_available():
            gpu = f"triton.{op}, idle: torch sees no GPU"
        else:
            gpu = f"triton.{op}"
        if op in _IN_CUDA and not machine.cuda_error:
            gpu = f"cuda.{op} {_IN_CUDA[op]}, else {gpu}" if _IN_CUDA[op] else f"cuda.{op}"
        ops[op] = {"cpu": cpu, "gpu": gpu}
    return ops


def report() -> dict[str, Any]:
    """What this machine has and which kernel serves which op, as plain data (`bigops doctor`)."""
    extension, table = machine.extension, machine.crossovers()
    return {
        "bigops": _version("bigops") or "not installed (run from a source tree)",
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpu": {
            "threads": torch.get_num_threads(),
            "features": list(extension.features()) if extension else [],
            "isa": extension.isa() if extension else "none",
            "isas": list(extension.isas()) if extension else [],
            "forced": os.environ.get("BIGOPS_ISA"),
        },
        "crossovers": {"source": table.source, "ignored": table.ignored},
        "extension": "loaded" if extension else machine.extension_error,
        "compiler": _compiler(),
        "torch": torch.__version__,
        "triton": machine.triton_version(),
        "triton_error": machine.triton_error(),
        "triton_limits": triton_limits(machine.triton_version()),
        "cuda": {
            "built": torch.version.cuda,
            "available": torch.cuda.is_available(),
            "kernels": machine.cuda_error or f"loaded, for sm_{', sm_'.join(machine.cuda_archs)}",
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "tiles": tuned.status(),
        "ops": _op_status(),
    }
