"""Training of weights compressed to 2:4: the kernel of csrc/cuda (sparse24_gradient) on the CPU by
csrc/hostrun, by the rule. The whole backward is in test_sparse24_gradient.py.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.backend import machine
from bigops.formats.sparse24 import Sparse24Weight, sample
from bigops.ops.family import Call
from bigops.ops.sparse_linear import sparse24 as op
from bigops.ops.sparse_linear import sparse24_pack as kernels
from bigops.ops.sparse_linear.sparse24_pack import prune24
from tests.support import hostrun
from tests.support.backends import covering
from tests.support.cases.compressed import DTYPES
from tests.support.cases.sparse24 import trained24
from tests.support.kernels_ran import expect
from tests.support.tolerance import check

SOURCE = Path(__file__).parent / "hostrun_sparse24_gradient.cu"
KERNEL = "sparse24_gradient.cu"
pytestmark = [
    hostrun.needs(),
    # numpy's, of Triton's interpreter, on NaN and inf
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
# Ragged against blocks of 128 x 128 and steps of 32 rows.
SHAPES = [(1, 1, 1), (37, 130, 70), (70, 20, 200), (0, 16, 64), (5, 0, 8), (5, 8, 0)]


@pytest.fixture(scope="module")
def library() -> Path:
    hostrun.load_op("sparse24_linear")
    hostrun.load_op("sparse24_pack")
    return hostrun.load_op("sparse24_gradient")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


def inputs(m: int, n: int, k: int, dtype: str = "bf16") -> tuple[Tensor, Tensor, Sparse24Weight]:
    """gz, x and the weight."""
    to = DTYPES[dtype]
    weight = prune24(torch.randn(n, k).to(to))
    return torch.randn(m, n).to(to), torch.randn(m, k).to(to), weight


def hold(got: Tensor, gz: Tensor, x: Tensor, weight: Sparse24Weight) -> None:
    """The gradient of the values, by the rule."""
    assert got.shape == weight.values.shape
    assert got.dtype == weight.values.dtype

    def product(dtype: torch.dtype, size: Any = lambda t: t) -> Tensor:
        dense = size(gz.to(dtype)).t() @ size(x.to(dtype))
        return sample(dense, weight.meta, weight.values.dtype)

    plain = product(torch.float32).to(got.dtype)
    check(got, product(torch.float64), plain, product(torch.float64, torch.abs))


# the kernel --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), covering(SHAPES, ["bf16", "f16"]), ids=str)
def test_shapes(shape: tuple[int, int, int], dtype: str) -> None:
    gz, x, weight = inputs(*shape, dtype)
    with expect(f"cuda.sparse24_gradient.{dtype}"):
        hold(kernels.gradient(gz, x, weight.meta), gz, x, weight)


def test_every_schedule_gives_the_same_bits(library: Path) -> None:
    gz, x, weight = inputs(100, 24, 72)
    want = kernels.gradient(gz, x, weight.meta)
    hold(want, gz, x, weight)
    for seed, early in hostrun.SCHEDULES[1:]:
        hostrun.schedule(library, seed, early)
        assert torch.equal(kernels.gradient(gz, x, weight.meta), want), (seed, early)


def test_any_strides() -> None:
    gz, x, weight = inputs(9, 24, 64)
    want = kernels.gradient(gz, x, weight.meta)
    hold(want, gz, x, weight)
    shifted = torch.empty(9 * 64 + 1, dtype=torch.bfloat16)[1:].view(9, 64).copy_(x)
    assert shifted.data_ptr() % 16 != 0
    for odd in (
        (gz.t().contiguous().t(), x),
        (gz, x.repeat_interleave(2, 1)[:, ::2]),
        (gz, shifted),
    ):
        assert torch.equal(kernels.gradient(*odd, weight.meta), want)


def test_a_perturbed_result_fails() -> None:
    gz, x, weight = inputs(37, 20, 64)
    got = kernels.gradient(gz, x, weight.meta)
    got[3, 5] *= 1 + 4 * torch.finfo(torch.bfloat16).eps
    with pytest.raises(AssertionError, match="element"):
        hold(got, gz, x, weight)


def test_bytes(library: Path) -> None:
    """Of one block: gz and x are copied once, and half of a dense gradient is all that comes."""
    gz, x, weight = inputs(64, 128, 128)
    hostrun.counts(library)
    got = kernels.gradient(gz, x, weight.meta)
    assert hostrun.counts(library) == [gz.nbytes + x.nbytes, 0]
    assert got.nbytes * 2 == 128 * 128 * 2
    assert (got.nbytes + weight.meta.nbytes) * 16 == 128 * 128 * 2 * 9


@pytest.mark.slow
def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """The last block of 2^31 values and more, all in sparse files."""
    n, k, m = (1 << 26) + 128, 64, 2

    def sparse(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        return file.view(shape)

    last, x, weight = inputs(m, 128, k)
    gz = sparse("gz", [m, n], torch.bfloat16)
    meta = sparse("meta", [n // 16, 1, 32], torch.int32)
    got = sparse("values", [n, k // 2], torch.bfloat16)
    gz[:, -128:], meta[-8:] = last, weight.meta
    assert got.numel() > 2**31
    built = hostrun.build(SOURCE)
    loaded = ctypes.CDLL(str(built))
    loaded.hostrun_only(ctypes.c_int64(n // 128 - 1))
    try:
        hostrun.call(built, "run_gradient", gz, x, meta, got, m, n, k, 0)
    finally:
        loaded.hostrun_only(ctypes.c_int64(-1))
    hold(got[-128:].contiguous(), last, x, weight)
    assert not got[-256:-128].any()


def test_bad_arguments() -> None:
    gz, x, weight = inputs(9, 24, 64)
    for args, message in (
        ((gz, x.float(), weight.meta), "x: expected dtype bf16 or f16; got f32"),
        ((gz, x[0], weight.meta), r"x: expected shape \[M, K\]; got \[64\]"),
        ((gz.half(), x, weight.meta), "gz: expected dtype bf16; got f16"),
        ((gz[:5], x, weight.meta), r"gz: expected shape \[9, 24\]; got \[5, 24\]"),
        ((gz, x, weight.meta[:1]), r"meta: expected shape \[2, 1, 32\]; got \[1, 1, 32\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.bigops.sparse24_gradient(*args)


# planted faults and sanitizers -------------------------------------------------------------------

FILL_BARRIER = "__syncthreads();  // everybody's copies"
RING_BARRIER = "__syncthreads();  // the stages become"
PAIR_BARRIER = "__syncthreads();  // the pairs of all"
FAULTS = {
    "the other half of the exchange": ("odd ? c[0] : c[2], 1", "odd ? c[2] : c[0], 1"),
    "metadata of the row eight above": ("(odd * 16 + column % 16)", "(column % 16)"),
    "metadata of the next four": ("+ column % 16) & 15u", "+ (column + 4) % 16) & 15u"),
    "x unpermuted": (
        "ptx::copy_async_16(to + place(row, part),",
        "ptx::copy_async_16(to + row * kRowBytes + part * 16,",
    ),
    "step forgotten": ("step < steps; ++step", "step + 1 < steps; ++step"),
}


def run_apart(
    folder: Path,
    sanitize: str,
    fault: hostrun.Fault | None,
    shape: tuple[int, int, int],
    **how: Any,
) -> tuple[int, str]:
    """(exit code, what it said) of one call in a process of its own; values held where it ends."""
    gz, x, weight = inputs(*shape)
    library = hostrun.build(SOURCE, sanitize, fault)
    got = torch.full_like(weight.values, math.nan)
    given = (gz, x, weight.meta, got, *shape, 0)
    done = hostrun.call_apart(
        library, "run_gradient", *given, folder=folder, sanitize=sanitize, **how
    )
    if done.returncode == 0:
        hold(got, gz, x, weight)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_wrong_values(fault: str) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    gz, x, weight = inputs(70, 40, 72)
    got = torch.full_like(weight.values, math.nan)
    hostrun.call(library, "run_gradient", gz, x, weight.meta, got, 70, 40, 72, 0)
    with pytest.raises(AssertionError):
        hold(got, gz, x, weight)


@pytest.mark.slow
def test_a_wrong_wait_count_gives_wrong_values_where_copies_land_late() -> None:
    fault = (KERNEL, "copy_wait<kStages - 2>", "copy_wait<kStages - 1>")
    library = hostrun.build(SOURCE, "canary", fault)
    gz, x, weight = inputs(70, 40, 72)
    for early in (False, True):
        got = torch.full_like(weight.values, math.nan)
        given = (gz, x, weight.meta, got, 70, 40, 72, 0)
        hostrun.call(library, "run_gradient", *given, early=early)
        if early:  # hides it
            hold(got, gz, x, weight)
        else:
            with pytest.raises(AssertionError):
                hold(got, gz, x, weight)


@hostrun.needs("asan")
@pytest.mark.slow
def test_address_sanitizer(tmp_path: Path) -> None:
    """Nothing in the sound kernel; a row past the last one, read as if it were there, is seen."""
    for shape, early in (((37, 24, 72), False), ((33, 7, 65), True)):
        code, said = run_apart(tmp_path, "asan", None, shape, seed=7, early=early)
        assert code == 0, said
    fault = (KERNEL, "= m0 + row < m ?", "= m0 + row <= m ?")
    code, said = run_apart(tmp_path, "asan", fault, (37, 24, 72))
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said, said


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("barrier", "early"),
    [("", False), ("", True), (FILL_BARRIER, True), (RING_BARRIER, False), (PAIR_BARRIER, False)],
    ids=["late", "early", "fill", "ring", "pairs"],
)
def test_thread_sanitizer(barrier: str, early: bool, tmp_path: Path) -> None:
    fault = (KERNEL, barrier, "//" + barrier.split("//")[1]) if barrier else None
    code, said = run_apart(tmp_path, "tsan", fault, (130, 24, 40), early=early)
    assert code == (66 if barrier else 0), said
    assert not barrier or "ThreadSanitizer: data race" in said


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("m", [7, 3000])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_on_a_gpu(dtype: str, m: int) -> None:
    """The kernels themselves, also where they are not the default (sm_90 and up)."""
    for n, k in ((4096, 1024), (1000, 5000)):
        case = trained24(m, n, k, dtype, "gelu")
        x, grad, bias = case.x.cuda(), case.grad.cuda(), case.bias
        assert bias is not None
        call = Call(x, case.weight.map(Tensor.cuda), bias.cuda(), None, "gelu")
        with expect("cuda.sparse24_linear_grad_x", "cuda.sparse24_gradient"):
            gx, gv, gb = op.gradients(grad, call, True, True, True)
        again = op.gradients(grad, call, True, True, True)
        for one, other in zip(again, (gx, gv, gb), strict=True):
            assert torch.equal(one, other)
        case.check_gradients([gx.cpu(), gv.cpu(), gb.cpu(), case.grad], "on a GPU")
