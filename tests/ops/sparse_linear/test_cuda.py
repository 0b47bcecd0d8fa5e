"""The decode kernels of sparse_linear (csrc/cuda) on the CPU by csrc/hostrun, by the rule."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.backend import machine
from bigops.formats.sparse import SparseWeight
from bigops.formats.sparse_layout import sizes
from bigops.ops import activation as act
from bigops.ops.sparse_linear import cuda as path
from tests.support import hostrun
from tests.support.cases.compressed import DTYPES, SPARSE, Case, make, served
from tests.support.kernels_ran import expect

SOURCE = Path(__file__).parent / "hostrun_sparse_linear.cu"
pytestmark = [
    hostrun.needs(),
    # numpy's, of Triton's interpreter, on NaN and inf
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
FLOATING = ("sparse_float", "sparse_bf16")


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.load_op("sparse_linear")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


def decode(case: Case, splits: int = 1, **given: Any) -> Tensor:
    """The op on a case with floating values and x [M, K], as it is called on a GPU."""
    weight = case.weight
    usual = {
        "x": case.x,
        "x_scale": None,
        "x_zero": None,
        "like": case.x,
        "values": weight.values,
        "index": weight.index,
        "rows": weight.rows,
        "ptr": weight.ptr,
        "scale": None,
        "sums": None,
        "n": weight.n,
        "k": weight.k,
        "chunk": weight.chunk,
        "bias": case.bias,
        "residual": case.residual,
        "activation": case.name,
        "splits": splits,
    }
    y: Tensor = torch.ops.bigops.sparse_linear_decode(*{**usual, **given}.values())
    return y


def run(
    form: str, dtype: str, lead: int | list[int], n: int, k: int, name: str = "none", **more: Any
) -> None:
    """One case by the path that a GPU takes: values by the rule, the kernel by its name."""
    if form == "sparse_int8":
        pytest.importorskip("triton")
        from tests.support import triton_interpreter

        triton_interpreter.install()
    case = make(form, lead, n, k, dtype, name, **more)
    with expect(f"cuda.sparse_linear.{dtype}.{SPARSE[form]}"):
        y = path.forward(case.call)
    case.check_forward(y)


# values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("form", SPARSE)
def test_full_thin_and_empty(form: str, sparsity: float) -> None:
    run(form, "bf16", 3, 70, 140, sparsity=sparsity)


@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_optional_arguments(bias: bool, residual: bool) -> None:
    run("sparse_float", "f16", 16, 20, 136, "gelu", bias=bias, residual=residual)


def test_longer_chunks() -> None:
    run("sparse_float", "f32", 2, 2100, 70, sparsity=0.9)


def test_any_strides() -> None:
    case = make("sparse_bf16", 7, 20, 64, "bf16", "gelu")
    want = decode(case)

    def odd(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    spread = {name: odd(getattr(case.weight, name)) for name in ("values", "index", "rows", "ptr")}
    assert torch.equal(decode(case, x=odd(case.x), **spread), want)


@pytest.mark.parametrize("form", FLOATING)
def test_every_order_of_threads_gives_the_same_bits(library: Path, form: str) -> None:
    case = make(form, 5, 70, 400, "bf16", "gelu")
    want = decode(case, 2)
    case.check_forward(want)
    for seed in (1, 7, 8):
        hostrun.schedule(library, seed, False)
        assert torch.equal(decode(case, 2), want), seed


@pytest.mark.parametrize("splits", [2, 3, 7])
def test_blocks_that_share_panels(splits: int) -> None:
    """Also more of them than there are panels: some have nothing to add."""
    case = make("sparse_float", 5, 70, 300, "f32", "silu")
    case.check_forward(decode(case, splits))


def test_whole_numbers_are_exact_in_every_split() -> None:
    """Products at their ends: x and W all -128, and a K whose sums need all of int32."""
    n, k, m = 16, 131068, 2
    weight = SparseWeight.from_mask(
        torch.ones(n, k), torch.ones(n, k // 4).bool(), torch.int8, (1, 4)
    )
    values = torch.full_like(weight.values, -128)
    x = torch.full((m, k), -128, dtype=torch.int8)
    one = torch.ones(m)
    y = torch.ops.bigops.sparse_linear_decode(
        x,
        one,
        torch.zeros(m, dtype=torch.int32),
        torch.empty(0),
        values,
        weight.index,
        weight.rows,
        weight.ptr,
        torch.ones(n),
        torch.zeros(n, dtype=torch.int32),
        n,
        k,
        weight.chunk,
        None,
        None,
        "none",
        3,
    )
    assert torch.equal(y, torch.full((m, n), 128.0 * 128 * k))


@pytest.mark.parametrize(
    ("name", "value"), [("index", 64), ("rows", 200), ("ptr", 1 << 20), ("ptr", -5)]
)
def test_a_broken_storage_gives_nan_and_no_wild_access(name: str, value: int) -> None:
    case = make("sparse_float", 3, 150, 70, "f32")
    want = decode(case)
    wrong = getattr(case.weight, name).clone()
    wrong[wrong.shape[0] // 2] = value
    y = decode(case, **{name: wrong})
    broken = y.isnan()
    assert broken.any()
    assert torch.equal(broken, broken[0].expand_as(broken))
    assert torch.equal(y[~broken], want[~broken])
    for chunk in broken[0].split(case.weight.chunk):
        assert bool(chunk.all()) or not bool(chunk.any())


# which kernel --------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where bigops/_cuda was built."""
    monkeypatch.setattr(machine, "cuda_archs", ("80", "90a"))
    machine.cuda_runs_on.cache_clear()
    yield
    machine.cuda_runs_on.cache_clear()


@pytest.mark.usefixtures("built")
def test_explain_names_the_kernel() -> None:
    case = make("sparse_bf16", 16, 100, 1000, "bf16")
    said = bigops.explain("sparse_linear", case.x, case.weight, device="sm_90")
    assert said.kernel == "cuda.sparse_linear.bf16.bf16"
    assert said.config == {"block_n": 64, "block_k": 128, "splits": 4}
    for m, device in ((17, "sm_90"), (4, "gfx942"), (4, "sm_100")):
        x = torch.zeros(m, 1000).bfloat16()
        said = bigops.explain("sparse_linear", x, case.weight, device=device)
        assert said.kernel == "reference.sparse_linear"


def test_splits_leave_each_block_two_panels() -> None:
    assert path.splits_for(4096, 4096, 256, torch.float32) == 16
    assert path.splits_for(4096, 4096, 256, torch.int8) == 8
    assert path.splits_for(65536, 4096, 256, torch.float32) == 2
    assert path.splits_for(0, 0, 64, torch.float32) == 1


def test_bad_arguments() -> None:
    case = make("sparse_bf16", 4, 20, 64, "bf16")
    decode(case)
    x = case.x
    for given, message in (
        ({"x": torch.zeros(17, 64).bfloat16()}, r"x: expected shape \[at most 16, 64\]; got \[17"),
        ({"x": x[:, :60]}, r"x: expected shape \[at most 16, 64\]; got \[4, 60\]"),
        ({"x": x.float(), "like": x.float()}, "x: expected dtype bf16 with bf16 values; got f32"),
        ({"values": case.weight.values.half()}, "values: expected dtype f32, bf16 or s8; got f16"),
        ({"index": case.weight.index[:, :3]}, r"index: expected shape \[\.\., 16\]"),
        ({"rows": case.weight.rows[:-1]}, r"rows: expected shape \[4, 16\]; got \[3, 16\]"),
        ({"ptr": case.weight.ptr[:-1]}, r"ptr: expected shape \[5\]; got \[4\]"),
        ({"chunk": 32}, "chunk: expected 64, 128 or 256; got 32"),
        ({"splits": 0}, "splits: expected 1 to 65535; got 0"),
        ({"scale": torch.ones(20)}, "x_scale, x_zero, scale, sums: expected None; got a tensor"),
        ({"bias": torch.zeros(20)}, "bias: expected dtype bf16; got f32"),
        ({"residual": x}, r"residual: expected shape \[4, 20\]; got \[4, 64\]"),
        ({"activation": "swiglu"}, "activation: expected one that is no gated pair; got swiglu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decode(case, **given)


# planted faults and sanitizers ------------------------------------------------------------------


def arguments(case: Case, splits: int) -> tuple[Tensor, tuple[Any, ...]]:
    """(y, the arguments of `run_decode`) for a case with floating values and x [M, K]."""
    weight, m = case.weight, case.x.shape[0]
    n, k, chunk, values, index = weight.n, weight.k, weight.chunk, weight.values, weight.index
    size = sizes(n, k, chunk, values.dtype)
    y = torch.full((m, n), math.nan, dtype=case.x.dtype)
    partial = torch.full((splits, m, size.chunks * chunk), math.nan)
    group_bits = {16: 0, 4: 2, 1: 4}[index.shape[1]]
    types = list(DTYPES.values())
    stored = (values, index, weight.rows, weight.ptr)
    tensors = (case.x, None, None, *stored, None, None, case.bias, case.residual)
    numbers = (m, n, k, k, values.shape[0], size.panels, size.chunks, chunk, group_bits)
    last = (act.CODES[case.name], splits, types.index(case.x.dtype))
    word = [torch.float32, torch.bfloat16, torch.int8].index(values.dtype)
    return y, (*tensors, y, partial, *numbers, *last, word)


KERNEL = "sparse_linear.cu"
BARRIER = "__syncthreads();  // sums of this"
FAULTS = {
    "a step of a half": ("step += 2", "step += 3"),
    "word of another row": ("index[step * indices + mine]", "index[step * indices]"),
    "rows of the whole group": ("row % (1 << task.group_bits)", "0"),
    "halves not added": ("part[i] + __shfl_xor_sync(0xffffffffu, part[i], kSlice)", "part[i]"),
    "x of the panel before": ("if (panel + 1 < last) put(panel + 1)", "if (false) put(panel + 1)"),
    "barrier forgotten": (BARRIER, "// sums of this"),
    "one split forgotten": ("for (int s = 0; s < task.splits", "for (int s = 1; s < task.splits"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_wrong_values(fault: str) -> None:
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    caught = []
    for seed in (0, 1, 7):
        case = make("sparse_bf16", 10, 70, 700, "bf16", "gelu", pattern="4x1")
        y, given = arguments(case, 2)
        hostrun.call(library, "run_decode", *given, seed=seed)
        try:
            case.check_forward(y)
        except AssertionError:
            caught.append(seed)
    assert caught


def apart(
    folder: Path, sanitize: str, fault: hostrun.Fault | None, case: Case, splits: int, **how: Any
) -> tuple[int, str]:
    """(exit code, what it said) of one call in a process of its own; values held where it ends."""
    library = hostrun.build(SOURCE, sanitize, fault)
    y, given = arguments(case, splits)
    done = hostrun.call_apart(
        library, "run_decode", *given, folder=folder, sanitize=sanitize, **how
    )
    if done.returncode == 0:
        case.check_forward(y)
    return done.returncode, done.stderr


@hostrun.needs("asan")
@pytest.mark.slow
@pytest.mark.parametrize("form", FLOATING)
def test_address_sanitizer_finds_nothing(form: str, tmp_path: Path) -> None:
    for m, splits in ((16, 2), (1, 1)):
        case = make(form, m, 70, 267, "bf16", "gelu")
        code, said = apart(tmp_path, "asan", None, case, splits, seed=7)
        assert code == 0, said


@hostrun.needs("asan")
@pytest.mark.slow
def test_address_sanitizer_finds_an_overrun(tmp_path: Path) -> None:
    """A step past the last slice's end."""
    fault = (KERNEL, "step = begin + half; step < end", "step = begin + half; step <= end")
    code, said = apart(tmp_path, "asan", fault, make("sparse_float", 2, 16, 64, "f32"), 1)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said, said


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["none", "barrier"])
def test_thread_sanitizer(whole: bool, tmp_path: Path) -> None:
    """On one block, without the barrier between panels: two warps add to one row."""
    fault = None if whole else (KERNEL, BARRIER, "// sums of this")
    case = make("sparse_bf16", 3, 64, 700, "bf16", "relu")
    code, said = apart(tmp_path, "tsan", fault, case, 1)
    assert code == (0 if whole else 66), said
    assert ("ThreadSanitizer: data race" in said) != whole


# on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("m", [1, 4, 16])
@pytest.mark.parametrize(
    ("form", "dtype"), [(form, dtype) for form in SPARSE for dtype in served(form)]
)
def test_on_a_gpu(form: str, dtype: str, m: int) -> None:
    for n, k in ((4096, 4096), (1000, 5003)):
        case = make(form, m, n, k, dtype, "gelu", sparsity=0.9)
        weight = case.weight.map(Tensor.cuda)
        inputs = [None if t is None else t.cuda() for t in case.inputs]
        with expect(f"cuda.sparse_linear.{dtype}"):
            y = bigops.sparse_linear(inputs[0], weight, *inputs[1:], "gelu")
            again = bigops.sparse_linear(inputs[0], weight, *inputs[1:], "gelu")
        assert torch.equal(y, again)
        case.check_forward(y.cpu())
