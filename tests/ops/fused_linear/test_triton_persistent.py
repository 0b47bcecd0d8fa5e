"""The persistent GEMM under the interpreter: values, which form runs, and its scratch memory."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

pytest.importorskip("triton")

from triton.runtime import _allocation

from bigops.kernels import fused_linear as kernels
from bigops.kernels.common import gemm_persistent, tile_walk, tiles
from bigops.kernels.common import product as products
from bigops.kernels.common.activation import NAMES
from bigops.kernels.common.tiles import TileConfig
from tests.ops.fused_linear.test_triton import (
    Case,
    check_forward,
    guarded,
    make,
    run_and_check,
)
from tests.support import triton_interpreter
from tests.support.backends import covering
from tests.support.cases.linear import GATED
from tests.support.planted import CAUGHT, plant
from tests.support.tolerance import check

triton_interpreter.install()

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TILE = TileConfig(32, 32, 32, 2, 4, 2, 2, persistent=True, programs=2)


class _Count:
    """A kernel that counts its launches and the programs of the last."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches, self.grid = kernel, 0, (0,)
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches, self.grid = self.launches + 1, grid
        return self.kernel[grid]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[str, _Count]:
    """The launches of both forms."""
    counts = {name: _Count(getattr(products, name)) for name in ("gemm", "gemm_persistent")}
    for name, count in counts.items():
        monkeypatch.setattr(products, name, count)
    return counts


@pytest.mark.parametrize(("name", "dtype"), covering(NAMES, DTYPES), ids=str)
def test_every_activation_forward_and_backward(
    name: str, dtype: torch.dtype, ran: dict[str, _Count]
) -> None:
    """Three products in their three orders; 33 x 40 x 40 is ragged against the tile."""
    run_and_check(make(33, 40, 40, dtype, name), config=TILE)
    assert (ran["gemm_persistent"].launches, ran["gemm"].launches) == (3, 0)


SHAPES = [(1, 8, 8), (70, 8, 40), (33, 72, 8), (64, 64, 64), (70, 72, 16)]


@pytest.mark.parametrize("name", ["none", "gelu_tanh", "geglu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], name: str, ran: dict[str, _Count]) -> None:
    run_and_check(make(*shape, torch.bfloat16, name), config=TILE)
    assert (ran["gemm_persistent"].launches, ran["gemm"].launches) == (3, 0)
    assert ran["gemm_persistent"].grid[0] <= 4  # 2 multiprocessors of 2 programs each


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_wide_sweep(name: str, dtype: torch.dtype, ran: dict[str, _Count]) -> None:
    config = TileConfig(64, 32, 64, 8, 4, 3, 1, persistent=True, programs=1)
    run_and_check(make(200, 136, 104, dtype, name), config=config)
    assert ran["gemm"].launches == 0


def test_rows_longer_than_the_matrix_is_wide(ran: dict[str, _Count]) -> None:
    """Views of longer rows; what stands beside them is NaN, and no column or row of K."""
    case = make(40, 21, 19, torch.float32, "swiglu")
    wide_x, wide_w = (torch.full((rows, 24), float("nan")) for rows in (40, 42))
    wide_x[:, :19], wide_w[:, :19] = case.x, case.weight
    with guarded():
        y, _ = kernels.forward(
            wide_x[:, :19], wide_w[:, :19], case.bias, case.residual, case.code, config=TILE
        )
    assert (ran["gemm_persistent"].launches, ran["gemm"].launches) == (1, 0)
    check_forward(case, y, None, bias=True, residual=True)
    kernels.forward(case.x, case.weight, case.bias, case.residual, case.code)
    assert ran["gemm"].launches == 1  # rows of 19 floats have no descriptor


def _launched(ran: dict[str, _Count], x: Tensor, weight: Tensor, config: TileConfig) -> str:
    before = {name: count.launches for name, count in ran.items()}
    y, _ = kernels.forward(x, weight, config=config)
    x64, weight64 = x.double(), weight.double()
    check(y, x64 @ weight64.t(), x @ weight.t(), x64.abs() @ weight64.abs().t())
    launched = [name for name, count in ran.items() if count.launches > before[name]]
    assert len(launched) == 1
    return launched[0]


def test_what_has_no_descriptor_goes_by_pointers(ran: dict[str, _Count]) -> None:
    x, weight = torch.randn(20, 16), torch.randn(12, 16)
    flat = torch.randn(20 * 16 + 1)
    cases: dict[str, tuple[Tensor, TileConfig]] = {
        "gemm_persistent": (x, TILE),
        "another config": (x, TILE._replace(persistent=False)),
        "a base that does not divide by 16": (flat[1:].view(20, 16), TILE),
        "rows of 17 floats": (torch.randn(20, 17)[:, :16], TILE),
        "no unit stride": (torch.randn(20, 32)[:, ::2], TILE),
        "rows that are one row": (torch.randn(1, 16).expand(20, 16), TILE),
        "columns that are one column": (torch.randn(20, 1).expand(20, 16), TILE),
        "nothing to sum": (torch.randn(20, 0), TILE),
    }
    for what, (a, config) in cases.items():
        w = weight[:, : a.shape[1]]
        expected = "gemm_persistent" if what == "gemm_persistent" else "gemm"
        assert _launched(ran, a, w, config) == expected, what
    assert _launched(ran, torch.randn(16, 20).t(), weight, TILE) == "gemm_persistent"
    assert gemm_persistent.described(x)
    assert not gemm_persistent.described(x.as_strided((1, 16), (2**40 // 4, 1)))


def test_the_committed_choice_is_persistent_only_for_described_operands(
    ran: dict[str, _Count], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def choose(*arguments: Any) -> TileConfig:
        asked.append(arguments[-2:])
        return tiles.choose_config(*arguments)

    monkeypatch.setattr(products, "choose_config", choose)
    x, weight = torch.randn(128, 16), torch.randn(128, 16)
    kernels.forward(x, weight)
    assert ran["gemm_persistent"].launches == 1
    kernels.forward(torch.randn(1, 16).expand(128, 16), weight)
    kernels.forward(x, weight[:120])
    assert ran["gemm"].launches == 2
    assert asked == [(True, True), (True, False), (False, False)]


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_values_with_few_and_many_programs(
    name: str, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiprocessors", lambda device: programs)
    case = make(70, 72, 32, torch.bfloat16, name)
    run_and_check(case, config=TILE._replace(programs=1))


# --- scratch memory for the descriptors ---------------------------------------------------------


def _users(size: int, alignment: int, stream: int | None) -> Any:
    raise AssertionError("the user's allocator was asked for our memory")


def test_the_users_allocator_stays_and_is_not_asked() -> None:
    found: list[Any] = []

    def launch() -> None:
        found.append(_allocation._allocator.get()(256, 128, None))

    def here() -> None:
        triton.set_allocator(_users)
        gemm_persistent.with_scratch(torch.device("cpu"), launch)
        assert _allocation._allocator.get() is _users

    contextvars.copy_context().run(here)
    assert _allocation._allocator.get() is _allocation._NULL_ALLOCATOR
    (memory,) = found
    assert (memory.numel(), memory.dtype, memory.device.type) == (256, torch.int8, "cpu")


def test_the_users_allocator_stays_when_a_launch_fails() -> None:
    def launch() -> None:
        raise MemoryError("no memory")

    def here() -> None:
        triton.set_allocator(_users)
        with pytest.raises(MemoryError):
            gemm_persistent.with_scratch(torch.device("cpu"), launch)
        assert _allocation._allocator.get() is _users

    contextvars.copy_context().run(here)


def test_launches_of_other_threads_find_memory_on_their_own_device() -> None:
    """One launch waits inside while another one of another device begins and ends."""
    inside, done = threading.Event(), threading.Event()
    found = {}

    def outer() -> None:
        inside.set()
        assert done.wait(10)
        found["outer"] = _allocation._allocator.get()(1, 1, None).device.type

    def inner() -> None:
        assert inside.wait(10)
        gemm_persistent.with_scratch(
            torch.device("meta"),
            lambda: found.update(inner=_allocation._allocator.get()(1, 1, None).device.type),
        )
        done.set()

    threads = [
        threading.Thread(target=gemm_persistent.with_scratch, args=(torch.device("cpu"), outer)),
        threading.Thread(target=inner),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {"outer": "cpu", "inner": "meta"}


def test_memory_is_asked_of_torch_at_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it lies on the stream, and in the graph, of that launch; nothing is kept."""
    sizes = []
    empty = torch.empty

    def counted(*size: Any, **options: Any) -> Tensor:
        sizes.append((size, options))
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    device = torch.device("cpu")
    for _ in range(2):
        gemm_persistent.with_scratch(device, lambda: _allocation._allocator.get()(128, 128, None))
    assert sizes == [((128,), {"dtype": torch.int8, "device": device})] * 2
    with pytest.raises(AssertionError, match="aligned to 1024"):
        gemm_persistent.with_scratch(device, lambda: _allocation._allocator.get()(128, 1024, None))


ON_A_GPU = """
import torch
from bigops.kernels import fused_linear as kernels
from bigops.kernels.common import product as products
from bigops.kernels.common.tiles import TileConfig
from tests.support.tolerance import check

tile = TileConfig(128, 128, 64, 8, 8, 3, 4, persistent=True, programs=2)
products.gemm = None  # the other form would fail
for dtype in (torch.bfloat16, torch.float16):
    x = torch.randn(4000, 1040, device="cuda", dtype=dtype)
    weight = torch.randn(2064, 1040, device="cuda", dtype=dtype) / 32
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    kernels.forward(x, weight, config=tile)  # compiled before it is captured
    with torch.cuda.graph(graph, stream=side):
        y = kernels.forward(x, weight, config=tile)[0]
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        clobber = torch.full((1 << 20,), 255, dtype=torch.uint8, device="cuda")
        again = kernels.forward(x, weight, config=tile)[0]
        assert torch.equal(y, again)
        truth, plain = x.double() @ weight.double().t(), x @ weight.t()
        check(y, truth, plain, x.double().abs() @ weight.double().abs().t(), what="y")
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu_by_itself_and_in_a_graph() -> None:
    if torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA before sm_90")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- planted faults -----------------------------------------------------------------------------

FAULTS = {
    "a tile left out": ("tiles_m * tiles_n, tl.num", "tiles_m * tiles_n - 1, tl.num"),
    "every tile by every program": ("tl.range(tl.program_id(0), ", "tl.range(0, "),
    "last step of K left out": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "band walked wrongly": ("tile_n = (index % band) // band_rows", "tile_n = index % band"),
    "up columns of the gate": ("N + col0, k0", "N, k0"),
    "a map past the last row": ("descriptor(a, [M, K]", "descriptor(a, [M + 8, K]"),
    "a map past the end of a row": ("b, [width, K], [", "b, [width, K + 8], ["),
}


def _faulty(folder: Path, old: str, new: str) -> ModuleType:
    return plant(kernels, folder, old, new, tile_walk, gemm_persistent, products)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    module = _faulty(tmp_path, *FAULTS[fault])
    with pytest.raises(CAUGHT):
        run_and_check(_long_rows(make(70, 40, 72, torch.float32, "swiglu")), module, TILE)


def test_a_copy_without_a_fault_passes(tmp_path: Path) -> None:
    module = _faulty(tmp_path, "M,", "M,")
    run_and_check(_long_rows(make(70, 40, 72, torch.float32, "swiglu")), module, TILE)
    assert "swiglu" in GATED


def _long_rows(case: Case) -> Case:
    """The weight in longer rows with NaN beside it."""
    wide = torch.full((case.weight.shape[0], case.weight.shape[1] + 8), float("nan"))
    wide[:, : case.weight.shape[1]] = case.weight
    return case._replace(weight=wide[:, : case.weight.shape[1]])
