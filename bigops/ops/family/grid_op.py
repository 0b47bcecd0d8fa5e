"""u8 between layers: the twins of quantized_linear and sparse_linear that read and give u8.

A grid is a float32 tensor [2], scale and zero point: u8 numbers q stand for
``scale * (q - zero_point)``. An op takes ``(x, *arguments, [x_grid], y_grid, bias, residual,
activation)``, the grids that its weight does not hold. It is for inference: u8 has no gradient,
and an input that asks for one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks, quantize
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.choice import Choice
from bigops.ops.family.call import Call
from bigops.ops.family.linear_op import LinearOp
from bigops.ops.library import autocast, define, encoder, register
from bigops.ops.targets import Target


class GridCall(NamedTuple):
    """A call of a `GridOp`."""

    call: Call
    x_grid: Tensor | None  # of the op, or the weight's own
    y_grid: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the result: u8 with a y_grid, else x's where that is floating, else bias's."""
        return torch.uint8 if self.y_grid is not None else self.floating

    @property
    def floating(self) -> torch.dtype:
        """dtype of bias and residual."""
        x, _, bias, residual, _ = self.call
        if x.dtype != torch.uint8:
            return x.dtype
        given = bias if bias is not None else residual
        return torch.float32 if given is None else given.dtype


class GridOp:
    """Defines the twin ``<name>_grid`` of a linear op, and applies it.

    Args:
        op: the op that it is a twin of; its product takes ``Call`` and the grid of x.
        grids: the grids besides the weight, in order: ``("y_grid",)`` where the weight holds that
            of x, ``("x_grid", "y_grid")`` where it does not.
        choose: ``choose(call, target)``: what serves a call there.
    """

    def __init__(
        self, op: LinearOp, grids: tuple[str, ...], choose: Callable[[GridCall, Target], Choice]
    ) -> None:
        self.op, self.grids, self.choose = op, grids, choose
        op.twin = self
        self.name = f"{op.name}_grid"
        self.arguments = ("x", *op.fields, *grids, "bias", "residual", "activation")
        self.forward = define(
            f"{self.name}(Tensor x, {op.format.SCHEMA}, "
            f"{', '.join(f'Tensor? {grid}' for grid in grids)}, Tensor? bias, Tensor? residual, "
            "str activation) -> Tensor",
            self._serve,
        )
        self._words = self.forward._overloadpacket.default
        self._encoded = encoder(self.forward)
        register(
            self.forward,
            fake=self._fake,
            backward=self._refused,
            setup=self._setup,
            vmap=self._vmap,
        )

    def call(self, *args: Any) -> GridCall:
        """The arguments of the op in words as an object."""
        named = dict(zip(self.arguments, args, strict=True))
        weight = self.op.weight(named["x"], *(named[field] for field in self.op.fields))
        call = Call(named["x"], weight, *(named[n] for n in ("bias", "residual", "activation")))
        return self._given(call, named.get("x_grid"), named["y_grid"])

    def _given(self, call: Call, x_grid: Tensor | None, y_grid: Tensor | None) -> GridCall:
        """The call with the grid of x that counts: the op's, or the weight's own."""
        if "x_grid" not in self.grids:
            x_grid = getattr(call.weight, "x_grid", None)
        return GridCall(call, x_grid, y_grid)

    # checks ---------------------------------------------------------------------------------

    def check(self, given: GridCall) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came.

        What the grids hold is asked in `check_values`: fake tensors hold nothing.
        """
        (x, _, bias, residual, _), floating = given.call, given.floating
        quantises = self._quantises(given)
        if x.dtype == torch.uint8:
            if not (quantises and given.x_grid is not None):
                raise TypeError(
                    f"x: expected a floating dtype, since {self._why_floating(given)}; got uint8"
                )
            if bias is not None:
                checks.floating("bias", bias, quantize.SERVED)
            if residual is not None:
                checks.floating("residual", residual, quantize.SERVED)
                checks.dtype("residual", residual, floating)
            x = x.new_empty(x.shape, dtype=floating)  # the others are held to this dtype
        elif "x_grid" in self.grids and given.x_grid is not None and not quantises:
            raise ValueError("x_grid: expected None with floating values; got a tensor")
        given.call._replace(x=x).check()
        for name, grid in (("x_grid", given.x_grid), ("y_grid", given.y_grid)):
            if grid is not None:
                quantize.check_grid_form(name, grid)
                checks.device(name, grid, x)

    def explain(
        self, call: Call, x_grid: Tensor | None, y_grid: Tensor | None, target: Target
    ) -> Choice:
        """What serves a call with a grid or a u8 x, which is checked first."""
        given = self._given(call, x_grid, y_grid)
        self.check(given)
        if not targets.is_cpu(target):
            targets.why_not(given.floating, target, self.op.name)  # it refuses what is no device
        return self.choose(given, target)

    def _quantises(self, given: GridCall) -> bool:
        """Whether x may be u8: a weight that holds the grid of x has one with "static" only."""
        weight = given.call.weight
        return weight.rounds and ("x_grid" in self.grids or given.x_grid is not None)

    def _why_floating(self, given: GridCall) -> str:
        if self._quantises(given):
            return "there is no x_grid"
        if "x_grid" in self.grids:
            return "the weight has floating values"
        return "the weight's activations are not 'static'"

    def check_values(self, given: GridCall) -> None:
        """Raise ValueError unless the grids hold what a grid is made of."""
        for name, grid in (("x_grid", given.x_grid), ("y_grid", given.y_grid)):
            if grid is not None and grid.numel() == 2:
                quantize.check_grid(name, grid)

    # reference, fake ------------------------------------------------------------------------

    def reference(self, given: GridCall) -> Tensor:
        """The meaning of the op in plain torch."""
        y = given.call.finish(given.call.biased(self.op.product(given.call, given.x_grid)))
        if given.y_grid is not None:
            return quantize.to_grid(y, given.y_grid)
        return y.to(given.dtype)

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

    def _refuse(self, name: str) -> None:
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient, since u8 has none (call under "
            f"torch.no_grad(), or {self.op.name} in floating point); got one with requires_grad"
        )

    def _refused(self, ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("the forward refused")

    # vmap, dispatch -------------------------------------------------------------------------

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        return self.op.fold(self.forward, args, in_dims, info.batch_size), 0

    def __call__(
        self,
        x: Tensor,
        arguments: tuple[Any, ...],
        k: int,
        grids: tuple[Tensor | None, ...],
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        """Run the op; ``arguments`` and ``k`` of the weight, ``grids`` as the schema has them."""
        try:
            if not isinstance(x, Tensor) and torch._C._has_torch_function_unary(x):  # fx's proxies
                return self._words(x, *arguments, *grids, bias, residual, activation)
            device_type = x.device.type
            if device_type != "meta" and torch.is_autocast_enabled(device_type):
                x, bias, residual = autocast(device_type, x, bias, residual)  # type: ignore[assignment]
            if x.shape[-1] != k:
                raise TypeError  # it is named below
            args = (x, *arguments, *grids, bias, residual, activation)
            if torch.is_grad_enabled():
                for name, t in zip(self.arguments, args, strict=True):
                    if isinstance(t, Tensor) and t.requires_grad:
                        self._refuse(name)
            coded = self._encoded(args)
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                return self.forward(*coded)
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(*coded)
        except (RuntimeError, AttributeError, TypeError, KeyError, IndexError):
            # The kernel checks its arguments; only a refused call pays for naming what is wrong.
            act.check_name(activation, gated=False)
            if not torch.compiler.is_compiling():
                named = dict(zip(self.grids, grids, strict=True))
                checks.tensors(x=x, bias=bias, residual=residual, **named)
                weight = self.op.stored(k, arguments)
                call = Call(x, weight, bias, residual, activation)
                given = self._given(call, named.get("x_grid"), named["y_grid"])
                self.check(given)
                self.check_values(given)
            raise
