"""Random cases of a dense linear op, their float64 truth and error scales, for every test file.

`Case.check_forward` and `Case.check_gradients` hold a result to tests/support/tolerance.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigops.formats.dense import DenseWeight
from bigops.ops.family import Call
from tests.support.tolerance import LIPSCHITZ, check

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
PLAIN = ("none", "relu", "relu2", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
ACTIVATIONS = (*PLAIN, *GATED)
CURVATURE = 1.2  # largest |act''| among the smooth activations (gelu at 0: 0.8; relu2: 2, below)


def act(name: str, z: Tensor) -> Tensor:
    """The epilogue in torch's own functions: independent of bigops.ops.activation."""
    if name in GATED:
        gate, up = z.chunk(2, dim=-1)
        return act(GATED[name], gate) * up
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda t: t,
        "relu": F.relu,
        "relu2": lambda t: F.relu(t).square(),
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "silu": F.silu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
    }
    return table[name](z)


def slope(name: str, z: Tensor) -> Tensor:
    """A bound of |act'| on the data, plus what the activation adds at 0 (sigmoid: 0.5)."""
    if name == "relu2":
        return 2 * z.abs() + 1
    return torch.full_like(z, LIPSCHITZ[name])


def offset(name: str) -> float:
    return 0.5 if name == "sigmoid" else 0.0


def curvature(name: str) -> float:
    return 2.0 if name == "relu2" else CURVATURE


@dataclass
class Case:
    """Inputs of one call: x [.., K], weight [N, K] or [2N, K], and dL/dy."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    grad: Tensor
    name: str

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.x, self.weight, self.bias, self.residual

    @property
    def call(self) -> Call:
        """The call as an op of the family takes it."""
        return Call(self.x, DenseWeight(self.weight), self.bias, self.residual, self.name)

    def leaves(self) -> list[Tensor | None]:
        """Fresh copies of the inputs that require gradients."""
        return [None if t is None else t.detach().clone().requires_grad_() for t in self.inputs]

    # truth ---------------------------------------------------------------------------------

    def plain(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        """(y, gradients of x, weight, bias, residual) by torch autograd in ``dtype``."""
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in self.inputs]
        x, weight, bias, residual = leaves
        assert x is not None
        assert weight is not None
        y = act(self.name, F.linear(x, weight, bias))
        if residual is not None:
            y = y + residual
        wanted = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, wanted, self.grad.to(dtype)))
        return y.detach(), [None if t is None else next(found) for t in leaves]

    def scales(self) -> tuple[Tensor, list[Tensor | None]]:
        """Error scales of y and of each gradient, float64."""
        return self._carry(sums=True)

    def roundings(self) -> tuple[Tensor, list[Tensor | None]]:
        """What a stored z and its stored gradient carry into y and each gradient, float64."""
        return self._carry(sums=False)

    def _carry(self, sums: bool) -> tuple[Tensor, list[Tensor | None]]:
        """Magnitudes through the op: the sum of all terms, or the root of their squares.

        With `sums` z starts from |x| |W|^T + |bias|, what its sum acts on; else from |z|, what
        is rounded when z is stored.
        """
        x, weight = self.x.double(), self.weight.double()
        bias = None if self.bias is None else self.bias.double()
        z = F.linear(x, weight, bias)
        z_error = z.abs()
        if sums:
            z_error = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
        grad = self.grad.double().abs()
        if self.name in GATED:
            inner = GATED[self.name]
            (gate, up), (gate_error, up_error) = z.chunk(2, -1), z_error.chunk(2, -1)
            steep, value = slope(inner, gate), act(inner, gate).abs()
            y_error = steep * gate_error * up.abs() + value * up_error
            gate_grad = up.abs() * (steep + curvature(inner) * gate_error) + steep * up_error
            gz = torch.cat([grad * gate_grad, grad * (value + steep * gate_error)], -1)
        else:
            steep = slope(self.name, z)
            y_error = steep * z_error + offset(self.name)
            gz = grad if self.name == "none" else grad * (steep + curvature(self.name) * z_error)
        if self.residual is not None:
            y_error = y_error + self.residual.double().abs()
        gz2 = gz.flatten(0, -2) if gz.dim() > 1 else gz.unsqueeze(0)
        x2 = x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)
        if sums:
            products = gz @ weight.abs(), gz2.t() @ x2.abs(), gz2.sum(0)
        else:
            squares = gz**2 @ weight**2, (gz2**2).t() @ x2**2, (gz2**2).sum(0)
            products = squares[0].sqrt(), squares[1].sqrt(), squares[2].sqrt()
        return y_error, [
            *products[:2],
            None if bias is None else products[2],
            None if self.residual is None else grad,
        ]

    # checks --------------------------------------------------------------------------------

    def check_forward(self, y: Tensor, what: str = "y") -> None:
        check(
            y,
            self.plain(torch.float64)[0],
            self.plain(self.x.dtype)[0],
            self.scales()[0],
            rounding=self.roundings()[0],
            what=f"{self.name} {what}",
        )

    def check_gradients(self, grads: Sequence[Tensor | None], what: str = "") -> None:
        """Gradients of x, weight, bias, residual, in that order; None where there is no input."""
        truth, plain = self.plain(torch.float64)[1], self.plain(self.x.dtype)[1]
        names = ("x", "weight", "bias", "residual")
        for name, got, ref, base, scale, rounding in zip(
            names, grads, truth, plain, self.scales()[1], self.roundings()[1], strict=True
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
    dtype: torch.dtype = torch.float32,
    name: str = "none",
    *,
    bias: bool = True,
    residual: bool = True,
) -> Case:
    """A case with x of [*lead, K]; weights scaled so that z is of order one."""
    lead = [lead] if isinstance(lead, int) else list(lead)
    rows = 2 * n if name in GATED else n
    return Case(
        torch.randn(*lead, k).to(dtype),
        (torch.randn(rows, k) / max(k, 1) ** 0.5).to(dtype),
        torch.randn(rows).to(dtype) if bias else None,
        torch.randn(*lead, n).to(dtype) if residual else None,
        torch.randn(*lead, n).to(dtype),
        name,
    )
