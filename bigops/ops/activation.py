"""Activations of the epilogue: names, integer codes shared by C++ and Triton, reference math.

A gated pair ``act(g) * u`` takes a weight of ``[2N, K]``: rows ``0:N`` make the gate g, rows
``N:2N`` the up projection u (GLU variants: Shazeer 2020, arXiv 2002.05202).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The position is the code that kernels see (csrc/common, kernels/common/activation.py) and saved
# programs hold: append only.
NAMES = (
    "none",
    "relu",
    "relu2",
    "gelu",
    "gelu_tanh",
    "silu",
    "sigmoid",
    "tanh",
    "swiglu",
    "geglu",
    "geglu_tanh",
    "reglu",
)
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
ACTIVATIONS = tuple(name for name in NAMES if name not in GATED)
CODES = {name: code for code, name in enumerate(NAMES)}
NONE = CODES["none"]

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def check_name(activation: str, gated: bool = True) -> None:
    """Raise ValueError unless ``activation`` is known (and not gated where that is not served)."""
    names = NAMES if gated else ACTIVATIONS
    if activation not in names:
        raise ValueError(f"activation: expected one of {', '.join(names)}; got {activation!r}")


def apply(activation: str, z: Tensor) -> Tensor:
    """``act(z)`` of a name in ACTIVATIONS; differentiable, any dtype and shape."""
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "relu2":
        return F.relu(z).square()
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    if activation == "sigmoid":
        return torch.sigmoid(z)
    assert activation == "tanh", activation
    return torch.tanh(z)


def derivative(activation: str, z: Tensor) -> Tensor:
    """``d act / dz`` of a name in ACTIVATIONS, itself differentiable (for double backward)."""
    if activation == "none":
        return torch.ones_like(z)
    if activation == "relu":
        return torch.where(z <= 0, torch.zeros_like(z), torch.ones_like(z))
    if activation == "relu2":
        return 2 * F.relu(z)
    if activation == "gelu":
        cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return cdf + z * _INV_SQRT_2PI * torch.exp(-0.5 * z * z)
    if activation == "gelu_tanh":
        near = z.clamp(-10, 10)  # t is -1 or 1 there already: 0 meets no overflowing power of z
        t = torch.tanh(_SQRT_2_OVER_PI * (near + 0.044715 * near**3))
        inner = _SQRT_2_OVER_PI * (1 + 0.134145 * near * near)
        return 0.5 * (1 + t) + 0.5 * z * ((1 - t * t) * inner)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "sigmoid":
        s = torch.sigmoid(z)
        return s * (1 - s)
    assert activation == "tanh", activation
    return 1 - torch.tanh(z).square()


def epilogue(activation: str, z: Tensor) -> Tensor:
    """``act(z)``, or ``act(g) * u`` where the last dimension of z is ``[g | u]``."""
    if activation in GATED:
        gate, up = z.chunk(2, dim=-1)
        return apply(GATED[activation], gate) * up
    return apply(activation, z)


def epilogue_backward(activation: str, grad: Tensor, z: Tensor) -> Tensor:
    """Gradient of ``epilogue`` for z, as a differentiable expression. Shape of z."""
    if activation in GATED:
        gate, up = z.chunk(2, dim=-1)
        inner = GATED[activation]
        grad_gate = grad * up * derivative(inner, gate)
        return torch.cat([grad_gate, grad * apply(inner, gate)], dim=-1)
    return grad if activation == "none" else grad * derivative(activation, z)
