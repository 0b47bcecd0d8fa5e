"""Cases of sparse24_linear: those of `sparse_linear` with a 2:4 pattern, the weight compressed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from bigops.ops._sparse24_weight import Sparse24Weight, from_sparse
from tests.compressed_cases import Case, make

# Stored as, and x: int8 values take x of any dtype, others their own.
KINDS = [("bf16", "bf16"), ("f16", "f16"), ("s8", "f32"), ("s8", "bf16"), ("s8", "f16")]
STORED = {"bf16": torch.bfloat16, "f16": torch.float16, "s8": torch.int8}
FORM = {"bf16": "sparse_bf16", "f16": "sparse_float", "s8": "sparse_int8"}


def make24(stored: str, lead: int | list[int], n: int, k: int, dtype: str, name: str = "none",
           **more: Any) -> tuple[Case, Sparse24Weight]:  # fmt: skip
    """A case of `sparse_linear` with a 2:4 pattern, and its weight compressed."""
    case = make(FORM[stored], lead, n, k, dtype, name, pattern="2:4", **more)
    weight = from_sparse(case.weight, STORED[stored])
    return replace(case, dense=weight.to_dense(torch.float64)), weight
