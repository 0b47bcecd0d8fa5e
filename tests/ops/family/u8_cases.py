"""Calls of quantized_linear and sparse_linear with qparams, and what holds their u8 results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bigops.formats.quantize import dequantize_u8, quantize_u8, static_qparams
from bigops.ops.quantized_linear import quantized_linear
from bigops.ops.sparse_linear import sparse_linear
from tests.support.cases.compressed import SPARSE, Case, kernel_of, make
from tests.support.kernels_ran import expect
from tests.support.tolerance import bound, check

ONE_OF_EACH = ("int8_static", "sparse_int8")
X_QPARAMS = static_qparams(-2.0, 3.0)  # that of the static cases; some of x lies outside
U8_FORMS = ("int8_static", "w4a8_static", "sparse_int8")  # whose x may be u8
FORMS = (*U8_FORMS, "int8", "int8_zero", "w8_zero", "w4", "w4a8", "sparse_float", "sparse_bf16")


def module_name(form: str) -> str:
    return "sparse_linear" if form in SPARSE else "quantized_linear"


def kernel(form: str, level: str, x: Tensor, m: int, u8: bool) -> str:
    """Name of the kernel, as far as the form says it."""
    dtype = {torch.uint8: "u8", torch.bfloat16: "bf16", torch.float16: "f16"}.get(x.dtype, "f32")
    end = "_u8" if u8 else ""
    if form in SPARSE:
        values = {"s8": "s8", "f32": "f32", "bf16": "bf16"}[SPARSE[form]]
        return f".sparse_linear.{dtype}.{values}_{'rows' if m <= 6 else 'columns'}{end}"
    if dtype == "u8":
        return kernel_of(form, level, "f32", m).replace(".f32.", ".u8.") + end
    return kernel_of(form, level, dtype, m) + end


def call(
    case: Case, x: Tensor, y_qparams: Tensor | None, x_qparams: Tensor | None = None
) -> Tensor:
    """The public call with these qparams; a sparse one takes those of a u8 x besides."""
    f: Any = sparse_linear if case.sparse else quantized_linear
    qparams: dict[str, Any] = {"y_qparams": y_qparams}
    if case.sparse:
        qparams["x_qparams"] = X_QPARAMS if x.dtype == torch.uint8 else x_qparams
    y: Tensor = f(x, case.weight, case.bias, case.residual, case.name, **qparams)
    return y


def raw_arguments(case: Case, x: Tensor, y_qparams: Tensor | None) -> list[Any]:
    x_qparams = [X_QPARAMS if x.dtype == torch.uint8 else None] if case.sparse else []
    return [x, *case.storage, *x_qparams, y_qparams, case.bias, case.residual, case.name]


def raw(case: Case) -> Any:
    return getattr(torch.ops.bigops, f"{case.op}_u8")


def qparams_of(case: Case) -> Tensor:
    """A qparams over most of the result: a few numbers lie outside."""
    y = case.truth(torch.float64)[0]
    if not y.numel():
        return static_qparams(-1.0, 1.0)
    return static_qparams(float(y.min()) * 0.9, float(y.max()) * 0.9)


def on_qparams(case: Case) -> Case:
    """The case with the x that its u8 codes stand for, which no kernel rounds again."""
    x = dequantize_u8(quantize_u8(case.x, X_QPARAMS), X_QPARAMS, torch.float32)
    return replace(case, x=x, quantised=False)


def check_u8(case: Case, q: Tensor, qparams: Tensor) -> None:
    """Hold a u8 result to float64: half a step off at most, plus what the rule allows y."""
    assert q.dtype == torch.uint8
    ref64, plain = case.truth(torch.float64)[0], case.truth(torch.float32)[0]
    assert q.shape == ref64.shape
    scale, zero = qparams.double()
    want = (ref64 / scale + zero).clamp(0, 255)
    allowed = 0.5 + bound(ref64, plain, case.scales()[0]) / scale
    # y * (1 / scale): two roundings of a number below 512
    allowed = allowed + 512 * 2 * torch.finfo(torch.float32).eps
    error = (q.double() - want).abs()
    worst = float((error - allowed).max()) if q.numel() else -1.0
    assert worst <= 0, f"{case.name}: u8 off by {worst} more than the rule allows"


def run(form: str, level: str, m: int, n: int, k: int, dtype: str, name: str, **more: Any) -> None:
    """One case: a u8 result of x, and where x may be u8 the same of u8 rows."""
    case = make(form, m, n, k, dtype, name, **more)
    qparams = qparams_of(case)
    with expect(kernel(form, level, case.x, m, True)):
        check_u8(case, call(case, case.x, qparams), qparams)
    if form not in U8_FORMS:
        return
    q = quantize_u8(case.x, X_QPARAMS)
    with expect(kernel(form, level, q, m, True), kernel(form, level, q, m, False)):
        u8, y = call(case, q, qparams), call(case, q, None)
    seen = on_qparams(case)
    check_u8(seen, u8, qparams)
    truth, plain = seen.truth(torch.float64)[0], seen.truth(torch.float32)[0].to(y.dtype)
    check(y, truth, plain, seen.scales()[0], what=f"{name} of u8")
