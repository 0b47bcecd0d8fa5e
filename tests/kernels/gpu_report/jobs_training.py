"""Rows of the GPU report for the loss and the optimiser steps; see report.py.

A form names what the call has: "full" is every option of the loss, with the gradient; "coded" 8-bit
states, "random" stochastic rounding, "copy" a bfloat16 copy, "light" a step without momentum and
decay, "l2" decay in the gradient, "rows" rows of no whole blocks, "parts" random bits of a part of
a tensor, "loose" addresses that do not divide by 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import triton.language as tl

from bigops.kernels import linear_cross_entropy as loss
from bigops.kernels.fused_adamw import kernels as fused_adamw
from bigops.kernels.fused_adamw import launch
from tests.kernels.gpu_report.jobs import constants_of
from tests.kernels.gpu_report.jobs import words as words_of

KERNELS = {
    "cross_entropy_rows": loss.cross_entropy_rows,
    "adamw_step": fused_adamw.adamw_step,
    "sgd_step": fused_adamw.sgd_step,
    "square_sums": fused_adamw.square_sums,
    "norm_of_sums": fused_adamw.norm_of_sums,
}
TYPES = {"f32": tl.float32, "bf16": tl.bfloat16, "f16": tl.float16, "f64": tl.float64}
CLASSES = 128256  # of a row: past every block


class Tile(NamedTuple):
    """What a program takes at a time: elements, or blocks of 256 of them."""

    size: int
    num_warps: int


def jobs(arch: str, job: Callable[..., Any]) -> Iterator[Any]:
    """The kernels as they are launched, with the options that need the most registers."""

    def row(kernel: str, form: str, dtype: str) -> Any:
        if kernel == "cross_entropy_rows":
            tile = Tile(*loss.block_size(arch, CLASSES))
        else:
            tile = Tile(*launch.blocks_of(arch, "coded" in form))
        return job(arch, kernel, form, dtype, tile, "none")

    for dtype in ("f32", "bf16"):
        yield row("cross_entropy_rows", "full", dtype)
        yield row("adamw_step", "plain", dtype)
        yield row("adamw_step", "coded_copy" if dtype == "f32" else "coded_random", dtype)
        yield row("sgd_step", "light", dtype)
    yield row("adamw_step", "coded_random_loose", "bf16")
    yield row("adamw_step", "coded_random_rows_parts_l2", "bf16")
    yield row("sgd_step", "coded_random_nesterov_rows_parts", "bf16")
    yield row("sgd_step", "coded_nesterov", "f32")
    yield row("square_sums", "plain", "f64")
    yield row("norm_of_sums", "plain", "f64")


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    return ("V", "ignore_index", "count", "depth", "n")


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn, words = KERNELS[job.kernel], words_of(job)
    types = dict.fromkeys(fn.arg_names, "fp32")
    types |= dict.fromkeys(("V", "ignore_index", "count", "depth", "n"), "i32")
    held = {"f32": "*fp32", "bf16": "*bf16", "f16": "*fp16", "f64": "*fp64"}[job.dtype]
    types |= dict.fromkeys(("logits", "bias"), held) | {"target": "*i64", "table": "*i64"}
    types |= dict.fromkeys(("class_weight", "scale", "losses", "sizes"), "*fp32")
    types |= dict.fromkeys(("signed_values", "unsigned_values"), "*fp32")
    types |= dict.fromkeys(("signed_buckets", "unsigned_buckets"), "*i32")
    types |= dict.fromkeys(("partial", "norm"), "*fp64")
    full, coded, light = "full" in words, "coded" in words, "light" in words
    constants: dict[str, Any] = {
        "SMOOTHED": full,
        "Z_LOSS": full,
        "CAPPED": full,
        "GRADIENT": full,
        "BLOCK": job.tile.size,
        "WIDTH": launch.NORM_WIDTH,
        "PARAM": TYPES[job.dtype],
        "GRAD": TYPES[job.dtype],
        "COPY": tl.bfloat16 if "copy" in words else None,
        "CODED": coded,
        "STOCHASTIC": "random" in words,
        "ALIGNED": "loose" not in words,
        "BLOCKS": job.tile.size,
        "TILES": launch.TILES,
        "MOMENTUM": not light,
        "DECAY": not light if job.kernel == "sgd_step" else "l2" in words,
        "ROWS": "rows" in words,
        "PARTS": "parts" in words,
        "NESTEROV": "nesterov" in words,
        "FIRST_STEP": False,
        "lses": None,  # of statistics, which a call asks for
    }
    if job.kernel == "cross_entropy_rows" and not full:
        constants |= dict.fromkeys(("bias", "class_weight", "scale"))
    if not coded:
        names = ("signed_values", "signed_buckets", "unsigned_values", "unsigned_buckets")
        constants |= dict.fromkeys(names)
    return fn, types, constants_of(fn, job, **constants)
