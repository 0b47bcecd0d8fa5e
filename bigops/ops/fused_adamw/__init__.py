"""fused_adamw, fused_sgd, fused_grad_norm: an optimiser step over many tensors in two passes.

Schema, reference, fake, autograd, dispatch, public function, in that order. Pass 1
(`fused_grad_norm`) reads the gradients once: their norm, which is inf or NaN where one of them is.
Pass 2 unscales, clips, updates and writes the low-precision copy. Both mutate in place what their
schema marks, and bump its version counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.backend import machine
from bigops.formats import checks
from bigops.ops import targets
from bigops.ops.explain import Explanation, serves
from bigops.ops.fused_adamw import cuda as _cuda
from bigops.ops.fused_adamw import lists, states
from bigops.ops.library import LIB, define
from bigops.ops.linear_cross_entropy import triton as _triton_loss

# --- reference -----------------------------------------------------------------------------


def reference_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, summed in float64."""
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    for grad in grads:
        total = total + grad.double().square().sum()
    return total.sqrt()


def _read(state: Tensor, scales: Tensor | None, signed: bool) -> Tensor:
    return state.clone() if scales is None else states.decode(state, scales, signed)


def _write(state: Tensor, scales: Tensor | None, value: Tensor, signed: bool) -> None:
    if scales is None:
        state.copy_(value)
    else:
        codes, new = states.encode(value, signed)
        state.copy_(codes)
        scales.copy_(new)


def _write_parameter(
    param: Tensor, value: Tensor, copy: Tensor | None, random: tuple[int, int, int] | None
) -> None:
    if random is not None and param.dtype == torch.bfloat16:
        seed, stream, step = random
        param.copy_(states.round_stochastic(value, seed, stream, step))
    else:
        param.copy_(value)
    if copy is not None:
        copy.copy_(value)


def reference_adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    exp_avg_scale: Tensor | None,
    exp_avg_sq_scale: Tensor | None,
    copy: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_factor: float,
    random: tuple[int, int, int] | None = None,
) -> None:
    """One tensor's AdamW step in plain torch, in place (arXiv 1711.05101, algorithm 2).

    ``random`` is (seed, stream, step) of stochastic rounding, or None for to nearest.
    """
    step += 1
    n = float(step)
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    g = grad.to(wide) * grad_factor
    m = _read(exp_avg, exp_avg_scale, True)
    v = _read(exp_avg_sq, exp_avg_sq_scale, False)
    m = m + (1 - beta1) * (g - m)
    v = v * beta2 + ((1 - beta2) * g) * g  # g * g is inf past 1.8e19, where v still has room
    denominator = v.sqrt() * (1 / math.sqrt(1 - beta2**n)) + eps
    p = param.to(wide) * (1 - lr * weight_decay) - lr / (1 - beta1**n) * (m / denominator)
    _write(exp_avg, exp_avg_scale, m, True)
    _write(exp_avg_sq, exp_avg_sq_scale, v, False)
    _write_parameter(param, p, copy, random)


def reference_sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    momentum_scale: Tensor | None,
    copy: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first_step: bool,
    grad_factor: float,
    random: tuple[int, int, int] | None = None,
) -> None:
    """One tensor's SGD step in plain torch, in place; the update of torch.optim.SGD."""
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    p = param.to(wide)
    g = grad.to(wide) * grad_factor
    if weight_decay != 0:
        g = g + weight_decay * p
    if momentum != 0:
        assert momentum_buffer is not None
        m = g
        if not first_step:
            m = momentum * _read(momentum_buffer, momentum_scale, True) + (1 - dampening) * g
        g = g + momentum * m if nesterov else m
        _write(momentum_buffer, momentum_scale, m, True)
    _write_parameter(param, p - lr * g, copy, random)


def _pick(tensors: Sequence[Tensor], i: int) -> Tensor | None:
    """The i-th tensor of an optional list; a list may be empty, and hold empty tensors."""
    return tensors[i] if len(tensors) and tensors[i].numel() else None


def _scale(scales: Sequence[Tensor], held: Sequence[Tensor], i: int) -> Tensor | None:
    """Scales of the i-th state; None where it holds floats, as that of a float64 parameter does."""
    coded = len(held) and held[i].dtype == torch.uint8
    return _pick(scales, i) if coded else None


def _random(streams: Sequence[int], i: int, seed: int, step: int) -> tuple[int, int, int] | None:
    return (seed, streams[i], step) if len(streams) else None


def _serve_adamw(  # type: ignore[no-untyped-def]
    params, grads, exp_avgs, exp_avg_sqs, steps, exp_avg_scales, exp_avg_sq_scales, copies,
    lr, beta1, beta2, eps, weight_decay, maximize, grad_factor, streams, seed, rounding_step,
):  # fmt: skip
    backend.note("reference.fused_adamw")
    for i, param in enumerate(params):
        reference_adamw(
            param, grads[i], exp_avgs[i], exp_avg_sqs[i], steps[i],
            _scale(exp_avg_scales, exp_avgs, i), _scale(exp_avg_sq_scales, exp_avg_sqs, i),
            _pick(copies, i),
            lr, beta1, beta2, eps, weight_decay, -grad_factor if maximize else grad_factor,
            _random(streams, i, seed, rounding_step),
        )  # fmt: skip


def _serve_sgd(  # type: ignore[no-untyped-def]
    params, grads, momentum_buffers, momentum_scales, copies,
    lr, momentum, dampening, weight_decay, nesterov, first_step, maximize, grad_factor,
    streams, seed, rounding_step,
):  # fmt: skip
    backend.note("reference.fused_sgd")
    for i, param in enumerate(params):
        reference_sgd(
            param, grads[i], momentum_buffers[i] if len(momentum_buffers) else None,
            _scale(momentum_scales, momentum_buffers, i), _pick(copies, i),
            lr, momentum, dampening, weight_decay, nesterov, first_step,
            -grad_factor if maximize else grad_factor, _random(streams, i, seed, rounding_step),
        )  # fmt: skip


def _serve_norm(grads):  # type: ignore[no-untyped-def]
    backend.note("reference.fused_grad_norm")
    return reference_norm(grads)


# --- schema --------------------------------------------------------------------------------

_ROUNDING = "int[] streams, int seed, int rounding_step) -> ()"
_adamw = define(
    "fused_adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] exp_avg_scales, "
    "Tensor(f!)[] exp_avg_sq_scales, Tensor(g!)[] copies, float lr, float beta1, float beta2, "
    "float eps, float weight_decay, bool maximize, float grad_factor, " + _ROUNDING,
    _serve_adamw,
)
_sgd = define(
    "fused_sgd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] momentum_scales, Tensor(d!)[] copies, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool first_step, bool maximize, "
    "float grad_factor, " + _ROUNDING,
    _serve_sgd,
)
_norm = define("fused_grad_norm(Tensor[] grads) -> Tensor", _serve_norm)


# --- fake ----------------------------------------------------------------------------------


@torch.library.register_fake("bigops::fused_adamw", lib=LIB)
@torch.library.register_fake("bigops::fused_sgd", lib=LIB)
def _fake_step(*args):  # type: ignore[no-untyped-def]
    return None


@torch.library.register_fake("bigops::fused_grad_norm", lib=LIB)
def _fake_norm(grads):  # type: ignore[no-untyped-def]
    device = grads[0].device if grads else "cpu"
    return torch.empty((), dtype=torch.float64, device=device)


# --- autograd ------------------------------------------------------------------------------
# A step has no gradient: where a graph would be recorded it is refused, never silently None.


def _refuse(name: str, op: Any) -> None:
    mutated = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None]

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(
            t.requires_grad for a in args if isinstance(a, list | tuple) for t in a
            if isinstance(t, Tensor)
        ):  # fmt: skip
            raise RuntimeError(
                f"{name}: expected a call under torch.no_grad(), since it has no gradient; got "
                "tensors that require grad"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def bump(keyset: Any, *args: Any) -> Any:
        for i in mutated:
            torch.autograd.graph.increment_version(args[i])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    LIB.impl(name, autograd, "Autograd", with_keyset=True)
    if mutated:
        LIB.impl(name, bump, "ADInplaceOrView", with_keyset=True)


def _below_autograd(op: Any, *args: Any) -> None:
    """Call a mutating op past the two keys above, each of which costs a turn of all lists.

    100 tensors: 0.3 ms a step. The version counters are bumped here then.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        op(*args)
        return
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op(*args)
    for argument, value in zip(op._schema.arguments, args, strict=True):
        if argument.alias_info is not None:
            torch.autograd.graph.increment_version(value)


def step_adamw(*args: Any) -> None:
    """The op `fused_adamw` without the checks of the public function; under torch.no_grad()."""
    _below_autograd(_adamw, *args)


def step_sgd(*args: Any) -> None:
    """The op `fused_sgd`, likewise."""
    _below_autograd(_sgd, *args)


for _name, _op in (("fused_adamw", _adamw), ("fused_sgd", _sgd), ("fused_grad_norm", _norm)):
    _refuse(_name, _op)


# --- dispatch ------------------------------------------------------------------------------
# The CPU kernels register themselves (csrc/cpu/fused_adamw.cpp). GPUs take the CUDA C++ kernels
# where built, else Triton's, which also serve SGD; float64 and other devices take the reference.


def _why_not(dtype: torch.dtype, target: targets.Target) -> str:
    return targets.why_not(dtype, target, "fused_linear")  # whose files hold their block


def _cuda_adamw(params, *rest):  # type: ignore[no-untyped-def]
    if _cuda.serves_step(params, rest[3]):
        return _cuda.adamw(params, *rest)
    (_triton_loss.adamw if _triton_loss.serves_step(params) else _serve_adamw)(params, *rest)


def _cuda_sgd(params, *rest):  # type: ignore[no-untyped-def]
    (_triton_loss.sgd if _triton_loss.serves_step(params) else _serve_sgd)(params, *rest)


def _cuda_norm(grads):  # type: ignore[no-untyped-def]
    if _cuda.serves(grads):
        return _cuda.norm(grads)
    serves = len(grads) > 0 and not _why_not(torch.float32, grads[0].device)
    return (_triton_loss.norm if serves else _serve_norm)(grads)


LIB.impl("fused_adamw", _cuda_adamw, "CUDA")
LIB.impl("fused_sgd", _cuda_sgd, "CUDA")
LIB.impl("fused_grad_norm", _cuda_norm, "CUDA")


def _explainer(op: str) -> Callable[..., Explanation]:
    def explain(
        params: Sequence[Tensor], *, eight_bit: bool = False, device: str | None = None
    ) -> Explanation:
        dtype = params[0].dtype if len(params) else torch.float32
        if len(params):
            checks.floating("params[0]", params[0])
        target = device or (params[0].device.type if len(params) else "cpu")
        if target not in ("cpu", "meta"):
            form = "double" if op == "fused_grad_norm" else "8bit" if eight_bit else "fused"
            wide = op == "fused_adamw" and dtype == torch.float64
            if op != "fused_sgd" and not wide and _cuda.serves_on(target):
                name = f"cuda.{op}.{checks.short(dtype)}.{form}"
                return Explanation(op, name, "one launch for 320 tensors of any dtypes")
            why = _why_not(torch.float32 if op == "fused_grad_norm" else dtype, target)
            if why:
                return Explanation(op, f"reference.{op}", why)
            name = f"triton.{op}.{checks.short(dtype)}.{form}"
            return Explanation(op, name, "one launch for all tensors of the same dtypes")
        if machine.extension is None:
            return Explanation(op, f"reference.{op}", machine.extension_error)
        level = machine.extension.isa()
        level = "portable" if dtype == torch.float64 else level.removesuffix("vnni")
        level = level.removesuffix("bf16")
        form = "double" if op == "fused_grad_norm" else "8bit" if eight_bit else "fused"
        name = f"cpu.{level}.{op}.{checks.short(dtype)}.{form}"
        return Explanation(op, name, "one kernel for all sizes; memory binds")

    return explain


for _name in ("fused_adamw", "fused_sgd", "fused_grad_norm"):
    serves(_name)(_explainer(_name))


# --- public function -----------------------------------------------------------------------


@torch.no_grad()
def fused_grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together: pass 1 of a step with clipping or a loss scale.

    Args:
        grads: dense tensors of one device; float32, bfloat16, float16 or float64, mixed freely,
            any strides. May be empty.

    Returns:
        float64, 0-dimensional: inf or NaN exactly where an element is (or where the norm itself
        passes float64). On the CPU summed in float64 over fixed chunks: the same bits at every
        thread count and instruction set.

    Raises:
        ValueError: sparse gradients, or several devices.
        TypeError: a dtype that is not served.
    """
    lists.tensors("grads", grads, grads, checks.FLOATING)
    for i, grad in enumerate(grads):
        if grad.device != grads[0].device:
            raise ValueError(f"grads[{i}]: expected device {grads[0].device}; got {grad.device}")
    if not grads:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return _norm(grads)  # type: ignore[no-any-return]


@torch.no_grad()
def fused_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_factor: float = 1.0,
    exp_avg_scales: Sequence[Tensor] = (),
    exp_avg_sq_scales: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    streams: Sequence[int] = (),
    seed: int = 0,
    rounding_step: int = 0,
    norm: Tensor | None = None,
    clip_norm: float = math.inf,
) -> None:
    """One AdamW step (decoupled weight decay, arXiv 1711.05101) of many tensors, in place.

    Lists hold one tensor for each parameter, of its shape; any strides; empty tensors do nothing.
    The arithmetic is float32, for float64 parameters float64. Nothing changes when it raises.

    Args:
        params: float32, bfloat16, float16 or float64, mixed freely; one device.
        grads: float64 where the parameter is, else float32, bfloat16 or float16.
        exp_avgs, exp_avg_sqs: float32 (float64 for float64 parameters), or uint8 codes of the
            dynamic map (arXiv 2110.02861), contiguous, with ``exp_avg_scales``.
        steps: float32, one element, on the CPU for CPU parameters, elsewhere on the CPU or the
            device of params; incremented here.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        grad_factor: gradients are multiplied by it first: the inverse loss scale times the
            clipping factor.
        exp_avg_scales, exp_avg_sq_scales: float32 ``[ceil(numel / 256)]`` for states of uint8,
            empty tensors for the others; may be left out where no state is uint8.
        copies: bfloat16 or float16, written with the new parameter rounded to nearest (the model's
            weights where params are float32 masters); empty tensors, or left out, for none.
        streams: one number for each parameter: bfloat16 parameters are then rounded
            stochastically by Philox of (seed, stream, rounding_step, element), the same bits at
            every thread count. Left out: to nearest.
        seed, rounding_step: see streams; rounding_step must differ from step to step.
        norm: float64 0-dimensional, `fused_grad_norm` of grads: nothing changes where it is inf or
            NaN. The CUDA C++ kernels read it on the device where steps are there too, so that
            norm and step can be captured in one CUDA graph; others wait for it.
        clip_norm: with norm: grads times grad_factor whose norm is past it are brought down to it,
            as torch.nn.utils.clip_grad_norm_ does.

    Raises:
        ValueError: lists of other lengths, shapes, devices, or sparse tensors; clip_norm not above
            0, or one without a norm.
        TypeError: dtypes that are not served.
    """
    lists.step_lists(params, grads, copies, streams)
    lists.check_norm(norm, clip_norm, params)
    lists.moments("exp_avgs", exp_avgs, exp_avg_scales, params)
    lists.moments("exp_avg_sqs", exp_avg_sqs, exp_avg_sq_scales, params)
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} tensors as params has; got {len(steps)}")
    for i, step in enumerate(steps):
        if step.dtype != torch.float32:
            checks.dtype(f"steps[{i}]", step, torch.float32)
        if step.numel() != 1:
            raise ValueError(f"steps[{i}]: expected one element; got shape {list(step.shape)}")
    for i, (m, v) in enumerate(zip(exp_avgs, exp_avg_sqs, strict=True)):
        if v.dtype != m.dtype:
            checks.dtype(f"exp_avg_sqs[{i}]", v, m.dtype)
    if not params:
        return
    mutated = (params, exp_avgs, exp_avg_sqs, steps, exp_avg_scales, exp_avg_sq_scales, copies)
    options = (lr, *betas, eps, weight_decay, maximize)
    if norm is not None and _cuda.counts(params, steps):
        rest = (*mutated[1:], *options, grad_factor, streams, seed, rounding_step)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            _cuda.adamw(params, grads, *rest, norm=norm, clip_norm=clip_norm)
        for changed in mutated:
            torch.autograd.graph.increment_version(changed)
        return
    if norm is not None:
        if not norm.isfinite():
            return
        grad_factor *= min(1.0, clip_norm / (float(norm) * abs(grad_factor) + 1e-6))
    step_adamw(params, grads, *mutated[1:], *options, grad_factor, streams, seed, rounding_step)


@torch.no_grad()
def fused_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first_step: bool = False,
    maximize: bool = False,
    grad_factor: float = 1.0,
    momentum_scales: Sequence[Tensor] = (),
    copies: Sequence[Tensor] = (),
    streams: Sequence[int] = (),
    seed: int = 0,
    rounding_step: int = 0,
) -> None:
    """One SGD step of many tensors, in place; the update of torch.optim.SGD.

    Args:
        params, grads, maximize, grad_factor, copies, streams, seed, rounding_step: as for
            `fused_adamw`.
        momentum_buffers: float32 (float64 for float64 parameters) or uint8 codes with
            ``momentum_scales``; needed where momentum is not 0.
        lr, momentum, dampening, weight_decay (coupled), nesterov: as in torch.optim.SGD.
        first_step: the buffers hold nothing yet and become the gradient.

    Raises:
        ValueError: lists of other lengths, shapes, devices, or sparse tensors.
        TypeError: dtypes that are not served.
    """
    lists.step_lists(params, grads, copies, streams)
    if momentum != 0 or momentum_buffers:
        lists.moments("momentum_buffers", momentum_buffers, momentum_scales, params)
    if params:
        step_sgd(
            params, grads, momentum_buffers, momentum_scales, copies, lr, momentum, dampening,
            weight_decay, nesterov, first_step, maximize, grad_factor, streams, seed, rounding_step,
        )  # fmt: skip
