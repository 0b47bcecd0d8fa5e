"""sparse24_linear: values and gradients by every way that serves it.

What is the kernel's own, such as schedules and planted faults, is in test_cuda_sparse24.py,
the compressed weight in tests/formats/test_sparse24.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigops import backend
from bigops.ops.sparse_linear import sparse_linear
from tests.support import paths
from tests.support.backends import HOSTRUN, REFERENCE, Way
from tests.support.cases.linear import PLAIN
from tests.support.cases.sparse24 import KINDS, make24

# numpy's, of Triton's interpreter, where it quantises the rows of x
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
WAYS = [REFERENCE, HOSTRUN]
# Ragged against blocks of 128 rows of W, 32 or 128 of x, and steps of 64 or 128 columns.
SHAPES = [(1, 1, 1), (5, 130, 70), (33, 17, 136), (130, 129, 65), (3, 16, 0), (0, 16, 64)]


def run(
    way: Way,
    stored: str,
    dtype: str,
    lead: int | list[int],
    n: int,
    k: int,
    name: str = "none",
    **more: bool,
) -> None:
    """Forward and backward of one case by one way, values and kernel names."""
    case, weight = make24(stored, lead, n, k, dtype, name, **more)
    x, bias, residual = leaves = case.leaves()
    assert x is not None
    kernel = f"cuda.sparse24_linear.{dtype}.{stored}"
    with way.serving("sparse24_linear", kernel, gradients=True):
        y = sparse_linear(x, weight, bias, residual, name)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], case.grad))
    case.check_forward(y)
    case.check_gradients([None if t is None else next(grads) for t in leaves], str(way))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("stored", "dtype"), KINDS)
@pytest.mark.parametrize("m", [3, 40])
def test_every_format_and_dtype(way: Way, m: int, stored: str, dtype: str) -> None:
    run(way, stored, dtype, m, 70, 330, "gelu")


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("stored", ["bf16", "s8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(way: Way, shape: tuple[int, int, int], stored: str) -> None:
    run(way, stored, "bf16", *shape, "silu")


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(way: Way, name: str) -> None:
    run(way, "f16", "f16", 4, 20, 72, name)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("lead", [[], [4, 0], [2, 1, 3, 2]], ids=str)
def test_leading_dimensions(way: Way, lead: list[int]) -> None:
    run(way, "bf16", "bf16", lead, 6, 7, "tanh")


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_optional_arguments(way: Way, bias: bool, residual: bool) -> None:
    run(way, "f16", "f16", 16, 20, 136, "gelu", bias=bias, residual=residual)


@pytest.mark.parametrize(("stored", "dtype"), KINDS)
@pytest.mark.parametrize("path", paths.PATHS)
def test_gradients_on_every_path(stored: str, dtype: str, path: str) -> None:
    """The references, on the CPU; they serve the gradients of the kernel as well."""
    case, weight = make24(stored, 5, 12, 33, dtype, "gelu")

    def f(x: Tensor, *rest: Tensor | None) -> Tensor:
        return sparse_linear(x, weight, *rest, "gelu")

    with backend.record() as names:
        grads = paths.PATHS[path](f, case.leaves(), case.grad)
    assert any(name.startswith("reference.sparse24_linear") for name in names)
    case.check_gradients(grads, path)
    case.check_forward(f(*case.inputs))


def test_opcheck() -> None:
    case, weight = make24("bf16", 5, 12, 33, "bf16", "gelu")
    x, bias, residual = case.leaves()
    paths.opcheck(torch.ops.bigops.sparse24_linear, (x, *weight.arguments, bias, residual, "gelu"))
