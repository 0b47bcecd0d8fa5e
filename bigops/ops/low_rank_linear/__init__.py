"""low_rank_linear: y = act(x base^T + scale (x v^T) u^T + bias) + residual, the weight in factors.

Schema, reference, fake, autograd, dispatch, public function, in that order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import checks
from bigops.formats.quantized import QuantizedWeight
from bigops.ops import activation as act
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.fused_linear import fused_linear
from bigops.ops.library import autocast, define, loop, register, rows
from bigops.ops.low_rank_linear import quantized as factors
from bigops.ops.low_rank_linear import triton as _triton

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    base: Tensor | None = None,
    activation: str = "none",
    scale: float = 1.0,
) -> Tensor:
    """The meaning of `low_rank_linear` in plain torch; differentiable, any device and dtype."""
    y = act.epilogue(activation, _preact(x, u, _inner(x, v, scale), bias, base))
    return y if residual is None else y + residual


def _inner(x: Tensor, v: Tensor, scale: float) -> Tensor:
    t = F.linear(x, v)
    return t if scale == 1.0 else t * scale


def _preact(x: Tensor, u: Tensor, t: Tensor, bias: Tensor | None, base: Tensor | None) -> Tensor:
    z = F.linear(t, u, bias)
    return z if base is None else z + F.linear(x, base)


def reference_backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    base: Tensor | None,
    t: Tensor,
    preact: Tensor | None,
    activation: str,
    scale: float,
    need_x: bool,
    need_u: bool,
    need_v: bool,
    need_bias: bool,
    need_base: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients for x, u, v, bias, base as a differentiable expression; None where not needed.

    `t` is scale x v^T and `preact` what the activation was given (None only for "none").
    """
    gz = grad if preact is None else act.epilogue_backward(activation, grad, preact)
    gz2, x2 = rows(gz), rows(x)
    gx = gv = None
    if need_x or need_v:
        gt = gz @ u
        gt = gt if scale == 1.0 else gt * scale
        if need_v:
            gv = rows(gt).transpose(0, 1) @ x2
        if need_x:
            gx = gt @ v if base is None else gt @ v + gz @ base
    return (
        gx,
        gz2.transpose(0, 1) @ rows(t) if need_u else None,
        gv,
        gz2.sum(0) if need_bias else None,
        gz2.transpose(0, 1) @ x2 if need_base else None,
    )


def _serve(x, u, v, bias, residual, base, activation, scale):  # type: ignore[no-untyped-def]
    check(x, u, v, bias, residual, base, activation)
    backend.note("reference.low_rank_linear")
    y = reference(x, u, v, bias, residual, base, activation, scale)
    return y.clone() if y is residual else y


def _serve_with_parts(x, u, v, bias, residual, base, activation, scale):  # type: ignore[no-untyped-def]
    check(x, u, v, bias, residual, base, activation)
    backend.note("reference.low_rank_linear_with_parts")
    t = _inner(x, v, scale)
    z = _preact(x, u, t, bias, base)
    y = act.epilogue(activation, z)
    if residual is not None:
        y = y + residual
    return y, t, x.new_empty(0) if activation == "none" else z


def _serve_backward(  # type: ignore[no-untyped-def]
    grad, x, u, v, base, t, preact, activation, scale, *needs
):
    backend.note("reference.low_rank_linear_backward")
    grads = reference_backward(grad, x, u, v, base, t, preact, activation, scale, *needs)
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


# --- schema --------------------------------------------------------------------------------

_ARGS = (
    "(Tensor x, Tensor u, Tensor v, Tensor? bias, Tensor? residual, Tensor? base, "
    "str activation, float scale)"
)
_forward = define("low_rank_linear" + _ARGS + " -> Tensor", _serve)
_forward_with_parts = define(
    "low_rank_linear_with_parts" + _ARGS + " -> (Tensor, Tensor, Tensor)", _serve_with_parts
)
_backward = define(
    "low_rank_linear_backward(Tensor grad, Tensor x, Tensor u, Tensor v, Tensor? base, Tensor t, "
    "Tensor? preact, str activation, float scale, bool need_x, bool need_u, bool need_v, "
    "bool need_bias, bool need_base) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _serve_backward,
)


def check(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    base: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    act.check_name(activation, gated=False)
    checks.floating("x", x)
    checks.matrix("u", u)
    checks.matrix("v", v)
    (n, rank), k = u.shape, v.shape[1]
    checks.shape("v", v, [rank, k])
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(
            f"x: expected shape [.., {k}] for v of {list(v.shape)}; got {list(x.shape)}"
        )
    if rank > min(n, k):
        raise ValueError(
            f"u, v: expected a rank of at most {min(n, k)}, the smaller side of [{n}, {k}]; "
            f"got {rank}"
        )
    wanted = (
        ("u", u, None),
        ("v", v, None),
        ("bias", bias, [n]),
        ("residual", residual, [*x.shape[:-1], n]),
        ("base", base, [n, k]),
    )
    for name, tensor, shape in wanted:
        if tensor is not None:
            if shape is not None:
                checks.shape(name, tensor, shape)
            checks.like(name, tensor, x)


# --- fake ----------------------------------------------------------------------------------


def _fake(x, u, v, bias, residual, base, activation, scale):  # type: ignore[no-untyped-def]
    check(x, u, v, bias, residual, base, activation)
    return x.new_empty((*x.shape[:-1], u.shape[0]))


def _fake_with_parts(x, u, v, bias, residual, base, activation, scale):  # type: ignore[no-untyped-def]
    y = _fake(x, u, v, bias, residual, base, activation, scale)
    t = x.new_empty((*x.shape[:-1], v.shape[0]))
    return y, t, x.new_empty(0) if activation == "none" else torch.empty_like(y)


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, u, v, base, t, preact, activation, scale, *needs
):
    n, k = u.shape[0], v.shape[1]
    shapes = (x.shape, u.shape, v.shape, (n,), (n, k))
    return tuple(
        x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)
    )


# --- autograd ------------------------------------------------------------------------------


def _gradients(
    grad: Tensor,
    saved: tuple[Tensor | None, ...],
    code: int,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients for x, u, v, bias, base: by the kernel, or an expression under create_graph."""
    x, u, v, bias, base, t, preact = saved
    assert x is not None
    assert u is not None
    assert v is not None
    if torch.is_grad_enabled():  # double backward: rebuild t and z inside the graph
        t = _inner(x, v, scale)
        z = None if code == act.NONE else _preact(x, u, t, bias, base)
        return reference_backward(grad, x, u, v, base, t, z, act.NAMES[code], scale, *needs)
    if t is None:  # the plain raw op keeps nothing
        _, t, preact = _forward_with_parts(x, u, v, bias, None, base, code, scale)
    preact = None if code == act.NONE else preact
    grads = _backward(grad, x, u, v, base, t, preact, code, scale, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _raw_backward(ctx: Any, grad: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    need = ctx.needs_input_grad
    needs = (need[0], need[1], need[2], need[3], need[5])
    if any(g is not None for g in others):
        raise RuntimeError(
            "low_rank_linear_with_parts: expected a gradient for y only; t and z are kept for the "
            "backward pass and have none"
        )
    grads = _gradients(grad, ctx.saved_tensors, ctx.code, ctx.scale, needs)
    return (*grads[:4], grad if need[4] else None, grads[4], None, None)


class _LowRankLinear(torch.autograd.Function):
    """Eager autograd in the ctx form: 10 microseconds a call, setup_context costs 30."""

    @staticmethod
    def forward(ctx, x, u, v, bias, residual, base, code, scale):  # type: ignore[no-untyped-def]
        ctx.code, ctx.scale = code, scale
        with torch._C._AutoDispatchBelowAutograd():
            y, t, z = _forward_with_parts(x, u, v, bias, residual, base, code, scale)
        ctx.save_for_backward(x, u, v, bias, base, t, z)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _raw_backward(ctx, grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, u, v, bias, _, base, ctx.code, ctx.scale = inputs
    t, z = output[1:] if isinstance(output, tuple) else (None, None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, u, v, bias, base, t, z)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, code, scale, need_x, need_u, need_v, need_bias, need_base = inputs
    ctx.rest = (act.NAMES[code], scale, need_x, need_u, need_v, need_bias, need_base)
    ctx.save_for_backward(*tensors)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Vector-Jacobian product of the raw backward op, through its differentiable reference."""
    with torch.enable_grad():
        inputs = [t if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        outputs = reference_backward(*inputs, *ctx.rest)  # type: ignore
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None]
        wanted = [t for t in inputs if t is not None]
        given = [g for _, g in pairs]
        found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, given, allow_unused=True))
    return (*(None if t is None else next(found) for t in inputs), *[None] * len(ctx.rest))


# --- vmap ----------------------------------------------------------------------------------


def _rows_only(in_dims: tuple[Any, ...]) -> bool:
    return all(dim is None for i, dim in enumerate(in_dims) if i not in (0, 4))


def _fold(op: Any, args: tuple[Any, ...], in_dims: tuple[Any, ...], batch: int) -> Any:
    """Rows are independent: a batch of x (and residual) is more rows of one call."""
    full = list(args)
    for i in (0, 4):
        if full[i] is not None:
            t, dim = full[i], in_dims[i]
            full[i] = t.expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)
    return op(*full)


def _vmap_by(op: Any) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        serve = _fold if _rows_only(in_dims) else loop
        out = serve(op, args, in_dims, info.batch_size)
        if not isinstance(out, tuple):
            return out, 0
        # z of activation "none" is an empty tensor, which a fold does not stack
        dims = tuple(None if serve is _fold and t.dim() == 1 and t.numel() == 0 else 0 for t in out)
        return out, dims

    return rule


def _vmap_backward(info, in_dims, *args):  # type: ignore[no-untyped-def]
    return loop(_backward, args, in_dims, info.batch_size), (0,) * 5


def _composed(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    base: Tensor | None,
    activation: str,
    scale: float,
) -> Tensor:
    """The op as calls of `fused_linear`, which goes through every torch.func transform."""
    t = fused_linear(x, v)
    t = t if scale == 1.0 else t * scale
    if base is None:
        return fused_linear(t, u, bias, residual, activation)
    if activation == "none":
        return fused_linear(x, base, bias, fused_linear(t, u, None, residual))
    y = act.epilogue(activation, fused_linear(x, base, bias, fused_linear(t, u)))
    return y if residual is None else y + residual


# --- dispatch ------------------------------------------------------------------------------
# The CPU kernels register themselves (csrc/cpu/low_rank_linear.cpp).


def _cuda(x, u, v, bias, residual, base, activation, scale):  # type: ignore[no-untyped-def]
    args = (x, u, v, bias, residual, base, activation, scale)
    if not _triton.serves(x.dtype, x.device):
        return _serve(*args)
    check(x, u, v, bias, residual, base, activation)
    return _triton.forward(*args, False)[0]


def _cuda_with_parts(x, u, v, bias, residual, base, activation, scale):  # type: ignore[no-untyped-def]
    args = (x, u, v, bias, residual, base, activation, scale)
    if not _triton.serves(x.dtype, x.device):
        return _serve_with_parts(*args)
    check(x, u, v, bias, residual, base, activation)
    y, t, z = _triton.forward(*args, True)
    return y, t, x.new_empty(0) if z is None else z


def _cuda_backward(grad, *args):  # type: ignore[no-untyped-def]
    serve = _triton.backward if _triton.serves(grad.dtype, grad.device) else _serve_backward
    return serve(grad, *args)


for _op, _served_by, _rule in (
    (_forward, _cuda, _fake),
    (_forward_with_parts, _cuda_with_parts, _fake_with_parts),
):
    register(
        _op,
        fake=_rule,
        backward=_raw_backward,
        setup=_setup,
        vmap=_vmap_by(_op),
        cuda=_served_by,
    )
register(
    _backward,
    fake=_fake_backward,
    backward=_double_backward,
    setup=_setup_backward,
    vmap=_vmap_backward,
    cuda=_cuda_backward,
)


@serves("low_rank_linear")
def _explain(
    x: Tensor,
    u: Any,
    v: Any,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    base: Tensor | None = None,
    scale: float = 1.0,
    device: str | None = None,
) -> Choice:
    if isinstance(u, QuantizedWeight) or isinstance(v, QuantizedWeight):
        _check_form(base, scale)
        return factors.explain(x, u, v, bias, residual, activation, device)
    check(x, u, v, bias, residual, base, activation)
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    (n, rank), k = u.shape, v.shape[1]
    m, dtype = (x.numel() // k if k else 0), checks.short(x.dtype)
    why = machine.extension_error if target == "cpu" else _triton.why_not(x.dtype, target)
    if why:
        return Choice.of("low_rank_linear", "reference.low_rank_linear", why)
    if target != "cpu":
        kernel, config, reason = _triton.explain(target, x.dtype, m, n, k, rank, base is not None)
        return Choice.of("low_rank_linear", kernel, reason, config)
    assert machine.extension is not None
    inner, _ = machine.extension.choose_fused_linear(m, rank, k, dtype)
    outer, reason = machine.extension.choose_fused_linear(m, n, rank, dtype)
    first, last = (name.rpartition(".")[2] for name in (inner, outer))
    return Choice.of(
        "low_rank_linear",
        outer.replace("fused_linear", "low_rank_linear"),
        f"x v^T by {first}, then u by {last}: {reason}",
    )


# --- public function -----------------------------------------------------------------------


def low_rank_linear(
    x: Tensor,
    u: Tensor | QuantizedWeight,
    v: Tensor | QuantizedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    base: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """``act(x @ base.T + scale * (x @ v.T) @ u.T + bias) + residual`` in one op.

    The weight ``u @ v`` is never formed: a row costs r (K + N) multiply-adds in place of K N. With
    ``base`` it is the LoRA form (Hu et al. 2021), v its A and u its B.

    Args:
        x: ``[.., K]``; float32, bfloat16, float16 or float64, any strides.
        u: ``[N, r]``; r from 0 (the product is zero) to min(N, K). Or both factors by
            `QuantizedWeight`: two calls of `quantized_linear`, without ``base`` and ``scale``.
        v: ``[r, K]``.
        bias: ``[N]`` or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid or tanh.
        base: a dense weight ``[N, K]`` whose product is added, or None.
        scale: factor of the low-rank product.

    Returns:
        ``[.., N]`` in x's dtype. Each product is summed in float32 for bf16 and fp16;
        ``scale * x @ v.T`` and, with ``base``, the low-rank product are rounded to x's dtype in
        between (the latter stays in float32 where a GPU takes one launch). Under `torch.autocast`
        all arguments are cast to the autocast dtype first.

    Raises:
        ValueError: unknown or gated activation, a rank above the smaller side, or shapes or devices
            that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    if isinstance(u, QuantizedWeight) or isinstance(v, QuantizedWeight):
        _check_form(base, scale)
        return factors.product(x, u, v, bias, residual, activation)  # type: ignore[arg-type]
    try:
        device_type = x.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            x, u, v, bias, residual, base = autocast(  # type: ignore[assignment]
                device_type, x, u, v, bias, residual, base
            )
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            check(x, u, v, bias, residual, base, activation)
            return _composed(x, u, v, bias, residual, base, activation, scale)
        tensors = (x, u, v, bias, residual, base)
        args = (*tensors, act.CODES[activation], scale)
        if min(u.shape[0], v.shape[1]) < v.shape[0]:
            raise ValueError  # the kernel itself would take it
        if torch.compiler.is_compiling():
            return _forward_with_parts(*args)[0] if torch.is_grad_enabled() else _forward(*args)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return _LowRankLinear.apply(*args)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(*args)
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError):
        # The kernel checks its arguments; only a refused call pays for naming what is wrong.
        act.check_name(activation, gated=False)
        if not torch.compiler.is_compiling():
            checks.tensors(x=x, u=u, v=v, bias=bias, residual=residual, base=base)
            check(x, u, v, bias, residual, base, activation)
        raise


def _check_form(base: Tensor | None, scale: float) -> None:
    if base is not None or scale != 1.0:
        raise ValueError(
            "base, scale: expected None and 1 with quantised factors; got "
            f"{'None' if base is None else 'a tensor'} and {scale}"
        )
