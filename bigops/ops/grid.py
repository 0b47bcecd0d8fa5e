"""u8 between layers: the twins of quantized_linear and sparse_linear that read and give u8.

A grid is a float32 tensor [2], scale and zero point: u8 numbers q stand for
``scale * (q - zero_point)``. An op takes ``(x, *storage, *sizes, [x_grid], y_grid, bias, residual,
activation)``, the grids that its storage does not hold. It is for inference: u8 has no gradient,
and an input that asks for one is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks, quantize
from bigops.ops import activation as act
from bigops.ops.family import FrozenLinear
from bigops.ops.library import autocast, define, encoder, in_words, register


def result_dtype(
    x: Tensor, y_grid: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> torch.dtype:
    """dtype of the result: u8 with a y_grid, else x's where that is floating, else bias's."""
    return torch.uint8 if y_grid is not None else _floating(x, bias, residual)


def _floating(x: Tensor, bias: Tensor | None, residual: Tensor | None) -> torch.dtype:
    if x.dtype != torch.uint8:
        return x.dtype
    given = bias if bias is not None else residual
    return torch.float32 if given is None else given.dtype


class GridLinear:
    """Defines the twin ``<name>_grid`` of a compressed linear op, and applies it.

    Args:
        road: the op that it is a twin of.
        grids: the grids besides the storage, in order: ``("y_grid",)`` where the storage holds that
            of x, ``("x_grid", "y_grid")`` where it does not.
        compute: ``compute(x, *storage, *sizes, x_grid, bias, residual, activation) -> [.., N]``
            float32, what the reference of the op is before it rounds its result.
        quantises: ``quantises(*storage, *sizes)``: whether x may be u8.
    """

    def __init__(
        self,
        road: FrozenLinear,
        grids: tuple[str, ...],
        compute: Callable[..., Tensor],
        quantises: Callable[..., bool],
    ) -> None:
        self.road, self.compute, self.quantises = road, compute, quantises
        self.name = f"{road.name}_grid"
        self.grids = grids
        self.fixed = road.fixed
        schema = ", ".join(f"Tensor? {grid}" for grid in grids)
        self.forward = define(
            f"{self.name}(Tensor x, {road.schema}, {schema}, Tensor? bias, Tensor? residual, "
            "str activation) -> Tensor",
            self._serve,
        )
        self._encoded = encoder(self.forward)
        register(
            self.forward,
            fake=self._fake,
            backward=self._refused,
            setup=self._setup,
            vmap=self._vmap,
        )

    # arguments ------------------------------------------------------------------------------

    def _split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Tensor | None]]:
        """Storage with sizes, and the grids by name (x_grid wherever it is kept)."""
        fixed = args[1 : 1 + self.fixed]
        named = dict(zip(self.road.storage, fixed, strict=False))
        given = dict(zip(self.grids, args[1 + self.fixed :], strict=False))
        return fixed, {"x_grid": given.get("x_grid", named.get("x_grid")),
                       "y_grid": given["y_grid"]}  # fmt: skip

    def _named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """The tensors by name."""
        grids = args[1 + self.fixed : -3]
        return {
            "x": args[0],
            **dict(zip(self.road.storage, args[1:], strict=False)),
            **dict(zip(self.grids, grids, strict=True)),
            "bias": args[-3],
            "residual": args[-2],
        }

    def check(self, *args: Any) -> None:
        """Raise ValueError or TypeError naming the argument, what was expected and what came.

        What the grids hold is asked in `check_values`: fake tensors hold nothing.
        """
        x, (bias, residual, activation) = args[0], args[-3:]
        fixed, grids = self._split(args)
        if x.dtype == torch.uint8:
            if not (self.quantises(*fixed) and grids["x_grid"] is not None):
                raise TypeError(
                    f"x: expected a floating dtype, since {self._why_floating(*fixed)}; got uint8"
                )
            dtype = _floating(x, bias, residual)
            if bias is not None:
                checks.floating("bias", bias, quantize.SERVED)
            if residual is not None:
                checks.floating("residual", residual, quantize.SERVED)
                checks.dtype("residual", residual, dtype)
            x = x.new_empty(x.shape, dtype=dtype)  # the other arguments are held to this dtype
        elif "x_grid" in self.grids and grids["x_grid"] is not None and not self.quantises(*fixed):
            raise ValueError("x_grid: expected None with floating values; got a tensor")
        self.road.check(x, *fixed, bias, residual, activation)
        for name, grid in grids.items():
            if grid is not None:
                quantize.check_grid_form(name, grid)
                checks.device(name, grid, x)

    def _why_floating(self, *fixed: Any) -> str:
        if self.quantises(*fixed):
            return "there is no x_grid"
        if "x_grid" in self.grids:
            return "the weight has floating values"
        return "the weight's activations are not 'static'"

    def check_values(self, *args: Any) -> None:
        """Raise ValueError unless the grids hold what a grid is made of."""
        for name, grid in self._split(args)[1].items():
            if grid is not None and grid.numel() == 2:
                quantize.check_grid(name, grid)

    # reference, fake ------------------------------------------------------------------------

    def reference(self, *args: Any) -> Tensor:
        """The meaning of the op in plain torch."""
        x, (bias, residual, activation) = args[0], args[-3:]
        fixed, grids = self._split(args)
        y = self.compute(x, *fixed, grids["x_grid"], bias, residual, activation)
        if grids["y_grid"] is not None:
            return quantize.to_grid(y, grids["y_grid"])
        return y.to(result_dtype(x, None, bias, residual))

    def _serve(self, *args: Any) -> Tensor:
        self.check(*args)
        self.check_values(*args)
        backend.note(f"reference.{self.name}")
        return self.reference(*args)

    def _fake(self, *args: Any) -> Tensor:
        self.check(*args)
        x, fixed = args[0], args[1 : 1 + self.fixed]
        dtype = result_dtype(x, self._split(args)[1]["y_grid"], args[-3], args[-2])
        return x.new_empty((*x.shape[:-1], self.road.rows(x, *fixed)), dtype=dtype)

    # no gradient ----------------------------------------------------------------------------

    def _setup(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        names = iter(self._named(inputs))
        for value, need in zip(inputs, ctx.needs_input_grad, strict=True):
            name = next(names) if isinstance(value, Tensor | None) else ""
            if need:
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient, since u8 has none (call under "
            f"torch.no_grad(), or {self.road.name} in floating point); got one with requires_grad"
        )

    def _refused(self, ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("the forward refused")

    # vmap, dispatch -------------------------------------------------------------------------

    def _vmap(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if info.batch_size == 0:
            one = [
                a if d is None else a.new_empty(a.shape[:d] + a.shape[d + 1 :])
                for a, d in zip(args, in_dims, strict=True)
            ]
            y = in_words(self.forward, self._fake)(*one)
            return y.new_empty((0, *y.shape)), 0
        return self.road._fold(self.forward, args, in_dims, info.batch_size), 0

    def apply(self, x: Tensor, *rest: Any) -> Tensor:
        """Run the op by the road that the caller's context needs."""
        try:
            *fixed, bias, residual, activation = rest
            device_type = x.device.type
            if torch.is_autocast_enabled(device_type):  # storage keeps its own dtypes
                x, bias, residual = autocast(device_type, x, bias, residual)  # type: ignore[assignment]
                rest = (*fixed, bias, residual, activation)
            if torch.is_grad_enabled():
                for name, t in self._named((x, *rest)).items():
                    if t is not None and t.requires_grad:
                        self._refuse(name)
            coded = self._encoded((x, *rest))
            if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
                return self.forward(*coded)
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward(*coded)
        except (RuntimeError, AttributeError, TypeError, KeyError):
            # The kernel checks its arguments; only a refused call pays for naming what is wrong.
            act.check_name(rest[-1], gated=False)
            if not torch.compiler.is_compiling():
                checks.tensors(**self._named((x, *rest)))
                self.check(x, *rest)
                self.check_values(x, *rest)
            raise
