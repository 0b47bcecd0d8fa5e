"""Rows of the GPU report for the kernels of sparse_linear; see report.py.

A form is the product, the side of a block, and what is unlike a large aligned product, as in
"forward_32_loose": w16, 16 rows by a word; wide, 64-bit strides; loose, odd sizes and no unit
stride; mixed, float32 values with a bfloat16 x. Every row has the masks of a last block that is not
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.common import form_tiles
from bigops.kernels.sparse_linear import kernels, launch
from tests.kernels.gpu_report.jobs import constants_of, pointer
from tests.kernels.gpu_report.jobs import words as words_of

KERNELS = {"block_product": kernels.block_product, "block_samples": kernels.block_samples}


def jobs(arch: str, job: Callable[..., Any]) -> Iterator[Any]:
    """Every shipped config of one device with blocks of 32; the largest by words of 16 rows also.

    float16 has no row: its values are float32, as with "mixed".
    """

    def row(form: str, dtype: str, entry: Any, **more: str) -> Any:
        kernel = "block_samples" if entry.form == "sampled" else "block_product"
        activation = "gelu" if entry.form == "forward" else "none"
        return job(arch, kernel, f"{entry.form}_{form}", dtype, entry.config, activation, **more)

    for entry in form_tiles.table_for(launch.OP, arch).entries:
        for dtype in ("bf16", "f32"):
            if dtype in entry.dtypes:
                yield row("32" if entry.aligned else "32_loose", dtype, entry)
        if entry.max_m is not None or not entry.aligned:
            continue
        if "bf16" in entry.dtypes:
            yield row("w16", "bf16", entry)
            if entry.form == "forward":
                yield row("32_wide", "bf16", entry)
        elif entry.form == "forward":
            yield row("32_mixed", "f32", entry)
            if arch[:2] == "sm":
                yield row("32", "f32", entry, precision="tf32")


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    if "loose" in words_of(job):
        return (
            "M",
            "N",
            "K",
            "WORDS",
            "stride_xm",
            "stride_xk",
            "stride_rm",
            "stride_rn",
            "stride_gm",
            "stride_gn",
        )
    return ("WORDS",)


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn, words = KERNELS[job.kernel], words_of(job)
    product, kind, *_ = words
    transposed, columns = product == "transposed", 1 if job.dtype == "f32" else 2
    side = int(kind.removeprefix("w"))
    types = dict.fromkeys(fn.arg_names, "i32")
    given = "*bf16" if "mixed" in words else pointer(job)
    types |= dict.fromkeys(("x", "gz", "bias", "residual", "y"), given)
    types |= dict.fromkeys(("values", "out"), pointer(job))
    tables = ("across", "step", "first", "order", "task_line", "task_first")
    types |= dict.fromkeys(tables, "*i32")
    own: dict[str, Any] = {
        "C": columns,
        "HEIGHT": side,
        "WIDTH": side,
        "BY_WORD": False,
        "TRANSPOSED": transposed,
        "EVEN": False,
        "COLUMNS": launch.TASK,
    }
    if kind == "w16":
        own |= {"WIDTH": 16 if transposed else columns, "BY_WORD": transposed}
    if "loose" not in words:
        own |= {"stride_xk": 1, "stride_rn": 1, "stride_gn": 1}
    if transposed:
        own |= {"bias": None, "residual": None}
    return fn, types, constants_of(fn, job, **own)
