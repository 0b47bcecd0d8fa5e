"""Rows of the GPU report for the kernels of quantized_linear; see report.py.

A form is the kind of product, what the weight has, and what is unlike a large aligned product, as
in "w4_g64_zero_odd": g64, groups of 64 (none: one scale a row); zero, zero points; odd, odd sizes
and strides; loose, also no unit stride; even, BLOCK_K divides K; wide, 64-bit strides; far, sums
past int32; ones, M, N and K are 1, which triton turns into constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.quantized_linear import forward as kernels
from bigops.kernels.quantized_linear import gradient, rows
from bigops.kernels.quantized_linear import tiles as quantized_tiles
from tests.kernels.gpu_report.jobs import TRITON_TYPE, constants_of, other_activations, pointer
from tests.kernels.gpu_report.jobs import words as words_of

KERNELS = {
    "quantized_gemm": kernels.quantized_gemm,
    "act_quant": rows.act_quant,
    "quantized_gradient": gradient.quantized_gradient,
}
# The matrix instructions of whole numbers: others in such a row would be no int8 product.
WHOLE_COUNTS = {
    "mma": r"IMMA",
    "wgmma": r"IGMMA",
    "tcgen05": r"UTCIMMA",
    "mfma": r"v_mfma_i32_\w+",
}


def _forms(kind: str, dtype: str) -> list[str]:
    """The forms of a kind by what the weight has; zero points and wide groups need the most."""
    if kind == "w8a8":
        return ["w8a8_zero"]
    if kind == "w8" or dtype == "f32":
        return [f"{kind}_g128_zero"]
    return [kind, f"{kind}_g32_zero", f"{kind}_g128_zero"]


def jobs(arch: str, job: Callable[..., Any]) -> Iterator[Any]:
    """Every kind with every shipped config of one device and the whole epilogue.

    A row stands for its like: where x is quantised only y has its dtype, dtypes of one width differ
    by the name of an instruction, and "w8" reads what "w4" does with fewer steps.
    """

    def gemm(form: str, dtype: str, entry: Any, activation: str = "gelu", **more: str) -> Any:
        tile = kernels.within(entry.config, _group(form))
        return job(arch, "quantized_gemm", form, dtype, tile, activation, **more)

    table = quantized_tiles.table_for(arch)
    for entry in table.entries:
        if entry.kinds[0].endswith("_gradient"):
            yield from _gradients(arch, job, entry)
            continue
        main = entry.max_m is None and entry.aligned
        end = "" if entry.aligned else "_odd"
        for kind in entry.kinds:
            floats = not kind.endswith("a8")
            for dtype in entry.dtypes:
                if dtype == "bf16" or (floats and (main or dtype == "f32")):
                    for form in _forms(kind, dtype):
                        yield gemm(form + end, dtype, entry)
            if main and kind == "w4" and "f32" in entry.dtypes and arch[:2] == "sm":
                yield gemm(kind, "f32", entry, precision="tf32")
            if "bf16" not in entry.dtypes or kind not in ("w8a8", "w4"):
                continue
            if not entry.aligned:
                yield gemm(f"{kind}_loose", "bf16", entry)
                yield gemm(f"{kind}_ones", "bf16", entry)
            if main:
                for variant in ("even", "wide", "preact", *(["zero_far"] * (kind == "w8a8"))):
                    yield gemm(f"{kind}_{variant}", "bf16", entry)
            if main and kind == "w8a8":  # the epilogue is that of all kinds
                for name in other_activations(False, ""):
                    yield gemm(kind, "bf16", entry, name)
    for mode in rows.MODES:
        for dtype in TRITON_TYPE if mode == "dynamic" else ("bf16",):
            yield job(arch, "act_quant", mode, dtype, table.rows, "none")
    for end in ("loose", "ones"):
        yield job(arch, "act_quant", f"dynamic_{end}", "bf16", table.rows, "none")


def _gradients(arch: str, job: Callable[..., Any], entry: Any) -> Iterator[Any]:
    """The backward's product: one scale a row and zero points by groups, float16 for its range."""

    def product(form: str, dtype: str, precision: str = "ieee") -> Any:
        tile = gradient.within(entry.config, _group(form))
        return job(arch, "quantized_gradient", form, dtype, tile, "none", precision=precision)

    end = "" if entry.aligned else "_odd"
    for kind in entry.kinds:
        for dtype in entry.dtypes:
            yield product(f"{kind}_zero{end}", dtype)
        if kind == "w4_gradient":
            yield product(f"{kind}_g32_zero{end}", entry.dtypes[0])
    kind = entry.kinds[-1]
    if entry.max_m is None and "bf16" in entry.dtypes:
        for variant in ("even", "wide") if entry.aligned else ("loose", "ones"):
            yield product(f"{kind}_{variant}", "bf16")
    if entry.aligned and "f32" in entry.dtypes and arch[:2] == "sm":
        yield product(f"{kind}_zero", "f32", "tf32")


def _group(form: str) -> int:
    return next((int(w[1:]) for w in form.split("_") if w[0] == "g" and w[1:].isdigit()), 0)


def whole(job: Any) -> bool:
    """Whether the row multiplies whole numbers."""
    return job.kernel == "quantized_gemm" and words_of(job)[0].endswith("a8")


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    words = words_of(job)
    if not {"odd", "loose", "ones"} & set(words):
        # K and the lines are whatever the layer's width gives; the other sizes are as in gemm
        return ()
    if job.kernel == "act_quant":
        return ("M", "K", "stride_xm", "stride_xk")  # the rows of q are ours
    if job.kernel == "quantized_gradient":
        return ("M", "N", "K", "LINES", "stride_gm", "stride_gn")
    own = ("stride_xm", "stride_xk") if not whole(job) else ()
    return ("M", "N", "K", "LINES", "stride_rm", "stride_rn", *own)


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn, words = KERNELS[job.kernel], words_of(job)
    stored = "*i8" if job.form[1] == "8" else "*u8"
    types = dict.fromkeys(fn.arg_names, "i32")
    types |= dict.fromkeys(("x", "bias", "residual", "y", "gz", "gx"), pointer(job))
    types |= {"values": stored, "scale": "*fp32", "zero_point": "*i8", "x_scale": "*fp32"}
    types |= {"x_zero": "*i32", "x_sum": "*i32"}
    own: dict[str, Any] = {}
    if "loose" not in words:
        own |= dict.fromkeys(("stride_xk", "stride_gn", "stride_rn"), 1)
    if "ones" in words:
        own |= dict.fromkeys(("M", "N", "K", "LINES"), 1)
    if job.kernel == "act_quant":
        types |= {"grid": "*fp32", "q": "*i8"}
        own |= {"MODE": rows.MODES[words[0]]}
        if words[0] != "static":
            own["grid"] = None
        return fn, types, constants_of(fn, job, **own)
    if "preact" in words:
        types["y"] = "*fp32"
    if whole(job):
        own["stride_xk"] = 1
        types |= {"x": "*i8", "row_sum": "*i32" if job.form[1] == "8" else "*fp32"}
    else:
        own |= dict.fromkeys(("row_sum", "x_scale", "x_zero", "x_sum"))
    if "zero" not in words:
        own["zero_point"] = None
    own |= {"BITS": int(job.form[1]), "GROUP": _group(job.form), "EXACT": "far" not in words}
    return fn, types, constants_of(fn, job, **own)
