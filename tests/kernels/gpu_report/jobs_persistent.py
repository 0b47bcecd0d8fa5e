"""Rows of the GPU report for the persistent form of the dense kernel; see report.py.

A form is the product, nt (x W^T), nn (gz W), tn (gz^T x) or gated, and "rows" where M and K do not
divide by 16. Operands always have a unit stride and row lengths that do: others have no descriptor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bigops.kernels.common import tiles
from bigops.kernels.common.gemm_persistent import gemm_persistent
from tests.kernels.gpu_report.jobs import constants_of, largest, other_activations, pointer
from tests.kernels.gpu_report.jobs import words as words_of

KERNELS = {"gemm_persistent": gemm_persistent}
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
                    yield job(
                        arch, "gemm_persistent", order, dtype, entry.config, activation, precision
                    )
        if entry != largest(entries, entry.form, entry.dtypes[0]) or "f32" in entry.dtypes:
            continue
        yield job(arch, "gemm_persistent", f"{form}_rows", "bf16", entry.config, worst)
        for name in other_activations(form == "gated", worst):
            yield job(arch, "gemm_persistent", form, "bf16", entry.config, name)


def unaligned(job: Any) -> tuple[str, ...]:
    """Names of the arguments that do not divide by 16."""
    return ("M", "K") if job.form.endswith("_rows") else ()


def arguments(job: Any) -> tuple[Any, dict[str, str], dict[str, Any]]:
    """The kernel, the types of its run-time arguments, the values of its constants."""
    fn = KERNELS[job.kernel]
    types = dict.fromkeys(fn.arg_names, "i32")
    types |= dict.fromkeys(("a", "b", "bias", "residual", "c", "preact"), pointer(job))
    own: dict[str, Any] = {
        "GATED": words_of(job)[0] == "gated",
        "A_ROWS": job.form != "tn",
        "B_ROWS": job.form in ("nn", "tn"),
    }
    if job.form in ("nn", "tn"):
        # No residual: its strides are 0, which triton passes as arguments of 32 bits.
        own |= dict.fromkeys(("bias", "residual", "preact"))
    else:
        own["stride_rn"] = 1
    return fn, types, constants_of(fn, job, **own)
