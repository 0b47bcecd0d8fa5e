"""act_quant: rows of activations to u8, once for all products that read them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks, quantize
from bigops.formats.quantize import QuantizedRows
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.explain import serves
from bigops.ops.library import define, register

__all__ = ["QuantizedRows", "act_quant"]
NAME = "act_quant"


def choose(x: Tensor, symmetric: bool, target: targets.Target) -> Choice:
    """The kernel that serves a call on ``target``; csrc/cpu/act_quant.cpp registers itself."""
    if not targets.is_cpu(target):
        targets.why_not(x.dtype, target, NAME)  # it refuses what is no device
        return reference(NAME, "no GPU kernel by itself; plain torch serves")
    given = (checks.short(x.dtype), symmetric)
    return on_cpu(NAME, lambda extension: extension.choose_act_quant(*given))


@serves(NAME)
def _explain(x: Tensor, symmetric: bool = False, device: str | None = None) -> Choice:
    _check(x)
    return choose(x, symmetric, targets.named(device, x))


def _check(x: Tensor) -> None:
    checks.tensor("x", x)
    checks.floating("x", x, quantize.SERVED)
    if x.dim() == 0:
        raise ValueError("x: expected shape [.., K]; got []")


def _serve(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    backend.note(f"reference.{NAME}")
    rows = quantize.act_quant(x, "symmetric" if symmetric else "dynamic")
    scale, zero_point = rows.scale.squeeze(-1), rows.zero_point.squeeze(-1)
    return rows.q.to(torch.uint8), scale.contiguous(), zero_point.to(torch.int32)


def _fake(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    _check(x)
    lead = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(lead, dtype=torch.float32),
        x.new_empty(lead, dtype=torch.int32),
    )


def _refuse() -> NoReturn:
    raise ValueError(
        "x: expected a tensor that needs no gradient, since u8 has none (call under "
        "torch.no_grad()); got one with requires_grad"
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    if ctx.needs_input_grad[0]:
        _refuse()


def _refused(ctx: Any, *grads: Tensor) -> NoReturn:
    raise AssertionError("the forward refused")


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, symmetric: bool) -> tuple[Any, Any]:
    return op(x.movedim(in_dims[0], 0), symmetric), (0, 0, 0)  # rows are independent


op = define("act_quant(Tensor x, bool symmetric) -> (Tensor, Tensor, Tensor)", _serve)
register(op, fake=_fake, backward=_refused, setup=_setup, vmap=_vmap)


def act_quant(x: Tensor, symmetric: bool = False) -> QuantizedRows:
    """Quantise each row of x to u8, so that several products read it without doing it again.

    The same numbers as `quantized_linear` and `sparse_linear` make of a floating x: the range of
    each row with 0 in it, rounded to the nearest, half to even. For inference.

    Args:
        x: ``[.., K]``; float32, bfloat16 or float16, any strides.
        symmetric: the largest magnitude of a row becomes 127 and the zero point 128, in place of
            its range.

    Returns:
        `QuantizedRows`: values ``[.., K]`` uint8, scale ``[..]`` float32, zero_point ``[..]``
        int32; x is about ``scale * (values - zero_point)``. A row with NaN or inf has the scale
        NaN, and products give a row of NaN.

    Raises:
        ValueError: x has no dimension, or requires a gradient.
        TypeError: a dtype that is not served.
    """
    if not isinstance(x, Tensor) and torch.overrides.has_torch_function_unary(x):  # of torch.fx
        values, scale, zero_point = (op._overloadpacket(x, symmetric)[i] for i in range(3))
        return QuantizedRows(values, scale, zero_point)
    _check(x)
    if torch.is_grad_enabled() and x.requires_grad:
        _refuse()
    return QuantizedRows(*op(x, symmetric))
