"""What the forms of a linear op for u8 share: no gradient, and a way past autograd.

u8 has no gradient: an input that asks for one is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import Format
from bigops.ops import activation as act
from bigops.ops.family.linear_op import LinearOp, fields_of
from bigops.ops.library import autocast, define, encoder, register


class InferenceOp:
    """Defines ``<name of the op>_<suffix>`` and applies it.

    In the library it takes ``(x, *ahead, *arguments of the format, *behind, bias, residual,
    activation)``.

    Args:
        op: the linear op.
        suffix: of its name.
        ahead, behind: schemas of what a call has besides those of the op.
    """

    def __init__(self, op: LinearOp, suffix: str, *, ahead: str = "", behind: str = "") -> None:
        self.op, self.name = op, f"{op.name}_{suffix}"
        self.ahead, self.behind = fields_of(ahead), fields_of(behind)
        own = (*self.ahead, *op.fields, *self.behind)
        self.arguments = ("x", *own, "bias", "residual", "activation")
        parts = ("Tensor x", ahead, op.format.SCHEMA, behind, "Tensor? bias, Tensor? residual")
        given = ", ".join(part for part in parts if part)
        self.forward = define(f"{self.name}({given}, str activation) -> Tensor", self._serve)
        self._words = self.forward._overloadpacket.default
        self._encoded = encoder(self.forward)
        register(
            self.forward,
            fake=self._fake,
            backward=self._refused,
            setup=self._setup,
            vmap=self._vmap,
        )

    def call(self, *args: Any) -> Any:
        """The arguments of the op in words as an object."""
        named = dict(zip(self.arguments, args, strict=True))
        fields = (named[field] for field in self.op.fields)
        return self.of(self.op.weight(named["x"], *fields), **named)

    def of(self, weight: Format, /, **named: Any) -> Any:
        """A call with this weight of the arguments by name."""
        raise NotImplementedError

    def check(self, given: Any) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came."""
        raise NotImplementedError

    def check_values(self, given: Any) -> None:
        """The same for what tensors hold besides x and the weight; fake ones hold nothing."""

    def reference(self, given: Any) -> Tensor:
        """The meaning of the op in plain torch."""
        raise NotImplementedError

    def _serve(self, *args: Any) -> Tensor:
        given = self.call(*args)
        self.check(given)
        given.call.weight.check_structure()
        self.check_values(given)
        backend.note(f"reference.{self.name}")
        return self.reference(given)

    def _fake(self, *args: Any) -> Tensor:
        given = self.call(*args)
        self.check(given)
        x = given.call.x
        return x.new_empty((*x.shape[:-1], given.call.weight.n), dtype=given.dtype)

    # no gradient ----------------------------------------------------------------------------

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        for name, need in zip(self.arguments, ctx.needs_input_grad, strict=True):
            if need:
                self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient, since u8 has none (call under "
            f"torch.no_grad(), or {self.op.name} in floating point); got one with requires_grad"
        )

    def _refused(self, ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("the forward refused")

    # vmap, dispatch -------------------------------------------------------------------------

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return self.op.fold(self.forward, args, in_dims, info.batch_size), 0

    def apply(
        self,
        x: Tensor,
        ahead: Sequence[Tensor],
        arguments: tuple[Any, ...],
        k: int,
        behind: Sequence[Tensor | None],
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        """Run the op; ``arguments`` and ``k`` of the weight, the others as its schema has them."""
        try:
            if not isinstance(x, Tensor) and torch._C._has_torch_function_unary(x):  # fx's proxies
                return self._words(x, *ahead, *arguments, *behind, bias, residual, activation)
            device_type = x.device.type
            if device_type != "meta" and torch.is_autocast_enabled(device_type):
                x, bias, residual = autocast(device_type, x, bias, residual)  # type: ignore[assignment]
            args = (x, *ahead, *arguments, *behind, bias, residual, activation)
            if checks.differ(x.shape[-1], k):
                raise TypeError  # it is named below
            if torch.is_grad_enabled():
                for name, t in zip(self.arguments, args, strict=True):
                    if isinstance(t, Tensor) and t.requires_grad:
                        self._refuse(name)
            coded = self._encoded(args)
            if (
                torch.compiler.is_compiling()
                or torch._C._are_functorch_transforms_active()
                or forward_ad._current_level >= 0
            ):
                return self.forward(*coded)
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return self.forward(*coded)
        except (RuntimeError, AttributeError, TypeError, KeyError, IndexError):
            # The kernel checks its arguments; only a refused call pays for naming what is wrong.
            act.check_name(activation, gated=False)
            if not torch.compiler.is_compiling():
                named: dict[str, Tensor | None] = dict(zip(self.ahead, ahead, strict=True))
                named |= dict(zip(self.behind, behind, strict=True))
                checks.tensors(x=x, bias=bias, residual=residual, **named)
                more = {"x": x, "bias": bias, "residual": residual, "activation": activation}
                given = self.of(self.op.stored(k, arguments), **named, **more)
                self.check(given)
                self.check_values(given)
            raise
