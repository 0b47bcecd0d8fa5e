"""Rows of the GPU report for the kernel of low_rank_linear; see report.py.

A form is "factors" or "lora" (with a base), the padded rank, and what is unlike a large aligned
product, as in "lora_r64_loose": parts, t and z are written; thin, strides of the factors and the
rank that do not divide by 16; wide, 64-bit strides; loose, odd sizes and no unit stride; back, the
product for x's gradient. Every row has the masks of a last block along K that is not whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.common import form_tiles
from bigops.kernels.common.tiles import pointwise_config
from bigops.kernels.low_rank_linear import kernel as kernels
from bigops.kernels.low_rank_linear.model import LOOSE, OP
from tests.kernels.gpu_report.jobs import constants_of, pointer
from tests.kernels.gpu_report.jobs import words as words_of

KERNELS = {
    "low_rank_product": kernels.low_rank_product,
    "activate_rows": kernels.activate_rows,
}
FACTORS = ("stride_vk", "stride_vr", "stride_ur", "stride_un")


def jobs(arch: str, job: Callable[..., Any]) -> Iterator[Any]:
    """Every shipped config of one device at its largest rank, with the whole epilogue.

    A row stands for its like: f16 differs from bf16 by the name of an instruction, and a form with
    masks or more outputs needs the registers of one without.
    """

    def product(form: str, dtype: str, entry: Any, activation: str = "gelu", **more: str) -> Any:
        form = f"{entry.form}_r{entry.width}" + (f"_{form}" if form else "")
        return job(arch, "low_rank_product", form, dtype, entry.config, activation, **more)

    for entry in form_tiles.table_for(OP, arch).entries:
        end = "parts_thin" if entry.width <= LOOSE else "parts"
        end = end if entry.aligned else "loose"
        for dtype in ("bf16", "f32"):
            if dtype in entry.dtypes:
                yield product(end, dtype, entry)
        if entry.max_m is not None or not entry.aligned:
            continue
        if "f32" in entry.dtypes:
            if entry.form == "factors" and arch[:2] == "sm":
                yield product("parts", "f32", entry, precision="tf32")
        elif entry.width == 64 and entry.form == "lora":
            yield product("back_thin", "bf16", entry, "none")
            yield product("parts_wide", "bf16", entry)
    yield job(arch, "activate_rows", "plain", "bf16", pointwise_config(arch), "gelu")


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    words = words_of(job)
    always = ("span", "tile_m")
    if "loose" in words:
        sizes = ("M", "N", "K", "R", "stride_xm", "stride_xk", "stride_bk", "stride_bn")
        return (*always, *sizes, *FACTORS, "stride_rm", "stride_rn")
    return (*always, "R", *FACTORS) if "thin" in words else always


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn, words = KERNELS[job.kernel], words_of(job)
    types = dict.fromkeys(fn.arg_names, "i32")
    pointers = ("x", "v", "u", "base", "bias", "residual", "y", "inner", "preact", "z")
    types |= dict.fromkeys(pointers, pointer(job)) | {"scale": "fp32"}
    if job.kernel == "activate_rows":
        return fn, types, constants_of(fn, job, stride_rn=1)
    own: dict[str, Any] = {"RANK": int(words[1][1:])}
    if words[0] == "factors":
        own["base"] = None
    if "back" in words:
        own |= dict.fromkeys(("bias", "residual", "preact"))
        own |= {"stride_xk": 1, "stride_vr": 1, "stride_un": 1, "stride_bn": 1}
    elif "loose" not in words:
        own |= {"stride_xk": 1, "stride_vk": 1, "stride_ur": 1, "stride_bk": 1, "stride_rn": 1}
    if not {"parts", "back"} & set(words):
        own |= {"inner": None, "preact": None}
    return fn, types, constants_of(fn, job, **own)
