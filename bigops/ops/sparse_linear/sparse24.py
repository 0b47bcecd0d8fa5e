"""The op under `sparse_linear` for a weight that is 2:4 sparse and compressed for NVIDIA GPUs.

The general storage of `sparse_linear` runs everywhere; this op takes the form that sparse tensor
cores read (layout: `bigops.formats.sparse24`; `from_sparse` makes it of the general storage, once,
where a weight is frozen for such a GPU).

Reference, op (schema, fake, autograd, vmap come from `bigops.ops.family`), dispatch, public
function, in that order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.formats import checks, quantize
from bigops.formats import sparse24 as storage
from bigops.formats.sparse24 import Sparse24Weight
from bigops.kernels.common.tiles import device_arch
from bigops.ops import activation as act
from bigops.ops import family as _frozen
from bigops.ops.library import define, register, rows
from bigops.ops.sparse_linear import sparse24_pack as kernels

MAX_K = 2**17  # with int8 values: sums past that may not fit in int32
BLOCK_N = 128  # rows of W of a block of the kernel
# Where the kernel serves: on sm_90 and up dense wgmma and tcgen05 are the rivals, and no default
# is set against them before hardware was measured.
ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89")

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None,
    sums: Tensor | None,
    meta_t: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `sparse24_linear` in plain torch."""
    w = storage.to_dense(values, meta, x.shape[-1])
    if scale is None:
        z = F.linear(x.float(), w)
    else:
        seen = quantize.quantize_rows(x, "dynamic", None)
        # whole numbers below 2^53: the product is exact, in whatever order it is summed
        total = torch.matmul((seen.q - seen.zero_point).double(), w.double().t()).float()
        z = total * (seen.scale * scale)
    if bias is not None:
        z = z + bias.float()
    y = act.apply(activation, z)
    if residual is not None:
        y = y + residual.float()
    return y.to(x.dtype)


def _dense(  # type: ignore[no-untyped-def]
    x: Tensor, values, meta, scale, sums, meta_t
) -> Tensor:
    w = storage.to_dense(values, meta, x.shape[-1])
    return w if scale is None else w * scale.unsqueeze(1)


def _sample(  # type: ignore[no-untyped-def]
    g: Tensor, x: Tensor, values, meta, scale, sums, meta_t
) -> Tensor:
    if values.dtype == torch.int8:
        raise TypeError("values: expected a floating-point dtype to have a gradient; got int8")
    return storage.sample(g, meta, values.dtype).to(values.dtype)


def check(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    scale: Tensor | None,
    sums: Tensor | None,
    meta_t: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    if x.dim() == 0:
        raise ValueError("x: expected shape [.., K]; got []")
    k = x.shape[-1]
    storage.check_storage(values, meta, scale, sums, k, meta_t)
    served = quantize.SERVED if values.dtype == torch.int8 else (values.dtype,)
    _frozen.check_call(x, values.shape[0], k, bias, residual, activation, served)
    tensors = (values, meta, scale, sums, meta_t)
    for name, t in zip(_op.storage, tensors, strict=True):
        if t is not None:
            checks.device(name, t, x)


# --- op ------------------------------------------------------------------------------------


class _Sparse24Linear(_frozen.FrozenLinear):
    def rows(self, x: Tensor, *fixed: object) -> int:
        values = fixed[0]
        assert isinstance(values, Tensor)
        return values.shape[0]


_op = _Sparse24Linear(
    "sparse24_linear",
    "Tensor values, Tensor meta, Tensor? scale, Tensor? sums, Tensor? meta_t",
    reference=reference,
    dense=_dense,
    check=check,
    rounds=lambda *fixed: fixed[2] is not None,
    sample=_sample,
)
reference_backward = _op.reference_backward

_product_op = define(
    "sparse24_linear_product(Tensor x, Tensor? x_scale, Tensor? x_zero, Tensor like, "
    "Tensor values, Tensor meta, Tensor? scale, Tensor? sums, int k, Tensor? bias, "
    "Tensor? residual, str activation) -> Tensor"
)  # the kernel by itself, for a GPU only; `sparse24_linear` has its reference and gradients


# --- dispatch ------------------------------------------------------------------------------
# The kernels serve on sm_80 to sm_89: the forward of all formats, the gradients of 16-bit values.
# That of x is a product of the same kind where the weight is transposable, else torch's.


def _product(
    x: Tensor,
    like: Tensor,
    values: Tensor,
    meta: Tensor,
    k: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    **more: Any,
) -> Tensor:
    """The kernel on x [M, K]; a result like ``like``."""
    names = ("x_scale", "x_zero", "scale", "sums")
    x_scale, x_zero, scale, sums = (more.get(name) for name in names)
    code = act.CODES[activation]
    y: Tensor = _product_op(
        x, x_scale, x_zero, like, values, meta, scale, sums, k, bias, residual, code
    )
    return y


def _forward(x: Tensor, *args: Any) -> Tensor:
    """The op by the kernel; x of any rank."""
    values, meta, scale, sums, _, bias, residual, activation = args
    flat, k, n = rows(x), x.shape[-1], values.shape[0]
    seen, more = flat, {}
    if scale is not None:
        from bigops.kernels.quantized_linear.rows import quantize_activations

        seen, x_scale, x_zero, _ = quantize_activations(flat, "dynamic")
        more = {"x_scale": x_scale, "x_zero": x_zero, "scale": scale, "sums": sums}
    added = None if residual is None else rows(residual)
    y = _product(seen, x, values, meta, k, bias, added, activation, **more)
    backend.note(_name(x.dtype, values.dtype))
    return y.view(*x.shape[:-1], n)


def _backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x, 16-bit values and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32: the forward keeps nothing.
    """
    values, meta, _, _, meta_t, bias, activation, need_x, need_values, need_bias = args
    k, n = x.shape[-1], values.shape[0]
    z = None
    if activation != "none":
        wide = None if bias is None else bias.float()
        like = x.new_empty(0, dtype=torch.float32)
        z = _product(rows(x), like, values, meta, k, wide, None, "none")
    gz, gb = _preact_gradient(rows(grad), z, activation, need_x or need_values, need_bias)
    gx, gv = x.new_empty(0), x.new_empty(0)
    if need_x and meta_t is not None:
        values_t = kernels.turn(values, meta, meta_t, k)
        gx = _product(gz, gz, values_t, meta_t, n, None, None, "none").view(x.shape)
        backend.note(_name(x.dtype, values.dtype, "_grad_x"))
    elif need_x:
        gx = (gz @ storage.to_dense(values, meta, k).to(x.dtype)).view(x.shape)
        backend.note("reference.sparse24_linear_grad_x")
    if need_values:
        gv = kernels.gradient(gz, rows(x), meta)
    return gx, gv, gb


def _preact_gradient(
    grad: Tensor, z: Tensor | None, activation: str, need_gz: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """(gz [M, N] in grad's dtype, its column sums); z float32, None without an activation."""
    nothing = grad.new_empty(0)
    if backend.has_triton():
        from bigops.kernels.fused_linear import preact_gradient

        code = act.CODES[activation]
        gz, gb = preact_gradient(grad, z, code, z is not None and need_gz, need_bias)
        return grad if gz is None else gz, nothing if gb is None else gb
    wide = grad.float()
    if z is not None:
        wide = act.epilogue_backward(activation, wide, z)
    gb = wide.sum(0).to(grad.dtype) if need_bias else nothing
    return wide.to(grad.dtype), gb


def _name(dtype: torch.dtype, stored: torch.dtype, part: str = "") -> str:
    return f"cuda.sparse24_linear{part}.{checks.short(dtype)}.{checks.short(stored)}"


def _fits(k: int, stored: torch.dtype) -> bool:
    # Triton's kernel quantises the rows of x for int8 values.
    return stored != torch.int8 or (k < MAX_K and backend.has_triton())


def _serves_on(arch: str, k: int, stored: torch.dtype) -> bool:
    return arch in ARCHS and backend.cuda_runs_on(arch) and _fits(k, stored)


def serves(x: Tensor, stored: torch.dtype) -> bool:
    """Whether the kernel serves x and values of ``stored`` on x's device."""
    return (
        x.is_cuda
        and not backend.cuda_error
        and _serves_on(device_arch(x.device), x.shape[-1], stored)
    )


def _cuda(x: Tensor, *args: Any) -> Tensor:
    check(x, *args)
    if serves(x, args[0].dtype):
        return _forward(x, *args)
    return _op._serve(x, *args)


def _cuda_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    if args[0].dtype != torch.int8 and serves(x, args[0].dtype):
        return _backward(grad, x, *args)
    return _op._serve_backward(grad, x, *args)


register(_op.forward, cuda=_cuda)
register(_op.backward, cuda=_cuda_backward)


def _check_weight_shape(x: Tensor, weight: Sparse24Weight) -> None:
    # The storage is filled up, so that it does not say where K ends.
    checks.tensors(x=x)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape [.., {k}] for a weight of [{n}, {k}]; got {list(x.shape)}"
        )


def _gradients_by(weight: Sparse24Weight) -> str:
    if weight.values.dtype == torch.int8:
        return "gradients come from torch's product"
    if weight.meta_t is not None:
        return "the gradient of x on them too, by the transpose; that of the values on dense ones"
    return (
        "the gradient of the values on dense tensor cores; that of x comes from torch's product, "
        "since the weight is not transposable"
    )


def explain(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> backend.Explanation:
    """Which kernel serves such a call of `sparse_linear`."""
    _check_weight_shape(x, weight)
    _op.check(x, *weight.tensors, bias, residual, activation)
    k, stored = weight.shape[1], weight.values.dtype
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    if target == "cuda" and torch.cuda.is_available() and not backend.cuda_error:
        target = device_arch(torch.device("cuda", torch.cuda.current_device()))
    plain = "the product with the unpacked weight by torch serves; gradients likewise"
    if _serves_on(target, k, stored):
        m = x.shape[:-1].numel()
        step = storage.STEP[stored]
        config = {"block_n": BLOCK_N, "block_m": 32 if m <= 32 else 128, "block_k": step}
        reason = f"sparse tensor cores (mma.sp); {_gradients_by(weight)}"
        return backend.Explanation("sparse_linear", _name(x.dtype, stored), reason, config)
    if target == "cpu":
        reason = f"made for sparse tensor cores, the general storage has CPU kernels; {plain}"
    elif target in ARCHS:
        why = backend.cuda_error or f"the CUDA C++ kernels are not built for {target}"
        reason = f"{why if _fits(k, stored) else 'int8 needs Triton and K below 2^17'}; {plain}"
    else:
        reason = f"no default before hardware was measured, {ARCHS[0]} to {ARCHS[-1]} only; {plain}"
    return backend.Explanation("sparse_linear", "reference.sparse24_linear", reason)


def apply(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """`sparse_linear` of such a weight.

    What x holds at the zeros of W is never read into a sum by the kernel, so NaN and infinity there
    do not spread; the reference, which multiplies by zero, gives NaN. Floating values have a
    gradient, at the places that are stored.
    """
    _check_weight_shape(x, weight)
    return _op.apply(x, *weight.tensors, bias, residual, activation)
