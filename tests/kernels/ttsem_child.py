"""The cases that ttsem judges, and the process that runs them, started by ttsem_run.py with NAMES.

Prints a line of JSON for each. A case calls kernels by the path that a GPU takes, on CPU tensors,
and holds the values to tests/support/tolerance.py itself. Outputs start as NaN.

ttsem sees the arguments of a launch alone. The optimiser's kernels reach their tensors by addresses
in a table: `reachable` adds those tensors to what a launch may touch.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import bigops
from bigops import backend
from bigops.formats import checks
from bigops.formats.quantize import act_quant
from bigops.kernels import fused_linear as linear_kernels
from bigops.kernels.common.activation import NAMES
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.quantized_linear import rows as quantized_rows
from bigops.ops.fp8_linear import triton as fp8_path
from bigops.ops.fused_adamw import reference_norm, reference_sgd
from bigops.ops.fused_linear import triton as linear_path
from bigops.ops.linear_cross_entropy import triton as loss_path
from bigops.ops.low_rank_linear import triton as low_rank_path
from bigops.ops.quantized_linear import triton as quantized_path
from bigops.ops.sparse_linear import triton as sparse_path
from tests.support.cases import compressed as compressed_cases
from tests.support.cases import cross_entropy as cross_entropy_cases
from tests.support.cases import linear as linear_cases
from tests.support.cases import low_rank as low_rank_cases
from tests.support.cases.optimizer import Problem
from tests.support.planted import plant
from tests.support.tolerance import check

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ROWS = 37  # against the tiles of 32 rows of kernels/configs/**/interpreter.json


# what is judged -----------------------------------------------------------------------------


def linear(dtype: torch.dtype, name: str, shape: tuple[int, int, int] = (ROWS, 45, 70)) -> None:
    case = linear_cases.make(*shape, dtype, name)
    y, z = linear_path.forward(case.call, True)
    case.check_forward(y)
    grads = linear_path.backward(case.grad, case.call, z, True, True, True)
    case.check_gradients([*grads, case.grad])


def persistent(dtype: torch.dtype, name: str) -> None:
    """By tensor descriptors, on sizes that have them."""
    case = linear_cases.make(ROWS, 48, 80, dtype, name)
    tile = TileConfig(32, 32, 32, 2, 4, 2, 1, persistent=True)
    y, _ = linear_kernels.forward(*case.inputs, NAMES.index(name), config=tile)
    case.check_forward(y)


def low_rank(dtype: torch.dtype, base: bool, rank: int = 9) -> None:
    case = low_rank_cases.make(ROWS, 45, 70, rank, dtype, "gelu", base=base, scale=0.75)
    y, t, z = low_rank_path.forward(case.call, True)
    assert t is not None
    case.check_forward(y)
    needs = (True, True, True, base, True)
    gx, gu, gv, gbase, gb = low_rank_path.backward(case.grad, case.call, t, z, *needs)
    case.check_gradients([gx, gu, gv, gb, case.grad, gbase if base else None])


def quantized(form: str, dtype: str) -> None:
    case = compressed_cases.make(form, ROWS, 45, 150, dtype, "gelu")
    case.check_forward(quantized_path.forward(case.call))


def fp8(form: str, dtype: str) -> None:
    case = compressed_cases.make(form, ROWS, 45, 150, dtype, "gelu")
    case.check_forward(fp8_path.forward(case.call))


def fp8_backward(form: str, dtype: str) -> None:
    case = compressed_cases.make(form, ROWS, 45, 150, dtype, "gelu")
    grads = fp8_path.backward(case.grad, case.call, True, True)
    case.check_gradients([*grads, case.grad], stored=True)


def quantized_backward(form: str, dtype: str) -> None:
    case = compressed_cases.make(form, ROWS, 45, 150, dtype, "gelu")
    grads = quantized_path.backward(case.grad, case.call, True, True)
    case.check_gradients([*grads, case.grad], stored=True)


def rows_as_integers(activations: str) -> None:
    x = torch.randn(ROWS, 150) * torch.logspace(-3, 3, ROWS).unsqueeze(1)
    qparams = torch.tensor([0.02, 120.0]) if activations == "static" else None
    q, scale, _, sums = quantized_rows.quantize_activations(x, activations, qparams)
    want = act_quant(x, activations, qparams)
    assert torch.equal(q[:, :150] + 128.0, want.q), "other whole numbers than the reference"
    assert torch.equal(scale, want.scale[:, 0]), "another scale than the reference"
    assert torch.equal(sums, q.sum(1, dtype=torch.int32)), "other sums than those of q"


def sparse(form: str, pattern: str, dtype: str, m: int = 35) -> None:
    case = compressed_cases.make(form, m, 48, 70, dtype, "gelu", pattern=pattern, values=True)
    blocks, why = sparse_path.blocks_of(case.call, "interpreter")
    assert blocks is not None, why
    case.check_forward(sparse_path.forward(case.call, blocks))
    grads = sparse_path.backward(case.grad, case.call, blocks, True, True, True)
    case.check_gradients([*grads, case.grad], stored=True)


def loss(dtype: torch.dtype, options: str) -> None:
    """Rows of more than one block; the public function, with the pass over logits of a GPU."""
    op = sys.modules["bigops.ops.linear_cross_entropy.schema"]
    before, op.chunk_op = op.chunk_op, loss_path.serve_chunk  # type: ignore[attr-defined]
    try:
        cross_entropy_cases.make(5, 700, 9, dtype, **cross_entropy_cases.ALL[options]).check()
    finally:
        op.chunk_op = before  # type: ignore[attr-defined]


SHAPES = [(1,), (), (255,), (257,), (7, 11, 13)]


def _same(ours: Problem, theirs: Problem) -> None:
    for got, want in zip(ours.all(), theirs.all(), strict=True):
        if got.dtype == torch.uint8:
            assert torch.equal(got, want), "other codes than the reference"
        else:
            check(got, want.double(), want, want.double().abs() + 1e-2)


def adamw(eight_bit: bool, streams: bool) -> None:
    ours, theirs = (Problem(F32, BF16, F16, shapes=SHAPES, eight_bit=eight_bit) for _ in range(2))
    random = {"streams": range(len(SHAPES)), "seed": 5, "rounding_step": 0} if streams else {}
    grads = ours.grads(0)
    ours.grads = lambda _: grads  # type: ignore[method-assign]
    with reachable([*ours.all(), *grads]), _on_gpu("step_adamw", "adamw"):
        ours.adamw(0, **random)
    theirs.adamw_reference(0, streams)
    _same(ours, theirs)


def sgd(nesterov: bool) -> None:
    ours, theirs = (Problem(F32, BF16, F16, shapes=SHAPES) for _ in range(2))
    grads = ours.grads(0)
    how = (0.1, 0.9, 0.2, 0.1, nesterov, False)
    with reachable([*ours.all(), *grads]), _on_gpu("step_sgd", "sgd"):
        bigops.fused_sgd(
            ours.params,
            grads,
            ours.first,
            lr=how[0],
            momentum=how[1],
            dampening=how[2],
            weight_decay=how[3],
            nesterov=nesterov,
            first_step=False,
        )
    for p, g, m in zip(theirs.params, grads, theirs.first, strict=True):
        reference_sgd(p, g, m, None, None, *how, 1.0)
    _same(ours, theirs)


def norm() -> None:
    grads = [torch.randn(s).to((F32, BF16, F16)[i % 3]) for i, s in enumerate(SHAPES)]
    grads.append(torch.randn(300, dtype=torch.float64))
    with reachable(grads), _on_gpu("norm_op", "norm"):
        found = bigops.fused_grad_norm(grads)
    truth = reference_norm(grads)
    check(found, truth, truth, truth)


@contextlib.contextmanager
def _on_gpu(name: str, served_by: str) -> Iterator[None]:
    """The optimiser step as a GPU takes it."""
    op = sys.modules["bigops.ops.fused_adamw"]
    before = getattr(op, name)
    setattr(op, name, getattr(op.choose, served_by))
    try:
        yield
    finally:
        setattr(op, name, before)


# what must be caught ------------------------------------------------------------------------


@triton.jit
def _copies(x, y, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < (N if MASKED else N + BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < N, other=0.0), mask=mask)


@triton.jit
def _gathers(x, y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at), mask=at < N)


@triton.jit
def _names_itself(y, APART: tl.constexpr):
    own = tl.program_id(0)
    tl.store(y + (own if APART else 0), own.to(tl.float32))


@triton.jit
def _behind_table(table, N, BLOCK: tl.constexpr):
    y = tl.load(table).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, BLOCK)
    tl.store(y + at, at.to(tl.float32), mask=at < N)


def copies(masked: bool) -> None:
    x = torch.randn(100)
    y = torch.empty(100)
    _copies[(4,)](x, y, 100, masked, 32)
    assert torch.equal(x, y)


def gathers() -> None:
    _gathers[(4,)](torch.randn(100), torch.empty(100), 100, 32)


def names_itself(apart: bool) -> None:
    y = torch.empty(5)
    _names_itself[(5,)](y, apart)
    assert torch.equal(y, torch.arange(5.0))


def behind_table(size: int, told: bool) -> None:
    y = torch.empty(5)
    with reachable([y] if told else []):
        _behind_table[(1,)](torch.tensor([y.data_ptr()]), size, 8)
    assert torch.equal(y, torch.arange(5.0))


def leaves_some_out() -> None:
    """A kernel that stores less than it should: what is left is NaN, whatever was there before."""
    x, y = torch.randn(100), torch.empty(100)
    _copies[(3,)](x, y, 100, True, 32)
    check(y, x.double(), x, x.double().abs())


def planted(old: str, new: str) -> None:
    """fused_linear with a fault in the epilogue of its GEMM."""
    from bigops.kernels.common import epilogue, gemm, tile_walk
    from bigops.kernels.common import product as products

    with tempfile.TemporaryDirectory() as folder:
        copy: ModuleType = plant(gemm, Path(folder), old, new, epilogue, tile_walk)
        case = linear_cases.make(ROWS, 45, 70, F32, "gelu", residual=False)
        before, products.gemm = products.gemm, copy.gemm
        try:
            y, _ = linear_path.forward(case.call, False)
        finally:
            products.gemm = before
    case.check_forward(y)


_STORE = "tl.store(c_tile, acc.to(c.dtype.element_ty), mask=mask)"
CANARIES: dict[str, Callable[[], None]] = {
    "masked store": partial(copies, True),
    "unmasked store": partial(copies, False),
    "unmasked load": gathers,
    "a place for each program": partial(names_itself, True),
    "one place for all programs": partial(names_itself, False),
    "a tensor behind a table": partial(behind_table, 5, True),
    "past a tensor behind a table": partial(behind_table, 6, True),
    "a tensor that nobody named": partial(behind_table, 5, False),
    "some of the output left out": leaves_some_out,
}
GEMM_CANARIES: dict[str, Callable[[], None]] = {
    "a copy of the GEMM": partial(planted, _STORE, _STORE),
    "the GEMM without its mask": partial(planted, _STORE, _STORE.replace(", mask=mask", "")),
    "the GEMM reads past K": partial(planted, "(rk[None, :] < K - k0)", "(rk[None, :] < K)"),
    "tiles of the GEMM in one place": partial(
        planted, "c_tile = c + (row0 * stride_cm + col0)", "c_tile = c + (0 * row0 + col0)"
    ),
}
QUICK: dict[str, Callable[[], None]] = {
    "fused_linear gelu bf16, small": partial(linear, BF16, "gelu", (33, 20, 35)),
    "linear_cross_entropy all f32": partial(loss, F32, "all, none"),
    "fused_adamw": partial(adamw, True, False),
}
WIDE: dict[str, Callable[[], None]] = {
    **{
        f"fused_linear {name} {checks.short(dtype)}": partial(linear, dtype, name)
        for dtype in (F32, BF16, F16)
        for name in ("none", "silu", "geglu")
    },
    **{
        f"fused_linear persistent {name} {checks.short(dtype)}": partial(persistent, dtype, name)
        for dtype in (F32, BF16)
        for name in ("silu", "geglu")
    },
    **{
        f"low_rank_linear {'lora' if base else 'factors'} {checks.short(dtype)}": partial(
            low_rank, dtype, base
        )
        for dtype in (F32, BF16)
        for base in (False, True)
    },
    "low_rank_linear composed f32": partial(low_rank, F32, True, 33),
    **{
        f"quantized_linear {form} {dtype}": partial(quantized, form, dtype)
        for form in ("int8_zero", "int8_static", "w8_zero", "w4_zero", "w4a8")
        for dtype in ("f32", "bf16")
    },
    **{
        f"fp8_linear {form} {dtype}": partial(fp8, form, dtype)
        for form in ("fp8", "fp8_block", "w_fp8_block")
        for dtype in ("f32", "bf16")
    },
    **{
        f"quantized_linear_backward {form} {dtype}": partial(quantized_backward, form, dtype)
        for form, dtype in (("int8_zero", "f32"), ("w4_zero", "bf16"), ("w8_group", "f16"))
    },
    **{
        f"fp8_linear backward {form} bf16": partial(fp8_backward, form, "bf16")
        for form in ("w_fp8", "fp8_block")
    },
    **{
        f"rows as integers {activations}": partial(rows_as_integers, activations)
        for activations in ("dynamic", "symmetric", "static")
    },
    **{
        f"sparse_linear {form} {pattern} {dtype}": partial(sparse, form, pattern, dtype)
        for pattern in ("16x1", "16x16", "32x32")
        for form, dtype in (("sparse_bf16", "bf16"), ("sparse_float", "f32"))
    },
    **{
        f"linear_cross_entropy {options} {checks.short(dtype)}": partial(loss, dtype, options)
        for options in ("plain", "all, none")
        for dtype in (F32, BF16)
    },
    "fused_adamw f32": partial(adamw, False, False),
    "fused_adamw 8bit": partial(adamw, True, False),
    "fused_sgd": partial(sgd, False),
    "fused_sgd nesterov": partial(sgd, True),
    "fused_grad_norm": norm,
}
# ttsem cannot judge these; test_ttsem.py says why.
BEYOND: dict[str, Callable[[], None]] = {
    "fused_adamw, stochastic rounding": partial(adamw, True, True),
}


# the process --------------------------------------------------------------------------------

_behind: list[Tensor] = []


@contextlib.contextmanager
def reachable(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Kernels launched inside may also touch these tensors, whose addresses stand in a table."""
    before = len(_behind)
    _behind.extend(t for t in tensors if t.numel())
    try:
        yield
    finally:
        del _behind[before:]


@contextlib.contextmanager
def judging(kernels: list[str]) -> Iterator[Any]:
    """ttsem's session; ``kernels`` collects the launches, and outputs start as NaN."""
    from triton.runtime.jit import JITFunction
    from ttsem import harness, memory, sanitize

    class WithTables(memory.Memory):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for t in _behind:
                self.register(*harness.storage_copy(t))

    write_back, own_memory, allocate = sanitize._write_back, harness.Memory, torch.empty

    def write_back_all(record: Any, execution: Any) -> None:
        write_back(record, execution)
        buffers = execution.memory.buffers()
        for t in _behind:
            data = torch.from_numpy(buffers[t.untyped_storage().data_ptr()].view("uint8").copy())
            torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())[: len(data)].copy_(data)

    def empty(*size: Any, **options: Any) -> Tensor:
        made = allocate(*size, **options)
        floating = made.is_floating_point()
        return made.fill_(float("nan") if floating else torch.iinfo(made.dtype).max - 90)

    with sanitize.session(cuda_is_cpu=False) as session:
        run = JITFunction.run

        def named(self: Any, *args: Any, **options: Any) -> Any:
            kernels.append(self.__name__)
            return run(self, *args, **options)

        JITFunction.run = named
        harness.Memory, sanitize._write_back, torch.empty = WithTables, write_back_all, empty
        try:
            yield session
        finally:
            harness.Memory, sanitize._write_back, torch.empty = own_memory, write_back, allocate
            JITFunction.run = run


def judge(case: Callable[[], None]) -> dict[str, Any]:
    """One case as ttsem_run.py reports it."""
    from ttsem.sanitize import KernelFault, Unjudged

    torch.manual_seed(0)
    kernels: list[str] = []
    said, message = "clean", ""
    with backend.record() as names, judging(kernels) as session:
        try:
            case()
        except KernelFault as fault:
            said, message = fault.fault.kind, str(fault)
        except Unjudged as stop:
            said, message = "unjudged", f"{stop.verdict}: {stop} {stop.unsupported}"
        except AssertionError as wrong:
            said, message = "wrong values", str(wrong)
    return {
        "said": said,
        "kernels": kernels,
        "names": names,
        "races_unchecked": session.races_unchecked,
        "message": message,
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    cases = {**CANARIES, **GEMM_CANARIES, **QUICK, **WIDE, **BEYOND}
    for name in names:
        print(json.dumps({"case": name, **judge(cases[name])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
