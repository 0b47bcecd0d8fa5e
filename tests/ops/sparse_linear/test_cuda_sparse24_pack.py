"""Pruning, packing and transposing 2:4 weights: the kernels of csrc/cuda (sparse24_pack) on the CPU
by csrc/hostrun, bit by bit what plain torch gives.
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
from bigops.formats.patterns import n_m_mask, transposable_mask
from bigops.formats.sparse24 import Sparse24Weight, meta_shape, padded, transpose
from bigops.ops.sparse_linear import sparse24_pack as kernels
from bigops.ops.sparse_linear.sparse24_pack import pack24, prune24
from tests.support import hostrun
from tests.support.kernels_ran import expect

SOURCE = Path(__file__).parent / "hostrun_sparse24_pack.cu"
KERNEL = "sparse24_pack.cu"
pytestmark = hostrun.needs()
SOURCES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
STORED = {"bf16": torch.bfloat16, "f16": torch.float16}
# Ragged against tiles of 64 x 64, rows of 16 and fours.
SHAPES = [(1, 1), (5, 7), (64, 64), (130, 70), (17, 257)]
EVEN = [(4, 4), (64, 64), (132, 68), (20, 196)]


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.load_op("sparse24_pack")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


def weight(n: int, k: int, source: str = "bf16", ties: bool = False) -> Tensor:
    """Random numbers; with ``ties`` of few magnitudes, zeros of both signs among them."""
    w = torch.randint(-2, 3, (n, k)) * -1.0 if ties else torch.randn(n, k)
    return w.to(SOURCES[source])


def same(found: kernels.Packed, want: Sparse24Weight) -> None:
    """The kernel's pack is plain torch's, to the last bit."""
    assert not found.broken.any()
    n, k = want.shape
    assert found.values.dtype == want.values.dtype
    assert torch.equal(found.values.view(torch.int16), want.values.view(torch.int16))
    assert torch.equal(found.meta, want.meta)
    if want.meta_t is None:
        assert found.values_t.numel() == found.meta_t.numel() == 0
    else:
        values_t = transpose(want.values, want.meta, want.meta_t, k)
        assert list(values_t.shape) == [k, padded(n, want.values.dtype) // 2]
        assert torch.equal(found.values_t.view(torch.int16), values_t.view(torch.int16))
        assert torch.equal(found.meta_t, want.meta_t)


# values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("source", SOURCES)
def test_every_dtype(source: str, stored: str) -> None:
    to, w = STORED[stored], weight(70, 136, source)
    with expect(f"cuda.sparse24_pack.{source}.{stored}"):
        same(
            kernels.pack(w, None, "largest", to, False),
            Sparse24Weight.from_mask(w, n_m_mask(w), to, False),
        )
    w = weight(68, 136, source)
    mask = transposable_mask(w)
    same(kernels.pack(w, None, "largest", to, True), Sparse24Weight.from_mask(w, mask, to, True))
    same(kernels.pack(w, mask, "given", to, True), Sparse24Weight.from_mask(w, mask, to, True))


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], ties: bool) -> None:
    """The two largest, fewer by a mask, and what is not 0."""
    w, to = weight(*shape, ties=ties), torch.bfloat16
    mask = n_m_mask(w)
    same(kernels.pack(w, None, "largest", to, False), Sparse24Weight.from_mask(w, mask, to, False))
    few = mask & (torch.rand(shape) < 0.6)
    same(kernels.pack(w, few, "given", to, False), Sparse24Weight.from_mask(w, few, to, False))
    held = torch.where(few, w, 0)
    same(
        kernels.pack(held, None, "given", to, False),
        Sparse24Weight.from_mask(held, held != 0, to, False),
    )


@pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("shape", EVEN, ids=str)
def test_transposable(shape: tuple[int, int], ties: bool) -> None:
    w, to = weight(*shape, "f32", ties), torch.float16
    mask = transposable_mask(w)
    want = Sparse24Weight.from_mask(w, mask, to, True)
    found = kernels.pack(w, None, "largest", to, True)
    same(found, want)
    same(kernels.pack(w, mask, "given", to, True), want)
    with expect("cuda.sparse24_transpose.f16"):
        values_t = kernels.transpose(found.values, found.meta, found.meta_t, shape[1])
    assert torch.equal(values_t.view(torch.int16), found.values_t.view(torch.int16))


def test_empty_and_any_strides() -> None:
    for shape in ((0, 8), (4, 0), (0, 0)):
        w = torch.zeros(shape).bfloat16()
        for transposable in (False, True):
            want = Sparse24Weight.from_mask(w, w != 0, torch.bfloat16, transposable)
            same(kernels.pack(w, None, "largest", torch.bfloat16, transposable), want)
    w = weight(24, 136)
    want = Sparse24Weight.from_mask(w, n_m_mask(w), torch.bfloat16, False)
    shifted = torch.empty(24 * 136 + 1, dtype=torch.bfloat16)[1:].view(24, 136).copy_(w)
    assert shifted.data_ptr() % 16 != 0
    for odd in (w.t().contiguous().t(), shifted):
        same(kernels.pack(odd, None, "largest", torch.bfloat16, False), want)
    mask = n_m_mask(w)
    other = torch.empty(24 * 136 + 1, dtype=torch.bool)[1:].view(24, 136).copy_(mask)
    assert other.data_ptr() % 4 != 0
    for same_mask in (mask, mask.t().contiguous().t(), other):
        same(kernels.pack(w, same_mask, "given", torch.bfloat16, False), want)


def test_every_schedule_gives_the_same_bits(library: Path) -> None:
    w = weight(68, 136)
    want = Sparse24Weight.from_mask(w, transposable_mask(w), torch.bfloat16, True)
    assert want.meta_t is not None
    for seed, early in hostrun.SCHEDULES:
        hostrun.schedule(library, seed, early)
        found = kernels.pack(w, None, "largest", torch.bfloat16, True)
        same(found, want)
        transposed = kernels.transpose(want.values, want.meta, want.meta_t, 136)
        assert torch.equal(transposed, found.values_t), (seed, early)


def test_each_byte_is_read_once(library: Path) -> None:
    """Of W to pack it, of the pack to turn it; each pack written is 9/16 of dense bfloat16."""
    w = weight(128, 192)
    hostrun.counts(library)
    found = kernels.pack(w, None, "largest", torch.bfloat16, True)
    assert hostrun.counts(library) == [0, w.nbytes]
    for pack in ((found.values, found.meta), (found.values_t, found.meta_t)):
        assert sum(t.nbytes for t in pack) * 16 == w.nbytes * 9
    kernels.transpose(found.values, found.meta, found.meta_t, 192)
    read = sum(t.nbytes for t in (found.values, found.meta, found.meta_t))
    assert hostrun.counts(library) == [read, 0]


@pytest.mark.slow
def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """The last tile of a weight of 2^31 entries and more, all in sparse files."""
    n, k, to = (1 << 25) + 64, 64, torch.bfloat16

    def sparse(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        return file.view(shape)

    w, last = sparse("w", [n, k], to), weight(64, 64)
    w[-64:] = last
    values, values_t = sparse("values", [n, 32], to), sparse("values_t", [k, n // 2], to)
    again, broken = sparse("again", [k, n // 2], to), sparse("broken", [n // 64], torch.int32)
    meta = sparse("meta", meta_shape(n, k, to), torch.int32)
    meta_t = sparse("meta_t", meta_shape(k, n, to), torch.int32)
    assert w.numel() > 2**31
    built = hostrun.build(SOURCE)
    loaded = ctypes.CDLL(str(built))
    loaded.hostrun_only(ctypes.c_int64(n // 64 - 1))
    try:
        given = (w, None, values, meta, values_t, meta_t, broken, n, k, 2, 1, 0)
        hostrun.call(built, "run_pack", *given)
        hostrun.call(built, "run_turn", values, meta, meta_t, again, n, k, 0)
    finally:
        loaded.hostrun_only(ctypes.c_int64(-1))
    want = Sparse24Weight.from_mask(last, transposable_mask(last), to, True)
    assert want.meta_t is not None
    transposed = transpose(want.values, want.meta, want.meta_t, k)
    assert torch.equal(values[-64:], want.values)
    assert torch.equal(meta[-4:], want.meta)
    assert torch.equal(meta_t[:, -1:], want.meta_t)
    assert torch.equal(values_t[:, -32:], transposed)
    assert torch.equal(again[:, -32:], transposed)
    assert not values[-128:-64].any()


# what cannot be kept ------------------------------------------------------------------------------


def test_a_four_with_too_many_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a flag of its tile and by NaN where it lies; nothing else is lost."""
    monkeypatch.setattr(kernels, "serves", lambda w, stored: True)
    w = weight(68, 136)
    mask = n_m_mask(w)
    mask[65, 8:12] = True
    found = kernels.pack(w, mask, "given", torch.bfloat16, False)
    assert found.broken.tolist() == [[0, 0, 0], [1, 0, 0]]
    nan = found.values.isnan().nonzero()
    assert nan.tolist() == [[row, column] for row in range(64, 68) for column in (4, 5)]
    with pytest.raises(ValueError, match=r"mask: expected at most 2 .* got 4 in row 65, columns 8"):
        pack24(w, mask)
    mask = transposable_mask(w)
    mask[5, :4] = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match="mask: expected 2 of each 4 .* got 1 in row 5 from 0 on"):
        pack24(w, mask, transposable=True)
    mask[5, :4] = mask[4, :4]
    with pytest.raises(ValueError, match=r"mask: expected 2 of each 4 .* got [134] in column"):
        pack24(w, mask, transposable=True)


def test_metadata_that_do_not_belong_together_give_nan() -> None:
    w = weight(64, 64)
    one, other = prune24(w, transposable=True), prune24(weight(64, 64), transposable=True)
    assert one.meta_t is not None
    assert other.meta_t is not None
    assert not kernels.transpose(one.values, one.meta, one.meta_t, 64).isnan().any()
    differ = transposable_mask(w) != (other.to_dense() != 0)
    blocks = differ.unflatten(1, (-1, 4)).unflatten(0, (-1, 4)).any(3).any(1)
    transposed = kernels.transpose(one.values, one.meta, other.meta_t, 64)
    nan = transposed.isnan().unflatten(1, (-1, 2)).all(2).unflatten(0, (-1, 4)).all(1)
    assert torch.equal(nan, blocks.t())


# the public functions ----------------------------------------------------------------------------


def test_the_public_functions_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "serves", lambda w, stored: stored != torch.int8)
    w = weight(20, 68, "f32")
    with expect("cuda.sparse24_pack.f32.bf16"):
        found = prune24(w)
    want = Sparse24Weight.from_mask(w, n_m_mask(w), torch.bfloat16, False)
    with expect("cuda.sparse24_pack.f32.f16"):
        both = pack24(w, transposable_mask(w), torch.float16, transposable=True)
    want_both = Sparse24Weight.from_mask(w, transposable_mask(w), torch.float16, True)
    for one, other in ((found, want), (both, want_both)):
        assert one.shape == other.shape
        for name, b in other.tensors().items():
            a = getattr(one, name)
            assert (a is None and b is None) or torch.equal(a, b)
    assert prune24(w, torch.int8).scale is not None


def test_bad_arguments() -> None:
    w = weight(20, 68)
    found = kernels.pack(w, None, "largest", torch.bfloat16, True)
    values, meta, _, meta_t, _ = found
    op, transposed = torch.ops.bigops.sparse24_pack, torch.ops.bigops.sparse24_transpose
    for call, args, message in (
        (op, (w.double(), None, "largest", "bf16", False), "w: expected dtype f32, bf16 or f16"),
        (op, (w[0], None, "largest", "bf16", False), r"w: expected shape \[N, K\]; got \[68\]"),
        (op, (w, None, 1, 2, False), r"dtype: expected a code from 0 to 1 \(bf16 to f16\); got 2"),
        (op, (w, None, -1, 0, False), r"choice: expected a code from 0 to 1 \(given to largest\)"),
        (op, (w, w != 0, "largest", "bf16", False), "mask: expected None with a choice by size"),
        (op, (w, w, "given", "bf16", False), "mask: expected dtype "),
        (
            op,
            (w, (w != 0)[:4], "given", "bf16", False),
            r"mask: expected shape \[20, 68\]; got \[4",
        ),
        (op, (w[:7], None, "largest", "bf16", True), "w: expected N and K that divide by 4"),
        (
            transposed,
            (values.float(), meta, meta_t, 68),
            "values: expected dtype bf16 or f16; got f32",
        ),
        (transposed, (values, meta, meta_t, 66), "k: expected a multiple of 4; got 66"),
        (transposed, (values[:, :32], meta, meta_t, 68), r"values: expected shape \[N, 64\]"),
        (transposed, (values, meta[:1], meta_t, 68), r"meta: expected shape \[2, 2, 32\]"),
        (transposed, (values, meta, meta_t[:1], 68), r"meta_t: expected shape \[5, 1, 32\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)


# planted faults and sanitizers -------------------------------------------------------------------

BITS_BARRIER = ("__syncthreads_or(broken ? 1 : 0)", "(broken ? 1 : 0)")
TRANSPOSE_BARRIER = ("__syncthreads();  // the pairs of all columns", "// the pairs of all columns")
FAULTS = {
    "of equal ones the last": ("i < j ? key[i]", "i > j ? key[i]"),
    "of equal sums the last": ("if (total > best)", "if (total >= best)"),
    "places exchanged": ("low | high << 2);", "high | low << 2);"),
    "a column's rows mixed up": ("(down >> 3 & 2u)", "(down >> 7 & 2u)"),
}


def run(library: Path, w: Tensor, call: Any = hostrun.call, **how: Any) -> tuple[bool, Any]:
    """(whether both kernels gave what plain torch gives, what the call of the first returned)."""
    (n, k), to = w.shape, torch.bfloat16
    values = torch.full((n, padded(k, to) // 2), 9.0, dtype=to)
    values_t = torch.full((k, padded(n, to) // 2), 9.0, dtype=to)
    again = values_t.clone()
    meta = torch.zeros(meta_shape(n, k, to), dtype=torch.int32)
    meta_t = torch.zeros(meta_shape(k, n, to), dtype=torch.int32)
    broken = torch.zeros(-(-n // 64) * -(-k // 64), dtype=torch.int32)
    given = (w, None, values, meta, values_t, meta_t, broken, n, k, 2, 1, 0)
    done = call(library, "run_pack", *given, **how)
    want = Sparse24Weight.from_mask(w, transposable_mask(w), to, True)
    assert want.meta_t is not None
    transposed = transpose(want.values, want.meta, want.meta_t, k)
    other = call(library, "run_turn", want.values, want.meta, want.meta_t, again, n, k, 0, **how)
    pairs = ((values, want.values), (values_t, transposed), (again, transposed), (meta, want.meta))
    good = all(torch.equal(a, b) for a, b in (*pairs, (meta_t, want.meta_t)))
    largest, mask = Sparse24Weight.from_mask(w, n_m_mask(w), to, False), n_m_mask(w)
    for given_mask, choice in ((None, 1), (mask, 0)):
        few = torch.zeros_like(meta)
        tensors = (w, given_mask, values, few, None, None, broken)
        call(library, "run_pack", *tensors, n, k, choice, 1, 0, **how)
        good = good and torch.equal(values, largest.values) and torch.equal(few, largest.meta)
    return good, (done, other)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    assert not run(library, weight(68, 72, ties=True))[0]


@pytest.mark.slow
@pytest.mark.parametrize("barrier", [BITS_BARRIER, TRANSPOSE_BARRIER], ids=["bits", "turn"])
def test_a_missing_barrier_is_seen(barrier: tuple[str, str]) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *barrier))
    assert not all(run(library, weight(68, 72), seed=seed)[0] for seed in (0, 1, 7))


def apart(
    folder: Path, sanitize: str, fault: hostrun.Fault | None, shape: tuple[int, int], **how: Any
) -> list[Any]:
    """The two runs under a sanitizer; values held where they end well."""
    library = hostrun.build(SOURCE, sanitize, fault)

    def call(*args: Any, **more: Any) -> Any:
        return hostrun.call_apart(*args, folder=folder, sanitize=sanitize, **more)

    good, done = run(library, weight(*shape), call, **how)
    if fault is None:
        assert good
    return list(done)


@hostrun.needs("asan")
@pytest.mark.slow
def test_address_sanitizer(tmp_path: Path) -> None:
    """Nothing in the sound kernel; rows past the last one, read as if they were there, are seen."""
    for early in (False, True):
        for done in apart(tmp_path, "asan", None, (20, 72), seed=7, early=early):
            assert done.returncode == 0, done.stderr
    fault = (
        KERNEL,
        "const bool there = n0 + row < task.n",
        "const bool there = n0 + row <= task.n",
    )
    done = apart(tmp_path, "asan", fault, (20, 72))[1]
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, done.stderr


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, BITS_BARRIER], ids=["none", "bits"])
def test_thread_sanitizer(fault: tuple[str, str] | None, tmp_path: Path) -> None:
    planted = None if fault is None else (KERNEL, *fault)
    done = apart(tmp_path, "tsan", planted, (20, 24))
    codes = [one.returncode for one in done]
    assert codes == ([0, 0] if fault is None else [66, 0]), [one.stderr for one in done]
    for one in done:
        assert one.returncode == 0 or "ThreadSanitizer: data race" in one.stderr


# on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("source", SOURCES)
def test_on_a_gpu(source: str, stored: str) -> None:
    to = STORED[stored]
    for ties in (False, True):
        w = weight(1000, 5003, source, ties)
        with expect(f"cuda.sparse24_pack.{source}.{stored}"):
            found = prune24(w.cuda(), to)
        assert torch.equal(
            found.meta.cpu(), Sparse24Weight.from_mask(w, n_m_mask(w), to, False).meta
        )
        w = weight(1000, 5004, source, ties)
        packed = kernels.pack(w.cuda(), None, "largest", to, True)
        same(
            kernels.Packed(*(t.cpu() for t in packed)),
            Sparse24Weight.from_mask(w, transposable_mask(w), to, True),
        )
        transposed = kernels.transpose(packed.values, packed.meta, packed.meta_t, 5004)
        assert torch.equal(transposed, packed.values_t)
