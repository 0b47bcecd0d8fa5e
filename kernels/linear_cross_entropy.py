"""Triton kernel of `linear_cross_entropy`: the pass over a chunk of logits, one program a row.

A row is read twice: once for the sum of exponentials, kept lane by lane so that no step waits for
the other warps, once more for the gradient, written in place. No atomics: the order of every sum
depends on the number of classes alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.activation import TANH, activate
from bigops.kernels.common.launch import check_dtype, contiguous, launch_options, on_device
from bigops.kernels.common.tiles import device_arch, pointwise_config

_MAX_SIZE = 2**31 - 2**16  # column indices are 32 bit and may overhang the edge by one block


@triton.jit
def _capped(
    logits,  # the row
    bias,  # [V] or None
    cols,
    in_v,
    softcap,
    CAPPED: tl.constexpr,
):
    """softcap * tanh((logits + bias) / softcap) in float32; -inf past the last class."""
    z = tl.load(logits + cols, mask=in_v, other=0.0).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + cols, mask=in_v, other=0.0).to(tl.float32)
    if CAPPED:
        z = softcap * activate(z / softcap, TANH)
    return tl.where(in_v, z, float("-inf"))


@triton.jit
def cross_entropy_rows(
    logits,  # [M, V] contiguous; with GRADIENT they become d loss / d logits times scale
    target,  # int64 [M]
    bias,  # [V] or None
    class_weight,  # float32 [V] or None
    scale,  # float32 [M] or None
    losses,  # float32 [M] out
    lses,  # float32 [M] or None out: log of the sum of exponentials, 0 of an ignored row
    V,
    ignore_index,
    class_weight_sum,
    smoothing,
    z_loss,
    softcap,
    SMOOTHED: tl.constexpr,
    Z_LOSS: tl.constexpr,
    CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    y = tl.load(target + row)
    lanes = tl.arange(0, BLOCK)
    if y == ignore_index:
        tl.store(losses + row, 0.0)
        if lses is not None:
            tl.store(lses + row, 0.0)
        if GRADIENT:
            nothing = tl.zeros((BLOCK,), dtype=logits.dtype.element_ty)
            for start in range(0, V, BLOCK):
                tl.store(logits + start + lanes, nothing, mask=start + lanes < V)
    else:
        # Read before the first sum over all lanes: its barrier keeps the slowest read before
        # the quickest store of the gradient. A direct caller's target out of range reads
        # nothing and makes the loss NaN.
        known = (y >= 0) & (y < V)
        at_target = tl.load(logits + y, mask=known, other=float("nan")).to(tl.float32)
        if bias is not None:
            at_target += tl.load(bias + y, mask=known, other=0.0).to(tl.float32)
        if CAPPED:
            at_target = softcap * activate(at_target / softcap, TANH)
        top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, V, BLOCK):
            cols = start + lanes
            in_v = cols < V
            t = _capped(logits, bias, cols, in_v, softcap, CAPPED)
            higher = tl.maximum(top, t)
            # A lane that has met nothing but -inf would subtract it from itself.
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.exp(t - shift)
            top = higher
            if SMOOTHED:
                kept = tl.where(in_v, t, 0.0)
                if class_weight is not None:
                    kept *= tl.load(class_weight + cols, mask=in_v, other=0.0)
                weighted += kept
        highest = tl.max(top, axis=0)
        sums = tl.sum(total * tl.exp(top - highest), axis=0)
        lse = highest + tl.log(sums)
        if lses is not None:
            tl.store(lses + row, lse)

        own = 1.0
        if class_weight is not None:
            own = tl.load(class_weight + y, mask=known, other=0.0)
        even = smoothing / V  # weight of each class
        mass = own * (1.0 - smoothing)
        loss = mass * (lse - at_target)
        if SMOOTHED:
            loss += even * (class_weight_sum * lse - tl.sum(weighted, axis=0))
        if Z_LOSS:
            loss += z_loss * own * lse * lse
        tl.store(losses + row, loss)

        if GRADIENT:
            # d loss / d t = p * (what all classes weigh + z-loss) - what the class weighs, by the
            # soft cap's slope 1 - (t / cap)^2
            factor = 1.0
            if scale is not None:
                factor = tl.load(scale + row)
            on_target = factor * mass
            share = factor * even
            if SMOOTHED:
                mass += even * class_weight_sum
            if Z_LOSS:
                mass += 2.0 * z_loss * own * lse
            mass = factor * mass / sums
            for start in range(0, V, BLOCK):
                cols = start + lanes
                in_v = cols < V
                t = _capped(logits, bias, cols, in_v, softcap, CAPPED)
                g = mass * tl.exp(t - highest)
                if SMOOTHED:
                    if class_weight is not None:
                        g -= share * tl.load(class_weight + cols, mask=in_v, other=0.0)
                    else:
                        g -= share
                g = tl.where(cols == y, g - on_target, g)
                if CAPPED:
                    u = t / softcap
                    g *= 1.0 - u * u
                tl.store(logits + cols, g.to(logits.dtype.element_ty), mask=in_v)


def block_size(arch: str, classes: int) -> tuple[int, int]:
    """(classes a program takes at a time, warps) on ``arch``, for rows of so many classes."""
    tile = pointwise_config(arch)
    most = tile.block_m * tile.block_n
    return min(most, max(128, triton.next_power_of_2(classes))), tile.num_warps


def _check(logits: Tensor, **parts: tuple[Tensor | None, int, torch.dtype]) -> None:
    check_dtype("logits", logits)
    if logits.dim() != 2 or not logits.is_contiguous() or max(logits.shape) > _MAX_SIZE:
        raise ValueError(
            f"logits: expected contiguous [M, V] of sizes up to {_MAX_SIZE}; "
            f"got {tuple(logits.shape)} of strides {logits.stride()}"
        )
    for name, (t, size, dtype) in parts.items():
        if t is None:
            continue
        if t.dtype != dtype or t.device != logits.device:
            raise TypeError(
                f"{name}: expected {dtype} on {logits.device}; got {t.dtype} on {t.device}"
            )
        if t.shape != (size,):
            raise ValueError(f"{name}: expected shape ({size},); got {tuple(t.shape)}")


def chunk(
    logits: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    scale: Tensor | None,
    class_weight_sum: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    gradient: bool,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and its logsumexp; with ``gradient`` the logits become its gradient.

    Args:
        logits: [M, V] contiguous, float32, bfloat16 or float16, without bias and soft cap.
        target: [M] int64. The loss is NaN for one that is no class and not ``ignore_index``:
            nothing is read from the device to raise here.
        bias: [V] in the dtype of logits.
        class_weight: [V] float32, and ``class_weight_sum`` its sum (V without it).
        scale: [M] float32, factor of each row's gradient.
        ignore_index, label_smoothing, z_loss: as of the op.
        softcap: 0 for none.
        gradient: whether to write the gradient.
        with_lse: whether to write the logsumexp.

    Returns:
        Losses [M] and logsumexp [M] (0 of an ignored row; without ``with_lse`` [0]), float32.

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: shapes that do not fit, or a size past 2^31.
    """
    m, v = logits.shape if logits.dim() == 2 else (0, 0)
    _check(
        logits,
        target=(target, m, torch.int64),
        bias=(bias, v, logits.dtype),
        class_weight=(class_weight, v, torch.float32),
        scale=(scale, m, torch.float32),
    )
    written = m if with_lse else 0
    if m == 0 or v == 0:
        return logits.new_zeros(m, dtype=torch.float32), logits.new_zeros(
            written, dtype=torch.float32
        )
    losses, lses = (logits.new_empty(n, dtype=torch.float32) for n in (m, written))
    block, warps = block_size(device_arch(logits.device), v)
    with on_device(logits.device):
        cross_entropy_rows[(m,)](
            logits,
            target.contiguous(),
            contiguous(bias),
            contiguous(class_weight),
            contiguous(scale),
            losses,
            lses if with_lse else None,
            v,
            ignore_index,
            class_weight_sum,
            label_smoothing,
            z_loss,
            softcap,
            SMOOTHED=label_smoothing != 0,
            Z_LOSS=z_loss != 0,
            CAPPED=softcap != 0,
            GRADIENT=gradient,
            BLOCK=block,
            **launch_options(warps),
        )
    return losses, lses
