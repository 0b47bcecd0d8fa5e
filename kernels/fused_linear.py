"""Triton kernels of `fused_linear`: y = act(x W^T + bias) + residual, forward and backward.

One strided GEMM serves all three products (x W^T with its epilogue, gz W, gz^T x); an operand is
transposed by its strides and never copied. The gradient of the pre-activation and the column sum
for the bias come from one elementwise kernel. Sums run in float32 in a fixed order, without
atomics: results are bitwise equal from run to run for one config.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import NONE, activate, derivative, split_code
from .tiles import DTYPES, TileConfig, choose_config, device_arch, pointwise_config, table_for

_MAX_SIZE = 2**31 - 2**12  # tile indices are 32 bit and may overhang an edge by one tile


@triton.jit
def _finish_tile(
    acc,  # float32 [BLOCK_M, columns]
    up,  # likewise, or acc again where not GATED
    bias,
    residual,
    c,
    preact,
    M,
    N,
    stride_rm,
    stride_rn,
    stride_cm,  # row length of c
    tile_m,
    column,  # of the tile's first column
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """The epilogue of `gemm` on one tile or on one half of its columns."""
    rm = tl.arange(0, acc.shape[0])
    rn = tl.arange(0, acc.shape[1])
    row0 = tile_m.to(tl.int64) * acc.shape[0]
    col0 = column.to(tl.int64)
    in_n = column + rn < N
    mask = (tile_m * acc.shape[0] + rm < M)[:, None] & in_n[None, :]
    if bias is not None:
        acc += tl.load(bias + col0 + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + N + col0 + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if preact is not None:
        width = stride_cm * 2 if GATED else stride_cm  # row length of preact
        z_tile = preact + (row0 * width + col0) + (rm[:, None] * width + rn[None, :])
        tl.store(z_tile, acc.to(preact.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(z_tile + N, up.to(preact.dtype.element_ty), mask=mask)
    acc = activate(acc, ACT)
    if GATED:
        acc = acc * up
    if residual is not None:
        r_tile = residual + (row0 * stride_rm + col0 * stride_rn)
        r_tile += rm[:, None] * stride_rm + rn[None, :] * stride_rn
        acc += tl.load(r_tile, mask=mask, other=0.0).to(tl.float32)
    c_tile = c + (row0 * stride_cm + col0) + (rm[:, None] * stride_cm + rn[None, :])
    tl.store(c_tile, acc.to(c.dtype.element_ty), mask=mask)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of a tile."""
    parts = tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _finish(
    acc, up, bias, residual, c, preact, M, N, stride_rm, stride_rn, stride_cm, tile_m, column,
    ACT: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_finish_tile` on PARTS groups of columns in turn: a wide tile's does not fit the registers."""
    # fmt: off
    if PARTS == 1:
        _finish_tile(acc, up, bias, residual, c, preact, M, N, stride_rm, stride_rn,
                     stride_cm, tile_m, column, ACT, GATED)
    else:
        left, right = _halves(acc)
        up_left, up_right = left, right
        if GATED:
            up_left, up_right = _halves(up)
        _finish(left, up_left, bias, residual, c, preact, M, N, stride_rm, stride_rn,
                stride_cm, tile_m, column, ACT, GATED, PARTS // 2)
        _finish(right, up_right, bias, residual, c, preact, M, N, stride_rm, stride_rn,
                stride_cm, tile_m, column + acc.shape[1] // 2, ACT, GATED, PARTS // 2)
    # fmt: on


@triton.jit
def gemm(
    a,  # [M, K]
    b,  # [K, N], or [K, 2N] gated: gate columns, then up columns
    bias,  # [N] or [2N] or None
    residual,  # [M, N] or None
    c,  # [M, N] out, rows contiguous
    preact,  # [M, N] or [M, 2N] out, rows contiguous, or None
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_rm,
    stride_rn,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    """c = act(a b + bias) + residual; each program makes one [BLOCK_M, BLOCK_N] tile of c."""
    # Bases are 64 bit; offsets inside a tile stay 32 bit unless a stride is enormous (WIDE).
    stride_cm = N
    if WIDE:
        stride_cm = tl.cast(N, tl.int64)
        stride_am = tl.cast(stride_am, tl.int64)
        stride_ak = tl.cast(stride_ak, tl.int64)
        stride_bk = tl.cast(stride_bk, tl.int64)
        stride_bn = tl.cast(stride_bn, tl.int64)
        stride_rm = tl.cast(stride_rm, tl.int64)
        stride_rn = tl.cast(stride_rn, tl.int64)

    # Bands of GROUP_M tile rows are walked column by column, so that neighbouring programs share
    # both a rows and b columns in the L2 cache.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    band = GROUP_M * tiles_n
    first_m = (pid // band) * GROUP_M
    band_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (pid % band) % band_rows
    tile_n = (pid % band) // band_rows

    rm = tl.arange(0, BLOCK_M)
    rn = tl.arange(0, BLOCK_N)
    rk = tl.arange(0, BLOCK_K)
    row0 = tile_m.to(tl.int64) * BLOCK_M
    col0 = tile_n.to(tl.int64) * BLOCK_N
    in_m = tile_m * BLOCK_M + rm < M
    in_n = tile_n * BLOCK_N + rn < N

    a_tile = a + row0 * stride_am + (rm[:, None] * stride_am + rk[None, :] * stride_ak)
    b_tile = b + col0 * stride_bn + (rk[:, None] * stride_bk + rn[None, :] * stride_bn)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        u_tile = b_tile + tl.cast(N, tl.int64) * stride_bn
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if EVEN_K:
            a_mask = in_m[:, None]
            b_mask = in_n[None, :]
        else:
            a_mask = in_m[:, None] & (rk[None, :] < K - k0)
            b_mask = in_n[None, :] & (rk[:, None] < K - k0)
        a_block = tl.load(a_tile, mask=a_mask, other=0.0)
        b_block = tl.load(b_tile, mask=b_mask, other=0.0)
        acc = tl.dot(a_block, b_block, acc, input_precision=PRECISION)
        if GATED:
            u_block = tl.load(u_tile, mask=b_mask, other=0.0)
            up = tl.dot(a_block, u_block, up, input_precision=PRECISION)
            u_tile += BLOCK_K * stride_bk
        a_tile += BLOCK_K * stride_ak
        b_tile += BLOCK_K * stride_bk

    # fmt: off
    _finish(acc, up if GATED else acc, bias, residual, c, preact, M, N, stride_rm, stride_rn,
            stride_cm, tile_m, tile_n * BLOCK_N, ACT, GATED, PARTS)
    # fmt: on


@triton.jit
def activation_backward(
    grad,  # [M, N]
    preact,  # [M, N], or [M, 2N] gated, or None where ACT is NONE
    gz,  # like preact, rows contiguous, out, or None
    partial,  # float32 [programs along M, N or 2N] out, or None
    M,
    N,
    stride_gm,
    stride_gn,
    stride_zm,
    stride_zn,
    rows_per_program,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """gz = grad * act'(preact), and its column sums over this program's rows."""
    chunk = tl.program_id(0)
    first = chunk * rows_per_program
    last = tl.minimum(first + rows_per_program, M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = cols < N
    width = N * 2 if GATED else N
    if partial is not None:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if GATED:
            total_up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row0 in range(first, last, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < last)[:, None] & in_n[None, :]
        g_tile = grad + rows[:, None] * stride_gm + cols[None, :] * stride_gn
        g = tl.load(g_tile, mask=mask, other=0.0).to(tl.float32)
        if preact is not None:
            z_tile = preact + rows[:, None] * stride_zm + cols[None, :] * stride_zn
            z = tl.load(z_tile, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                u_tile = z_tile + tl.cast(N, tl.int64) * stride_zn
                u = tl.load(u_tile, mask=mask, other=0.0).to(tl.float32)
                g_up = g * activate(z, ACT)
                g = g * u * derivative(z, ACT)
            else:
                g = g * derivative(z, ACT)
        if gz is not None:
            out = gz + rows[:, None] * width + cols[None, :]
            tl.store(out, g.to(gz.dtype.element_ty), mask=mask)
            if GATED:
                tl.store(out + N, g_up.to(gz.dtype.element_ty), mask=mask)
        if partial is not None:
            total += g
            if GATED:
                total_up += g_up
    if partial is not None:
        out_row = partial + chunk.to(tl.int64) * width + cols
        tl.store(out_row, tl.sum(total, axis=0), mask=in_n)
        if GATED:
            tl.store(out_row + N, tl.sum(total_up, axis=0), mask=in_n)


@triton.jit
def sum_rows(
    partial,  # float32 [R, N]
    out,  # [N]
    R,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = partial summed over its rows, in a fixed order."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    in_n = cols < N
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row0 in range(0, R, BLOCK_M):
        rows = row0 + tl.arange(0, BLOCK_M).to(tl.int64)
        mask = (rows < R)[:, None] & in_n[None, :]
        total += tl.load(partial + rows[:, None] * N + cols[None, :], mask=mask, other=0.0)
    tl.store(out + cols, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=in_n)


def dot_precision(dtype: torch.dtype) -> str:
    """Name the precision of float32 products: "tf32" where torch's own may use it, else "ieee"."""
    if dtype == torch.float32 and torch.version.hip is None:
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    # Triton launches on the current device, whichever device holds the tensors.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _check(**tensors: Tensor | None) -> None:
    present = {name: t for name, t in tensors.items() if t is not None}
    name0, first = next(iter(present.items()))
    if first.dtype not in DTYPES:
        allowed = ", ".join(str(d) for d in DTYPES)
        raise TypeError(f"{name0}: expected one of {allowed}; got {first.dtype}")
    for name, t in present.items():
        if t.dtype != first.dtype or t.device != first.device:
            raise TypeError(
                f"{name}: expected {first.dtype} on {first.device} like {name0}; "
                f"got {t.dtype} on {t.device}"
            )
        if max(t.shape, default=0) > _MAX_SIZE:
            raise ValueError(f"{name}: expected sizes up to {_MAX_SIZE}; got {tuple(t.shape)}")


def _product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    act: int = NONE.value,
    gated: bool = False,
    with_preact: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(a b + bias) + residual and, if asked for, a b + bias; a [M, K], b [K, N] or [K, 2N]."""
    m, k = a.shape
    n = b.shape[1] // 2 if gated else b.shape[1]
    out = torch.empty((m, n), dtype=a.dtype, device=a.device)
    preact = torch.empty((m, b.shape[1]), dtype=a.dtype, device=a.device) if with_preact else None
    if m == 0 or n == 0:
        return out, preact
    if config is None:
        config = choose_config(device_arch(a.device), a.dtype, m, n, k, gated)
    stride_r = residual.stride() if residual is not None else (0, 0)
    reach = max(
        config.block_m * max(a.stride(0), stride_r[0], b.shape[1]),
        config.block_n * max(b.stride(1), stride_r[1]),
        config.block_k * max(a.stride(1), b.stride(0)),
    )
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    with _on(a.device):
        gemm[grid](
            a,
            b,
            bias,
            residual,
            out,
            preact,
            m,
            n,
            k,
            *a.stride(),
            *b.stride(),
            *stride_r,
            ACT=act,
            GATED=gated,
            PRECISION=dot_precision(a.dtype),
            EVEN_K=k % config.block_k == 0,
            WIDE=2 * reach >= 2**31,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=config.group_m,
            PARTS=config.parts,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out, preact


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: int = 0,
    with_preact: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """act(x W^T + bias) + residual, and the pre-activation if asked for.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides, here and below.
        weight: [N, K]; for gated pairs [2N, K], gate rows first.
        bias: [N] or [2N].
        residual: [M, N].
        activation: code, the position in `activation.NAMES`.
        with_preact: also store z = x W^T + bias, [M, N] or [M, 2N].
        config: tiles to use instead of the committed choice.

    Returns:
        (y [M, N], z or None), contiguous, in the dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: unknown activation, or a size past 2^31.
    """
    act, gated = split_code(activation)
    _check(x=x, weight=weight, bias=bias, residual=residual)
    return _product(
        x,
        weight.t(),
        bias=None if bias is None else bias.contiguous(),
        residual=residual,
        act=act,
        gated=gated,
        with_preact=with_preact,
        config=config,
    )


def preact_gradient(
    grad: Tensor,
    preact: Tensor | None,
    activation: int,
    need_gz: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """gz = grad * act'(preact) [M, N] or [M, 2N], and its column sum; None for what is not asked.

    Args: as for `backward`.
    """
    act, gated = split_code(activation)
    m, n = grad.shape
    width = 2 * n if gated else n
    gz = torch.empty((m, width), dtype=grad.dtype, device=grad.device) if need_gz else None
    gb = torch.zeros(width, dtype=grad.dtype, device=grad.device) if need_bias else None
    if m == 0 or n == 0 or not (need_gz or need_bias):
        return gz, gb
    tile = pointwise_config(device_arch(grad.device))
    # At most `max_chunks` partial sums per column, whatever M: the second stage stays small and
    # the order of summation depends on the shape alone.
    rows = triton.cdiv(triton.cdiv(m, tile.max_chunks), tile.block_m) * tile.block_m
    chunks = triton.cdiv(m, rows)
    partial = None
    if need_bias:
        partial = torch.empty((chunks, width), dtype=torch.float32, device=grad.device)
    with _on(grad.device):
        activation_backward[(chunks, triton.cdiv(n, tile.block_n))](
            grad,
            preact,
            gz,
            partial,
            m,
            n,
            *grad.stride(),
            *(preact.stride() if preact is not None else (0, 0)),
            rows,
            ACT=act,
            GATED=gated,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
        )
        if partial is not None:
            sum_rows[(triton.cdiv(width, tile.block_n),)](
                partial,
                gb,
                chunks,
                width,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                num_warps=tile.num_warps,
            )
    return gz, gb


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    preact: Tensor | None,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward` for x, weight and bias (that of the residual is ``grad`` itself).

    Args:
        grad: dL/dy, [M, N].
        x: [M, K].
        weight: [N, K], or [2N, K] gated.
        preact: z as `forward` stored it; None only where the activation is none.
        activation: code, the position in `activation.NAMES`.
        need_x, need_weight, need_bias: which gradients to compute; the others come back as [0].
        config: tiles to use instead of the committed choice.

    Returns:
        (gx [M, K], gw like weight, gb [N] or [2N]), contiguous, in the dtype of x.

    Raises:
        TypeError: unsupported or differing dtypes or devices.
        ValueError: unknown activation, a missing ``preact``, or a size past 2^31.
    """
    act, _ = split_code(activation)
    _check(x=x, grad=grad, weight=weight, preact=preact)
    plain = act == NONE.value
    if preact is None and not plain:
        raise ValueError(f"preact: expected a tensor for activation {activation}; got None")
    # Without an activation gz is grad; a copy is worth it only where no axis of grad is
    # contiguous (an expanded gradient): the products would load it element by element.
    copy = not plain or 1 not in grad.stride()
    need_gz = (need_x or need_weight) and copy
    gz, gb = preact_gradient(grad, None if plain else preact, activation, need_gz, need_bias)
    if gz is None:
        gz = grad
    nothing = torch.empty(0, dtype=x.dtype, device=x.device)
    gx = _product(gz, weight, config=config)[0] if need_x else nothing
    gw = _product(gz.t(), x, config=config)[0] if need_weight else nothing
    return gx, gw, gb if gb is not None else nothing


def explain(
    target: str, dtype: torch.dtype, m: int, rows: int, k: int, activation: int
) -> tuple[dict[str, int | str], str]:
    """Say which config the forward product takes on ``target``, which need not be present.

    Args:
        target: "sm_90", "gfx942" and so on; or "cuda", the present GPU.
        dtype: of x.
        m, k: x is [m, k].
        rows: of the weight, N or 2N gated.
        activation: code.

    Returns:
        (config fields and the file they come from, the reason).

    Raises:
        TypeError: an unsupported dtype.
        ValueError: an unknown activation or target, or "cuda" where torch sees no GPU.
    """
    _, gated = split_code(activation)
    if target == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device: torch sees no GPU here; expected an architecture such as sm_90; got 'cuda'"
            )
        target = device_arch(torch.device("cuda", torch.cuda.current_device()))
    config = choose_config(target, dtype, m, rows // 2 if gated else rows, k, gated)
    name = table_for(target).device
    form = "gated" if gated else "plain"
    reason = f"{form} {DTYPES[dtype]} tile for {m} rows from kernels/configs/{name}.json"
    return {**config._asdict(), "file": f"{name}.json"}, reason
