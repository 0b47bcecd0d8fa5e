"""2:4 weights compressed for sparse tensor cores: the group of `sparse_linear` that needs a GPU.

Forward, the gradients of x and of the values, and pruning with packing, against dense torch,
torch.compile and torch's own semi-structured weights. All get the same pruned weight, chosen along
rows and columns at once, so that both gradients stay on tensor cores; errors are against the
float64 product with it. Where the kernels are no default (sm_90 and up) they run beside it as
"bigops mma.sp".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import bigops
from bigops.backend import machine
from bigops.benches import rivals
from bigops.benches.harness import DTYPES, OWN, Case, LeftOut, Side, compiled, optional_side
from bigops.benches.limits import Cost
from bigops.formats.patterns import transposable_mask
from bigops.formats.sparse24 import Sparse24Weight
from bigops.kernels.common.tiles import device_arch
from bigops.ops.family import Call
from bigops.ops.sparse_linear import sparse24 as op
from bigops.ops.sparse_linear.sparse24_pack import pack24, prune24

PATTERN = "2:4t packed"
SHAPES = ((1024, 1024), (4096, 4096), (4096, 11008))


def cases() -> list[Case]:
    """Forward in every format, then what a training step is made of."""

    def case(m: int, k: int, n: int, values: str, direction: str, quick: bool = False) -> Case:
        params = {"activation": "none", "sparsity": 0.5, "values": values, "pattern": PATTERN}
        dtype = "bf16" if values == "int8" else values
        name = f"packed-{values}-2:4t"
        return Case("sparse_linear", name, m, k, n, dtype, direction, params, quick=quick, gpu=True)

    found = [
        case(m, k, n, values, "forward", m == 1024 and k == n == 4096 and values == "bf16")
        for k, n in SHAPES
        for m in (64, 1024, 8192)
        for values in ("bf16", "fp16", "int8")
    ]
    for direction in ("backward-x", "backward-values", "pack"):
        found += [case(8192, k, n, v, direction) for k, n in SHAPES for v in ("bf16", "fp16")]
    return found


def build(case: Case, device: str) -> tuple[list[Tensor], list[Side]]:
    """The float64 truth of a case and its sides."""
    dtype, values = DTYPES[case.dtype], str(case.params["values"])
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    master = torch.randn(case.n, case.k, device=device) * case.k**-0.5
    weight = torch.where(transposable_mask(master), master, 0).to(dtype)
    if case.direction == "pack":
        return _pack(case, master.to(dtype), weight)
    if values == "int8":
        own = pack24(weight, weight != 0, torch.int8)
    else:
        own = pack24(weight, transposable_mask(master), transposable=True)
    if case.direction.startswith("backward"):
        return _backward(case, x, weight, own)
    bias = torch.randn(case.n, device=device).to(dtype)
    moved = x.element_size() * case.m * (case.k + case.n)
    total = 2.0 * case.m * case.k * case.n
    unit = "int8" if values == "int8" else case.dtype
    sparse = Cost(unit, total / 2, float(own.nbytes + moved))
    dense = Cost(case.dtype, total, float(weight.nbytes + moved))
    plain = rivals.eager("none", False)
    sides = [Side(OWN, lambda: bigops.sparse_linear(x, own, bias), sparse)]
    if _beside_default(x, own):
        sides.append(Side("bigops mma.sp", lambda: op.product(Call(x, own, bias)), sparse))
    sides.append(rivals.eager_side(case, x, weight, (bias,), plain, dense))
    sides.append(rivals.dense_compiled(case, x, weight, bias, plain, dense))
    optional_side(sides, _semi_structured, weight, lambda w: F.linear(x, w, bias), sparse)
    return [plain(x.double().cpu(), own.to_dense(torch.float64).cpu(), bias.double().cpu())], sides


def _beside_default(x: Tensor, weight: Sparse24Weight) -> bool:
    """Whether the kernels run on this GPU without being its default."""
    if not x.is_cuda or machine.cuda_error or op.serves(weight.values.dtype, weight.k, x.device):
        return False
    return machine.cuda_runs_on(device_arch(x.device))


def _backward(
    case: Case, x: Tensor, weight: Tensor, own: Sparse24Weight
) -> tuple[list[Tensor], list[Side]]:
    """gx = gz W, or gz^T x where values are stored."""
    grad = torch.randn(case.m, case.n, device=x.device).to(x.dtype)
    want_x = case.direction == "backward-x"
    args = (grad, x, *own.arguments, None, "none", want_x, not want_x, False)

    needs = {"need_x": want_x, "need_values": not want_x, "need_bias": False}

    def shown(found: Any) -> Tensor:
        return found[0] if want_x else own.replace(values=found[1]).to_dense()

    def product(g: Tensor, other: Tensor) -> Tensor:
        return g @ other if want_x else g.t() @ other

    kept = weight != 0
    total, moved = 2.0 * case.m * case.k * case.n, x.nbytes + grad.nbytes
    mine = Cost(case.dtype, total / 2 if want_x else total, float(own.nbytes + moved))
    dense = Cost(case.dtype, total, float(weight.nbytes + moved))
    sides = [Side(OWN, lambda: torch.ops.bigops.sparse24_linear_backward(*args), mine, shown=shown)]
    if _beside_default(x, own):
        sides.append(
            Side(
                "bigops mma.sp",
                lambda: op.gradients(grad, Call(x, own), **needs),
                mine,
                shown=shown,
            )
        )
    other = weight if want_x else x
    only = None if want_x else lambda g: torch.where(kept, g, 0)
    sides.append(Side("eager", lambda: product(grad, other), dense, "aten mm", shown=only))
    ready = compiled(product)
    sides.append(Side("torch.compile", lambda: ready(grad, other), dense, "inductor", shown=only))
    if want_x:
        transposed = weight.t().contiguous()
        optional_side(sides, _semi_structured, transposed, lambda w: F.linear(grad, w), mine)
    x64, grad64 = x.double().cpu(), grad.double().cpu()
    dense64 = own.to_dense(torch.float64).cpu()
    truth = grad64 @ dense64 if want_x else torch.where(kept.cpu(), grad64.t() @ x64, 0)
    return [truth], sides


def _pack(case: Case, master: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Side]]:
    """Choosing what stays along rows and columns and packing it, W and W^T."""
    cost = Cost(case.dtype, 0.0, float(master.nbytes + 2 * master.nbytes * 9 // 16))
    eager = Side(
        "eager", lambda: torch.where(transposable_mask(master), master, 0), cost, "aten, not packed"
    )
    own = Side(OWN, lambda: prune24(master, transposable=True), cost, shown=_dense)  # type: ignore[arg-type, return-value]
    truth = torch.where(transposable_mask(master), master, 0)
    return [truth.double().cpu()], [own, eager]


def _dense(weight: Sparse24Weight) -> Tensor:
    return weight.to_dense()


def _semi_structured(weight: Tensor, call: Callable[[Tensor], Tensor], cost: Cost) -> Side:
    """torch's ``to_sparse_semi_structured``.

    Raises:
        LeftOut: it does not take the weight on this device.
    """
    try:
        packed = torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, ValueError, NotImplementedError) as reason:
        raise LeftOut(f"torch semi-structured: {reason!s:.150}") from reason
    return Side("torch semi-structured", lambda: call(packed), cost, type(packed).__name__)
