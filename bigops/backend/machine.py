"""What this machine has: the extension, CUDA C++ kernels, triton, limits and crossovers.

Everything is read as an attribute at call time (`machine.extension`), so that this module is the
one place that holds it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import re
import warnings
from pathlib import Path
from types import ModuleType

import torch

from bigops.backend import crossover


def _load() -> tuple[ModuleType | None, str]:
    try:
        import bigops._C as module  # type: ignore[import-not-found, import-untyped]
    except ModuleNotFoundError:
        return None, "the C++ extension is not built (no compiler was found at installation)"
    except ImportError as error:
        return None, f"the C++ extension does not load: {error}"
    return module, ""


extension, extension_error = _load()
"""The C++ extension, or None with the reason in `extension_error`."""

# What csrc/cuda/nvcc.py builds where nothing else is asked for.
_ALL_ARCHS = ("80", "86", "89", "90a", "100a", "120")


def _load_cuda() -> tuple[tuple[str, ...], str]:
    """(architectures of the CUDA C++ kernels, why they do not serve here: "" where they do)."""
    here = Path(__file__).parent.parent
    files = [here / f"_cuda{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    file = next((f for f in files if f.exists()), None)
    if file is None:
        return (), "the CUDA C++ kernels are not built (BIGOPS_CUDA=1 builds them)"
    if torch.version.cuda is None:  # one of its symbols is in libtorch_cuda only
        return _ALL_ARCHS, "the CUDA C++ kernels need a torch that is built for CUDA"
    try:
        torch.ops.load_library(str(file))
        archs = ctypes.CDLL(str(file)).bigops_cuda_archs
    except (OSError, AttributeError) as error:
        why = error.__cause__ or error  # torch's own words leave the reason out
        return (), f"the CUDA C++ kernels do not load: {why}"
    archs.restype = ctypes.c_char_p
    return tuple(archs().decode().split("_")), ""


cuda_archs, cuda_error = _load_cuda()
"""Architectures of the CUDA C++ kernels as nvcc names them; why they do not serve here, or ""."""


@functools.cache
def cuda_runs_on(arch: str) -> bool:
    """Whether the CUDA C++ kernels, as built, have code for a device such as "sm_90"."""
    found = re.fullmatch(r"sm_(\d+)(\d)", arch)
    if found is None:
        return False
    major, minor = int(found.group(1)), int(found.group(2))
    for built in cuda_archs:
        number = int(built.rstrip("a"))
        if number == 10 * major + minor:
            return True
        # code runs on later devices of its generation, unless it is for one architecture alone
        if not built.endswith("a") and number // 10 == major and number % 10 < minor:
            return True
    return False


_SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@functools.cache
def crossovers() -> crossover.Table:
    """Where own CPU kernels hand over: the committed table, or `bigops tune`'s of this machine."""
    if extension is None:
        return crossover.Table({}, {}, "aten")
    table = crossover.current(extension)
    if table.ignored:
        warnings.warn(f"tuned crossovers are ignored: {table.ignored}", stacklevel=2)
    return table


def apply_crossovers(table: crossover.Table | None = None) -> None:
    """Hand a table, by default this machine's, to the extension."""
    if extension is None:
        return
    table = table or crossovers()
    for op, dtype, limits in table.limits():
        extension.set_crossover(op, dtype, limits.max_rows, limits.max_flops)
    extension.set_bf16_dot(table.bf16_dot)
    extension.set_float_product(usable(table.float_product))


def packs(dtype: torch.dtype) -> bool:
    """Whether packing pays for a CPU weight of ``dtype``."""
    return crossovers().packs.get(_SHORT.get(dtype, ""), False)


def float_product() -> str:
    """Whose product of float32 matrices serves besides the own kernel: "aten" or "onednn"."""
    return usable(crossovers().float_product)


def usable(library: str) -> str:
    """``library``, or "aten" where this torch does not have oneDNN's product."""
    return library if library == "aten" or _has_onednn() else "aten"


@functools.cache
def _has_onednn() -> bool:
    """Whether this torch has the private op by which oneDNN multiplies fp32 matrices, and its shim.

    Python calls the op, the extension the shim.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if extension is not None and not extension.has_onednn_linear():
        return False
    op = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if op is None:
        return False
    want = "(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm)"
    return want in str(op.default._schema)


MIN_TRITON = (3, 8)


def triton_number(version: str) -> tuple[int, int]:
    """(major, minor); (0, 0) for what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


@functools.cache
def _find_triton() -> tuple[str | None, str]:
    """(version of triton, why it does not serve: "" where it does)."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    try:
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken installation fails in many ways, and torch serves anyway
        return None, f"triton does not load: {str(error) or type(error).__name__}"
    if triton_number(version) < MIN_TRITON:
        least = ".".join(map(str, MIN_TRITON))
        return version, f"triton {version} is too old: expected {least} or later"
    return version, ""


def triton_error() -> str:
    """Why triton, which is optional, does not serve here: missing, broken, too old; else ""."""
    return _find_triton()[1]


def triton_version() -> str | None:
    """The version of the triton that is imported here, which pip may know by another name."""
    return _find_triton()[0]


def has_triton() -> bool:
    """Whether a triton that the GPU kernels can use is importable."""
    return not triton_error()


apply_crossovers()
