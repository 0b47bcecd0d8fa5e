"""sparse_linear of weights compressed to 2:4: the kernels of csrc/cuda (sparse24_linear) on the CPU
by csrc/hostrun, by the rule.
"""

from __future__ import annotations

import copy
import ctypes
import math
import pickle
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
from bigops.formats.sparse24 import Sparse24Weight, padded
from bigops.nn import Linear, SparseLinear
from bigops.ops import activation as act
from bigops.ops.family import Call
from bigops.ops.sparse_linear import sparse24 as op
from bigops.ops.sparse_linear import sparse_linear
from bigops.ops.sparse_linear.sparse24_pack import pack24
from tests.support import hostrun
from tests.support.backends import serve_by
from tests.support.cases.compressed import DTYPES, Case
from tests.support.cases.sparse24 import KINDS, make24
from tests.support.kernels_ran import expect, needs_extension

SOURCE = Path(__file__).parent / "hostrun_sparse24_linear.cu"
pytestmark = [
    hostrun.needs(),
    # numpy's, of Triton's interpreter, on NaN and inf
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.load_op("sparse24_linear")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


def product(case: Case, weight: Sparse24Weight, **given: Any) -> Tensor:
    """The kernel by itself, on a case with 16-bit values and x [M, K]."""
    usual = {
        "x": case.x,
        "x_scale": None,
        "x_zero": None,
        "like": case.x,
        "values": weight.values,
        "meta": weight.meta,
        "scale": None,
        "sums": None,
        "k": weight.shape[1],
        "bias": case.bias,
        "residual": case.residual,
        "activation": case.name,
    }
    y: Tensor = torch.ops.bigops.sparse24_linear_product(*{**usual, **given}.values())
    return y


# values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["bf16", "f16"])
@pytest.mark.parametrize("m", [5, 40])
def test_a_float32_result_of_16_bit_values(m: int, stored: str) -> None:
    """A pre-activation, which the backward computes anew."""
    case, weight = make24(stored, m, 20, 72, stored, bias=False, residual=False)
    wide = replace(case, x=case.x.float(), bias=torch.randn(20))
    wide.check_forward(product(case, weight, like=wide.x, bias=wide.bias))


def test_any_strides() -> None:
    case, weight = make24("bf16", 7, 20, 64, "bf16", "gelu")
    want = product(case, weight)
    case.check_forward(want)

    def odd(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    x = torch.empty(7 * 64 + 1, dtype=torch.bfloat16)[1:].view(7, 64).copy_(case.x)
    assert x.data_ptr() % 16 != 0
    for given in (
        {"x": odd(case.x), "values": odd(weight.values), "meta": odd(weight.meta)},
        {"x": x},
    ):
        assert torch.equal(product(case, weight, **given), want)


@pytest.mark.parametrize("m", [5, 40])
def test_every_schedule_gives_the_same_bits(library: Path, m: int) -> None:
    case, weight = make24("bf16", m, 70, 330, "bf16", "gelu")
    case = replace(case, x=case.x[:, :328].contiguous(), dense=case.dense[:, :328])  # copied whole
    weight = pack24(weight.to_dense()[:, :328], None, torch.bfloat16)
    want = product(case, weight)
    case.check_forward(want)
    for seed, early in hostrun.SCHEDULES[1:]:
        hostrun.schedule(library, seed, early)
        assert torch.equal(product(case, weight), want), (seed, early)


def test_what_stands_at_zeros_of_w_is_not_read_into_a_sum() -> None:
    """NaN and infinity in every column that no row keeps; the others as if they were not there."""
    case, _ = make24("f16", 4, 20, 128, "f16")
    mask = torch.zeros(128, dtype=torch.bool)
    mask[torch.arange(0, 128, 4)] = mask[torch.arange(3, 128, 4)] = True
    dense = torch.randn(20, 128).half() * mask
    packed = pack24(dense, mask.expand(20, 128))
    assert packed.values.all()
    x = case.x.clone()
    x[:, ~mask] = math.nan
    x[0, 1] = math.inf
    clean = torch.where(mask, x, 0)
    y = product(case, packed, x=x)
    assert bool(y.isfinite().all())
    assert torch.equal(y, product(case, packed, x=clean))
    replace(case, x=clean, dense=packed.to_dense(torch.float64)).check_forward(y)


@pytest.mark.slow
def test_whole_numbers_are_exact() -> None:
    """Products at their ends, x and W all -128, and the longest rows that are served."""
    n, k, m = 3, 2**17 - 4, 2
    dense = torch.zeros(n, k // 4, 4)
    dense[..., 1::2] = -1.0
    weight = pack24(dense.flatten(1), None, torch.int8)
    values = torch.full_like(weight.values, -128)
    x = torch.full((m, k), -128, dtype=torch.int8)
    y = torch.ops.bigops.sparse24_linear_product(
        x,
        torch.ones(m),
        torch.zeros(m, dtype=torch.int32),
        torch.empty(0),
        values,
        weight.meta,
        torch.ones(n),
        torch.zeros(n, dtype=torch.int32),
        k,
        None,
        None,
        "none",
    )
    assert torch.equal(y, torch.full((m, n), 128.0 * 128 * k / 2))


def test_each_byte_is_copied_once(library: Path) -> None:
    """Of one block: values, metadata, which are 9/16 of dense bfloat16 together, and x."""
    case, weight = make24("bf16", 32, 128, 640, "bf16", residual=False)
    hostrun.counts(library)
    case.check_forward(product(case, weight))
    copied, streamed = hostrun.counts(library)
    assert weight.nbytes * 16 == 128 * 640 * 2 * 9
    assert (copied, streamed) == (weight.nbytes + case.x.nbytes, 0)


@pytest.mark.slow
def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """The last block of a weight of 2^31 bytes and more, all in sparse files."""
    tiles = (1 << 21) + 8
    n, k = 16 * tiles, 64

    def sparse(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        return file.view(shape)

    case, last = make24("bf16", 33, 16, k, "bf16", bias=False, residual=False)
    values = sparse("values", [n, k // 2], torch.bfloat16)
    meta = sparse("meta", [tiles, 1, 32], torch.int32)
    meta[-8:] = 0x44444444
    values[-16:], meta[-1:] = last.values, last.meta
    assert values.nbytes > 2**31
    y = sparse("y", [33, n], torch.bfloat16)
    library = hostrun.build(SOURCE)
    loaded = ctypes.CDLL(str(library))
    loaded.hostrun_only(ctypes.c_int64(tiles // 8 - 1))
    try:
        given = (case.x, None, None, values, meta, None, None, None, None, y)
        hostrun.call(library, "run_sparse24", *given, 33, n, k, k, k, tiles, 0, 0, 0, 1)
    finally:
        loaded.hostrun_only(ctypes.c_int64(-1))
    case.check_forward(y[:, -16:].contiguous())
    assert not y[:, -128:-16].any()


# explain, and layers that take the kernel ------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where bigops/_cuda was built."""
    monkeypatch.setattr(machine, "cuda_archs", ("80", "89", "90a"))
    machine.cuda_runs_on.cache_clear()
    yield
    machine.cuda_runs_on.cache_clear()


@pytest.mark.usefixtures("built")
def test_explain_names_the_kernel() -> None:
    case, weight = make24("bf16", 40, 100, 1000, "bf16")
    for arch in ("sm_80", "sm_86", "sm_89"):
        said = bigops.explain("sparse_linear", case.x, weight, device=arch)
        assert said.kernel == "cuda.sparse24_linear.bf16.bf16"
        assert said.config == {"block_n": 128, "block_m": 128, "block_k": 64}
        assert "that of x comes from torch's product" in said.reason
    for device, reason in (
        ("sm_90", "no default before hardware was measured, sm_80 to sm_89 only"),
        ("gfx942", "sm_80 to sm_89 only"),
        ("cpu", "the general storage has CPU kernels"),
    ):
        said = bigops.explain("sparse_linear", case.x, weight, device=device)
        assert said.kernel == "reference.sparse24_linear"
        assert reason in said.reason


@pytest.mark.parametrize("stored", ["bf16", "s8"])
def test_a_frozen_2_4_layer_takes_the_kernel(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU that it serves: without gradients, more rows than a decode step has, a pack."""
    if stored == "s8":
        pytest.importorskip("triton")
        from tests.support import triton_interpreter

        triton_interpreter.install()
    values = {"bf16": "bf16", "s8": "int8"}[stored]
    layer = SparseLinear.from_linear(Linear(70, 24, activation="relu"), None, "2:4", values)
    layer = layer.bfloat16().freeze().eval()
    x, residual = torch.randn(20, 70).bfloat16(), torch.randn(20, 24).bfloat16()
    assert layer.bias is not None
    general, before = layer.storage(), layer.nbytes
    bias = layer.bias.detach()
    dense = general.to_dense(torch.float64)
    case = Case(x, general, dense, stored == "s8", bias, residual, residual, "relu")
    serve_by(monkeypatch, op.op, op.product)
    with torch.no_grad(), backend.record() as names:
        layer(x, residual)
    assert names
    assert not any("sparse24" in name for name in names), names
    monkeypatch.setattr(op, "serves", lambda stored, k, target: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # which the layer asks first
    with torch.no_grad(), expect(f"cuda.sparse24_linear.bf16.{stored}"):
        y = layer(x, residual)
    case.check_forward(y)
    packed = Sparse24Weight.from_sparse(general)
    assert layer.nbytes == before + packed.nbytes
    with torch.no_grad(), backend.record() as names:
        layer(x[:16])  # a decode step
    with backend.record() as more:
        layer(x)  # the bias wants a gradient
    with torch.no_grad(), backend.record() as static:
        SparseLinear.from_linear(Linear(70, 24), 0.5, "1x4", values).bfloat16().freeze()(x)
    for found in (names, more, static):
        assert found
        assert not any("sparse24" in name for name in found), found
    other = SparseLinear.from_linear(Linear(70, 24, activation="relu"), None, "2:4", values)
    other = other.bfloat16().freeze()
    layer.load_state_dict(other.state_dict())
    assert layer.gpu_nbytes == 0
    with torch.no_grad(), expect(f"cuda.sparse24_linear.bf16.{stored}"):
        assert torch.equal(layer(x), other(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to(x.dtype)):
        assert twin.gpu_nbytes == 0


@needs_extension  # the reference refuses such words
def test_a_layer_with_full_words_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training of bfloat16 values leaves them."""
    layer = SparseLinear.from_linear(Linear(64, 16), None, "2:4", "bf16").bfloat16().freeze()
    monkeypatch.setattr(op, "serves", lambda stored, k, target: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    before = layer.nbytes
    with torch.no_grad():
        layer.values.fill_(1.0)  # whole words: more than two of four
        for _ in range(2):
            with backend.record() as names:
                layer(torch.randn(20, 64).bfloat16())
            assert names
            assert not any("sparse24" in name for name in names), names
    assert layer.nbytes == before


def test_bad_arguments() -> None:
    case, weight = make24("bf16", 4, 20, 64, "bf16")
    whole = pack24(weight.to_dense(), None, torch.int8)
    x = case.x
    for given, message in (
        ({"x": x[:, :60]}, r"x: expected shape \[M, 64\]; got \[4, 60\]"),
        ({"x": x.half(), "like": x.half()}, "x: expected dtype bf16; got f16"),
        ({"like": x.half()}, "like: expected the dtype of the values or f32; got f16"),
        ({"values": weight.values.float()}, "values: expected dtype bf16, f16 or s8; got f32"),
        ({"values": weight.values[:, :16]}, r"values: expected shape \[20, 32\]; got \[20, 16\]"),
        ({"meta": weight.meta[:1]}, r"meta: expected shape \[2, 1, 32\]; got \[1, 1, 32\]"),
        ({"meta": weight.meta.float()}, "meta: expected dtype s32; got f32"),
        ({"scale": torch.ones(20)}, "x_scale, x_zero, scale, sums: expected None; got a tensor"),
        ({"bias": torch.zeros(20)}, "bias: expected dtype bf16; got f32"),
        ({"residual": x}, r"residual: expected shape \[4, 20\]; got \[4, 64\]"),
        ({"activation": "swiglu"}, "activation: expected one that is no gated pair; got swiglu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            product(case, weight, **given)
    for args, error, message in (
        ((x.float(), weight), TypeError, "x: expected dtype bfloat16; got float32"),
        ((x[:, :60], weight), ValueError, r"x: expected shape \[.., 64\] for .*; got \[4, 60\]"),
        ((x, whole, x), ValueError, r"bias: expected shape \[20\]; got \[4, 64\]"),
        ((x, weight.replace(meta=weight.meta[:1])), ValueError, r"meta: expected shape \[2, 1"),
        ((x, weight, None, None, "swiglu"), ValueError, "activation"),
    ):
        with pytest.raises(error, match=message):
            sparse_linear(*args)
    with pytest.raises(ValueError, match="y_qparams: expected None with a Sparse24Weight"):
        sparse_linear(x, weight, y_qparams=torch.ones(2))


# planted faults and sanitizers -------------------------------------------------------------------


def arguments(case: Case, weight: Sparse24Weight) -> tuple[Tensor, tuple[Any, ...]]:
    """(y, the arguments of `run_sparse24`) for a case with 16-bit values and x [M, K]."""
    (n, k), m = weight.shape, case.x.shape[0]
    y = torch.full((m, n), math.nan, dtype=case.x.dtype)
    tensors = (case.x, None, None, weight.values, weight.meta, None, None, case.bias, case.residual)
    numbers = (m, n, k, k, padded(k, weight.values.dtype), weight.meta.shape[0])
    types = list(DTYPES.values())
    return y, (*tensors, y, *numbers, act.CODES[case.name], 0, 0, types.index(case.x.dtype))


KERNEL = "sparse24_linear.cu"
FILL_BARRIER = "__syncthreads();  // everybody's copies"
SUM_BARRIER = "__syncthreads();  // the stages become"
FAULTS = {
    "selector of the other half": ("multiply_sparse<bytes ? 0 : Half>", "multiply_sparse<0>"),
    "metadata of the neighbour lane": (": tile) * 32 + lane]", ": tile) * 32 + (lane ^ 1)]"),
    "metadata of the tile before": ("n0 / kTile + tile, last", "n0 / kTile + (tile ^ 1), last"),
    "x of the other half": ("part = 4 * Half + lane / 8", "part = 4 * (1 - Half) + lane / 8"),
    "numbers unpermuted": ("(part ^ row / 2 % 4) * 16);", "part * 16);"),
    "step forgotten": ("step < steps; ++step", "step + 1 < steps; ++step"),
}


def wrong(library: Path, **how: Any) -> bool:
    """Whether values break the rule in a run of three steps."""
    case, weight = make24("bf16", 10, 70, 192, "bf16", "gelu")
    y, given = arguments(case, weight)
    hostrun.call(library, "run_sparse24", *given, **how)
    try:
        case.check_forward(y)
    except AssertionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_wrong_values(fault: str) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    assert all(wrong(library, seed=seed, early=False) for seed in (0, 1, 7))


def apart(
    folder: Path,
    sanitize: str,
    fault: hostrun.Fault | None,
    shape: tuple[int, int, int],
    **how: Any,
) -> tuple[int, str]:
    """(exit code, what it said) of one call in a process of its own; values held where it ends."""
    case, weight = make24("bf16", *shape, "bf16", "gelu")
    library = hostrun.build(SOURCE, sanitize, fault)
    y, given = arguments(case, weight)
    under = "" if sanitize == "canary" else sanitize
    done = hostrun.call_apart(library, "run_sparse24", *given, folder=folder, sanitize=under, **how)
    if done.returncode == 0:
        case.check_forward(y)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_wrong_wait_count_meets_metadata_that_has_not_landed(tmp_path: Path) -> None:
    """A copy that lands when it is issued hides it."""
    fault = (KERNEL, "copy_wait<kStages - 2>", "copy_wait<kStages - 1>")
    for seed in (0, 1, 7):
        code, said = apart(tmp_path, "canary", fault, (10, 70, 192), seed=seed)
        assert code != 0
        assert "mma.sp.bf16: metadata whose places do not rise" in said, said
    assert apart(tmp_path, "canary", fault, (10, 70, 192), early=True)[0] == 0


@hostrun.needs("asan")
@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_address_sanitizer_finds_nothing(early: bool, tmp_path: Path) -> None:
    for shape in ((5, 130, 136), (40, 20, 71)):
        code, said = apart(tmp_path, "asan", None, shape, seed=7, early=early)
        assert code == 0, said


@hostrun.needs("asan")
@pytest.mark.slow
def test_address_sanitizer_finds_an_overrun(tmp_path: Path) -> None:
    """A row of W past the last one, read as if it were there."""
    fault = (
        KERNEL,
        "const bool inside = n0 + row < task.n",
        "const bool inside = n0 + row <= task.n",
    )
    code, said = apart(tmp_path, "asan", fault, (5, 20, 64))
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said, said


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("barrier", ["", FILL_BARRIER, SUM_BARRIER], ids=["none", "fill", "sums"])
def test_thread_sanitizer(barrier: str, early: bool, tmp_path: Path) -> None:
    fault = (KERNEL, barrier, "//" + barrier.split("//")[1]) if barrier else None
    code, said = apart(tmp_path, "tsan", fault, (5, 20, 256), early=early)
    if fault is None:
        assert code == 0, said
    else:
        # what the race leaves of the metadata may end the run before the sanitizer does
        seen = {66: "ThreadSanitizer: data race", -6: "metadata whose places do not rise"}
        assert code in seen, said
        assert seen[code] in said


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize(("stored", "dtype"), KINDS)
def test_on_a_gpu(stored: str, dtype: str, m: int) -> None:
    """The kernel itself, also where it is not the default (sm_90 and up)."""
    for n, k in ((4096, 4096), (1000, 5003)):
        case, packed = make24(stored, m, n, k, dtype, "gelu")
        weight = packed.map(Tensor.cuda)
        x, *rest = (None if t is None else t.cuda() for t in case.inputs)
        assert x is not None
        with expect(f"cuda.sparse24_linear.{dtype}.{stored}"):
            y, again = (op.product(Call(x, weight, *rest, "gelu")) for _ in range(2))
        assert torch.equal(y, again)
        case.check_forward(y.cpu())
