"""Rows of the GPU report for the kernels of sparse_linear; see gpu_report.py.

A form is the product, the side of a block, and what is unlike a large aligned product, as in
"forward_32_loose": w16, 16 rows by a word; wide, 64-bit strides; loose, odd sizes and no unit
stride; mixed, float32 values with a bfloat16 x. Every row has the masks of a last block that is not
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.common import form_tiles
from bigops.kernels.common.activation import NAMES, split_code
from bigops.kernels.sparse_linear import kernels, launch

KERNELS = {"block_product": kernels.block_product, "block_samples": kernels.block_samples}
TRITON_TYPE = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}


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


def _words(job: Any) -> list[str]:
    words: list[str] = job.form.split("_")
    return words


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    if "loose" in _words(job):
        return ("M", "N", "K", "WORDS", "stride_xm", "stride_xk", "stride_rm", "stride_rn",
                "stride_gm", "stride_gn")  # fmt: skip
    return ("WORDS",)


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn, words = KERNELS[job.kernel], _words(job)
    types = dict.fromkeys(fn.arg_names, "i32")
    held = "*" + TRITON_TYPE[job.dtype]  # values
    given = "*bf16" if "mixed" in words else held
    types |= dict.fromkeys(("x", "gz", "bias", "residual", "y"), given)
    types |= dict.fromkeys(("values", "out"), held)
    tables = ("across", "step", "first", "order", "task_line", "task_first")
    types |= dict.fromkeys(tables, "*i32")
    constants: dict[str, Any] = {
        "C": 1 if job.dtype == "f32" else 2,
        "HEIGHT": int(words[1].removeprefix("w")),
        "WIDTH": int(words[1].removeprefix("w")),
        "BY_WORD": False,
        "PRECISION": job.precision,
        "EVEN": False,
        "WIDE": "wide" in words,
        "BLOCK_K": job.tile.block_k,
    }
    if words[1] == "w16":
        transposed = words[0] == "transposed"
        constants |= {"WIDTH": 16 if transposed else constants["C"], "BY_WORD": transposed}
    if "loose" not in words:
        constants |= {"stride_xk": 1, "stride_rn": 1, "stride_gn": 1}
    if words[0] == "sampled":
        constants["COLUMNS"] = launch.TASK
    else:
        constants |= {
            "TRANSPOSED": words[0] == "transposed",
            "ACT": split_code(NAMES.index(job.activation))[0],
            "BLOCK_M": job.tile.block_m,
        }
        if words[0] == "transposed":
            constants |= {"bias": None, "residual": None}
    named = set(fn.arg_names)
    return fn, types, {name: value for name, value in constants.items() if name in named}
