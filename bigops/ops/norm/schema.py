"""The ops of norms: schemas, what serves them without a kernel, fakes, vmap; no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.quantize import SERVED
from bigops.ops.codes import code_of
from bigops.ops.library import define, loop, register
from bigops.ops.norm.reference import normed, quantised, summed

Outputs = tuple[Tensor, ...]
TENSORS = ("x", "weight", "bias", "residual")


class Call(NamedTuple):
    """The arguments that all of them share, the kind a word."""

    x: Tensor  # [.., K]
    weight: Tensor | None  # [K]
    bias: Tensor | None  # [K]
    residual: Tensor | None  # [.., K]
    eps: float
    kind: str

    def check(self, needs_residual: bool = False) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came."""
        x, weight, bias, residual, eps, kind = self
        code_of("kind", kind)
        checks.floating("x", x, SERVED)
        if x.dim() == 0:
            raise ValueError("x: expected shape [.., K]; got []")
        for name, t in (("weight", weight), ("bias", bias)):
            if t is not None:
                checks.shape(name, t, [x.shape[-1]])
                checks.floating(name, t, (x.dtype, torch.float32))
                checks.device(name, t, x)
        if weight is not None and bias is not None:
            checks.dtype("bias", bias, weight.dtype)
        if residual is not None:
            checks.shape("residual", residual, x.shape)
            checks.like("residual", residual, x)
        elif needs_residual:
            raise ValueError("residual: expected a tensor, whose sum with x is wanted; got None")
        if not eps >= 0:
            raise ValueError(f"eps: expected a number of at least 0; got {eps}")

    def check_tensors(self) -> None:
        """Raise TypeError for an argument that is no tensor, or a nested one."""
        given = zip(TENSORS, self, strict=False)
        checks.tensors(**{name: t for name, t in given if t is not None or name == "x"})

    def refuse_gradients(self) -> None:
        """Raise RuntimeError where a gradient is asked for."""
        for name, t in zip(TENSORS, self, strict=False):
            if isinstance(t, Tensor) and t.requires_grad:
                raise RuntimeError(no_gradient(name))


def no_gradient(name: str) -> str:
    """Why an argument that asks for a gradient is refused."""
    return (
        f"{name}: norm is for inference only and has no gradient; call it under torch.no_grad(), "
        "or torch.nn.functional.layer_norm or rms_norm where one is wanted; got a tensor with "
        "requires_grad"
    )


class Form:
    """One of the ops.

    Args:
        name: of the op.
        results: the type that it returns, as in a schema.
        serve: ``serve(call, *flags)`` by the reference.
        fake: ``fake(call, *flags)``.
        keeps_sum: ``keeps_sum(*flags)``: whether the sum with the residual is asked for.
        kept: ``kept(*flags)``: of each result, whether it is given; empty tensors stand for the
            others.
        flags: the names of its arguments besides those of a `Call`, bools.
    """

    def __init__(
        self,
        name: str,
        results: str,
        serve: Callable[..., Any],
        fake: Callable[..., Any],
        keeps_sum: Callable[..., bool],
        kept: Callable[..., tuple[bool, ...]],
        flags: tuple[str, ...] = (),
    ) -> None:
        self.name, self.flags = name, flags
        self.keeps_sum, self.kept = keeps_sum, kept
        self._serve, self._fake = serve, fake
        self.op = define(
            f"{name}(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
            f"str kind{''.join(f', bool {flag}' for flag in flags)}) -> {results}",
            self._by_reference,
        )
        self.words = self.op._overloadpacket.default
        register(
            self.op,
            fake=self._faked,
            backward=self._refused,
            setup=self._setup,
            vmap=self._vmap,
            expression=self._forward_mode,
        )

    def check(self, *args: Any) -> tuple[Call, tuple[Any, ...]]:
        """The arguments, checked, as a call and flags."""
        x, weight, bias, residual, eps, kind, *flags = args
        call = Call(x, weight, bias, residual, eps, kind)
        call.check(self.keeps_sum(*flags))
        return call, tuple(flags)

    def _by_reference(self, *args: Any) -> Any:
        call, flags = self.check(*args)
        backend.note(f"reference.{self.name}")
        return self._serve(call, *flags)

    def _faked(self, *args: Any) -> Any:
        call, flags = self.check(*args)
        return self._fake(call, *flags)

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        for name, need in zip(TENSORS, ctx.needs_input_grad, strict=False):
            if need:
                raise RuntimeError(no_gradient(name))

    def _refused(self, ctx: Any, *grads: Any) -> Any:
        raise AssertionError("the forward refused")

    def _forward_mode(self, *args: Any) -> Any:
        raise RuntimeError(no_gradient("a tensor with a tangent"))

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Rows are independent: a batch of x and residual is more rows of one call."""
        x, weight, bias, residual, *others = args
        x_dim, weight_dim, bias_dim, residual_dim, *_ = in_dims

        def front(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            return t.movedim(dim, 0) if dim is not None else t.expand(info.batch_size, *t.shape)

        if weight_dim is None and bias_dim is None:
            parts = front(x, x_dim), weight, bias, front(residual, residual_dim)
            found = self.op(*parts, *others)
        else:
            found = loop(self.op, args, in_dims, info.batch_size)
        if isinstance(found, Tensor):
            return found, 0
        # what is not kept is an empty tensor, to which more rows give no batch
        return found, tuple(None if t.dim() == 1 and not t.numel() else 0 for t in found)


def _norm(call: Call) -> Tensor:
    _, weight, bias, _, eps, kind = call
    return normed(summed(call.x, call.residual), weight, bias, eps, kind).to(call.x.dtype)


def _norm_with_sum(call: Call) -> Outputs:
    _, weight, bias, _, eps, kind = call
    v = summed(call.x, call.residual)
    return normed(v, weight, bias, eps, kind).to(call.x.dtype), v.to(call.x.dtype)


def _norm_act_quant(call: Call, symmetric: bool, keep_float: bool, keep_sum: bool) -> Outputs:
    x, weight, bias, residual, eps, kind = call
    v = summed(x, residual)
    y = normed(v, weight, bias, eps, kind)
    kept = y.to(x.dtype) if keep_float else x.new_empty(0)
    return *quantised(y, symmetric), kept, v.to(x.dtype) if keep_sum else x.new_empty(0)


def _fake(call: Call) -> Tensor:
    return call.x.new_empty(call.x.shape)


def _fake_with_sum(call: Call) -> Outputs:
    return _fake(call), _fake(call)


def _fake_act_quant(call: Call, symmetric: bool, keep_float: bool, keep_sum: bool) -> Outputs:
    x, rows = call.x, call.x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
        _fake(call) if keep_float else x.new_empty(0),
        _fake(call) if keep_sum else x.new_empty(0),
    )


NORM = Form("norm", "Tensor", _norm, _fake, lambda: False, lambda: (True,))
WITH_SUM = Form(
    "norm_with_sum",
    "(Tensor, Tensor)",
    _norm_with_sum,
    _fake_with_sum,
    lambda: True,
    lambda: (True, True),
)
ACT_QUANT = Form(
    "norm_act_quant",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm_act_quant,
    _fake_act_quant,
    lambda symmetric, keep_float, keep_sum: keep_sum,
    lambda symmetric, keep_float, keep_sum: (True, True, True, keep_float, keep_sum),
    ("symmetric", "keep_float", "keep_sum"),
)
