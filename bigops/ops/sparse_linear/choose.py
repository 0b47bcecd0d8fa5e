"""Which kernel serves a call of sparse_linear with a `SparseWeight`.

The CPU kernels register themselves (csrc/cpu/sparse_linear.cpp). On a GPU a few rows of x, as in a
decode step, have a CUDA C++ kernel for every pattern; more of them a Triton kernel where the weight
has blocks. A call with qparams is the reference there, as `backend.record` says, and so is what
`triton.blocks_of` gives a reason for.
"""

from __future__ import annotations

from torch import Tensor

from bigops.formats import checks
from bigops.formats.sparse import SparseWeight
from bigops.ops import targets
from bigops.ops.choice import Choice, on_cpu, reference
from bigops.ops.family import Call, RowsCall, U8Call
from bigops.ops.sparse_linear import cuda, triton
from bigops.ops.targets import Target

NAME = "sparse_linear"


def choose(call: Call, target: Target) -> Choice:
    """The kernel that serves a call on ``target``."""
    weight = call.weight
    assert isinstance(weight, SparseWeight)
    if targets.is_cpu(target):
        return _on_cpu(call, False)
    if cuda.serves(call, weight, target):
        return Choice(NAME, cuda.name(call, weight), lambda: cuda.said(call, weight), cuda.forward)
    blocks, reason = triton.blocks_of(call, target)
    if blocks is None:
        return reference(NAME, f"{reason}; plain torch serves")
    return Choice(
        NAME,
        triton.name(call, blocks),
        lambda: triton.said(call, blocks, target),
        lambda call: triton.forward(call, blocks),
    )


def choose_u8(given: U8Call, target: Target) -> Choice:
    """The kernel that serves a call whose x or result is u8."""
    if targets.is_cpu(target):
        return _on_cpu(given.call, given.y_qparams is not None)
    reason = "no GPU kernel for a call with qparams"
    return reference(NAME, f"{reason}; plain torch serves", f"{NAME}_u8")


def choose_rows(given: RowsCall, target: Target) -> Choice:
    """The kernel that serves a call whose x is quantised rows."""
    if targets.is_cpu(target):
        return _on_cpu(given.call, False)
    return reference(NAME, "no GPU kernel for quantised rows; plain torch serves", f"{NAME}_rows")


def _on_cpu(call: Call, to_u8: bool) -> Choice:
    weight = call.weight
    assert isinstance(weight, SparseWeight)
    stored, x = checks.short(weight.values.dtype), checks.short(call.x.dtype)
    return on_cpu(
        NAME, lambda extension: extension.choose_sparse_linear(call.rows, stored, x, to_u8)
    )


def backward(grad: Tensor, call: Call, **needs: bool) -> tuple[Tensor, ...] | None:
    """The gradients of a call by a kernel on x's device, or None."""
    blocks, _ = triton.blocks_of(call, call.x.device)
    return None if blocks is None else triton.backward(grad, call, blocks, **needs)
