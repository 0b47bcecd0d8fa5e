"""The road from sparse_linear to its Triton kernels: which weight they serve, and what ran."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats import sparse as storage
from bigops.ops import activation as act
from bigops.ops import targets
from bigops.ops.library import rows
from bigops.ops.sparse_linear import blocks as _sparse_blocks
from bigops.ops.targets import present

if TYPE_CHECKING:
    from bigops.kernels.sparse_linear.launch import Blocks


def blocks_of(x: Tensor, target: targets.Target, *fixed: Any) -> tuple[Blocks | None, str]:
    """(where the blocks of the weight lie, the reason why no kernel serves it, or "")."""
    values, index, given_rows, length, ptr, _, _, n, chunk = fixed
    reason = targets.why_not(x.dtype, target, "sparse_linear")
    if x.dtype == torch.uint8:
        reason = "no GPU kernel for a uint8 x"
    elif values.dtype == torch.int8:
        reason = "no GPU kernel for int8 values"
    elif values.device.type == "meta":
        reason = "a weight on the meta device does not say whether it has blocks"
    if not reason:
        reason = _no_tile(targets.present(target), values.dtype)
    if reason:
        return None, reason
    found = _sparse_blocks.find(values, index, given_rows, length, ptr, n, chunk, x.shape[-1])
    if found is None:
        group = storage.SLICE // index.shape[1]
        return None, (
            "no GPU kernel for this pattern: expected rows that share it 16 by 16, which fill a "
            f"matrix unit (16x1, 16x16, 32x32); got {group} by {group}"
        )
    return found, ""


@functools.cache
def _no_tile(arch: str, dtype: torch.dtype) -> str:
    """The reason why the config file cannot serve every block, or ""."""
    from bigops.kernels.common import form_tiles

    for form in form_tiles.FORMS["sparse_linear"]:
        for side, aligned in itertools.product(_sparse_blocks.SIDES, (True, False)):
            given = (form, dtype, 1 << 31, side, aligned)
            if form_tiles.choose_config("sparse_linear", arch, *given) is None:
                return f"no tile for {form} by blocks of {side} in the config file of {arch}"
    return ""


def _name(op: str, x: Tensor, values: Tensor, blocks: Blocks) -> str:
    pattern = f"{blocks.height}x{blocks.rows.width}"
    return f"triton.{op}.{checks.short(x.dtype)}.{checks.short(values.dtype)}.{pattern}"


def forward(x: Tensor, blocks: Blocks, *args: Any) -> Tensor:
    """`kernels/sparse_linear/launch.py` forward on x of any rank; the arguments of the op."""
    from bigops.kernels.sparse_linear import launch as kernels

    values, n, bias, residual, activation = args[0], args[7], *args[9:]
    y = kernels.forward(
        rows(x),
        values,
        blocks,
        n,
        bias,
        None if residual is None else rows(residual),
        act.CODES[activation],
    )
    backend.note(_name("sparse_linear", x, values, blocks))
    return y.view(*x.shape[:-1], n)


def backward(grad: Tensor, x: Tensor, blocks: Blocks, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x, values and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32: the forward keeps nothing.
    """
    from bigops.kernels.fused_linear import preact_gradient
    from bigops.kernels.sparse_linear import launch as kernels

    values, n, bias, activation, need_x, need_values, need_bias = args[0], args[7], *args[9:]
    flat_grad, flat_x = rows(grad), rows(x)
    z = None
    if activation != "none":
        z = kernels.forward(flat_x, values, blocks, n, bias, dtype=torch.float32)
    code = act.CODES[activation]
    gz, gb = preact_gradient(flat_grad, z, code, z is not None, need_bias)
    if gz is None:
        gz = flat_grad
    nothing = x.new_empty(0)
    gx = kernels.transposed(gz, values, blocks, x.shape[-1]).view(x.shape) if need_x else nothing
    gv = kernels.sampled(gz, flat_x, values, blocks) if need_values else nothing
    backend.note(_name("sparse_linear_backward", x, values, blocks))
    return gx, gv, nothing if gb is None else gb


def explain(target: str, x: Tensor, blocks: Blocks, *fixed: Any) -> backend.Explanation:
    """Kernel, config and reason on ``target`` ("cuda", "sm_90", "gfx942" ...)."""
    from bigops.kernels.sparse_linear import launch as kernels

    values, n = fixed[0], fixed[7]
    m, k = x.shape[:-1].numel(), x.shape[-1]
    sides = (blocks.height, blocks.rows.width)
    config, reason = kernels.explain(present(target), values.dtype, m, n, k, *sides)
    name = _name("sparse_linear", x, values, blocks)
    return backend.Explanation("sparse_linear", name, reason, config)
