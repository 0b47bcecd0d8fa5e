"""Random cases of `low_rank_linear`, their float64 truth and error scales.

The magnitudes go through the op as in linear.py, with one more product on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats.dense import Factors
from bigops.ops.family import Call
from tests.support.cases.linear import act, curvature, offset, slope
from tests.support.tolerance import check

NAMES = ("x", "u", "v", "bias", "residual", "base")


@dataclass
class LowRankCase:
    """Inputs of one call: x [.., K], u [N, r], v [r, K], base [N, K], and dL/dy."""

    inputs: tuple[Tensor | None, ...]  # as NAMES says
    grad: Tensor
    name: str
    scale: float

    @property
    def call(self) -> Call:
        """The call as an op of the family takes it."""
        x, u, v, bias, residual, base = self.inputs
        assert x is not None
        assert u is not None
        assert v is not None
        return Call(x, Factors(u, v, base, self.scale), bias, residual, self.name)

    def leaves(self) -> list[Tensor | None]:
        """Fresh copies of the inputs that require gradients."""
        return [None if t is None else t.detach().clone().requires_grad_() for t in self.inputs]

    @torch.enable_grad()  # type: ignore[untyped-decorator]
    def plain(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        """(y, gradients of all inputs) by torch autograd in ``dtype``."""
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self.inputs]
        x, u, v, bias, residual, base = leaves
        assert x is not None
        assert u is not None
        assert v is not None
        z = F.linear(F.linear(x, v) * self.scale, u, bias)
        if base is not None:
            z = z + F.linear(x, base)
        y = act(self.name, z)
        if residual is not None:
            y = y + residual
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, wanted, self.grad.to(dtype)))
        return y.detach(), [None if t is None else next(found) for t in leaves]

    def carried(self, sums: bool) -> tuple[Tensor, list[Tensor | None]]:
        """What reaches y and each gradient: magnitudes of all terms, or the root of the squares
        of what is rounded when t, z and their gradients are stored."""
        x, u, v, bias, residual, base = (
            None if t is None else t.detach().double() for t in self.inputs
        )
        assert x is not None
        assert u is not None
        assert v is not None

        def product(a: Tensor, b: Tensor) -> Tensor:  # a [.., K] times b [K, N]
            return a.abs() @ b.abs() if sums else (a**2 @ b**2).sqrt()

        factor = abs(self.scale)
        t = x.abs() @ v.abs().t() * factor if sums else (x @ v.t()).abs() * factor
        low = product(t, u.t())
        z = F.linear(F.linear(x, v) * self.scale, u, bias)
        z = z if base is None else z + F.linear(x, base)
        z_error = low if sums else low + z.abs() + (x @ v.t() * factor @ u.t()).abs()
        if sums and bias is not None:
            z_error = z_error + bias.abs()
        if sums and base is not None:
            z_error = z_error + product(x, base.t())
        steep, grad = slope(self.name, z), self.grad.double().abs()
        y_error = steep * z_error + offset(self.name)
        if residual is not None:
            y_error = y_error + residual.abs()
        gz = grad if self.name == "none" else grad * (steep + curvature(self.name) * z_error)
        gz2, x2, t2 = gz.flatten(0, -2), x.flatten(0, -2), t.flatten(0, -2)
        gt = product(gz, u) * factor
        gx = product(gt, v)
        gx = gx if base is None else gx + product(gz, base)
        ones = torch.ones(1, gz2.shape[0], dtype=torch.float64)
        return y_error, [
            gx,
            product(gz2.t(), t2),
            product(gt.flatten(0, -2).t(), x2),
            None if bias is None else product(ones, gz2)[0],
            None if residual is None else grad,
            None if base is None else product(gz2.t(), x2),
        ]

    def check_forward(self, y: Tensor, what: str = "y") -> None:
        x = self.inputs[0]
        assert x is not None
        truth, plain = self.plain(torch.float64)[0], self.plain(x.dtype)[0]
        scale, rounding = self.carried(True)[0], self.carried(False)[0]
        check(y, truth, plain, scale, rounding=rounding, what=f"{self.name} {what}")

    def check_gradients(self, grads: Sequence[Tensor | None], what: str = "") -> None:
        """Gradients in the order of NAMES; None where there is no input."""
        x = self.inputs[0]
        assert x is not None
        truth, plain = self.plain(torch.float64)[1], self.plain(x.dtype)[1]
        scales, roundings = self.carried(True)[1], self.carried(False)[1]
        for name, got, ref, base, scale, rounding in zip(
            NAMES, grads, truth, plain, scales, roundings, strict=True
        ):
            label = f"{self.name} {what} gradient of {name}"
            if ref is None:
                assert got is None, f"{label}: came for an input that is not there"
                continue
            assert got is not None, f"{label}: None"
            assert base is not None
            assert scale is not None
            assert rounding is not None
            check(got, ref, base, scale, rounding=rounding, what=label)


def make(
    lead: int | Sequence[int],
    n: int,
    k: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    name: str = "none",
    *,
    base: bool = False,
    extras: bool = True,
    scale: float = 1.0,
) -> LowRankCase:
    """A case with x of [*lead, K]; factors scaled so that z is of order one."""
    lead = [lead] if isinstance(lead, int) else list(lead)
    return LowRankCase(
        (
            torch.randn(*lead, k).to(dtype),
            (torch.randn(n, rank) / max(rank, 1) ** 0.5).to(dtype),
            (torch.randn(rank, k) / max(k, 1) ** 0.5).to(dtype),
            torch.randn(n).to(dtype) if extras else None,
            torch.randn(*lead, n).to(dtype) if extras else None,
            (torch.randn(n, k) / max(k, 1) ** 0.5).to(dtype) if base else None,
        ),
        torch.randn(*lead, n).to(dtype),
        name,
        scale,
    )
