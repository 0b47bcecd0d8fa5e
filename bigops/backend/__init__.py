"""What this machine has, which kernel serves which op, and which kernels ran.

Anything in bigops may import this module; it imports torch and the extension only.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bigops.backend import crossover

__all__ = ["Explanation", "explain", "extension", "note", "record", "report"]


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
    for dtype, limits in table.fused_linear.items():
        extension.set_crossover("fused_linear", dtype, limits.max_rows, limits.max_flops)
    extension.set_bf16_dot(table.bf16_dot)
    extension.set_float_product(usable(table.float_product))


def packs(dtype: torch.dtype) -> bool:
    """Whether `pack_` lays a CPU weight of ``dtype`` out for packed_linear."""
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


apply_crossovers()


# --- which kernels ran ---------------------------------------------------------------------

_recorders: list[list[str]] = []


def note(kernel: str) -> None:
    """Say that ``kernel`` runs now. Kernels written in Python call it; C++ ones say it below."""
    for names in _recorders:
        names.append(kernel)


@contextlib.contextmanager
def record() -> Iterator[list[str]]:
    """Collect the names of the kernels that run inside, in all threads.

    The list holds the Python-side kernels while inside and the C++ ones from the end of the block.
    """
    names: list[str] = []
    if extension is not None:
        extension.record_start()
    _recorders.append(names)
    try:
        yield names
    finally:
        _recorders.remove(names)
        if extension is not None:
            names.extend(extension.record_stop())


# --- explain -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """Which kernel serves a call, with which config, and why."""

    op: str
    kernel: str
    reason: str
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        config = ", ".join(f"{k}={v}" for k, v in self.config.items())
        return f"{self.op}: {self.kernel}" + (f" [{config}]" if config else "") + f"; {self.reason}"


_choosers: dict[str, Callable[..., Explanation]] = {}


def serves(op: str) -> Callable[[Callable[..., Explanation]], Callable[..., Explanation]]:
    """Register the function that answers `explain` for ``op`` (each op's file has one)."""

    def register(chooser: Callable[..., Explanation]) -> Callable[..., Explanation]:
        _choosers[op] = chooser
        return chooser

    return register


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(type(n) is int for n in value)


def _of_shape(value: Any, dtype: torch.dtype | None) -> Any:
    """A shape becomes a tensor of ``dtype`` on the meta device; so in a list of them."""
    if isinstance(value, list):
        return [_of_shape(item, dtype) for item in value]
    if not _is_shape(value):
        return value
    if dtype is None:
        raise ValueError(f"dtype: expected a torch.dtype for the shape {value}; got none")
    return torch.empty(value, dtype=dtype, device="meta")


def explain(op: str, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Explanation:
    """Say which kernel a call of ``op`` with these arguments takes, its config and the reason.

    Args:
        op: name of an op, as in `report()["ops"]`.
        *args, **kwargs: as for the op's public function; tensors may live on the "meta" device,
            and a shape, a tuple of ints, stands for a floating tensor of ``dtype``:
            ``explain("fused_linear", (64, 4096), (11008, 4096), dtype=torch.bfloat16,
            device="sm_90")``. Weights in a format of their own are given as they are.
        dtype: of what is given as a shape.
        device: optional; "cpu", "cuda" or an architecture such as "sm_90" or "gfx942", which
            need not be present.

    Raises:
        ValueError: unknown op, arguments that the op refuses, or a shape without ``dtype``.
    """
    import bigops.ops  # noqa: F401  registers the choosers

    if op not in _choosers:
        raise ValueError(f"op: expected one of {', '.join(sorted(_choosers))}; got {op!r}")
    given = [_of_shape(value, dtype) for value in args]
    return _choosers[op](*given, **{name: _of_shape(v, dtype) for name, v in kwargs.items()})


# --- report --------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


MIN_TRITON = (3, 8)
# What versions below a bound cannot, the lowest bound first; by compiling the kernels with them.
_TRITON_LIMITS = (
    ((3, 5), "it compiles no product: their epilogue is recursive"),
    (
        MIN_TRITON,
        "it does not compile quantized_linear with int8 x (W8A8, W4A8: tl.dot of int8 into int32); "
        "the other kernels compile, but none was ever run by it",
    ),
    ((3, 9), "all kernels serve; their registers and spills were read with 3.9"),
)


def _triton_number(version: str) -> tuple[int, int]:
    """(major, minor); (0, 0) for what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found.group(1)), int(found.group(2))) if found else (0, 0)


def triton_limits(version: str | None) -> str:
    """What this triton cannot that the newest known can, or ""; "" for None."""
    if version is None or _triton_number(version) == (0, 0):
        return ""
    return next((said for bound, said in _TRITON_LIMITS if _triton_number(version) < bound), "")


@functools.cache
def _find_triton() -> tuple[str | None, str]:
    """(version of triton, why it does not serve: "" where it does)."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    try:
        version = str(importlib.import_module("triton").__version__)
    except Exception as error:  # a broken installation fails in many ways, and torch serves anyway
        return None, f"triton does not load: {str(error) or type(error).__name__}"
    if _triton_number(version) < MIN_TRITON:
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


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and (path := shutil.which(name)):
            return Path(path).name
    return None


_NOT_ON_CPU = ("fp8_linear",)
_ON_GPU = (
    "fp8_linear",
    "fused_linear",
    "low_rank_linear",
    "quantized_linear",
    "sparse_linear",
    "linear_cross_entropy",
    "fused_adamw",
    "fused_sgd",
    "fused_grad_norm",
)


_IN_CUDA = {  # which calls of them
    "quantized_linear": "for few rows",
    "sparse_linear": "for few rows",
    "fused_adamw": "without float64",
    "fused_grad_norm": "",
}


def _op_status() -> dict[str, dict[str, str]]:
    import bigops.ops  # noqa: F401

    ops: dict[str, dict[str, str]] = {}
    for op in sorted(_choosers):
        if op in _NOT_ON_CPU:
            cpu = f"reference.{op} (no CPU kernel of this op)"
        elif extension is not None:
            cpu = f"cpu.{extension.isa()}.{op}"
        else:
            cpu = f"reference.{op} ({extension_error})"
        if op not in _ON_GPU:
            gpu = f"reference.{op} (no GPU kernel of this op yet)"
        elif triton_error():
            gpu = f"reference.{op} ({triton_error()})"
        elif not torch.cuda.is_available():
            gpu = f"triton.{op}, idle: torch sees no GPU"
        else:
            gpu = f"triton.{op}"
        if op in _IN_CUDA and not cuda_error:
            gpu = f"cuda.{op} {_IN_CUDA[op]}, else {gpu}" if _IN_CUDA[op] else f"cuda.{op}"
        ops[op] = {"cpu": cpu, "gpu": gpu}
    return ops


def _tiles_status() -> list[dict[str, Any]]:
    """The tuned tiles of each kind of GPU here, and why a file of them is ignored."""
    from bigops.ops import tuned as _triton_tuned

    return _triton_tuned.status()


def report() -> dict[str, Any]:
    """What this machine has and which kernel serves which op, as plain data (`bigops doctor`)."""
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
        "crossovers": {"source": crossovers().source, "ignored": crossovers().ignored},
        "extension": "loaded" if extension else extension_error,
        "compiler": _compiler(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "triton_error": triton_error(),
        "triton_limits": triton_limits(triton_version()),
        "cuda": {
            "built": torch.version.cuda,
            "available": torch.cuda.is_available(),
            "kernels": cuda_error or f"loaded, for sm_{', sm_'.join(cuda_archs)}",
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "tiles": _tiles_status(),
        "ops": _op_status(),
    }
