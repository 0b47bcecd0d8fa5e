"""quantized_linear by the tile registers of AMX: when they serve, and beside others that use them.

Values are in test_values.py, at level amx, and on any CPU in tests/csrc/test_emulated_tiles.py.
"""

from __future__ import annotations

import threading

import pytest
import torch

import bigops
from bigops.ops.quantized_linear import quantized_linear
from tests.support.cases.compressed import TILE_ROWS, Case, make
from tests.support.kernels_ran import ISAS, isa

pytestmark = pytest.mark.skipif("amx" not in ISAS, reason="no AMX here")


def outcome(case: Case) -> torch.Tensor:
    return quantized_linear(case.x, case.weight, case.bias, case.residual, case.name)


@pytest.mark.parametrize(
    ("form", "m", "level"),
    [
        ("int8", TILE_ROWS - 1, "avx512vnni"),
        ("int8", TILE_ROWS, "amx"),
        ("w4a8", TILE_ROWS - 1, "avx512vnni"),
        ("w4a8", TILE_ROWS, "amx"),
        ("w4a8_static", TILE_ROWS, "avx512vnni"),  # groups of 32 columns
        ("w8", TILE_ROWS, "avx512"),
    ],
)
def test_what_serves_is_explained(form: str, m: int, level: str) -> None:
    case = make(form, m, 20, 128)
    with isa("amx"):
        said = bigops.explain("quantized_linear", case.x, case.weight)
    assert said.kernel.startswith(f"cpu.{level}.quantized_linear.f32.w")
    assert ("tile registers" in said.reason) == (level == "amx")


def test_beside_the_tiles_of_onednn_in_the_same_thread() -> None:
    """Each sets the shapes of the registers that it needs, and leaves none behind."""
    case = make("int8", 37, 70, 200, name="gelu")
    a, b = torch.randn(64, 256).bfloat16(), torch.randn(256, 128).bfloat16()
    with isa("amx"):
        want, product = outcome(case), a @ b
        for _ in range(3):
            assert torch.equal(a @ b, product)
            assert torch.equal(outcome(case), want)
    case.check_forward(want)


def test_from_threads_of_the_caller() -> None:
    """The kernel gives tiles to the process; each thread sets its own."""
    case = make("int8_zero", 40, 50, 130)
    found: dict[int, torch.Tensor] = {}

    def call(i: int) -> None:
        for _ in range(20):
            found[i] = outcome(case)

    with isa("amx"):
        want = outcome(case)
        callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(found) == 4
    for got in found.values():
        assert torch.equal(got, want)
