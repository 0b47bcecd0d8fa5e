"""Rows of the GPU report for the kernels of fp8_linear; see report.py.

A form is the kind of product, what shares a scale, and what is unlike a large aligned product, as
in "f8a8_block_odd": odd, odd sizes and strides; loose, also no unit stride; even, BLOCK_K divides
K; wide, 64-bit strides; ones, M, N and K are 1, which triton turns into constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.fp8_linear import forward as kernels
from bigops.kernels.fp8_linear import gradient, rows
from bigops.kernels.fp8_linear import tiles as fp8_tiles
from tests.kernels.gpu_report.jobs import constants_of, other_activations, pointer
from tests.kernels.gpu_report.jobs import words as words_of

KERNELS = {
    "fp8_gemm": kernels.fp8_gemm,
    "quantize_fp8": rows.quantize_fp8,
    "fp8_gradient": gradient.fp8_gradient,
}
# The matrix instructions of e4m3: others in such a row would be no fp8 product.
CODE_COUNTS = {
    "mma": r"QMMA",
    "wgmma": r"QGMMA",
    "tcgen05": r"UTCQMMA",
    "mfma": r"v_mfma_f32_\w+_fp8_fp8|v_mfma_(?:scale_)?f32_\w+_f8f6f4",
}


def jobs(arch: str, job: Callable[..., Any]) -> Iterator[Any]:
    """Both kinds with every shipped config of one device and the whole epilogue.

    Scales in blocks need the most registers, one for all of W the least. Where x is rounded only y
    has its dtype.
    """
    table = fp8_tiles.table_for(arch)
    for entry in table.entries:
        if gradient.KIND in entry.kinds:
            yield from _gradients(arch, job, entry)
            continue
        main = entry.max_m is None and entry.aligned
        end = "" if entry.aligned else "_odd"
        for kind in entry.kinds:
            for dtype in entry.dtypes:
                if dtype != "bf16" and (kind == "f8a8" or not (main or dtype == "f32")):
                    continue
                for scales in ("row", "block"):
                    yield job(
                        arch, "fp8_gemm", f"{kind}_{scales}{end}", dtype, entry.config, "gelu"
                    )
            if "bf16" not in entry.dtypes:
                continue
            if not entry.aligned:
                for word in ("loose", "ones"):
                    form = f"{kind}_block_{word}"
                    yield job(arch, "fp8_gemm", form, "bf16", entry.config, "gelu")
            if main:
                for form in ("tensor", "block_even", "block_wide", "block_preact"):
                    yield job(arch, "fp8_gemm", f"{kind}_{form}", "bf16", entry.config, "gelu")
            if main and kind == "f8a8":  # the epilogue is that of both kinds
                for name in other_activations(False, "gelu"):
                    yield job(arch, "fp8_gemm", "f8a8_row", "bf16", entry.config, name)
    for form, dtype in (
        ("row", "f32"),
        ("row", "bf16"),
        ("row", "f16"),
        ("block", "bf16"),
        ("static", "bf16"),
        ("row_loose", "bf16"),
        ("block_loose", "bf16"),
        ("row_ones", "bf16"),
    ):
        yield job(arch, "quantize_fp8", form, dtype, _rows(arch, form), "none")


def _gradients(arch: str, job: Callable[..., Any], entry: Any) -> Iterator[Any]:
    """The backward's product: scales of rows within the sum, those of blocks after a step."""

    def product(form: str, dtype: str, precision: str = "ieee") -> Any:
        return job(arch, "fp8_gradient", form, dtype, entry.config, "none", precision=precision)

    end = "" if entry.aligned else "_odd"
    for dtype in entry.dtypes:
        for scales in ("row", "block"):
            yield product(f"{scales}{end}", dtype)
    if entry.max_m is None and "bf16" in entry.dtypes:
        forms = ("tensor", "row_even", "block_wide") if entry.aligned else ("row_loose", "row_ones")
        for form in forms:
            yield product(form, "bf16")
    if entry.aligned and "f32" in entry.dtypes and arch[:2] == "sm":
        yield product("row", "f32", "tf32")


def _rows(arch: str, form: str) -> Any:
    """The tile as `quantize_activations` launches it."""
    tile = fp8_tiles.row_config(arch)
    if not form.startswith("block"):
        return tile
    return tile._replace(
        block_m=tile.block_m * tile.block_n // fp8_tiles.BLOCK, block_n=fp8_tiles.BLOCK
    )


def rounded(job: Any) -> bool:
    """Whether the row multiplies codes by codes, widened or not."""
    return job.kernel == "fp8_gemm" and words_of(job)[0] == "f8a8"


def by_unit(job: Any) -> bool:
    """Whether a unit of the device multiplies the codes of the row."""
    return rounded(job) and fp8_tiles.units_of(job.arch) != "none"


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    words = words_of(job)
    if job.kernel == "quantize_fp8":  # the rows of q are ours
        loose = {"loose", "ones"} & set(words)
        return ("M", "K", "stride_xm", "stride_xk") if loose else ()
    if not {"odd", "loose", "ones"} & set(words):
        return ("GROUPS",)
    if job.kernel == "fp8_gradient":
        return ("M", "N", "K", "GROUPS", "stride_gm", "stride_gn")
    own = () if rounded(job) else ("stride_xm", "stride_xk")
    return ("M", "N", "K", "GROUPS", "stride_rm", "stride_rn", *own)


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn, words, units = KERNELS[job.kernel], words_of(job), fp8_tiles.units_of(job.arch)
    codes = "*fp8e4nv" if units == "e4m3fn" else "*u8"
    types = dict.fromkeys(fn.arg_names, "i32")
    types |= dict.fromkeys(("x", "bias", "residual", "y", "gz", "gx"), pointer(job))
    types |= {"w": codes, "scale": "*fp32", "x_scale": "*fp32"}
    own: dict[str, Any] = {}
    if "loose" not in words:
        own |= dict.fromkeys(("stride_xk", "stride_gn", "stride_rn"), 1)
    if "ones" in words:
        own |= dict.fromkeys(("M", "N", "K", "GROUPS"), 1)
    if job.kernel == "quantize_fp8":
        types |= {"given": "*fp32", "q": "*u8"}
        own |= {"GROUP": fp8_tiles.BLOCK if "block" in words else 0}
        if "static" not in words:
            own["given"] = None
        return fn, types, constants_of(fn, job, **own)
    scales = next(word for word in words if word in kernels.SCALES)
    own |= {"SCALES": kernels.SCALES[scales], "FNUZ": units == "e4m3fnuz"}
    if "preact" in words:
        types["y"] = "*fp32"
    if rounded(job):
        types["x"] = codes
        own["stride_xk"] = 1
    else:
        own["x_scale"] = None
    return fn, types, constants_of(fn, job, **own)
