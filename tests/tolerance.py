"""The one numerics rule of the project; no test picks a tolerance of its own.

For every element of an output or gradient::

    |out - ref64| <= 2 * max|plain - ref64| + C[accumulation dtype] * eps * scale

``ref64`` is the float64 truth on the same, already rounded inputs; ``plain`` is what plain torch
gives in the same dtype; ``scale`` bounds the magnitude that rounding acts on, for a linear op
``(|x| |W|^T + |bias| + |residual|)`` times the activation's Lipschitz bound. eps is that of the
dtype the result is stored in: it is rounded there at least once.
"""

from __future__ import annotations

import torch
from torch import Tensor

# One constant per accumulation dtype. Sums of K terms err by about sqrt(K) * eps / 2 in practice;
# float32 sums of up to 4096 terms stay below 32 * eps * scale, float64 likewise. A bf16 or fp16
# result accumulated in float32 is rounded at most four times in its own dtype (pre-activation,
# activation, residual, store).
C = {torch.float64: 32.0, torch.float32: 32.0, torch.bfloat16: 4.0, torch.float16: 4.0}

# Lipschitz bounds of the activations, used for `scale`. relu2 is not Lipschitz: callers pass the
# largest slope on their data through `slope`.
LIPSCHITZ = {
    "none": 1.0,
    "relu": 1.0,
    "gelu": 1.13,
    "gelu_tanh": 1.13,
    "silu": 1.1,
    "sigmoid": 0.25,
    "tanh": 1.0,
}


def bound(ref64: Tensor, plain: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Largest allowed ``|out - ref64|``, elementwise (float64)."""
    eps = torch.finfo(dtype).eps
    scale64 = torch.as_tensor(scale, dtype=torch.float64)
    plain_error = (plain.double() - ref64).abs()
    worst = plain_error.max() if plain_error.numel() else torch.zeros((), dtype=torch.float64)
    return 2 * worst + C[dtype] * eps * scale64


def check(
    out: Tensor,
    ref64: Tensor,
    plain: Tensor,
    scale: Tensor | float,
    *,
    what: str = "output",
) -> None:
    """Hold ``out`` to the rule; raise AssertionError that names the worst element.

    Args:
        out: result of the kernel under test; its dtype sets eps and the constant.
        ref64: float64 truth, same shape.
        plain: plain torch in ``out``'s dtype, same shape.
        scale: elementwise error scale, broadcastable to ``out``.
        what: name used in the message.
    """
    assert ref64.dtype == torch.float64, f"{what}: the reference must be float64"
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)} != {tuple(ref64.shape)}"
    assert plain.shape == ref64.shape, f"{what}: plain has shape {tuple(plain.shape)}"
    assert plain.dtype == out.dtype, f"{what}: dtype {out.dtype}, plain torch gives {plain.dtype}"
    if out.numel() == 0:
        return
    out, plain, ref64 = out.detach(), plain.detach(), ref64.detach()
    nan = ref64.isnan()
    assert torch.equal(out.isnan(), nan), f"{what}: NaN at other places than the reference"
    if nan.all():
        return
    out, plain, ref64 = out.double()[~nan], plain[~nan], ref64[~nan]
    if isinstance(scale, Tensor):
        scale = scale.detach().double().expand(nan.shape)[~nan]
    allowed = bound(ref64, plain, scale, plain.dtype)
    error = (out - ref64).abs()
    error = torch.where(out == ref64, torch.zeros_like(error), error)  # inf == inf
    worst = int((error - allowed).argmax())
    allowed = allowed.expand_as(error)
    assert bool((error <= allowed).all()), (
        f"{what}: element {worst} is {out[worst].item():.9g}, float64 says "
        f"{ref64[worst].item():.9g}; error {error[worst].item():.3g} > allowed "
        f"{allowed[worst].item():.3g} ({int((error > allowed).sum())} of {error.numel()} too far)"
    )


def snr_db(out: Tensor, ref: Tensor) -> float:
    """Signal-to-noise ratio of ``out`` against ``ref`` in dB (for quantised formats)."""
    ref, out = ref.double(), out.double()
    noise = (out - ref).pow(2).sum()
    return float(10 * torch.log10(ref.pow(2).sum() / noise.clamp_min(1e-300)))
