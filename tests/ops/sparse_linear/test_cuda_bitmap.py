"""sparse_linear of bitmap weights: the decode kernels of csrc/cuda (bitmap_linear) on the CPU by
csrc/hostrun, by the rule.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.benches import harness
from bigops.benches.limits import Cost
from bigops.formats.bitmap import BitmapWeight
from bigops.nn import Linear, SparseLinear
from bigops.ops import activation as act
from bigops.ops.family import Call
from bigops.ops.sparse_linear import bitmap as op
from bigops.ops.sparse_linear import sparse_linear
from tests.support import hostrun, paths
from tests.support.backends import serve_by
from tests.support.cases.compressed import DTYPES, Case, make
from tests.support.cases.linear import PLAIN
from tests.support.kernels_ran import expect

SOURCE = Path(__file__).parent / "hostrun_bitmap_linear.cu"
pytestmark = [hostrun.needs()]
# Ragged against blocks of 32 rows of W, groups of 4, panels of 256 columns.
SHAPES = [(1, 1, 1), (16, 4, 256), (9, 33, 260), (2, 7, 1030), (5, 16, 0), (0, 16, 64)]


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.load_op("bitmap_linear")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


def make_bitmap(
    dtype: str, lead: int | list[int], n: int, k: int, name: str = "none", **more: Any
) -> tuple[Case, BitmapWeight]:
    """A case of `sparse_linear` with single entries, and its weight as a bitmap."""
    form = "sparse_bf16" if dtype == "bf16" else "sparse_float"
    case = make(form, lead, n, k, dtype, name, **{"pattern": "1x1", **more})
    weight = BitmapWeight.from_sparse(case.weight, DTYPES[dtype])
    return replace(case, dense=weight.to_dense(torch.float64)), weight


def decode(case: Case, weight: BitmapWeight, **given: Any) -> Tensor:
    """The kernel by itself, on a case with x [M, K]."""
    usual = {
        "x": case.x,
        "values": weight.values,
        "bits": weight.bits,
        "ptr": weight.ptr,
        "n": weight.shape[0],
        "bias": case.bias,
        "residual": case.residual,
        "activation": case.name,
        "splits": 1,
    }
    y: Tensor = torch.ops.bigops.bitmap_linear_decode(*{**usual, **given}.values())
    return y


def run(dtype: str, lead: int | list[int], n: int, k: int, name: str = "none", **more: Any) -> None:
    """One case by the path that a GPU takes: values by the rule, the kernel by its name."""
    case, weight = make_bitmap(dtype, lead, n, k, name, **more)
    with expect(f"cuda.bitmap_linear.{dtype}"):
        y = op._forward(Call(case.x, weight, case.bias, case.residual, name))
    case.check_forward(y)


# values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 3, 11])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: str, m: int) -> None:
    run(dtype, m, 37 if m == 3 else 9, 300, "gelu")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int]) -> None:
    run("bf16", *shape, "silu")


@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(name: str) -> None:
    run("f16", 4, 20, 72, name)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_full_thin_and_empty(dtype: str, sparsity: float) -> None:
    run(dtype, 3, 9, 260, sparsity=sparsity)


@pytest.mark.parametrize("lead", [[], [4, 0], [2, 1, 3, 2]], ids=str)
def test_leading_dimensions(lead: list[int]) -> None:
    run("bf16", lead, 6, 7, "tanh")


@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_optional_arguments(bias: bool, residual: bool) -> None:
    run("f32", 16, 20, 300, "gelu", bias=bias, residual=residual)


@pytest.mark.parametrize("splits", [2, 7])
def test_blocks_that_share_panels(splits: int) -> None:
    """Also more of them than there are panels: some have nothing to add."""
    case, weight = make_bitmap("f32", 3, 6, 1100, "silu")
    case.check_forward(decode(case, weight, splits=splits))


def test_any_strides() -> None:
    case, weight = make_bitmap("bf16", 7, 20, 300, "gelu")
    want = decode(case, weight)

    def odd(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    spread = {name: odd(getattr(weight, name)) for name in ("values", "bits", "ptr")}
    assert torch.equal(decode(case, weight, x=odd(case.x), **spread), want)


@pytest.mark.parametrize(("dtype", "m"), [("f32", 1), ("bf16", 2), ("f16", 5)])
def test_every_schedule_gives_the_same_bits(library: Path, dtype: str, m: int) -> None:
    """Also at more panels than the pipeline of copies is deep."""
    case, weight = make_bitmap(dtype, m, 7, 1100 if m < 5 else 300, "gelu")
    want = decode(case, weight)
    case.check_forward(want)
    for seed, early in hostrun.SCHEDULES[1:]:
        hostrun.schedule(library, seed, early)
        assert torch.equal(decode(case, weight), want), (seed, early)


def test_what_stands_at_zeros_of_w_is_not_read_into_a_sum() -> None:
    case, _ = make_bitmap("f16", 4, 20, 300)
    mask = torch.rand(300) < 0.5
    packed = BitmapWeight.from_mask(torch.randn(20, 300).half(), mask.expand(20, 300))
    x = torch.where(mask, case.x, math.nan)
    y = decode(case, packed, x=x)
    clean = torch.where(mask, x, 0)
    assert torch.equal(y, decode(case, packed, x=clean))
    replace(case, x=clean, dense=packed.to_dense(torch.float64)).check_forward(y)


def test_each_byte_of_w_is_copied_once(library: Path) -> None:
    case, weight = make_bitmap("bf16", 3, 37, 530)
    hostrun.counts(library)
    case.check_forward(decode(case, weight, splits=2))
    assert hostrun.counts(library) == [weight.values.nbytes + weight.bits.nbytes, 0]


@pytest.mark.parametrize(
    ("name", "value"), [("ptr", 1 << 20), ("ptr", -5), ("ptr", 0), ("bits", -1)]
)
def test_a_broken_storage_gives_nan_and_no_wild_access(name: str, value: int) -> None:
    case, weight = make_bitmap("f32", 3, 22, 530)
    want = decode(case, weight)
    wrong = getattr(weight, name).clone()
    wrong[wrong.shape[0] // 2] = value
    y = decode(case, weight, **{name: wrong})
    broken = y.isnan()
    assert broken.any()
    assert torch.equal(broken, broken[0].expand_as(broken))
    assert torch.equal(y[~broken], want[~broken])
    assert int(broken[0].sum()) <= 8  # one group of four rows, or two beside a boundary


@pytest.mark.slow
def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """The last block of a weight of more than 2^31 bytes of values, in sparse files."""
    case, last = make_bitmap("bf16", 3, 32, 256, bias=False, residual=False)
    groups, units = (1 << 20) + 8, 128  # all of a tile's 2048 bytes
    n, k = 4 * groups, 256

    def sparse(name: str, size: int, dtype: torch.dtype) -> Tensor:
        return torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)

    values = sparse("values", 8 * units * groups, torch.bfloat16)
    bits, ptr = sparse("bits", 32 * groups, torch.int32), sparse("ptr", groups + 1, torch.int32)
    assert values.nbytes > 2**31
    first = values.shape[0] - last.values.shape[0]
    values[first:] = last.values
    bits[-8 * 32 :] = last.bits.flatten()
    ptr[-9:] = last.ptr + first // 8
    y = sparse("y", 3 * n, torch.bfloat16).view(3, n)
    library = hostrun.build(SOURCE)
    loaded = ctypes.CDLL(str(library))
    loaded.hostrun_only(ctypes.c_int64(groups // 8 - 1))
    try:
        given = (case.x, values, bits, ptr, None, None, y, None)
        hostrun.call(library, "run_bitmap", *given, 3, n, k, values.shape[0] // 8, 1, 0, 1, 1)
    finally:
        loaded.hostrun_only(ctypes.c_int64(-1))
    case.check_forward(y[:, -32:].contiguous())


# the op: reference, gradients, explain, the layer ------------------------------------------------


@pytest.mark.parametrize("path", paths.PATHS)
def test_gradients_on_every_path(path: str) -> None:
    """The references, on the CPU; they serve the gradients of the kernel as well."""
    case, weight = make_bitmap("f32", 5, 12, 33, "gelu")

    def f(x: Tensor, *rest: Tensor | None) -> Tensor:
        return sparse_linear(x, weight, *rest, "gelu")

    with backend.record() as names:
        grads = paths.PATHS[path](f, case.leaves(), case.grad)
    assert any(name.startswith("reference.bitmap_linear") for name in names)
    case.check_gradients(grads, path)
    case.check_forward(f(*case.inputs))


def test_opcheck() -> None:
    case, weight = make_bitmap("bf16", 5, 12, 33, "gelu")
    x, bias, residual = case.leaves()
    paths.opcheck(torch.ops.bigops.bitmap_linear, (x, *weight.arguments, bias, residual, "gelu"))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where bigops/_cuda was built."""
    monkeypatch.setattr(machine, "cuda_archs", ("80", "90a"))
    machine.cuda_runs_on.cache_clear()
    yield
    machine.cuda_runs_on.cache_clear()


@pytest.mark.usefixtures("built")
def test_explain_names_the_kernel() -> None:
    case, weight = make_bitmap("bf16", 16, 100, 3000)
    for arch in ("sm_80", "sm_86", "sm_90"):
        said = bigops.explain("sparse_linear", case.x, weight, device=arch)
        assert said.kernel == "cuda.bitmap_linear.bf16"
        assert said.config == {"block_k": 256, "splits": 3}
    for m, device, reason in (
        (17, "sm_90", "17 rows, 1 to 16 have a kernel"),
        (4, "sm_100", "not built"),
        (4, "cpu", "the general storage has CPU kernels"),
    ):
        x = torch.zeros(m, 3000).bfloat16()
        said = bigops.explain("sparse_linear", x, weight, device=device)
        assert said.kernel == "reference.bitmap_linear"
        assert reason in said.reason


def test_splits_leave_each_block_four_panels() -> None:
    assert op.splits_for(4096, 4096) == 4
    assert op.splits_for(1024, 16384) == 16
    assert op.splits_for(65536, 4096) == 1
    assert op.splits_for(0, 0) == 1


@pytest.mark.parametrize("values", ["bf16", "fp32"])
def test_a_frozen_layer_takes_the_kernel(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that it serves: a decode step without gradients; a pack of fewer bytes."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[values]
    layer = SparseLinear.from_linear(Linear(530, 24, activation="relu"), 0.5, "1x1", values)
    layer = layer.to(dtype).freeze().eval()
    x, residual = torch.randn(5, 530).to(dtype), torch.randn(5, 24).to(dtype)
    assert layer.bias is not None
    general, before, bias = layer.storage(), layer.nbytes, layer.bias.detach()
    case = Case(
        x, general, general.to_dense(torch.float64), False, bias, residual, residual, "relu"
    )
    serve_by(monkeypatch, op.op, op._forward)
    with torch.no_grad(), backend.record() as plain:
        layer(x, residual)
    monkeypatch.setattr(op, "serves", lambda rows, target: rows <= 16)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # which the layer asks first
    with torch.no_grad(), expect("cuda.bitmap_linear"):
        y = layer(x, residual)
    case.check_forward(y)
    packed = BitmapWeight.from_sparse(general)
    assert packed.nbytes < general.nbytes
    assert layer.nbytes == before + packed.nbytes
    with torch.no_grad(), backend.record() as many:
        layer(torch.randn(17, 530).to(dtype))
    with backend.record() as trained:
        layer(x)  # the bias wants a gradient
    with torch.no_grad(), backend.record() as other:
        SparseLinear.from_linear(Linear(512, 24), 0.98, "16x16", values).to(dtype).freeze()(
            x[:, :512]
        )  # its indices are fewer bytes
        SparseLinear.from_linear(Linear(530, 24), 0.5, "1x1", "int8").to(dtype).freeze()(x)
    for found in (plain, many, trained, other):
        assert found
        assert not any("bitmap" in name for name in found), found
    twin = SparseLinear.from_linear(Linear(530, 24, activation="relu"), 0.5, "1x1", values)
    twin = twin.to(dtype).freeze()
    layer.load_state_dict(twin.state_dict())
    assert layer.gpu_nbytes == 0
    with torch.no_grad(), expect("cuda.bitmap_linear"):
        assert torch.equal(layer(x), twin(x))
    assert layer.gpu_nbytes > 0
    assert layer.thaw().gpu_nbytes == 0


def test_the_bench_measures_it_beside_the_general_storage() -> None:
    """The side that a GPU adds, by its values; here the reference serves."""
    bench = harness.bench_module("sparse_linear")
    case, weight = make_bitmap("bf16", 3, 20, 300, residual=False)
    assert case.bias is not None
    sizes = harness.Case("sparse_linear", "decode", 3, 300, 20, "bf16")
    cost = Cost("bf16", 1.0, float(case.weight.nbytes + 100))
    side = bench.bitmap_side(sizes, case.x, case.weight, case.bias, "none", cost)
    case.check_forward(side.call())
    assert side.cost.nbytes == weight.nbytes + 100
    decodes = [c for c in bench.cases() if c.name.startswith("decode-bf16-1x1")]
    assert {c.m for c in decodes} == {1, 16}


def test_bad_arguments() -> None:
    case, weight = make_bitmap("bf16", 4, 20, 300)
    x = case.x
    for given, message in (
        ({"x": torch.zeros(17, 300).bfloat16()}, r"x: expected shape \[at most 16, K\]; got \[17"),
        ({"x": x.half()}, "x: expected dtype bf16; got f16"),
        ({"x": x[:, :200]}, r"bits: expected shape \[5, 1, 32\]; got \[5, 2, 32\]"),
        ({"values": weight.values.char()}, "values: expected dtype f32, bf16 or f16; got s8"),
        ({"values": weight.values[:-1]}, r"values: expected shape \[a multiple of 8\]"),
        ({"bits": weight.bits.float()}, "bits: expected dtype s32; got f32"),
        ({"ptr": weight.ptr[:-1]}, r"ptr: expected shape \[11\]; got \[10\]"),
        ({"n": -1}, "n: expected at least 0; got -1"),
        ({"splits": 0}, "splits: expected 1 to 65535; got 0"),
        ({"bias": torch.zeros(20)}, "bias: expected dtype bf16; got f32"),
        ({"residual": x}, r"residual: expected shape \[4, 20\]; got \[4, 300\]"),
        ({"activation": "swiglu"}, "activation: expected one that is no gated pair; got swiglu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decode(case, weight, **given)
    for args, error, message in (
        ((x.float(), weight), TypeError, "x: expected dtype bfloat16; got float32"),
        ((x[:, :60], weight), ValueError, r"x: expected shape \[.., 300\] for .*; got \[4, 60\]"),
        ((x, weight.replace(ptr=weight.ptr + 1)), ValueError, "ptr: expected the sums of what"),
        ((x, weight, None, None, "swiglu"), ValueError, "activation"),
    ):
        with pytest.raises(error, match=message):
            sparse_linear(*args)
    with pytest.raises(ValueError, match="x_qparams, y_qparams: expected None with a BitmapWeight"):
        sparse_linear(x, weight, y_qparams=torch.ones(2))


# planted faults and sanitizers -------------------------------------------------------------------


def arguments(case: Case, weight: BitmapWeight, splits: int = 2) -> tuple[Tensor, tuple[Any, ...]]:
    """(y, the arguments of `run_bitmap`) for a case with x [M, K]."""
    (n, k), m = weight.shape, case.x.shape[0]
    y = torch.full((m, n), math.nan, dtype=case.x.dtype)
    partial = torch.full((splits, m, n), math.nan)
    tensors = (case.x, *weight.tensors().values(), case.bias, case.residual, y, partial)
    total = weight.values.nbytes // 16
    types = list(DTYPES.values())
    last = (act.CODES[case.name], splits, types.index(case.x.dtype))
    return y, (*tensors, m, n, k, total, -(-k // 256), *last)


KERNEL = "bitmap_linear.cu"
PANEL_BARRIER = "__syncthreads();  // x of the next"
FAULTS = {
    "values of the word before": ("before -= __popc(word);", ""),
    "bits of the neighbour": ("bits >> lane & 1u", "bits >> (lane ^ 1) & 1u"),
    "warp barrier forgotten": ("__syncwarp();  // the tile of every", "// the tile of every"),
    "prefix cut short": ("by = 1; by < 32; by *= 2", "by = 1; by < 16; by *= 2"),
    "x of the panel before": ("put(panel + 1, 0);", ""),
    "one split forgotten": ("int s = 0; s < task.splits", "int s = 1; s < task.splits"),
    "half of the lanes added": ("by = 16; by > 0; by /= 2) sum", "by = 8; by > 0; by /= 2) sum"),
}
WAIT = ("ptx::copy_wait<kStages - 2>();", "ptx::copy_wait<kStages - 1>();")


def wrong(library: Path, **how: Any) -> bool:
    case, weight = make_bitmap("bf16", 3, 39, 1300, "gelu")
    y, given = arguments(case, weight)
    hostrun.call(library, "run_bitmap", *given, **how)
    try:
        case.check_forward(y)
    except AssertionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_wrong_values(fault: str) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    assert wrong(library, seed=7)


@pytest.mark.slow
def test_a_wrong_wait_count_meets_what_has_not_landed() -> None:
    """A copy that lands when it is issued hides it."""
    library = hostrun.build(SOURCE, "canary", (KERNEL, *WAIT))
    assert all(wrong(library, seed=seed, early=False) for seed in (0, 1, 7))
    assert not wrong(library, early=True)


def apart(
    folder: Path,
    sanitize: str,
    fault: hostrun.Fault | None,
    case: Case,
    weight: BitmapWeight,
    **how: Any,
) -> tuple[int, str]:
    """(exit code, what it said) of one call in a process of its own; values held where it ends."""
    library = hostrun.build(SOURCE, sanitize, fault)
    y, given = arguments(case, weight)
    done = hostrun.call_apart(
        library, "run_bitmap", *given, folder=folder, sanitize=sanitize, **how
    )
    if done.returncode == 0:
        case.check_forward(y)
    return done.returncode, done.stderr


@hostrun.needs("asan")
@pytest.mark.slow
def test_address_sanitizer_finds_nothing_but_an_overrun(tmp_path: Path) -> None:
    for dtype, m, early in (("bf16", 9, False), ("f32", 1, True)):
        case, weight = make_bitmap(dtype, m, 37, 530, "gelu")
        code, said = apart(tmp_path, "asan", None, case, weight, seed=7, early=early)
        assert code == 0, said
    fault = (KERNEL, "i < units; i += 32", "i <= units; i += 32")
    code, said = apart(tmp_path, "asan", fault, case, weight)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said, said


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("barrier", "early"),
    [(False, False), (False, True), (True, False)],
    ids=["none-late", "none-early", "barrier"],
)
def test_thread_sanitizer(barrier: bool, early: bool, tmp_path: Path) -> None:
    """On one block; without the barrier between panels x is overwritten while it is read."""
    fault = (KERNEL, PANEL_BARRIER, "//" + PANEL_BARRIER.split("//")[1]) if barrier else None
    case, weight = make_bitmap("bf16", 1, 32, 1300)
    code, said = apart(tmp_path, "tsan", fault, case, weight, early=early)
    assert code == (66 if barrier else 0), said
    assert ("ThreadSanitizer: data race" in said) == barrier


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype: str, m: int) -> None:
    for n, k in ((4096, 4096), (1000, 5003)):
        case, packed = make_bitmap(dtype, m, n, k, "gelu", sparsity=0.5)
        weight = packed.map(Tensor.cuda)
        x, *rest = (None if t is None else t.cuda() for t in case.inputs)
        assert x is not None
        with expect(f"cuda.bitmap_linear.{dtype}"):
            y = sparse_linear(x, weight, *rest, "gelu")
            again = sparse_linear(x, weight, *rest, "gelu")
        assert torch.equal(y, again)
        case.check_forward(y.cpu())
