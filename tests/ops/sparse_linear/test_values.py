"""sparse_linear: values and gradients by the reference and the GPU kernels, which are named.

The CPU kernels are in test_cpu.py, gradients on every path in tests/ops/family/test_paths.py,
storage in tests/formats/test_sparse.py, errors in test_errors.py; what is the GPU kernels' own in
test_triton.py and test_cuda.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.backends import HOSTRUN, REFERENCE, TRITON, Way, covering
from tests.support.cases.compressed import (
    PATTERNS,
    SPARSE,
    served,
)
from tests.support.cases.compressed import make as make_case
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import needs_extension

pytestmark = needs_extension


def run_by(
    way: Way,
    form: str,
    lead: int | list[int],
    n: int,
    k: int,
    dtype: str,
    name: str = "none",
    **options: Any,
) -> None:
    """The same by the reference or on a GPU's way, with values that train where they can."""
    case = make_case(form, lead, n, k, dtype, name, values=form != "sparse_int8", **options)
    device = "cuda" if way is HOSTRUN else way.name
    leaves = case.leaves()
    with way.serving(
        "sparse_linear", f"{device}.sparse_linear.{dtype}.{SPARSE[form]}", gradients=True
    ):
        y = case.public(*leaves)  # type: ignore[arg-type]
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    found = [None if t is None else next(grads) for t in leaves]
    case.check_gradients(found, str(way), stored=way is not REFERENCE)


# Triton serves floating values in blocks, CUDA C++ every pattern with at most 16 rows of x.
BLOCKS = ("16x1", "16x16", "32x32")
BY_FORM = [(form, dtype) for form in SPARSE for dtype in served(form)]
FLOATING = [by for by in BY_FORM if by[0] != "sparse_int8"]
FIRST = [(form, served(form)[0]) for form in SPARSE]
GPU_SHAPES = covering(
    [TRITON],
    FIRST[1:],
    BLOCKS,
    [
        (1, 1, 1),
        (33, 16, 16),
        ([2, 3], 48, 65),
        (2, 72, 70),
        (3, 33, 40),
        (0, 20, 20),
        (3, 0, 20),
        (3, 20, 0),
    ],
) + covering(
    [HOSTRUN],
    [(form, "bf16") for form in SPARSE],
    ["1x4"],
    [(1, 1, 1), (16, 64, 256), (9, 65, 257), (2, 130, 515), (5, 16, 0)],
)
LEADS: list[tuple[Way, list[int]]] = [
    (REFERENCE, []),
    (REFERENCE, [4, 0]),
    (TRITON, []),
    (TRITON, [4, 0]),
    (TRITON, [2, 3]),
    (HOSTRUN, []),
    (HOSTRUN, [2, 1, 3, 2]),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of whole numbers in Triton
@pytest.mark.parametrize(
    ("way", "by", "pattern", "m"),
    covering([TRITON], FLOATING, BLOCKS, [35])
    + covering([HOSTRUN], BY_FORM, ["1x4"], (1, 3, 11))
    + covering([HOSTRUN], FIRST, PATTERNS, [4])
    + [(REFERENCE, by, pattern, 9) for by in BY_FORM for pattern in PATTERNS],
    ids=str,
)
def test_every_format(way: Way, by: tuple[str, str], pattern: str, m: int) -> None:
    form, dtype = by
    run_by(way, form, m, 70, 130, dtype, "gelu", pattern=pattern)


@pytest.mark.parametrize("way", [REFERENCE, TRITON, HOSTRUN], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(way: Way, name: str) -> None:
    run_by(way, "sparse_float", 5, 37, 83, "f32", name, pattern="16x16")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("way", "by", "pattern", "shape"), GPU_SHAPES, ids=str)
def test_shapes_of_gpu_kernels(
    way: Way, by: tuple[str, str], pattern: str, shape: tuple[int | list[int], int, int]
) -> None:
    (form, dtype), (lead, n, k) = by, shape
    run_by(way, form, lead, n, k, dtype, "silu", pattern=pattern)


@pytest.mark.parametrize(("way", "lead"), LEADS, ids=str)
def test_leading_dimensions_on_gpu_ways(way: Way, lead: list[int]) -> None:
    run_by(way, "sparse_float", lead, 6, 7, "f32", "tanh", pattern="16x16")
