"""The op under `sparse_linear` for a weight that is 2:4 sparse and compressed for NVIDIA GPUs.

The general storage of `sparse_linear` runs everywhere; this op takes the form that sparse tensor
cores read (`Sparse24Weight`, made of the general storage, once, where a weight is frozen for such a
GPU). The kernels serve on sm_80 to sm_89: the forward of all formats, the gradients of 16-bit
values. That of x is a product of the same kind where the weight is transposable, else torch's.

What x holds at the zeros of W is never read into a sum by the kernel, so NaN and infinity there do
not spread; the reference, which multiplies by zero, gives NaN. Floating values have a gradient, at
the places that are stored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import checks, quantize
from bigops.formats import sparse24 as storage
from bigops.formats.base import rows
from bigops.formats.sparse24 import Sparse24Weight
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.choice import Choice, reference
from bigops.ops.family import Call, LinearOp
from bigops.ops.library import define
from bigops.ops.sparse_linear import sparse24_pack as kernels
from bigops.ops.targets import Target

MAX_K = 2**17  # with int8 values: sums past that may not fit in int32
BLOCK_N = 128  # rows of W of a block of the kernel
# Where the kernel serves: on sm_90 and up dense wgmma and tcgen05 are the rivals, and no default
# is set against them before hardware was measured.
ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89")

_product_op = define(
    "sparse24_linear_product(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor like, "
    "Tensor values, Tensor meta, Tensor? scale, Tensor? sums, int k, Tensor? bias, "
    "Tensor? residual, str activation) -> Tensor"
)  # the kernel by itself, for a GPU only; `sparse24_linear` has its reference and gradients


def _product(call: Call, seen: quantize.Rows | None) -> Tensor:
    x, weight = call.x, call.weight
    assert isinstance(weight, Sparse24Weight)
    w = storage.to_dense(weight.values, weight.meta, weight.k)
    if weight.scale is None:
        return F.linear(x.float(), w)
    seen = seen or quantize.act_quant(x)
    # whole numbers below 2^53: the product is exact, in whatever order it is summed
    total = torch.matmul((seen.q - seen.zero_point).double(), w.double().t()).float()
    return total * (seen.scale * weight.scale)


def serves(stored: torch.dtype, k: int, target: Target) -> bool:
    """Whether the kernel serves ``k`` columns of values of ``stored`` on ``target``."""
    return _fits(k, stored) and targets.cuda_arch(target) in ARCHS


def _fits(k: int, stored: torch.dtype) -> bool:
    # Triton's kernel quantises the rows of x for int8 values.
    return stored != torch.int8 or (k < MAX_K and machine.has_triton())


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    weight = call.weight
    assert isinstance(weight, Sparse24Weight)
    stored = weight.values.dtype
    if serves(stored, weight.k, target):
        return Choice("sparse_linear", _name(call), lambda: _said(call, weight), product)
    plain = "the product with the unpacked weight by torch serves; gradients likewise"
    arch = target if targets.is_cpu(target) or target == "cuda" else targets.present(target)
    if targets.is_cpu(target):
        reason = f"made for sparse tensor cores, the general storage has CPU kernels; {plain}"
    elif arch in ARCHS:
        why = machine.cuda_error or f"the CUDA C++ kernels are not built for {arch}"
        reason = (
            f"{why if _fits(weight.k, stored) else 'int8 needs Triton and K below 2^17'}; {plain}"
        )
    else:
        reason = f"no default before hardware was measured, {ARCHS[0]} to {ARCHS[-1]} only; {plain}"
    return reference("sparse_linear", reason, "sparse24_linear")


def _name(call: Call, part: str = "") -> str:
    weight = call.weight
    assert isinstance(weight, Sparse24Weight)
    dtypes = f"{checks.short(call.x.dtype)}.{checks.short(weight.values.dtype)}"
    return f"cuda.sparse24_linear{part}.{dtypes}"


def _said(call: Call, weight: Sparse24Weight) -> tuple[str, dict[str, Any]]:
    step = storage.STEP[weight.values.dtype]
    config = {"block_n": BLOCK_N, "block_m": 32 if call.rows <= 32 else 128, "block_k": step}
    return f"sparse tensor cores (mma.sp); {_gradients_by(weight)}", config


def _gradients_by(weight: Sparse24Weight) -> str:
    if weight.values.dtype == torch.int8:
        return "gradients come from torch's product"
    if weight.meta_t is not None:
        return "the gradient of x on them too, by the transpose; that of the values on dense ones"
    return (
        "the gradient of the values on dense tensor cores; that of x comes from torch's product, "
        "since the weight is not transposable"
    )


def _multiply(
    x: Tensor,
    like: Tensor,
    values: Tensor,
    meta: Tensor,
    k: int,
    bias: Tensor | None,
    residual: Tensor | None,
    code: int,
    **of_int8: Any,
) -> Tensor:
    """The kernel on x [M, K]; a result like ``like``."""
    names = ("x_scale", "x_zero", "scale", "sums")
    x_scale, x_zero, scale, sums = (of_int8.get(name) for name in names)
    y: Tensor = _product_op(
        x, x_scale, x_zero, like, values, meta, scale, sums, k, bias, residual, code
    )
    return y


def product(call: Call) -> Tensor:
    """The op by the kernel; x of any rank."""
    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, Sparse24Weight)
    seen = rows(x)
    more: dict[str, Any] = {}
    if weight.rounds:
        from bigops.kernels.quantized_linear.rows import quantize_activations

        seen, x_scale, x_zero, _ = quantize_activations(seen, "dynamic")
        more = {"x_scale": x_scale, "x_zero": x_zero, "scale": weight.scale, "sums": weight.sums}
    added = None if residual is None else rows(residual)
    stored = (weight.values, weight.meta, weight.k)
    y = _multiply(seen, x, *stored, call.bias, added, call.code, **more)
    backend.note(_name(call))
    return y.view(*x.shape[:-1], weight.n)


def gradients(
    grad: Tensor, call: Call, need_x: bool, need_values: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, 16-bit values and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32: the forward keeps nothing.
    """
    x, weight, bias = call.x, call.weight, call.bias
    assert isinstance(weight, Sparse24Weight)
    values, meta, k = weight.values, weight.meta, weight.k
    z = None
    if call.activation != "none":
        wide = None if bias is None else bias.float()
        like = x.new_empty(0, dtype=torch.float32)
        z = _multiply(rows(x), like, values, meta, k, wide, None, act.NONE)
    gz, gb = _preact_gradient(rows(grad), z, call.activation, need_x or need_values, need_bias)
    gx, gv = x.new_empty(0), x.new_empty(0)
    if need_x and weight.meta_t is not None:
        values_t = kernels.transpose(values, meta, weight.meta_t, k)
        transposed = (values_t, weight.meta_t, weight.n)
        gx = _multiply(gz, gz, *transposed, None, None, act.NONE).view(x.shape)
        backend.note(_name(call, "_grad_x"))
    elif need_x:
        gx = (gz @ storage.to_dense(values, meta, k).to(x.dtype)).view(x.shape)
        backend.note("reference.sparse24_linear_grad_x")
    if need_values:
        gv = kernels.gradient(gz, rows(x), meta)
    return gx, gv, gb


def backward(grad: Tensor, call: Call, **needs: bool) -> tuple[Tensor, ...] | None:
    """The gradients of a call by kernels on x's device, or None."""
    weight = call.weight
    assert isinstance(weight, Sparse24Weight)
    if weight.rounds or not serves(weight.values.dtype, weight.k, call.x.device):
        return None
    return gradients(grad, call, **needs)


def _preact_gradient(
    grad: Tensor, z: Tensor | None, activation: str, need_gz: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """(gz [M, N] in grad's dtype, its column sums); z float32, None without an activation."""
    nothing = grad.new_empty(0)
    if machine.has_triton():
        from bigops.kernels.fused_linear import preact_gradient

        code = act.CODES[activation]
        gz, gb = preact_gradient(grad, z, code, z is not None and need_gz, need_bias)
        return grad if gz is None else gz, nothing if gb is None else gb
    wide = grad.float()
    if z is not None:
        wide = act.epilogue_backward(activation, wide, z)
    gb = wide.sum(0).to(grad.dtype) if need_bias else nothing
    return wide.to(grad.dtype), gb


op = LinearOp("sparse24_linear", Sparse24Weight, _product, choose, backward)
