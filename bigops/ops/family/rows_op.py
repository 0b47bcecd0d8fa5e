"""Quantised rows as x: the forms of quantized_linear and sparse_linear behind `act_quant`.

Several products that read one x (q, k and v; gate and up) quantise it once. An op takes ``(x,
x_scale, x_zero_point, *arguments, bias, residual, activation)``, x the u8 values. For inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops.formats import checks, quantize
from bigops.formats.base import Format
from bigops.formats.quantize import QuantizedRows
from bigops.ops import targets
from bigops.ops.choice import Choice
from bigops.ops.family.call import Call
from bigops.ops.family.inference_op import InferenceOp
from bigops.ops.family.linear_op import LinearOp
from bigops.ops.targets import Target


class RowsCall(NamedTuple):
    """A call of a `RowsOp`; ``call.x`` is the u8 values."""

    call: Call
    x_scale: Tensor  # [..]
    x_zero_point: Tensor  # [..]

    @property
    def dtype(self) -> torch.dtype:
        """Of bias, residual and result."""
        given = self.call.bias if self.call.bias is not None else self.call.residual
        return torch.float32 if given is None else given.dtype


class RowsOp(InferenceOp):
    """Defines ``<name>_rows``, the form of a linear op whose x is `QuantizedRows`, and applies it.

    Args:
        op: the linear op; its product takes ``Call`` and the rows.
        choose: ``choose(call, target)``: what serves a call there.
    """

    def __init__(self, op: LinearOp, choose: Callable[[RowsCall, Target], Choice]) -> None:
        self.choose = choose
        op.rows = self
        super().__init__(op, "rows", ahead="Tensor x_scale, Tensor x_zero_point")

    def run(
        self,
        x: QuantizedRows,
        arguments: tuple[Any, ...],
        k: int,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        *qparams: Tensor | None,
    ) -> Tensor:
        """The op on rows; ``qparams`` of the public call, which says them of other forms of x."""
        self._no_qparams(qparams)
        values, scale, zero_point = x
        more = (scale, zero_point)
        return self.apply(values, more, arguments, k, (), bias, residual, activation)

    @staticmethod
    def _no_qparams(qparams: tuple[Tensor | None, ...]) -> None:
        if any(given is not None for given in qparams):
            raise ValueError("x_qparams, y_qparams: expected None with QuantizedRows; got a tensor")

    def of(self, weight: Format, /, **named: Any) -> RowsCall:
        """A call with this weight of the arguments by name."""
        call = Call(named["x"], weight, named["bias"], named["residual"], named["activation"])
        return RowsCall(call, named["x_scale"], named["x_zero_point"])

    def check(self, given: RowsCall) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came."""
        x, weight, bias, residual, _ = given.call
        checks.dtype("x", x, torch.uint8)
        if not weight.takes_rows:
            raise TypeError(
                "x: expected a floating dtype, since this weight does not quantise each row of x "
                "at run time; got QuantizedRows"
            )
        for name, t, dtype in (
            ("x_scale", given.x_scale, torch.float32),
            ("x_zero_point", given.x_zero_point, torch.int32),
        ):
            checks.tensor(name, t)
            checks.dtype(name, t, dtype)
            checks.shape(name, t, [*x.shape[:-1]])
            checks.device(name, t, x)
        if bias is not None:
            checks.floating("bias", bias, quantize.SERVED)
        if residual is not None:
            checks.floating("residual", residual, quantize.SERVED)
            checks.dtype("residual", residual, given.dtype)
        given.call._replace(x=x.new_empty(x.shape, dtype=given.dtype)).check()

    def explain(
        self,
        x: QuantizedRows,
        weight: Any,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        qparams: tuple[Tensor | None, ...],
        target: Target,
    ) -> Choice:
        """What serves a call, which is checked first."""
        self._no_qparams(qparams)
        call = Call(x.values, weight, bias, residual, activation)
        given = RowsCall(call, x.scale, x.zero_point)
        self.check(given)
        if not targets.is_cpu(target):
            targets.why_not(given.dtype, target, self.op.name)  # it refuses what is no device
        return self.choose(given, target)

    def reference(self, given: RowsCall) -> Tensor:
        """The meaning of the op in plain torch."""
        call = given.call
        seen = quantize.Rows(
            call.x.float(), given.x_scale.unsqueeze(-1), given.x_zero_point.float().unsqueeze(-1)
        )
        return call.finish(call.biased(self.op.product(call, seen))).to(given.dtype)
