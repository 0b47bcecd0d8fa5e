"""The path from sparse_linear to its Triton kernels: which weight they serve, and what ran."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigops import backend
from bigops.formats import checks
from bigops.formats.base import rows
from bigops.formats.sparse import SparseWeight
from bigops.ops import targets
from bigops.ops.family import Call
from bigops.ops.sparse_linear import blocks
from bigops.ops.targets import present

if TYPE_CHECKING:
    from bigops.kernels.sparse_linear.launch import Blocks


def blocks_of(call: Call, target: targets.Target) -> tuple[Blocks | None, str]:
    """(where the blocks of the weight lie, the reason why no kernel serves it, or "")."""
    weight = call.weight
    assert isinstance(weight, SparseWeight)
    reason = targets.why_not(call.x.dtype, target, "sparse_linear")
    if weight.values.dtype == torch.int8:
        reason = "no GPU kernel for int8 values"
    elif weight.values.device.type == "meta":
        reason = "a weight on the meta device does not say whether it has blocks"
    if not reason:
        reason = _no_tile(targets.present(target), weight.values.dtype)
    if reason:
        return None, reason
    found = blocks.find(weight)
    if found is None:
        return None, (
            "no GPU kernel for this pattern: expected rows that share it 16 by 16, which fill a "
            f"matrix unit (16x1, 16x16, 32x32); got {weight.group} by {weight.group}"
        )
    return found, ""


@functools.cache
def _no_tile(arch: str, dtype: torch.dtype) -> str:
    """The reason why the config file cannot serve every block, or ""."""
    from bigops.kernels.common import form_tiles

    for form in form_tiles.FORMS["sparse_linear"]:
        for side, aligned in itertools.product(blocks.SIDES, (True, False)):
            given = (form, dtype, 1 << 31, side, aligned)
            if form_tiles.choose_config("sparse_linear", arch, *given) is None:
                return f"no tile for {form} by blocks of {side} in the config file of {arch}"
    return ""


def name(call: Call, found: Blocks, part: str = "") -> str:
    """The kernel's name, as `backend.record` gives it."""
    weight = call.weight
    assert isinstance(weight, SparseWeight)
    dtypes = f"{checks.short(call.x.dtype)}.{checks.short(weight.values.dtype)}"
    return f"triton.sparse_linear{part}.{dtypes}.{found.height}x{found.rows.width}"


def forward(call: Call, found: Blocks) -> Tensor:
    """`kernels/sparse_linear.py` forward on x of any rank."""
    from bigops.kernels.sparse_linear import launch as kernels

    x, weight, residual = call.x, call.weight, call.residual
    assert isinstance(weight, SparseWeight)
    y = kernels.forward(
        rows(x),
        weight.values,
        found,
        weight.n,
        call.bias,
        None if residual is None else rows(residual),
        call.code,
    )
    backend.note(name(call, found))
    return y.view(*x.shape[:-1], weight.n)


def backward(
    grad: Tensor, call: Call, found: Blocks, need_x: bool, need_values: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, values and bias by kernels; [0] for what is not needed.

    The pre-activation is computed anew, in float32: the forward keeps nothing.
    """
    from bigops.kernels.fused_linear import preact_gradient
    from bigops.kernels.sparse_linear import launch as kernels

    x, weight = call.x, call.weight
    assert isinstance(weight, SparseWeight)
    values, flat_grad, flat_x = weight.values, rows(grad), rows(x)
    z = None
    if call.activation != "none":
        z = kernels.forward(flat_x, values, found, weight.n, call.bias, dtype=torch.float32)
    gz, gb = preact_gradient(flat_grad, z, call.code, z is not None, need_bias)
    if gz is None:
        gz = flat_grad
    nothing = x.new_empty(0)
    gx = kernels.transposed(gz, values, found, weight.k).view(x.shape) if need_x else nothing
    gv = kernels.sampled(gz, flat_x, values, found) if need_values else nothing
    backend.note(name(call, found, "_backward"))
    return gx, gv, nothing if gb is None else gb


def said(call: Call, found: Blocks, target: targets.Target) -> tuple[str, dict[str, Any]]:
    """(reason, config) on ``target``."""
    from bigops.kernels.sparse_linear import launch as kernels

    weight = call.weight
    assert isinstance(weight, SparseWeight)
    config, reason = kernels.explain(
        present(target),
        weight.values.dtype,
        call.rows,
        weight.n,
        weight.k,
        found.height,
        found.rows.width,
    )
    return reason, config
