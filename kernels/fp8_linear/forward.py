"""Triton kernels of `fp8_linear`: y = act(x W^T + bias) + residual, W and maybe x in e4m3.

Numbers are codes of float8_e4m3fn (OCP 8-bit floating point, revision 1.0), scales are float32
and come after the products: one for all of W, one a row, or one a block of 128 x 128 with one for
each 128 columns of a row of x (DeepSeek-V3, arXiv:2412.19437, section 3.3). Whatever the device
has, the numbers are the same: its unit for e4m3fn multiplies the codes; a unit for e4m3fnuz (CDNA3)
takes the same bits for half the number, which two factors of 2 undo; where there is no unit, codes
are widened to float16, which holds each of them.

The unit of sm_90 keeps fewer bits of a sum than float32 has (arXiv:2412.19437, section 3.3.2), so
the sums of each BLOCK_K columns are added up in float32. Sums run in a fixed order, without
atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bigops.kernels.common.activation import ungated_code
from bigops.kernels.common.epilogue import finish
from bigops.kernels.common.launch import (
    check_operands,
    contiguous,
    dot_precision,
    is_wide,
    launch_product,
    product_is_aligned,
    strides,
)
from bigops.kernels.common.tile_walk import banded_tile, wide_strides
from bigops.kernels.common.tiles import DTYPES, TileConfig, arch_of, device_arch
from bigops.kernels.fp8_linear.rows import quantize_activations
from bigops.kernels.fp8_linear.tiles import BLOCK, choose_config, table_for, units_of

SCALES = {"tensor": 0, "row": 1, "block": 2}
ROW = tl.constexpr(1)
BLOCKS = tl.constexpr(2)
SPAN = tl.constexpr(BLOCK)


@triton.jit
def _widen(code):
    """The number of an e4m3fn code (uint8), float16, which holds it."""
    c = code.to(tl.uint16)
    # exponent and fraction where float16 has them; biases are 7 and 15
    wide = ((c & 128) << 8) | ((c & 127) << 7)
    wide = wide.to(tl.float16, bitcast=True) * 256.0
    return tl.where((c & 127) == 127, float("nan"), wide).to(tl.float16)


@triton.jit
def _factor(code, FNUZ: tl.constexpr):
    """Codes as the matrix unit takes them, with FNUZ for half the number."""
    if code.dtype != tl.uint8:
        factor = code
    elif FNUZ:  # -0 is NaN there and needs no sign; NaN has one code
        nan = (code & 127) == 127
        other = tl.where(code == 128, 0, code)
        factor = tl.where(nan, 128, other).to(tl.uint8).to(tl.float8e4b8, bitcast=True)
    else:
        factor = _widen(code)
    return factor


@triton.jit
def fp8_gemm(
    x,  # [M, K], or codes [M, stride_xm] of `quantize_fp8`
    w,  # codes [N, stride_w], 0 beyond K
    scale,  # float32 [1], [N] or [ceil(N / 128), GROUPS]
    x_scale,  # float32 [M], in blocks [GROUPS, M]; None with a floating x
    bias,  # [N] or None
    residual,  # [M, N] or None
    y,  # [M, N] out, rows contiguous
    M,
    N,
    K,
    GROUPS,  # ceil(K / 128)
    stride_xm,
    stride_xk,
    stride_w,
    stride_rm,
    stride_rn,
    SCALES: tl.constexpr,
    FNUZ: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """y = act(x W^T + bias) + residual; each program makes one [BLOCK_M, BLOCK_N] tile of y.

    Codes come as float8e4nv where a unit multiplies e4m3fn, else as uint8.
    """
    stride_ym, stride_xm, stride_xk, stride_w, stride_rm, stride_rn = wide_strides(
        (N, stride_xm, stride_xk, stride_w, stride_rm, stride_rn), WIDE
    )

    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = banded_tile(pid, tiles_m, GROUP_M * tl.cdiv(N, BLOCK_N), GROUP_M)

    rm = tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    col0 = tile_n.to(tl.int64) * BLOCK_N
    in_m = tile_m * BLOCK_M + rm < M
    in_n = tile_n * BLOCK_N + rn < N

    x_tile = x + row0 * stride_xm + (rm[:, None] * stride_xm + rk[None, :] * stride_xk)
    w_tile = w + col0 * stride_w + (rk[:, None] + rn[None, :] * stride_w)
    s_tile = scale
    if SCALES == BLOCKS:  # a tile lies within one block of rows of W
        s_tile += (col0 // SPAN) * GROUPS
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        x_mask = in_m[:, None]
        w_mask = in_n[None, :]
        if not EVEN_K:
            w_mask = w_mask & (rk[:, None] < K - k0)
            if x_scale is None:
                x_mask = x_mask & (rk[None, :] < K - k0)
        x_block = tl.load(x_tile, mask=x_mask, other=0.0)
        w_block = tl.load(w_tile, mask=w_mask, other=0.0)
        if x_scale is None:
            if w_block.dtype == tl.uint8:
                w_block = _widen(w_block)
            w_block = w_block.to(x.dtype.element_ty)
            if SCALES == BLOCKS:
                part = tl.dot(x_block, w_block, input_precision=PRECISION)
                acc += part * tl.load(s_tile + k0 // SPAN)
            else:
                acc = tl.dot(x_block, w_block, acc, input_precision=PRECISION)
        else:
            a = _factor(x_block, FNUZ)
            b = _factor(w_block, FNUZ)
            if SCALES == BLOCKS:
                at = tl.cast(k0 // SPAN, tl.int64) * M
                by_row = tl.load(x_scale + at + row0 + rm, mask=in_m, other=0.0)
                # one after the other: the product of two small scales may be 0
                part = tl.dot(a, b) * tl.load(s_tile + k0 // SPAN)
                acc += part * by_row[:, None]
            elif a.dtype == tl.float8e4nv:
                acc = tl.dot(a, b, acc, max_num_imprecise_acc=BLOCK_K)
            else:
                acc = tl.dot(a, b, acc)
        x_tile += BLOCK_K * stride_xk
        w_tile += BLOCK_K

    if SCALES == ROW:
        acc *= tl.load(scale + col0 + rn, mask=in_n, other=0.0)[None, :]
    elif SCALES != BLOCKS:
        acc *= tl.load(scale)
    if x_scale is not None:
        if SCALES != BLOCKS:
            acc *= tl.load(x_scale + row0 + rm, mask=in_m, other=0.0)[:, None]
        if FNUZ:
            acc *= 4.0
    finish(
        acc,
        acc,
        bias,
        residual,
        y,
        None,
        M,
        N,
        stride_rm,
        stride_rn,
        stride_ym,
        tile_m,
        tile_n * BLOCK_N,
        ACT,
        False,
        PARTS,
    )


def _codes(t: Tensor, units: str) -> Tensor:
    """Codes of e4m3fn as `fp8_gemm` takes them where ``units`` multiply."""
    return t.view(torch.float8_e4m3fn if units == "e4m3fn" else torch.uint8)


def kind_of(activations: str) -> str:
    """The kind of product, as the config files name it: "f8a8" or "f8"."""
    return "f8" if activations == "none" else "f8a8"


def forward(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    x_scale: Tensor | None,
    scales: str,
    activations: str,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    config: TileConfig | None = None,
    units: str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """act(x W^T + bias) + residual; the storage as in `bigops.ops.fp8_linear`.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, here and below.
        values: [N, K rounded up to 16] float8_e4m3fn, 0 beyond K.
        scale: float32 [1, 1], [N, 1] or [ceil(N / 128), ceil(K / 128)].
        x_scale: float32 [1] with activations "static", else None.
        scales: "tensor", "row" or "block".
        activations: "none", "dynamic" or "static".
        bias: [N] in x's dtype.
        residual: [M, N] in x's dtype.
        activation: code, the position in `activation.NAMES`; no gated pair.
        config: tiles to use instead of the committed choice.
        units: what multiplies codes, of `fp8_tiles.UNITS`, instead of what the device has.
        dtype: of the result; None: that of x.

    Returns:
        [M, N], contiguous.

    Raises:
        TypeError: unsupported or differing dtypes.
        ValueError: a gated or unknown activation, differing devices, or a size past 2^31.
    """
    act = ungated_code(activation)
    check_operands(x, values=values, scale=scale, x_scale=x_scale, bias=bias, residual=residual)
    m, k = x.shape
    n = values.shape[0]
    y = torch.empty((m, n), dtype=dtype or x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    arch = device_arch(x.device)
    units = units_of(arch) if units is None else units
    rounds = activations != "none"
    if config is None:
        aligned = product_is_aligned(n, None if rounds else x, residual)
        config = choose_config(arch, kind_of(activations), x.dtype, m, aligned)
    a, by = x, None
    if rounds:
        a, by = quantize_activations(x, scales == "block", x_scale)
        a = _codes(a, units)
    values, stride_r = values.contiguous(), strides(residual)
    launch_product(
        fp8_gemm,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config,
        a,
        _codes(values, units),
        scale.contiguous(),
        by,
        contiguous(bias),
        residual,
        y,
        m,
        n,
        k,
        triton.cdiv(k, BLOCK),
        *a.stride(),
        values.shape[1],
        *stride_r,
        SCALES=SCALES[scales],
        FNUZ=units == "e4m3fnuz",
        ACT=act,
        PRECISION=dot_precision(x.dtype),
        EVEN_K=k % config.block_k == 0,
        WIDE=is_wide(
            config.block_m * max(a.stride(0), stride_r[0], n),
            config.block_n * max(values.shape[1], stride_r[1]),
            config.block_k * a.stride(1),
        ),
    )
    return y


def explain(
    target: str, dtype: torch.dtype, m: int, n: int, k: int, activations: str
) -> tuple[dict[str, int | str], str]:
    """Say which config the product takes on ``target``, which need not be present.

    Contiguous tensors are assumed; others may take the tile for unaligned products.

    Args:
        target: "sm_90", "gfx942" and so on; or "cuda", the present GPU.
        dtype: of x.
        m, k: x is [m, k].
        n: output features.
        activations: as for `forward`.

    Returns:
        (config fields, what multiplies codes there and the file they come from; the reason).

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unknown target, or "cuda" where torch sees no GPU.
    """
    target = arch_of(target)
    kind = kind_of(activations)
    aligned = n % 16 == 0 and (activations != "none" or k % 16 == 0)
    config = choose_config(target, kind, dtype, m, aligned)
    name = f"fp8_linear/{table_for(target).device}.json"
    what = f"{'' if aligned else 'un'}aligned {kind} {DTYPES[dtype]}"
    units = units_of(target)
    how = {
        "none": f"{target} has no unit for e4m3: codes are widened in the kernel",
        "e4m3fn": "e4m3fn units multiply the codes",
        "e4m3fnuz": "e4m3fnuz units multiply the codes, which are converted in the kernel",
    }[units]
    if activations == "none":
        how = "the weight is widened to the dtype of x in the kernel"
    return {
        **config.of_one_form(),
        "units": units,
        "file": name,
    }, f"{what} tile for {m} rows from kernels/configs/{name}; {how}"
