"""The planted faults and the rung that catches each: one line a fault, checked to be there.

A fault is planted in the source of a kernel (or in a copy of what a check reads) and must be seen.
This table does not run them, the named tests do; it fails when one of them is renamed, loses its
parameter or is no test any more.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

# (fault, what sees it, file of tests, test, id of its parameter or "")
TABLE = [
    # Triton, interpreted
    (
        "bfloat16 without the repair",
        "values under the interpreter",
        "kernels/test_triton_interpreter",
        "test_unrepaired_interpreter_is_wrong",
        "",
    ),
    (
        "a store without its mask",
        "bounds of the interpreter",
        "kernels/test_triton_interpreter",
        "test_unmasked_store_is_caught",
        "",
    ),
    (
        "a load without its mask",
        "bounds of the interpreter",
        "kernels/test_triton_interpreter",
        "test_unmasked_load_is_caught",
        "",
    ),
    (
        "two programs at one place",
        "stores of the interpreter",
        "kernels/test_triton_interpreter",
        "test_race_between_programs_is_caught",
        "",
    ),
    (
        "a store without its mask",
        "guards around outputs",
        "ops/fused_linear/test_triton",
        "test_guards_alone_see_an_unmasked_store",
        "",
    ),
    (
        "the last step along K dropped",
        "values by the numerics rule",
        "ops/fused_linear/test_triton",
        "test_planted_fault_in_the_kernels_is_caught",
        "last K step dropped",
    ),
    (
        "an edge of K that is not masked",
        "values by the numerics rule",
        "ops/low_rank_linear/test_triton",
        "test_planted_fault_is_caught",
        "K edge not masked",
    ),
    (
        "the blocks of the next line",
        "values by the numerics rule",
        "ops/sparse_linear/test_triton",
        "test_planted_fault_is_caught",
        "blocks of the next line taken along",
    ),
    (
        "an epilogue through memory",
        "bytes counted",
        "kernels/test_traffic",
        "test_an_epilogue_through_memory_is_caught",
        "",
    ),
    (
        "a low-rank product through memory",
        "bytes counted",
        "kernels/test_traffic",
        "test_a_low_rank_product_through_memory_is_caught",
        "",
    ),
    (
        "an operand read twice",
        "bytes counted",
        "kernels/test_traffic",
        "test_a_kernel_that_reads_twice_is_caught",
        "",
    ),
    (
        "a call that another kernel serves",
        "names of the kernels that ran",
        "house/test_backends",
        "test_a_call_that_another_way_serves_is_seen",
        "",
    ),
    # Triton, its TTIR by ttsem
    (
        "store or load without a mask, a race, a value nobody wrote",
        "ttsem",
        "kernels/test_ttsem",
        "test_canaries_are_caught_and_one_case_of_each_kind_is_clean",
        "",
    ),
    (
        "the same in the GEMM",
        "ttsem",
        "kernels/test_ttsem",
        "test_faults_planted_in_the_gemm_are_caught",
        "",
    ),
    # Triton, compiled
    (
        "a spilling config",
        "gate on the machine code",
        "kernels/test_gpu_compile",
        "test_gate_sees_spills",
        "",
    ),
    (
        "too much shared memory",
        "gate on the machine code",
        "kernels/test_gpu_compile",
        "test_gate_sees_too_much_shared_memory",
        "",
    ),
    (
        "no matrix instruction, atomics",
        "gate on the machine code",
        "kernels/test_gpu_compile",
        "test_gate_sees_a_missing_matrix_instruction_and_atomics",
        "",
    ),
    (
        "an int8 product on the float unit",
        "gate on the machine code",
        "kernels/test_gpu_compile",
        "test_gate_sees_an_int8_product_without_its_instruction",
        "",
    ),
    # CUDA C++ on the CPU
    (
        "a wrong cp.async wait count",
        "copies that land late, shared memory of NaN",
        "csrc/test_hostrun",
        "test_a_wrong_wait_count_gives_wrong_values_where_copies_land_late",
        "",
    ),
    (
        "shared memory that nobody wrote",
        "NaN in every block",
        "csrc/test_hostrun",
        "test_shared_memory_starts_as_nan_in_every_block",
        "",
    ),
    (
        "a missing barrier, read after write",
        "values in one of three orders of threads",
        "csrc/test_hostrun",
        "test_a_missing_barrier_gives_wrong_values_by_some_order",
        "",
    ),
    (
        "a missing barrier, read after write",
        "ThreadSanitizer",
        "csrc/test_hostrun",
        "test_thread_sanitizer",
        "missing barrier",
    ),
    (
        "a missing barrier before a refill",
        "ThreadSanitizer where copies land early",
        "csrc/test_hostrun",
        "test_thread_sanitizer",
        "missing barrier before a refill",
    ),
    (
        "a divergent barrier",
        "end of the run",
        "csrc/test_hostrun",
        "test_what_a_gpu_leaves_undefined_ends_the_run",
        "divergent barrier",
    ),
    (
        "copies that nobody waits for",
        "end of the run",
        "csrc/test_hostrun",
        "test_what_a_gpu_leaves_undefined_ends_the_run",
        "copies nobody waits for",
    ),
    (
        "shared memory overrun through ldmatrix",
        "AddressSanitizer",
        "csrc/test_hostrun",
        "test_address_sanitizer",
        "shared memory overrun",
    ),
    (
        "metadata of 2:4 in another lane",
        "values by the numerics rule",
        "ops/sparse_linear/test_cuda_sparse24",
        "test_a_planted_fault_gives_wrong_values",
        "metadata of the neighbour lane",
    ),
    (
        "selector of the other half",
        "values by the numerics rule",
        "ops/sparse_linear/test_cuda_sparse24",
        "test_a_planted_fault_gives_wrong_values",
        "selector of the other half",
    ),
    (
        "metadata that the manual forbids",
        "end of the run",
        "formats/test_sparse24",
        "test_metadata_that_the_manual_forbids_ends_the_run",
        "",
    ),
    (
        "a wrong wait count in 2:4",
        "metadata that has not landed",
        "ops/sparse_linear/test_cuda_sparse24",
        "test_a_wrong_wait_count_meets_metadata_that_has_not_landed",
        "",
    ),
    (
        "a divergent barrier in a decode kernel",
        "end of the run",
        "ops/quantized_linear/test_cuda",
        "test_a_divergent_barrier_ends_the_run",
        "",
    ),
    # CUDA C++, compiled
    ("registers capped at 32", "ptxas", "csrc/test_cuda_build", "test_a_spill_is_seen", ""),
    (
        "a 2:4 product on the dense unit",
        "the machine code",
        "csrc/test_cuda_build",
        "test_a_2_4_product_without_its_instructions_is_seen",
        "",
    ),
    # C++ on the CPU
    (
        "a read past a tensor's end",
        "AddressSanitizer",
        "csrc/test_sanitizers",
        "test_a_planted_fault_is_found",
        "reads_past",
    ),
    ("a sum that wraps", "UBSan", "csrc/test_sanitizers", "test_a_planted_fault_is_found", "wraps"),
    (
        "a bit of a weight",
        "emulation",
        "csrc/test_emulated_tiles",
        "test_a_wrong_weight_is_seen",
        "",
    ),
    (
        "x shorter than a tile register",
        "AddressSanitizer",
        "csrc/test_emulated_tiles",
        "test_a_read_past_the_rows_of_x_is_seen",
        "",
    ),
]


def parameters(test: Any) -> Iterator[str]:
    """What stands for the parameters of a test in its id, one mark at a time."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args
        ids = mark.kwargs.get("ids")
        for i, value in enumerate(values):
            if isinstance(ids, list | tuple):
                yield str(ids[i])
            elif isinstance(value, str):
                yield value
            elif isinstance(value, tuple):
                yield from (part for part in value if isinstance(part, str))
            else:
                yield f"{names}{i}"


@pytest.mark.parametrize(
    ("fault", "seen_by", "file", "test", "parameter"), TABLE, ids=[row[0] for row in TABLE]
)
def test_a_test_plants_this_fault(
    fault: str, seen_by: str, file: str, test: str, parameter: str
) -> None:
    module = importlib.import_module(f"tests.{file}".replace("/", "."))
    function = getattr(module, test, None)
    assert callable(function), f"{fault}, seen by {seen_by}: no {test} in {file}.py"
    if parameter:
        assert parameter in set(parameters(function)), f"{fault}: {test} has no {parameter!r}"


def test_a_line_without_its_test_is_seen() -> None:
    with pytest.raises(AssertionError, match="no test_nothing in csrc/test_hostrun.py"):
        test_a_test_plants_this_fault("a", "b", "csrc/test_hostrun", "test_nothing", "")
    with pytest.raises(AssertionError, match="has no 'another'"):
        test_a_test_plants_this_fault(
            "a", "b", "csrc/test_hostrun", "test_thread_sanitizer", "another"
        )
