"""Bytes that the Triton kernels move, counted under the interpreter and held to formulas.

Each byte of an argument counts once a launch. What an op must move is its inputs read and its
outputs written, once each: an epilogue adds no intermediate, and neither does the low-rank product.
Where a gradient needs an intermediate the formula says which.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import bigops
from bigops.kernels import fused_linear as linear_kernels
from bigops.kernels import linear_cross_entropy as loss_kernels
from bigops.kernels.common import gemm as gemm_kernels
from bigops.kernels.common import product as products
from bigops.kernels.common import tiles
from bigops.kernels.common.activation import NAMES
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.low_rank_linear import kernel as low_rank_kernels
from bigops.ops.fp8_linear import triton as fp8_path
from bigops.ops.fused_linear import triton as linear_path
from bigops.ops.low_rank_linear import triton as low_rank_path
from bigops.ops.quantized_linear import triton as quantized_path
from bigops.ops.sparse_linear import triton as sparse_path
from tests.support import triton_interpreter
from tests.support.cases import compressed as compressed_cases
from tests.support.cases import linear as linear_cases
from tests.support.cases import low_rank as low_rank_cases
from tests.support.cases.optimizer import Problem
from tests.support.kernels_ran import expect
from tests.support.planted import plant
from tests.support.traffic import Traffic, counting

triton_interpreter.install()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on masked lanes
M, N, K = 70, 45, 90
BF16 = torch.bfloat16


def size(*tensors: Tensor | None) -> int:
    return sum(t.nbytes for t in tensors if t is not None)


# dense --------------------------------------------------------------------------------------


def check_epilogue(traffic: Traffic, read: int, written: int) -> None:
    """What the op reads and writes is what it must, within the 1.1 that is promised of it."""
    found = traffic.sums("once")
    assert found[0] <= 1.1 * read, f"reads {found[0]} bytes, ideal {read}: {list(traffic)}"
    assert found[1] <= 1.1 * written, f"writes {found[1]} bytes, ideal {written}: {list(traffic)}"
    assert sum(found) == read + written, f"less than it must: {found}, ideal {(read, written)}"


@pytest.mark.parametrize(
    ("name", "parts"), [("none", False), ("gelu", False), ("gelu", True), ("swiglu", True)]
)
def test_an_epilogue_adds_no_bytes(name: str, parts: bool) -> None:
    case = linear_cases.make(M, N, K, BF16, name)
    with counting() as traffic, expect("triton.fused_linear.bf16"):
        y, z = linear_path.forward(case.call, parts)
    assert traffic.kernels == ["gemm"]
    check_epilogue(traffic, size(*case.inputs), size(y, z))


@pytest.mark.parametrize("name", ["gelu", "geglu"])
def test_the_programs_of_a_product_read_each_operand_once(name: str) -> None:
    """x by every column of tiles, W and bias by every row of tiles; the rest lies in L2."""
    case = linear_cases.make(M, N, K, BF16, name)
    with counting() as traffic:
        y, _ = linear_path.forward(case.call, False)
    gated = name == "geglu"
    config = tiles.choose_config("interpreter", BF16, M, N, K, gated, False)
    rows, columns = -(-M // config.block_m), -(-N // config.block_n)
    read = columns * size(case.x) + rows * size(case.weight, case.bias) + size(case.residual)
    assert traffic.sums("all") == (read, size(y))


@pytest.mark.parametrize("name", ["gelu", "geglu"])
def test_the_persistent_form_moves_no_more(name: str) -> None:
    case = linear_cases.make(M, 48, 88, BF16, name)  # sizes that have tensor descriptors
    tile = TileConfig(32, 32, 32, 2, 4, 2, 1, persistent=True)
    with counting() as traffic:
        y, _ = linear_kernels.forward(*case.inputs, NAMES.index(name), config=tile)
    assert traffic.kernels == ["gemm_persistent"]
    check_epilogue(traffic, size(*case.inputs), size(y))


@pytest.mark.parametrize("name", ["none", "swiglu"])
def test_gradients_of_a_dense_product_move_gz_and_nothing_else(name: str) -> None:
    """gz is written once and read by both products; column sums go through one row a chunk."""
    case = linear_cases.make(M, N, K, BF16, name)
    _, z = linear_path.forward(case.call, True)
    with counting() as traffic, expect("triton.fused_linear_backward.bf16"):
        gx, gw, gb = linear_path.backward(case.grad, case.call, z, True, True, True)
    assert traffic.kernels == ["activation_backward", "sum_rows", "gemm", "gemm"]
    tile = tiles.pointwise_config("interpreter")
    chunks = -(-M // (-(-M // tile.max_chunks // tile.block_m) * tile.block_m))
    partial = chunks * gb.numel() * 4
    gz, saved = (0, 0) if name == "none" else (M * gb.numel() * 2, size(z))
    through = gz or size(case.grad)
    read = size(case.grad) + saved + partial + 2 * through + size(case.weight, case.x)
    check_epilogue(traffic, read, gz + partial + size(gx, gw, gb))


# low rank -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("base", "parts"), [(False, False), (True, True)])
def test_the_low_rank_product_stays_on_chip(base: bool, parts: bool) -> None:
    case = low_rank_cases.make(M, N, K, 9, BF16, "gelu", base=base)
    with counting() as traffic, expect("triton.low_rank_linear.bf16.fused"):
        y, t, z = low_rank_path.forward(case.call, parts)
    assert traffic.kernels == ["low_rank_product"]
    check_epilogue(traffic, size(*case.inputs), size(y, t, z))


@pytest.mark.parametrize("base", [False, True], ids=["factors", "lora"])
def test_gradients_of_the_low_rank_product(base: bool) -> None:
    """gz and gt = gz u are written once each, whatever K and N."""
    case = low_rank_cases.make(M, N, K, 9, BF16, "gelu", base=base)
    x, u, v, _, _, dense = case.inputs
    _, t, z = low_rank_path.forward(case.call, True)
    assert t is not None
    with counting() as traffic, expect("triton.low_rank_linear_backward.bf16.fused"):
        needs = (True, True, True, base, True)
        found = low_rank_path.backward(case.grad, case.call, t, z, *needs)
    products = ["gemm"] * (3 if base else 2)
    assert traffic.kernels == ["activation_backward", "sum_rows", "low_rank_product", *products]
    tile = tiles.pointwise_config("interpreter")
    chunks = -(-M // (-(-M // tile.max_chunks // tile.block_m) * tile.block_m))
    partial, gz, gt = chunks * N * 4, M * N * 2, M * 9 * 2
    read = size(case.grad, z) + partial + 2 * gz + size(u, v, dense) + gt + size(x, t)
    read += gz + size(x) if base else 0
    check_epilogue(traffic, read, gz + gt + partial + size(*found))


# compressed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["w8_zero", "w4_zero"])
def test_weight_only_products_read_the_codes(form: str) -> None:
    """x, codes, scales and zero points once each, and y written: no dequantised weight."""
    case = compressed_cases.make(form, M, 48, 128, "bf16", "gelu")
    with counting() as traffic, expect("triton.quantized_linear.bf16"):
        y = quantized_path.forward(case.call)
    assert traffic.kernels == ["quantized_gemm"]
    stored = size(case.weight.values, case.weight.scale, case.weight.zero_point)
    check_epilogue(traffic, size(*case.inputs) + stored, size(y))
    bits = case.weight.bits
    assert case.weight.values.nbytes * 16 == bits * 2 * 48 * 128, "codes at bits/16 of bfloat16"


@pytest.mark.parametrize("form", ["int8_zero", "w4a8"])
def test_quantised_rows_are_written_once(form: str) -> None:
    """The one intermediate: x in one byte, with three numbers a row."""
    case = compressed_cases.make(form, M, 48, 128, "bf16", "gelu")
    with counting() as traffic, expect("triton.quantized_linear.bf16"):
        y = quantized_path.forward(case.call)
    assert traffic.kernels == ["act_quant", "quantized_gemm"]
    weight, rows = case.weight, M * 128 + 3 * 4 * M
    used = 0 if weight.zero_point is None else 4 * M  # sums of q, for the zero points of W
    stored = size(weight.values, weight.scale, weight.zero_point, weight.row_sum)
    read = size(*case.inputs) + stored + M * 128 + 2 * 4 * M + used
    check_epilogue(traffic, read, rows + size(y))


@pytest.mark.parametrize("form", ["w_fp8", "w_fp8_block", "fp8", "fp8_block"])
def test_fp8_weights_are_read_as_they_are_stored(form: str) -> None:
    """One byte a number. Where x is rounded, its codes and scales are the one intermediate."""
    case = compressed_cases.make(form, M, 48, 128, "bf16", "gelu")
    with counting() as traffic, expect("triton.fp8_linear.bf16"):
        y = fp8_path.forward(case.call)
    rounded = case.weight.activations != "none"
    assert traffic.kernels == ["quantize_fp8"] * rounded + ["fp8_gemm"]
    rows = (M * 128 + 4 * M) * rounded
    stored = size(case.weight.values, case.weight.scale)
    check_epilogue(traffic, size(*case.inputs) + stored + rows, size(y) + rows)


@pytest.mark.parametrize("form", ["w8_zero", "w4_zero", "int8", "w_fp8", "w_fp8_block"])
def test_the_gradient_of_x_reads_the_codes(form: str) -> None:
    """gz once, codes, scales and zero points once, gx written: no dequantised weight."""
    case = compressed_cases.make(form, M, 48, 128, "bf16", residual=False)
    of, path = ("fp8", fp8_path) if "fp8" in form else ("quantized", quantized_path)
    with counting() as traffic, expect(f"triton.{of}_linear_backward.bf16"):
        gx, _ = path.backward(case.grad, case.call, True, False)
    assert traffic.kernels == [f"{of}_gradient"]
    zero_point = getattr(case.weight, "zero_point", None)
    stored = size(case.weight.values, case.weight.scale, zero_point)
    check_epilogue(traffic, size(case.grad) + stored, size(gx))


@pytest.mark.parametrize("pattern", ["16x16", "32x32"])
def test_sparse_products_read_the_stored_blocks(pattern: str) -> None:
    """Forward and both gradients: values once, only x where blocks are; no dense W or gradient."""
    case = compressed_cases.make(
        "sparse_bf16",
        M,
        64,
        96,
        "bf16",
        pattern=pattern,
        sparsity=0.7,
        bias=False,
        residual=False,
        values=True,
    )
    side = int(pattern[:2])
    full = case.dense.view(64 // side, side, 96 // side, side).abs().sum((1, 3)) > 0
    columns, lines = int(full.any(0).sum()) * side, int(full.any(1).sum()) * side
    values = case.weight.values
    assert values.nbytes == int(full.sum()) * side * side * 2

    blocks, why = sparse_path.blocks_of(case.call, "interpreter")
    assert blocks is not None, why

    def moved(traffic: Traffic) -> tuple[list[str], dict[str, int], dict[str, int]]:
        tables = ("across", "step", "first", "order", "task_line", "task_first")
        (launch,) = traffic
        read = {k: b for k, b in launch.once["read"].items() if k not in tables}
        small = sum(b for k, b in launch.once["read"].items() if k in tables)
        assert small <= 4 * (2 * values.shape[0] + 64 + 96)
        return traffic.kernels, read, dict(launch.once["written"])

    with counting() as traffic, expect("triton.sparse_linear.bf16"):
        y = sparse_path.forward(case.call, blocks)
    assert moved(traffic) == (
        ["block_product"],
        {"x": M * columns * 2, "values": values.nbytes},
        {"y": size(y)},
    )
    with counting() as traffic:
        gx, *_ = sparse_path.backward(case.grad, case.call, blocks, True, False, False)
    assert moved(traffic) == (
        ["block_product"],
        {"x": M * lines * 2, "values": values.nbytes},
        {"y": size(gx)},
    )
    with counting() as traffic:
        _, gv, _ = sparse_path.backward(case.grad, case.call, blocks, False, True, False)
    assert moved(traffic) == (
        ["block_samples"],
        {"x": M * columns * 2, "gz": M * lines * 2},
        {"out": size(gv)},
    )


# loss and optimiser -------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
def test_the_loss_writes_its_gradient_over_the_logits(gradient: bool) -> None:
    logits, target = torch.randn(5, 700).to(BF16), torch.randint(700, (5,))
    bias, scale = torch.randn(700).to(BF16), torch.ones(5)
    with counting() as traffic:
        losses, _ = loss_kernels.chunk(
            logits, target, bias, None, scale, 700.0, -100, 0.0, 0.0, 0.0, gradient
        )
    assert traffic.kernels == ["cross_entropy_rows"]
    read = size(logits, target, bias) + (size(scale) if gradient else 0)
    check_epilogue(traffic, read, size(losses) + (size(logits) if gradient else 0))


@pytest.mark.parametrize("eight_bit", [False, True])
def test_adamw_moves_each_number_once(eight_bit: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read: parameter, gradient, both states; written: all but the gradient."""
    op = sys.modules["bigops.ops.fused_adamw"]
    monkeypatch.setattr(op, "step_adamw", op.choose.adamw)
    problem = Problem(torch.float32, shapes=[(257,), (7, 11, 13)], eight_bit=eight_bit)
    grads = problem.grads(0)
    monkeypatch.setattr(problem, "grads", lambda _: grads)
    with triton_interpreter.reachable([*problem.all(), *grads]), counting() as traffic:
        problem.adamw(0)
    # tensors whose rows begin blocks anew have a launch of their own
    assert traffic.kernels == ["adamw_step"] * (2 if eight_bit else 1)
    held = [*problem.params, *problem.first, *problem.second]
    held += [*problem.first_scales, *problem.second_scales] if eight_bit else []
    of_state = {
        way: sum(
            n
            for launch in traffic
            for name, n in launch.once[way].items()
            if name.startswith("tensor ")
        )
        for way in ("read", "written")
    }
    assert of_state == {"read": size(*held, *grads), "written": size(*held)}
    assert all("tensor" in name for launch in traffic for name in launch.once["written"])


def test_sgd_and_the_norm_move_each_number_once(monkeypatch: pytest.MonkeyPatch) -> None:
    op = sys.modules["bigops.ops.fused_adamw"]
    monkeypatch.setattr(op, "step_sgd", op.choose.sgd)
    monkeypatch.setattr(op, "norm_op", op.choose.norm)
    problem = Problem(torch.float32, shapes=[(257,), (7, 11, 13)])
    grads = problem.grads(0)
    with triton_interpreter.reachable([*problem.all(), *grads]), counting() as traffic:
        bigops.fused_sgd(problem.params, grads, problem.first, lr=0.1, momentum=0.9)
        bigops.fused_grad_norm(grads)
    assert traffic.kernels == ["sgd_step", "square_sums", "norm_of_sums"]
    step, sums, _ = traffic

    def of_tensors(counts: dict[str, int]) -> int:
        return sum(n for name, n in counts.items() if name.startswith("tensor "))

    held = size(*problem.params, *problem.first)
    assert of_tensors(step.once["read"]) == held + size(*grads)
    assert of_tensors(step.once["written"]) == held
    assert of_tensors(sums.once["read"]) == size(*grads)
    assert of_tensors(sums.once["written"]) == 0


# planted faults: the checks above must see each of them ---------------------------------------


def test_an_epilogue_through_memory_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """z written by the product, read by a kernel of its own for the activation."""

    def apart(x: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, None]:
        residual, act = options.pop("residual"), options.pop("act")
        z = products.product(x, b, **options)[0]
        y = torch.empty_like(z)
        grid = (-(-z.shape[0] // 32), -(-z.shape[1] // 32))
        low_rank_kernels.activate_rows[grid](
            z, residual, y, *z.shape, *residual.stride(), ACT=act, BLOCK_M=32, BLOCK_N=32
        )
        return y, None

    monkeypatch.setattr(linear_kernels, "product", apart)
    case = linear_cases.make(M, N, K, BF16, "gelu")
    with counting() as traffic:
        y, _ = linear_path.forward(case.call, False)
    case.check_forward(y)
    with pytest.raises(AssertionError, match="ideal"):
        check_epilogue(traffic, size(*case.inputs), size(y))


def test_a_low_rank_product_through_memory_is_caught() -> None:
    case = low_rank_cases.make(M, N, K, 33, BF16)  # of a rank that the interpreter's tile lacks
    with counting() as traffic, expect("triton.low_rank_linear.bf16.composed"):
        y, *_ = low_rank_path.forward(case.call, False)
    with pytest.raises(AssertionError, match="ideal"):
        check_epilogue(traffic, size(*case.inputs), size(y))


def test_a_kernel_that_reads_twice_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the count of all that programs ask for; values and compulsory bytes stay as they were."""
    old = "a_block = tl.load(a_tile, mask=a_mask, other=0.0)\n"
    copy = plant(gemm_kernels, tmp_path, old, old + " " * 8 + old)
    monkeypatch.setattr(products, "gemm", copy.gemm)
    with pytest.raises(AssertionError):
        test_the_programs_of_a_product_read_each_operand_once("gelu")


def test_an_intermediate_kept_in_an_argument_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of the first column also store the block of x it has read."""
    old = "b_block = tl.load(b_tile, mask=b_mask, other=0.0)\n"
    copy = plant(
        gemm_kernels,
        tmp_path,
        old,
        old + " " * 8 + "if tile_n == 0:\n" + " " * 12 + "tl.store(a_tile, a_block, mask=a_mask)\n",
    )
    monkeypatch.setattr(products, "gemm", copy.gemm)
    case = linear_cases.make(M, N, K, BF16, "gelu")
    with counting() as traffic:
        y, _ = linear_path.forward(case.call, False)
    case.check_forward(y)
    with pytest.raises(AssertionError, match="ideal"):
        check_epilogue(traffic, size(*case.inputs), size(y))
