"""fused_linear: y = act(x W^T + bias) + residual, dense weight, forward, backward, double backward.

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
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.choice import Choice
from bigops.ops.explain import serves
from bigops.ops.fused_linear import triton as _triton
from bigops.ops.library import autocast, define, register, rows

# --- reference -----------------------------------------------------------------------------


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The meaning of `fused_linear` in plain torch; differentiable, any device and dtype."""
    y = act.epilogue(activation, F.linear(x, weight, bias))
    return y if residual is None else y + residual


def reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    preact: Tensor | None,
    activation: str,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x, weight and bias as a differentiable expression; None where not needed.

    `preact` is z = x W^T + bias; only for activation "none" may it be None.
    """
    gz = grad if preact is None else act.epilogue_backward(activation, grad, preact)
    gz2 = rows(gz)  # [M, N]
    return (
        gz @ weight if need_x else None,
        gz2.transpose(0, 1) @ rows(x) if need_weight else None,
        gz2.sum(0) if need_bias else None,
    )


def _serve(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
    check(x, weight, bias, residual, activation)
    backend.note("reference.fused_linear")
    y = reference(x, weight, bias, residual, activation)
    return y.clone() if y is residual else y


def _serve_with_preact(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
    check(x, weight, bias, residual, activation)
    backend.note("reference.fused_linear_with_preact")
    z = F.linear(x, weight, bias)
    y = act.epilogue(activation, z)
    if residual is not None:
        y = y + residual
    return (y.clone() if y is z else y), z


def _serve_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, preact, activation, need_x, need_weight, need_bias
):
    backend.note("reference.fused_linear_backward")
    grads = reference_backward(grad, x, weight, preact, activation, need_x, need_weight, need_bias)
    return tuple(grad.new_empty(0) if g is None else g for g in grads)


# --- schema --------------------------------------------------------------------------------

_ARGS = "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation)"
_forward = define("fused_linear" + _ARGS + " -> Tensor", _serve)
_forward_with_preact = define(
    "fused_linear_with_preact" + _ARGS + " -> (Tensor, Tensor)", _serve_with_preact
)
_backward = define(
    "fused_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? preact, str activation, "
    "bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _serve_backward,
)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    act.check_name(activation)
    checks.floating("x", x)
    checks.matrix("weight", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x: expected shape [.., {weight.shape[1]}] for a weight of "
            f"{list(weight.shape)}; got {list(x.shape)}"
        )
    rows = weight.shape[0]
    if activation in act.GATED and rows % 2:
        raise ValueError(
            f"weight: {activation} needs an even number of rows (gate, then up); got {rows}"
        )
    checks.like("weight", weight, x)
    if bias is not None:
        checks.shape("bias", bias, [rows])
        checks.like("bias", bias, x)
    if residual is not None:
        n = rows // 2 if activation in act.GATED else rows
        checks.shape("residual", residual, [*x.shape[:-1], n])
        checks.like("residual", residual, x)


# --- fake ----------------------------------------------------------------------------------


def _fake(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
    check(x, weight, bias, residual, activation)
    n = weight.shape[0] // 2 if activation in act.GATED else weight.shape[0]
    return x.new_empty((*x.shape[:-1], n))


def _fake_with_preact(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
    y = _fake(x, weight, bias, residual, activation)
    return y, x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, preact, activation, need_x, need_weight, need_bias
):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


# --- autograd ------------------------------------------------------------------------------


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    preact: Tensor | None,
    code: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Gradients for x, weight, bias: by the kernel, or as an expression under create_graph."""
    if torch.is_grad_enabled():  # double backward: rebuild z inside the graph
        return _expression(grad, x, weight, bias, code, needs)
    if preact is None and code != act.NONE:
        preact = _forward(x, weight, bias, None, act.NONE)
    grads = _backward(grad, x, weight, preact, code, *needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _expression(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    code: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    z = F.linear(x, weight, bias) if code != act.NONE else None
    return reference_backward(grad, x, weight, z, act.NAMES[code], *needs)


class _FusedLinear(torch.autograd.Function):
    """Eager autograd in the ctx form: 10 microseconds a call, setup_context costs 30."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, code):  # type: ignore[no-untyped-def]
        ctx.code = code
        with torch._C._AutoDispatchBelowAutograd():
            if code == act.NONE:
                y, preact = _forward(x, weight, bias, residual, code), None
            else:
                y, preact = _forward_with_preact(x, weight, bias, residual, code)
        ctx.save_for_backward(x, weight, bias, preact)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return _raw_backward(ctx, grad)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _, ctx.code = inputs
    preact = output[1] if isinstance(output, tuple) and ctx.code != act.NONE else None
    ctx.save_for_backward(x, weight, bias, preact)


def _raw_backward(ctx: Any, grad: Tensor, grad_preact: Tensor | None = None) -> tuple[Any, ...]:
    """Gradients of all inputs. The plain raw op keeps no z, so its backward makes it anew."""
    x, weight, bias, preact = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
    needs = (need_x, need_weight, need_bias)
    gx, gw, gb = _gradients(grad, x, weight, bias, preact, ctx.code, needs)
    if grad_preact is not None:  # someone differentiates z itself
        ex, ew, eb = reference_backward(grad_preact, x, weight, None, "none", *needs)
        gx, gw, gb = (
            b if a is None else a if b is None else a + b for a, b in ((gx, ex), (gw, ew), (gb, eb))
        )
    return gx, gw, gb, grad if need_residual else None, None


def _preact_backward(ctx: Any, grad: Tensor | None, grad_preact: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        x, weight = ctx.saved_tensors[:2]
        n = weight.shape[0] // (2 if act.NAMES[ctx.code] in act.GATED else 1)
        grad = x.new_zeros((*x.shape[:-1], n))
    return _raw_backward(ctx, grad, grad_preact)


def _setup_preact(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    _setup(ctx, inputs, output)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, x, weight, preact, ctx.code, *ctx.needs = inputs
    ctx.save_for_backward(grad, x, weight, preact)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Vector-Jacobian product of the raw backward op, through its differentiable reference."""
    saved = ctx.saved_tensors
    with torch.enable_grad():
        inputs = [t if t is None else t.detach().requires_grad_() for t in saved]
        outputs = reference_backward(*inputs, act.NAMES[ctx.code], *ctx.needs)  # type: ignore
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o is not None]
        wanted = [t for t in inputs if t is not None]
        found = iter(
            torch.autograd.grad(
                [o for o, _ in pairs],
                wanted,
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=False,
            )
        )
    return (*(None if t is None else next(found) for t in inputs), None, None, None, None)


# --- vmap ----------------------------------------------------------------------------------


def _fold(op: Any, args: tuple[Any, ...], in_dims: tuple[Any, ...], batch: int) -> Any:
    """Rows are independent: a batch of x (and residual) is more rows of one call."""
    x, weight, bias, residual, activation = args  # a word or a code, as the op takes it
    x_dim, _, _, residual_dim, _ = in_dims

    def batched(t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None:
            return None
        return t.unsqueeze(0).expand(batch, *t.shape) if dim is None else t.movedim(dim, 0)

    return op(batched(x, x_dim), weight, bias, batched(residual, residual_dim), activation)


def _batched(
    args: tuple[Any, ...], activation: str, in_dims: tuple[Any, ...], batch: int
) -> tuple[Tensor, Tensor]:
    """A batch of weights or biases: batched matrix products, (y, z) with the batch in front."""
    *tensors, _ = args
    *dims, _ = in_dims
    x, weight, bias, residual = (
        t if t is None or dim is None else t.movedim(dim, 0)
        for t, dim in zip(tensors, dims, strict=True)
    )
    x_dim, _, bias_dim, _ = dims
    if x_dim is None:
        x = x.unsqueeze(0)
    lead = x.shape[1:-1]
    x3 = (x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)).expand(batch, -1, -1)  # [B, M, K]
    w3 = weight.expand(batch, *weight.shape[-2:])
    z = torch.bmm(x3, w3.transpose(1, 2))
    if bias is not None:
        z = z + (bias.unsqueeze(1) if bias_dim is not None else bias)
    z = z.reshape(batch, *lead, z.shape[-1])
    y = act.epilogue(activation, z)
    if residual is not None:
        y = y + residual
    return y, z


class _FusedLinearFunctorch(torch.autograd.Function):
    """Autograd under torch.func transforms, which take the setup_context form only.

    Each level lowers to the public function, so that levels nest (grad of vmap, vmap of grad).
    The backward is the differentiable expression: torch.func.grad always asks for it.
    """

    @staticmethod
    def forward(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
        return fused_linear(x, weight, bias, residual, activation)

    @staticmethod
    def setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
        x, weight, bias, _, activation = inputs
        ctx.code = act.CODES[activation]
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual, _ = ctx.needs_input_grad
        needs = (need_x, need_weight, need_bias)
        gx, gw, gb = _expression(grad, x, weight, bias, ctx.code, needs)
        return gx, gw, gb, grad if need_residual else None, None

    @staticmethod
    def vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
        if in_dims[1] is None and in_dims[2] is None:
            return _fold(fused_linear, args, in_dims, info.batch_size), 0
        return _batched(args, args[4], in_dims, info.batch_size)[0], 0


def _vmap(info, in_dims, *args):  # type: ignore[no-untyped-def]
    if in_dims[1] is None and in_dims[2] is None:
        return _fold(_forward, args, in_dims, info.batch_size), 0
    return _batched(args, act.NAMES[args[4]], in_dims, info.batch_size)[0], 0


def _vmap_with_preact(info, in_dims, *args):  # type: ignore[no-untyped-def]
    if in_dims[1] is None and in_dims[2] is None:
        return _fold(_forward_with_preact, args, in_dims, info.batch_size), (0, 0)
    return _batched(args, act.NAMES[args[4]], in_dims, info.batch_size), (0, 0)


def _vmap_backward(info, in_dims, grad, x, weight, preact, code, *needs):  # type: ignore[no-untyped-def]
    *dims, _, _, _, _ = in_dims
    one = lambda *t: _serve_backward(*t, act.NAMES[code], *needs)  # type: ignore[call-arg]  # noqa: E731
    return torch.vmap(one, in_dims=tuple(dims))(grad, x, weight, preact), (0, 0, 0)


# --- dispatch ------------------------------------------------------------------------------
# The CPU kernels register themselves (csrc/cpu/fused_linear.cpp).


def _cuda(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
    if not targets.serves(x.dtype, x.device, "fused_linear"):
        return _serve(x, weight, bias, residual, activation)
    check(x, weight, bias, residual, activation)
    return _triton.forward(x, weight, bias, residual, activation, False)[0]


def _cuda_with_preact(x, weight, bias, residual, activation):  # type: ignore[no-untyped-def]
    if not targets.serves(x.dtype, x.device, "fused_linear"):
        return _serve_with_preact(x, weight, bias, residual, activation)
    check(x, weight, bias, residual, activation)
    return _triton.forward(x, weight, bias, residual, activation, True)


def _cuda_backward(grad, x, weight, preact, activation, *needs):  # type: ignore[no-untyped-def]
    if not targets.serves(x.dtype, x.device, "fused_linear"):
        return _serve_backward(grad, x, weight, preact, activation, *needs)
    return _triton.backward(grad, x, weight, preact, activation, *needs)


register(_forward, fake=_fake, backward=_raw_backward, setup=_setup, vmap=_vmap, cuda=_cuda)
register(
    _forward_with_preact,
    fake=_fake_with_preact,
    backward=_preact_backward,
    setup=_setup_preact,
    vmap=_vmap_with_preact,
    cuda=_cuda_with_preact,
)
register(
    _backward,
    fake=_fake_backward,
    backward=_double_backward,
    setup=_setup_backward,
    vmap=_vmap_backward,
    cuda=_cuda_backward,
)


@serves("fused_linear")
def _explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    device: str | None = None,
) -> Choice:
    check(x, weight, bias, residual, activation)
    n, k = weight.shape
    m = x.numel() // k if k else 0
    target = device or ("cpu" if x.device.type == "meta" else x.device.type)
    if target == "cpu":
        if machine.extension is None:
            return Choice.of("fused_linear", "reference.fused_linear", machine.extension_error)
        kernel, reason = machine.extension.choose_fused_linear(m, n, k, checks.short(x.dtype))
        return Choice.of("fused_linear", kernel, reason)
    why = targets.why_not(x.dtype, target, "fused_linear")
    if why:
        return Choice.of("fused_linear", "reference.fused_linear", why)
    kernel, config, reason = _triton.explain(target, x.dtype, m, n, k, activation)
    return Choice.of("fused_linear", kernel, reason, config)


# --- public function -----------------------------------------------------------------------


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ weight.T + bias) + residual`` in one op, with gradients of every order.

    Args:
        x: ``[.., K]``; float32, bfloat16, float16 or float64, any strides.
        weight: ``[N, K]``, or ``[2N, K]`` for a gated pair (rows ``0:N`` gate, then up).
        bias: ``[N]`` (``[2N]`` for a gated pair), or None.
        residual: ``[.., N]``, the shape of the result, or None.
        activation: none, relu, relu2, gelu (erf), gelu_tanh, silu, sigmoid, tanh, or a gated
            pair ``act(gate) * up``: swiglu, geglu, geglu_tanh, reglu (arXiv 2002.05202).

    Returns:
        ``[.., N]`` in x's dtype; sums and epilogue are held in float32 for bf16 and fp16. Under
        `torch.autocast` all arguments are cast to the autocast dtype first.

    Raises:
        ValueError: unknown activation, or shapes or devices that do not fit.
        TypeError: a dtype that is not served, or dtypes that differ.
    """
    try:
        device_type = x.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            x, weight, bias, residual = autocast(device_type, x, weight, bias, residual)  # type: ignore[assignment]
        code = act.CODES[activation]
        if torch.compiler.is_compiling():
            if code != act.NONE and torch.is_grad_enabled():
                return _forward_with_preact(x, weight, bias, residual, code)[0]
            return _forward(x, weight, bias, residual, code)
        # Under functorch `requires_grad` of the wrapped tensors says nothing: ask this first.
        if torch._C._are_functorch_transforms_active():
            return _FusedLinearFunctorch.apply(x, weight, bias, residual, activation)  # type: ignore[no-any-return]
        if torch.is_grad_enabled() and (
            weight.requires_grad
            or x.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            return _FusedLinear.apply(x, weight, bias, residual, code)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            return _forward(x, weight, bias, residual, code)
    except (RuntimeError, AttributeError, TypeError, KeyError):
        # The kernel checks its arguments; only a refused call pays for naming what is wrong.
        act.check_name(activation)
        if not torch.compiler.is_compiling():
            checks.tensors(x=x, weight=weight, bias=bias, residual=residual)
            check(x, weight, bias, residual, activation)
        raise
