"""What the tests of several Triton kernels check in the same way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.cases.compressed import Case

FAR = 1 << 27


def in_far_rows(folder: Path, t: Tensor) -> Tensor:
    """A float16 matrix in rows 2^27 elements apart of a sparse file, row 17 past element 2^31."""
    rows, columns = t.shape
    assert rows > 17
    size = FAR * (rows - 1) + columns
    file = str(folder / "rows")
    storage = torch.from_file(file, shared=True, size=size, dtype=torch.float16, device="cpu")
    return storage.as_strided((rows, columns), (FAR, 1)).copy_(t)


def rows_of_all_kinds(k: int) -> Tensor:
    """[40, k] of many scales; rows of one sign, of zeros, tiny, huge, and with NaN and infinity."""
    x = torch.randn(40, k) * torch.logspace(-6, 4, 40).unsqueeze(1)
    x[1], x[2], x[3], x[4] = x[1].abs(), -x[2].abs(), 0, 1e-42
    x[5, 0], x[6, -1], x[7, 0] = float("nan"), float("inf"), float("-inf")
    x[8], x[9] = 3e38, torch.where(torch.arange(k) % 2 == 0, 3e38, -3e38)
    return x


def check_rows_that_are_not_finite(
    case: Case, call: Callable[[Case], Tensor], floating: bool
) -> None:
    """A row of x with NaN or infinity is NaN in the result, and no other is."""
    case.x[1, -1] = float("nan")
    if not floating:  # in floating point an infinity may well stay one
        case.x[3, 0], case.x[4, 20] = float("inf"), float("-inf")
    y = call(case)
    bad = torch.zeros(len(case.x), dtype=torch.bool)
    bad[[1] if floating else [1, 3, 4]] = True
    assert bool(y[bad].isnan().all())
    assert bool(y[~bad].isfinite().all())


def check_refusals(kernels: ModuleType, weight: Any, *form: Any) -> None:
    """What `kernels.forward` raises of a weight [5, 8] and x [4, 8]; ``form`` is of the weight."""
    x, (values, *rest) = torch.randn(4, 8), weight.tensors().values()
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        kernels.forward(x.double(), values, *rest, *form)
    with pytest.raises(TypeError, match=r"bias: expected torch.float32, that of x; got .*float16"):
        kernels.forward(x, values, *rest, *form, torch.zeros(5).half())
    with pytest.raises(ValueError, match=r"values: expected device cpu, that of x; got meta"):
        kernels.forward(x, values.to("meta"), *rest, *form)
    with pytest.raises(ValueError, match=r"activation: expected the code of no gated pair; got 8"):
        kernels.forward(x, values, *rest, *form, activation=8)
