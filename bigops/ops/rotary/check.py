"""Which arguments `rotary` takes."""

from __future__ import annotations

import torch
from torch import Tensor

from bigops.formats import checks
from bigops.formats.quantize import SERVED


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError or TypeError naming the argument, what was expected and what came."""
    for name, given in (("x", x), ("cos", cos), ("sin", sin)):
        checks.tensor(name, given)
    checks.tensors(x=x, cos=cos, sin=sin)
    checks.floating("x", x, SERVED)
    checks.dims("x", x, 4)
    checks.floating("cos", cos, (x.dtype, torch.float32))
    checks.dtype("sin", sin, cos.dtype)
    for name, given in (("cos", cos), ("sin", sin)):
        checks.device(name, given, x)
        if not _fits(given, x):
            raise ValueError(
                f"{name}: expected shape [B or 1, T, R] of x [B, H, T, D] {list(x.shape)}, R even "
                f"and at most D; got {list(given.shape)}"
            )
    checks.shape("sin", sin, [*sin.shape[:-1], cos.shape[-1]])


def _fits(table: Tensor, x: Tensor) -> bool:
    if table.dim() not in (2, 3, 4) or checks.differ(table.shape[-2], x.shape[2]):
        return False
    if table.dim() == 4 and checks.differ(table.shape[1], 1):
        return False
    b = table.shape[0]
    if table.dim() > 2 and checks.differ(b, 1) and checks.differ(b, x.shape[0]):
        return False
    r = table.shape[-1]
    return not (checks.differ(r % 2, 0) or checks.differ(torch.sym_min(r, x.shape[3]), r))
