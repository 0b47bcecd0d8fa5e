"""Rows of the GPU report for the persistent form of the dense kernel; see gpu_report.py.

A form is the product, nt (x W^T), nn (gz W), tn (gz^T x) or gated, and "rows" where M and K do not
divide by 16. Operands always have a unit stride and row lengths that do: others have no descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.common import tiles
from bigops.kernels.common.activation import NAMES, split_code
from bigops.kernels.common.gemm_persistent import gemm_persistent

KERNELS = {"gemm_persistent": gemm_persistent}
TRITON_TYPE = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
MAPS = 2  # of a and b: each is published by one atomic exchange (tensormap.cp_fenceproxy)


def jobs(arch: str, job: Callable[..., Any]) -> Iterator[Any]:
    """Every persistent config of one device in every order, with the whole epilogue forward."""
    entries = [entry for entry in tiles.table_for(arch).entries if entry.config.persistent]
    for entry in entries:
        form, worst = ("gated", "geglu") if entry.form == "gated" else ("nt", "gelu")
        forms = [(form, worst)] + ([("nn", "none"), ("tn", "none")] if form == "nt" else [])
        for dtype in entry.dtypes:
            for precision in ("ieee", "tf32") if dtype == "f32" else ("ieee",):
                for order, activation in forms:
                    yield job(arch, "gemm_persistent", order, dtype, entry.config, activation,
                              precision)  # fmt: skip
        if entry != tiles.largest(entries, entry.form, entry.dtypes[0]) or "f32" in entry.dtypes:
            continue
        yield job(arch, "gemm_persistent", f"{form}_rows", "bf16", entry.config, worst)
        for code, name in enumerate(NAMES):
            if split_code(code)[1] == (form == "gated") and name != worst:
                yield job(arch, "gemm_persistent", form, "bf16", entry.config, name)


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    return ("M", "K") if job.form.endswith("_rows") else ()


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn = KERNELS[job.kernel]
    act, gated = split_code(NAMES.index(job.activation))
    types = dict.fromkeys(fn.arg_names, "i32")
    pointers = ("a", "b", "bias", "residual", "c", "preact")
    types |= dict.fromkeys(pointers, "*" + TRITON_TYPE[job.dtype])
    constants: dict[str, Any] = {
        "ACT": act,
        "GATED": gated,
        "PRECISION": job.precision,
        "A_ROWS": job.form != "tn",
        "B_ROWS": job.form in ("nn", "tn"),
        "BLOCK_M": job.tile.block_m,
        "BLOCK_N": job.tile.block_n,
        "BLOCK_K": job.tile.block_k,
        "GROUP_M": job.tile.group_m,
        "PARTS": job.tile.parts,
    }
    if job.form in ("nn", "tn"):
        # No residual: its strides are 0, which triton passes as arguments of 32 bits.
        return fn, types, constants | dict.fromkeys(("bias", "residual", "preact"))
    return fn, types, constants | {"stride_rn": 1}
