"""The one numerics rule of the project; no test picks a tolerance of its own.

For every element of an output or gradient::

    |out - ref64| <= 2 * max|plain - ref64| + C * eps(accumulation) * scale
                     + eps(storage) * (|ref64| + 2 * rounding)

``ref64`` is the float64 truth on the same, already rounded inputs; ``plain`` is what plain torch
gives in the same dtype; ``scale`` bounds the magnitude that the sum acts on, for a linear op
``(|x| |W|^T + |bias| + |residual|)`` times the activation's Lipschitz bound. The last line is for
16-bit results: they are rounded where they are stored (once at least: |ref64|), and values that
are stored on the way (a pre-activation, its gradient) enter by ``rounding``, the root sum of
squares of what they carry into the result. A 16-bit sum held in 16 bits does not pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

# dtype of the result -> dtype that sums are held in
ACCUMULATION = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
# One constant per accumulation dtype: sums of K terms err by about sqrt(K) * eps / 2 in practice,
# and those of up to 4096 terms stay below 32 * eps * scale.
C = {torch.float64: 32.0, torch.float32: 32.0}

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


def bound(
    ref64: Tensor, plain: Tensor, scale: Tensor | float, rounding: Tensor | float = 0.0
) -> Tensor:
    """Largest allowed ``|out - ref64|``, elementwise (float64)."""
    accumulation = ACCUMULATION[plain.dtype]
    plain_error = (plain.double() - ref64).abs()
    worst = plain_error.max() if plain_error.numel() else torch.zeros((), dtype=torch.float64)
    scale64 = torch.as_tensor(scale, dtype=torch.float64)
    allowed = 2 * worst + C[accumulation] * torch.finfo(accumulation).eps * scale64
    if plain.dtype != accumulation:
        stored = ref64.abs() + 2 * torch.as_tensor(rounding, dtype=torch.float64)
        allowed = allowed + torch.finfo(plain.dtype).eps * stored
    return allowed


def check(
    out: Tensor,
    ref64: Tensor,
    plain: Tensor,
    scale: Tensor | float,
    *,
    rounding: Tensor | float = 0.0,
    what: str = "output",
) -> None:
    """Hold ``out`` to the rule; raise AssertionError that names the worst element.

    Args:
        out: result of the kernel under test; its dtype sets both eps and the constant.
        ref64: float64 truth, same shape.
        plain: plain torch in ``out``'s dtype, same shape.
        scale: elementwise error scale, broadcastable to ``out``.
        rounding: what stored intermediates carry into the result, broadcastable to ``out``.
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

    def chosen(value: Tensor | float) -> Tensor:
        wide = torch.as_tensor(value, dtype=torch.float64, device=nan.device)
        return wide.detach().expand(nan.shape)[~nan]

    allowed = bound(ref64, plain, chosen(scale), chosen(rounding))
    error = (out - ref64).abs()
    error = torch.where(out == ref64, torch.zeros_like(error), error)  # inf == inf
    worst = int((error - allowed).argmax())
    allowed = allowed.expand_as(error)
    assert bool((error <= allowed).all()), (
        f"{what}: element {worst} is {out[worst].item():.9g}, float64 says "
        f"{ref64[worst].item():.9g}; error {error[worst].item():.3g} > allowed "
        f"{allowed[worst].item():.3g} ({int((error > allowed).sum())} of {error.numel()} too far)"
    )


def check_rms(out: Tensor, ref64: Tensor, plain: Tensor, what: str = "output") -> None:
    """Hold the root mean square error of long sums to twice that of plain torch.

    The rule of `check` grows with the magnitudes that a sum acts on, and a sum of 65,536 terms in
    one accumulator stays within it. The root mean square over some hundred sums shows the order
    of their additions.

    Args:
        out: result of the kernel under test, at least 512 elements.
        ref64: float64 truth, same shape.
        plain: plain torch on the same numbers, same shape.
        what: name used in the message.
    """
    assert ref64.dtype == torch.float64, f"{what}: the reference must be float64"
    assert out.shape == ref64.shape, f"{what}: shape {tuple(out.shape)} != {tuple(ref64.shape)}"
    assert plain.shape == ref64.shape, f"{what}: plain has shape {tuple(plain.shape)}"
    assert out.numel() >= 512, f"{what}: {out.numel()} elements say little"
    error, base = ((t.detach().double() - ref64).square().mean().sqrt() for t in (out, plain))
    assert bool(error <= 2 * base), f"{what}: rms error {error:.3g} > 2 x {base:.3g} of plain torch"


def snr_db(out: Tensor, ref: Tensor) -> float:
    """Signal-to-noise ratio of ``out`` against ``ref`` in dB (for quantised formats)."""
    ref, out = ref.double(), out.double()
    noise = (out - ref).pow(2).sum()
    return float(10 * torch.log10(ref.pow(2).sum() / noise.clamp_min(1e-300)))
