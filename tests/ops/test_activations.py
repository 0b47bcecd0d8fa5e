"""Activations and their derivatives where floats end, by every way that serves them.

At large values an activation is its limit to the last bit, and so is its slope; torch in float64
says which. Values of usual size are held in the tests of each op.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bigops.formats.packed import PackedWeight
from bigops.formats.quantized import QuantizedWeight
from bigops.ops.fused_linear import fused_linear
from bigops.ops.packed_linear import packed_linear
from bigops.ops.quantized_linear import quantized_linear
from tests.support.backends import CPU, HOSTRUN, REFERENCE, TRITON, Way, covering
from tests.support.cases.linear import ACTIVATIONS, GATED, PLAIN, act
from tests.support.tolerance import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LARGE = (1e4, 5e4, 1e10, 1e13, 5e13, 1e15, 1e18, 1e20, 3e38, 1e90)
SIZES = (*LARGE, 0.0, 1e-45, 1e-40, 1e-38, 6e-8)  # subnormals of each dtype among them
FACTORS = (1.0, -0.5)  # what a gate is multiplied by
INF = float("inf")


def points(dtype: torch.dtype, sizes: tuple[float, ...]) -> Tensor:
    """Those sizes that the dtype can hold, with both signs."""
    values = torch.tensor(sizes, dtype=torch.float64)
    values = values[values <= torch.finfo(dtype).max]
    return torch.cat([values, -values]).to(dtype)


def pre_activations(name: str, z: Tensor) -> Tensor:
    """z, or each z as a gate with each factor: the gates, then the factors."""
    if name not in GATED:
        return z
    gate = z.repeat(len(FACTORS))
    return torch.cat([gate, torch.tensor(FACTORS, dtype=z.dtype).repeat_interleave(len(z))])


def with_gradient(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """(act(z), its gradient for z) by torch."""
    z = z.detach().clone().requires_grad_()
    y = act(name, z)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


def fused(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same by `fused_linear`. z comes by the bias, since in a product 0 meets inf."""
    bias = z.detach().clone().requires_grad_()
    zeros = torch.zeros(1, 1, dtype=z.dtype), torch.zeros(len(z), 1, dtype=z.dtype)
    y = fused_linear(*zeros, bias, None, name)
    return y.detach()[0], torch.autograd.grad(y.sum(), bias)[0]


def packed(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same by `packed_linear`, which stands for all compressed weights."""
    bias = z.detach().clone().requires_grad_()
    weight = PackedWeight.from_dense(torch.zeros(len(z), 1, dtype=z.dtype))
    y = packed_linear(torch.zeros(1, 1, dtype=z.dtype), weight, bias, None, name)
    return y.detach()[0], torch.autograd.grad(y.sum(), bias)[0]


def hold(got: Tensor, ref: Tensor, sizes: int, what: str) -> None:
    """Size by size, ``sizes`` of them again and again: one worst error says nothing of them all."""
    plain = ref.to(got.dtype)
    columns = zip(*(t.view(-1, sizes).unbind(1) for t in (got, ref, plain)), strict=True)
    for mine, wide, torchs in columns:
        finite = torchs.isfinite()  # past the end of the dtype it is inf
        assert torch.equal(mine[~finite], torchs[~finite]), f"{what}: {mine}, float64 {wide}"
        check(mine[finite], wide[finite], torchs[finite], wide[finite].abs(), what=what)


@pytest.mark.parametrize(("way", "dtype"), covering([REFERENCE, *CPU], DTYPES), ids=str)
def test_large_and_small_values(way: Way, dtype: torch.dtype) -> None:
    hold_all(way, dtype)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_large_and_small_values_of_triton_kernels(dtype: torch.dtype) -> None:
    hold_all(TRITON, dtype)


def hold_all(way: Way, dtype: torch.dtype) -> None:
    for name in ACTIVATIONS:
        # The values of the reference are torch's own, and so is a gradient of geglu: torch's gelu
        # is NaN from 1.3e19 on in float32, and 0 for subnormals in bfloat16.
        if way is REFERENCE and name == "geglu":
            continue
        sizes = points(dtype, SIZES)
        z = pre_activations(name, sizes)
        with way.serving("fused_linear", gradients=True):
            y, grad = fused(name, z)
        wanted = with_gradient(name, z.double())
        if way is not REFERENCE:
            hold(y, wanted[0], len(sizes) // 2, f"{name} of {sizes.tolist()}")
        hold(grad, wanted[1], len(sizes) // 2, f"gradient of {name} at {sizes.tolist()}")


@pytest.mark.parametrize(("way", "dtype"), covering(CPU, DTYPES[:3]), ids=str)
def test_large_and_small_values_of_compressed_layers(way: Way, dtype: torch.dtype) -> None:
    for name in PLAIN:
        z = points(dtype, SIZES)
        with way.serving("packed_linear", gradients=True):
            y, grad = packed(name, z)
        wanted = with_gradient(name, z.double())
        hold(y, wanted[0], len(z) // 2, f"{name} of {z.tolist()}")
        hold(grad, wanted[1], len(z) // 2, f"gradient of {name} at {z.tolist()}")


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_large_and_small_values_of_cuda_kernels(dtype: torch.dtype) -> None:
    for name in PLAIN:
        z = points(dtype, SIZES)
        weight = QuantizedWeight.from_dense(torch.zeros(len(z), 32), bits=4, group=32)
        with HOSTRUN.serving("quantized_linear"):
            y = quantized_linear(torch.zeros(1, 32, dtype=dtype), weight, z, None, name)
        hold(y[0], act(name, z.double()), len(z) // 2, f"{name} of {z.tolist()}")


@pytest.mark.parametrize(("way", "dtype"), covering(CPU, DTYPES), ids=str)
def test_infinities_and_nan(way: Way, dtype: torch.dtype) -> None:
    """As torch gives them, in float64 or (where its vectors differ from it) in the same dtype."""
    z = torch.tensor([INF, -INF, float("nan")], dtype=dtype)
    for name in PLAIN:
        with way.serving("fused_linear", gradients=True):
            got = fused(name, z)
        either = with_gradient(name, z.double()), with_gradient(name, z)
        for mine, *torchs in zip(got, *either, strict=True):
            same = [(mine.double() == t.double()) | (mine.isnan() & t.isnan()) for t in torchs]
            assert bool((same[0] | same[1]).all()), f"{name}: {mine}, torch {torchs}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_derivatives_of_large_values(dtype: torch.dtype) -> None:
    for name in PLAIN:
        z = points(dtype, LARGE).requires_grad_()
        y = fused_linear(z.unsqueeze(1), torch.ones(1, 1, dtype=dtype), None, None, name)
        (grad,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        got = torch.autograd.grad(grad.sum(), z)[0] if grad.requires_grad else torch.zeros_like(z)
        wide = z.detach().double().requires_grad_()
        (grad,) = torch.autograd.grad(act(name, wide).sum(), wide, create_graph=True)
        ref = torch.zeros_like(wide)
        if grad.requires_grad:
            ref = torch.autograd.grad(grad.sum(), wide)[0]
        hold(got.detach(), ref, len(z) // 2, f"second derivative of {name} at {z.tolist()}")
