"""csrc/hostrun runs CUDA C++ on the CPU, and sees what is wrong with it.

The wrappers of csrc/cuda/ptx.cuh are held here to plain numbers; the planted faults are on a small
product of the usual form (hostrun_kernels.cu).
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from csrc.cuda import nvcc
from tests.support import hostrun
from tests.support.tolerance import check

SOURCE = hostrun.HERE / "hostrun_kernels.cu"
pytestmark = hostrun.needs()
RAGGED = (70, 40, 104)  # against tiles of 64 x 64 x 32


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.build(SOURCE)


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    return a, b, torch.empty(m, n)


def check_product(a: Tensor, b: Tensor, c: Tensor) -> None:
    truth, scale = a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
    check(c, truth, a.float() @ b.float().t(), scale)


# values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "early"), hostrun.SCHEDULES)
@pytest.mark.parametrize("shape", [RAGGED, (64, 64, 32), (1, 1, 8)], ids=str)
def test_a_pipelined_product(
    library: Path, shape: tuple[int, int, int], seed: int, early: bool
) -> None:
    a, b, c = operands(*shape)
    copied, streamed = hostrun.call(library, "run_product", a, b, c, *shape, seed=seed, early=early)
    check_product(a, b, c)
    tiles = (-(-shape[0] // 64), -(-shape[1] // 64))
    assert copied == a.nbytes * tiles[1] + b.nbytes * tiles[0]
    assert streamed == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_multiply_of_16_bit_floats(library: Path, dtype: torch.dtype) -> None:
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(8, 16).to(dtype), torch.randn(16, 8)
    truth = c.double() + a.double() @ b.double().t()
    scale = c.double().abs() + a.double().abs() @ b.double().abs().t()
    plain = c + a.float() @ b.float().t()
    name = "bf16" if dtype == torch.bfloat16 else "f16"
    hostrun.call(library, f"run_multiply_{name}", a, b, c, seed=7)
    check(c, truth, plain, scale)


def test_multiply_of_8_bit_numbers(library: Path) -> None:
    a = torch.randint(-128, 128, (16, 32), dtype=torch.int8)
    b = torch.randint(-128, 128, (8, 32), dtype=torch.int8)
    c = torch.randint(-1000, 1000, (16, 8), dtype=torch.int32)
    truth = c + a.int() @ b.int().t()
    hostrun.call(library, "run_multiply_s8", a, b, c, seed=7)
    assert torch.equal(c, truth)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_load_matrix(library: Path, count: int, transposed: bool) -> None:
    """Lane 4 g + t has numbers 2 t and 2 t + 1 of row g; transposed, of column g."""
    matrices = torch.arange(64 * count, dtype=torch.int16).view(count, 8, 8)
    out = torch.empty(count, 32, 2, dtype=torch.int16)
    counts = hostrun.call(library, "run_load", matrices, out, count, transposed, seed=7)
    want = matrices.transpose(1, 2) if transposed else matrices
    assert torch.equal(out, want.reshape(count, 32, 2))
    assert counts == [0, matrices.nbytes]


@pytest.mark.parametrize(("seed", "early"), hostrun.SCHEDULES)
def test_warp_functions(library: Path, seed: int, early: bool) -> None:
    words = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64).to(torch.int32)
    out = torch.empty(8, 32, dtype=torch.int32)
    hostrun.call(library, "run_warp_functions", words, out, seed=seed, early=early)
    lane = torch.arange(32)
    assert torch.equal(out[0], words[5].expand(32))
    assert torch.equal(out[1], words[lane ^ 3])
    assert torch.equal(out[2], words[torch.where(lane < 30, lane + 2, lane)])
    ballot = sum(1 << i for i in range(32) if int(words[i]) & 1)
    assert torch.equal(out[3].long() & 0xFFFFFFFF, torch.full((32,), ballot))
    for row, dtype in ((4, torch.bfloat16), (5, torch.float16)):
        low = (lane.float() + 0.3).to(dtype)
        pairs = torch.stack([low + torch.tensor(0.25, dtype=dtype), low - 1.5], 1)
        assert torch.equal(out[row].view(dtype).view(32, 2), pairs)
    odd = torch.where(lane % 2 == 1, words, torch.zeros_like(words))
    assert torch.equal(out[6], odd[lane ^ 1])
    assert torch.equal(out[7], words[lane ^ 1])


def test_conversions_round_as_torch_does(library: Path) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    edges = torch.tensor(
        [
            0.0,
            -0.0,
            65504,
            65519.9,
            65520,
            -65520,
            6e-8,
            2.9e-8,
            6.1e-5,
            1e-45,
            3.4e38,
            float("inf"),
            float("-inf"),
            float("nan"),
            1.00048828125,
            1.00146484375,
        ]
        * 2
    )
    values = torch.cat([bits.view(torch.float32), torch.randn(4096), edges])
    count = values.numel()
    bf, half = torch.empty(count).bfloat16(), torch.empty(count).half()
    back = torch.empty(count)
    hostrun.call(library, "run_halves", values, bf, half, back, count)
    for got, want in (
        (bf, values.bfloat16()),
        (half, values.half()),
        (back, values.half().float()),
    ):
        nan = want.isnan()
        assert torch.equal(got.isnan(), nan)
        assert torch.equal(got[~nan], want[~nan])


def test_shared_memory_starts_as_nan_in_every_block(library: Path) -> None:
    out = torch.zeros(2, 32)
    hostrun.call(library, "run_unwritten", out)
    assert torch.equal(out[0], torch.ones(32))
    assert bool(out[1].isnan().all()), "the second block saw what the first one wrote"


# planted faults ------------------------------------------------------------------------------

KERNEL = SOURCE.name
SHORT_WAIT = (KERNEL, "ptx::copy_wait<1>()", "ptx::copy_wait<2>()")
NO_BARRIER = (KERNEL, "__syncthreads();  // everybody's", "// everybody's")
NO_REFILL_BARRIER = (KERNEL, "__syncthreads();  // before", "// before")
OVERRUN = (KERNEL, "(wm + 16 * i + lane % 16) * kPitch", "(wm + 16 * i + lane % 16 + 96) * kPitch")
DIVERGENT = (KERNEL, "__syncthreads();  // before", "if (warp != 1) __syncthreads();  // before")
NO_WAIT = (KERNEL, "ptx::copy_wait<0>();\n    }", "}")


def planted(fault: hostrun.Fault, seed: int, early: bool) -> bool:
    """Whether the values are wrong in a run with the fault."""
    a, b, c = operands(*RAGGED)
    hostrun.call(
        hostrun.build(SOURCE, fault=fault), "run_product", a, b, c, *RAGGED, seed=seed, early=early
    )
    try:
        check_product(a, b, c)
    except AssertionError:
        return True
    return False


@pytest.mark.slow
def test_a_wrong_wait_count_gives_wrong_values_where_copies_land_late() -> None:
    assert all(planted(SHORT_WAIT, seed, False) for seed in (0, 1, 7))
    assert not planted(SHORT_WAIT, 0, True)


@pytest.mark.slow
def test_a_missing_barrier_gives_wrong_values_by_some_order() -> None:
    assert any(planted(NO_BARRIER, seed, False) for seed in (0, 1, 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (DIVERGENT, "divergent barrier: threads wait at __syncthreads in line"),
        (NO_WAIT, "cp.async groups that it never waited for"),
    ],
    ids=["divergent barrier", "copies nobody waits for"],
)
def test_what_a_gpu_leaves_undefined_ends_the_run(
    fault: hostrun.Fault, message: str, tmp_path: Path
) -> None:
    a, b, c = operands(*RAGGED)
    library = hostrun.build(SOURCE, fault=fault)
    done = hostrun.call_apart(library, "run_product", a, b, c, *RAGGED, folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr


@hostrun.needs("asan")
@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, OVERRUN], ids=["none", "shared memory overrun"])
def test_address_sanitizer(fault: hostrun.Fault | None, tmp_path: Path) -> None:
    a, b, c = operands(*RAGGED)
    library = hostrun.build(SOURCE, "asan", fault)
    done = hostrun.call_apart(
        library, "run_product", a, b, c, *RAGGED, folder=tmp_path, sanitize="asan", seed=7
    )
    if fault is None:
        assert done.returncode == 0, done.stderr
        check_product(a, b, c)
    else:
        assert done.returncode != 0
        assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr
        assert "hostrun::load_matrices" in done.stderr


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize(
    "fault",
    [None, NO_BARRIER, NO_REFILL_BARRIER],
    ids=["none", "missing barrier", "missing barrier before a refill"],
)
def test_thread_sanitizer(fault: hostrun.Fault | None, early: bool, tmp_path: Path) -> None:
    shape = (64, 64, 96)  # one tile
    a, b, c = operands(*shape)
    library = hostrun.build(SOURCE, "tsan", fault)
    done = hostrun.call_apart(
        library, "run_product", a, b, c, *shape, folder=tmp_path, sanitize="tsan", early=early
    )
    if fault is None or (fault == NO_REFILL_BARRIER and not early):
        # copies that land late, at the wait, come after the barrier that follows the read
        assert done.returncode == 0, done.stderr
        check_product(a, b, c)
    else:
        assert done.returncode == 66, done.stderr
        assert "ThreadSanitizer: data race" in done.stderr


# for the GPU ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(nvcc.compiler() is None, reason="no nvcc here")
def test_the_same_source_compiles_for_a_gpu(tmp_path: Path) -> None:
    compiler = nvcc.compiler()
    assert compiler is not None
    out = tmp_path / "kernels.o"
    done = subprocess.run(
        nvcc.command(compiler, SOURCE, out, ["80"]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_inline_ptx_stands_in_one_file() -> None:
    found = [
        path.name
        for path in sorted((hostrun.ROOT / "csrc").rglob("*"))
        if path.suffix in (".cu", ".cuh", ".h", ".cpp", ".inl")
        and any(word in path.read_text() for word in ("asm volatile", "asm("))
        and path.parent.name in ("cuda", "hostrun")
    ]
    assert found == ["ptx.cuh"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.skipif(nvcc.compiler() is None, reason="no nvcc here")
def test_each_wrapper_does_on_a_gpu_what_its_twin_does(library: Path, tmp_path: Path) -> None:
    compiler = nvcc.compiler()
    assert compiler is not None
    arch = "".join(map(str, torch.cuda.get_device_capability()))
    made = tmp_path / "kernels.so"
    command = [compiler, *nvcc.NVCC_FLAGS, f"-arch=sm_{arch}", "-shared", str(SOURCE)]
    subprocess.run([*command, "-o", str(made)], check=True)
    device = ctypes.CDLL(str(made))
    words = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int64).to(torch.int32)
    a8, b8 = (torch.randint(-128, 128, (r, 32), dtype=torch.int8) for r in (16, 8))
    a16, b16 = torch.randint(-9, 10, (16, 16)), torch.randint(-9, 10, (8, 16))
    b32, b64 = torch.randint(-9, 10, (8, 32)), torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    rising = torch.tensor([0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110])
    places = (rising[torch.randint(6, (32, 8))] << torch.arange(0, 32, 4)).sum(1).to(torch.int32)
    matrices = torch.arange(256, dtype=torch.int16)
    whole = torch.arange(128).view(16, 8)  # exact in every type: sums in any order agree
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("run_multiply_bf16", (a16.bfloat16(), b16.bfloat16(), whole.float())),
        ("run_multiply_f16", (a16.half(), b16.half(), whole.float())),
        ("run_multiply_s8", (a8, b8, whole.int())),
        ("run_sparse_bf16", (a16.bfloat16(), b32.bfloat16(), places, whole.float(), 1)),
        ("run_sparse_f16", (a16.half(), b32.half(), places, whole.float(), 0)),
        ("run_sparse_s8", (a8, b64, places, whole.int())),
        ("run_warp_functions", (words, torch.zeros(8, 32, dtype=torch.int32))),
        ("run_product", (*operands(*RAGGED), *RAGGED)),
    ]
    for count in (1, 2, 4):
        for transposed in (0, 1):
            out = torch.zeros(count * 32, dtype=torch.int32)
            calls.append(("run_load", (matrices, out, count, transposed)))
    for function, given in calls:
        there = [t.cuda() if isinstance(t, Tensor) else t for t in given]
        getattr(device, function)(*hostrun.convert(tuple(there), []))
        torch.cuda.synchronize()
        hostrun.call(library, function, *given)
        for here, on_gpu in zip(given, there, strict=True):
            if function == "run_product" and isinstance(here, Tensor):
                check_product(*(t.cpu() for t in there[:3]))
            elif isinstance(here, Tensor):
                assert torch.equal(here, on_gpu.cpu()), function
