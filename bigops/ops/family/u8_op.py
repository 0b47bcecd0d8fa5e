"""u8 between layers: the forms of quantized_linear and sparse_linear that read and give u8.

Qparams are a float32 tensor [2], scale and zero point: u8 numbers q stand for
``scale * (q - zero_point)``. An op takes ``(x, *arguments, [x_qparams], y_qparams, bias, residual,
activation)``, the qparams that its weight does not hold. It is for inference: u8 has no gradient,
and an input that asks for one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format
from bigops.ops import targets
from bigops.ops.choice import Choice
from bigops.ops.family.call import Call
from bigops.ops.family.inference_op import InferenceOp
from bigops.ops.family.linear_op import LinearOp
from bigops.ops.targets import Target


class U8Call(NamedTuple):
    """A call of a `U8Op`."""

    call: Call
    x_qparams: Tensor | None  # of the op, or the weight's own
    y_qparams: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: u8 by y_qparams, else x's where that is floating, else bias's."""
        return torch.uint8 if self.y_qparams is not None else self.floating

    @property
    def floating(self) -> torch.dtype:
        """dtype of bias and residual."""
        x, _, bias, residual, _ = self.call
        if x.dtype != torch.uint8:
            return x.dtype
        given = bias if bias is not None else residual
        return torch.float32 if given is None else given.dtype


class U8Op(InferenceOp):
    """Defines ``<name>_u8``, the form of a linear op that reads and gives u8, and applies it.

    Args:
        op: the linear op; its product takes ``Call`` and the qparams of x.
        qparams: those besides the weight, in order: ``("y_qparams",)`` where the weight holds
            those of x, ``("x_qparams", "y_qparams")`` where it does not.
        choose: ``choose(call, target)``: what serves a call there.
    """

    def __init__(
        self, op: LinearOp, qparams: tuple[str, ...], choose: Callable[[U8Call, Target], Choice]
    ) -> None:
        self.qparams, self.choose = qparams, choose
        op.u8 = self
        super().__init__(op, "u8", behind=", ".join(f"Tensor? {name}" for name in qparams))

    def of(self, weight: Format, /, **named: Any) -> U8Call:
        """A call with this weight of the arguments by name."""
        call = Call(named["x"], weight, named["bias"], named["residual"], named["activation"])
        return self._given(call, named.get("x_qparams"), named["y_qparams"])

    def _given(self, call: Call, x_qparams: Tensor | None, y_qparams: Tensor | None) -> U8Call:
        """The call with the qparams of x that counts: the op's, or the weight's own."""
        if "x_qparams" not in self.qparams:
            x_qparams = getattr(call.weight, "x_qparams", None)
        return U8Call(call, x_qparams, y_qparams)

    # checks ---------------------------------------------------------------------------------

    def check(self, given: U8Call) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came.

        What the qparams hold is asked in `check_values`: fake tensors hold nothing.
        """
        (x, _, bias, residual, _), floating = given.call, given.floating
        quantises = self._quantises(given)
        if x.dtype == torch.uint8:
            if not (quantises and given.x_qparams is not None):
                raise TypeError(
                    f"x: expected a floating dtype, since {self._why_floating(given)}; got uint8"
                )
            if bias is not None:
                checks.floating("bias", bias, quantize.SERVED)
            if residual is not None:
                checks.floating("residual", residual, quantize.SERVED)
                checks.dtype("residual", residual, floating)
            x = x.new_empty(x.shape, dtype=floating)  # the others are held to this dtype
        elif "x_qparams" in self.qparams and given.x_qparams is not None and not quantises:
            raise ValueError("x_qparams: expected None with floating values; got a tensor")
        given.call._replace(x=x).check()
        for name, qparams in (("x_qparams", given.x_qparams), ("y_qparams", given.y_qparams)):
            if qparams is not None:
                quantize.check_qparams_form(name, qparams)
                checks.device(name, qparams, x)

    def explain(
        self, call: Call, x_qparams: Tensor | None, y_qparams: Tensor | None, target: Target
    ) -> Choice:
        """What serves a call with qparams or a u8 x, which is checked first."""
        given = self._given(call, x_qparams, y_qparams)
        self.check(given)
        if not targets.is_cpu(target):
            targets.why_not(given.floating, target, self.op.name)  # it refuses what is no device
        return self.choose(given, target)

    def _quantises(self, given: U8Call) -> bool:
        """Whether x may be u8: a weight that holds the qparams of x has them with "static" only."""
        weight = given.call.weight
        return weight.rounds and ("x_qparams" in self.qparams or given.x_qparams is not None)

    def _why_floating(self, given: U8Call) -> str:
        if self._quantises(given):
            return "there is no x_qparams"
        if "x_qparams" in self.qparams:
            return "the weight has floating values"
        return "the weight's activations are not 'static'"

    def check_values(self, given: U8Call) -> None:
        """Raise ValueError unless the qparams hold a scale and a zero point."""
        for name, qparams in (("x_qparams", given.x_qparams), ("y_qparams", given.y_qparams)):
            if qparams is not None and qparams.numel() == 2:
                quantize.check_qparams(name, qparams)

    def __call__(
        self,
        x: Tensor,
        arguments: tuple[Any, ...],
        k: int,
        qparams: tuple[Tensor | None, ...],
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        """Run the op; ``arguments`` and ``k`` of the weight, ``qparams`` as the schema has them."""
        return self.apply(x, (), arguments, k, qparams, bias, residual, activation)

    # reference ------------------------------------------------------------------------------

    def reference(self, given: U8Call) -> Tensor:
        """The meaning of the op in plain torch."""
        call, x_qparams, y_qparams = given
        seen = None if x_qparams is None else quantize.act_quant(call.x, "static", x_qparams)
        y = call.finish(call.biased(self.op.product(call, seen)))
        if y_qparams is not None:
            return quantize.quantize_u8(y, y_qparams)
        return y.to(given.dtype)
