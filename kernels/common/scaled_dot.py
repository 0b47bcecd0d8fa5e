"""A step of a product along rows of W that have a scale each, for gradients."""

import triton
import triton.language as tl

TINY = tl.constexpr(1.1754943508222875e-38)  # smallest normal float32


@triton.jit
def scaled_dot(
    acc,  # float32 [BLOCK_M, BLOCK_N]
    g,  # [BLOCK_M, BLOCK_K]
    w,  # numbers of W, [BLOCK_K, BLOCK_N]
    by,  # float32 [BLOCK_K], their scales
    PRECISION: tl.constexpr,
):
    """acc + g (by w): numbers are scaled in float32 and rounded to the dtype of g, as torch does.

    Float16 reaches neither far down nor far up, so there the scales of one step enter relative to
    the largest of them, and that one after the product: whatever the scale of a weight or of a
    loss, neither its numbers nor the sums of a step leave the range.
    """
    RELATIVE: tl.constexpr = g.dtype == tl.float16
    if RELATIVE:
        most = tl.maximum(tl.max(by, axis=0), TINY)
        scaled = (w.to(tl.float32) * (by / most)[:, None]).to(g.dtype)
        acc += tl.dot(g, scaled) * most
    else:
        scaled = (w.to(tl.float32) * by[:, None]).to(g.dtype)
        acc = tl.dot(g, scaled, acc, input_precision=PRECISION)
    return acc
