"""The decode kernels of quantized_linear (csrc/cuda) on the CPU by csrc/hostrun, by the rule.

The op itself runs, registration and checks included, on CPU tensors. The planted faults and the
sanitizers take the kernels by themselves, in a process without torch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops
from bigops.backend import machine
from bigops.formats.quantized import QuantizedWeight, pack
from bigops.ops import activation as act
from bigops.ops.quantized_linear import cuda as path
from tests.support import hostrun
from tests.support.cases.compressed import DTYPES, QUANTISED, Case, make
from tests.support.kernels_ran import expect

SOURCE = Path(__file__).parent / "hostrun_quantized_linear.cu"
pytestmark = hostrun.needs()
FORMS = ("w8", "w8_group", "w8_zero", "w4", "w4_zero", "w4_row")  # those with a floating x
KINDS = ("w8_zero", "w4_zero", "w4_row")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def library() -> Path:
    return hostrun.load_op("quantized_linear")


@pytest.fixture(autouse=True)
def _schedule(library: Path) -> None:
    hostrun.schedule(library, 0, False)


def decoded(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors that the kernels read."""
    return weight.values, weight.scale, weight.zero_point


def decode(case: Case, weight: QuantizedWeight | None = None, splits: int | None = None) -> Tensor:
    """The op on a case with x [M, K], as it is called on a GPU."""
    weight = weight or case.weight
    if splits is None:
        splits = path.splits_for(weight.n, weight.k, weight.bits)
    y: Tensor = torch.ops.bigops.quantized_linear_decode(
        case.x,
        *decoded(weight),
        -weight.n % 16,
        weight.k,
        weight.bits,
        weight.group,
        case.bias,
        case.residual,
        case.name,
        splits,
    )
    return y


# values --------------------------------------------------------------------------------------


def test_the_forms_are_all_that_take_floating_activations() -> None:
    floating = [f for f in QUANTISED if make(f, 1, 1, 1).weight.activations == "none"]
    assert sorted(floating) == sorted(FORMS)


@pytest.mark.parametrize("form", KINDS)
def test_every_schedule_gives_the_same_bits(library: Path, form: str) -> None:
    case = make(form, 10, 70, 1400, "bf16", "gelu")
    want = decode(case, splits=1)
    case.check_forward(want)
    for seed, early in hostrun.SCHEDULES[1:]:
        hostrun.schedule(library, seed, early)
        assert torch.equal(decode(case, splits=1), want), (seed, early)


@pytest.mark.parametrize("splits", [2, 3, 7])
@pytest.mark.parametrize("form", KINDS)
def test_blocks_that_share_k(form: str, splits: int) -> None:
    """Also more of them than there are stages: some have nothing to add."""
    case = make(form, 5, 70, 700, "f32", "silu")
    case.check_forward(decode(case, splits=splits))


def test_any_strides() -> None:
    case = make("w4_zero", 7, 20, 64, "bf16", "gelu")
    want = decode(case)

    def odd(t: Any) -> Any:
        return None if t is None else t.repeat_interleave(2, -1)[..., ::2]

    def moved(t: Any) -> Any:  # to an address that does not divide by 16
        if t is None:
            return None
        room = torch.empty(t.numel() + 1, dtype=t.dtype)
        return room[1:].view(t.shape).copy_(t)

    for move in (odd, moved):
        weight = case.weight.map(move)
        case.x, case.bias, case.residual = move(case.x), move(case.bias), move(case.residual)
        assert torch.equal(decode(case, weight), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_in_every_column_is_itself(dtype: str) -> None:
    """x picks one column at a time; with the zero points at their ends 16-bit floats must hold."""
    for bits, low, high in ((8, -128, 127), (4, -8, 7)):
        count = high - low + 1
        q = (torch.arange(48).unsqueeze(1) * 7 + torch.arange(64)) % count + low
        base = QuantizedWeight.from_dense(torch.zeros(48, 64), bits, 32, False, "none")
        for zero in (low, 0, high):
            weight = base.replace(
                values=pack(q.float(), bits),
                scale=torch.ones_like(base.scale),
                zero_point=torch.full_like(base.zero_point, zero),
            )
            x = torch.eye(64, dtype=DTYPES[dtype])
            for rows in x.split(16):
                y = torch.ops.bigops.quantized_linear_decode(
                    rows, *decoded(weight), 0, 64, bits, 32, None, None, "none", 1
                )
                want = rows.float() @ (q - zero).float().t()
                assert torch.equal(y, want.to(DTYPES[dtype]))


def test_float32_keeps_its_24_bits() -> None:
    """One weight of 1 a row: the product gives x back to the bit, the largest floats as well."""
    q = torch.zeros(64, 64)
    q[range(64), range(64)] = 1
    weight = QuantizedWeight.from_dense(torch.ones(64, 64), 8, None, True, "none").replace(
        values=pack(q, 8), scale=torch.ones(1, 64)
    )
    x = torch.randn(16, 64) * torch.logspace(-30, 30, 16).unsqueeze(1)
    x[0, :2] = torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max])
    y = torch.ops.bigops.quantized_linear_decode(
        x, *decoded(weight), 0, 64, 8, 0, None, None, "none", 1
    )
    assert torch.equal(y, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["w8", "w4"])
def test_a_row_with_nan_or_infinity_spoils_no_other(form: str, dtype: str) -> None:
    case = make(form, 11, 19, 37, dtype, "relu")
    case.x[0, 36], case.x[3, 2] = float("nan"), float("inf")
    y = decode(case)
    want = torch.nn.functional.linear(case.x.double(), case.weight.to_dense(torch.float64))
    assert bool(y[0].isnan().all())
    rows = torch.tensor([r not in (0, 3) for r in range(11)])
    assert bool(y[rows].isfinite().all())
    assert not bool(y[3].isfinite()[want[3] > 0].any())


@pytest.mark.slow
def test_offsets_past_32_bits(tmp_path: Path) -> None:
    """The last block of a weight of 2^31 bytes and more, all in sparse files."""
    tiles = (1 << 25) + 1
    n = 16 * tiles

    def sparse(name: str, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        return torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype).view(
            shape
        )

    last = QuantizedWeight.from_dense(torch.randn(16, 8), 4, None, True, "none")
    values = sparse("values", [tiles, 1, 16, 4], torch.uint8)
    scale = sparse("scale", [1, n], torch.float32)
    values[-1], scale[:, -16:] = last.values[0], last.scale
    x, y = torch.randn(5, 8).half(), sparse("y", [5, n], torch.float16)
    library = hostrun.build(SOURCE)
    loaded = ctypes.CDLL(str(library))
    loaded.hostrun_only(ctypes.c_int64((tiles - 1) // 4))
    try:
        given = (x, values, scale, None, None, None, y, None, 5, n, 8, tiles, 1, 0, 4, 0, 1, 2)
        hostrun.call(library, "run_decode", *given)
    finally:
        loaded.hostrun_only(ctypes.c_int64(-1))
    case = Case(x, last, last.to_dense(torch.float64), False, None, None, y[:, -16:], "none")
    case.check_forward(y[:, -16:].contiguous())


def test_each_byte_is_read_once(library: Path) -> None:
    """The weight is read once, and nothing but x and y besides: no more than it takes."""
    case = make("w4_zero", 4, 128, 1024, "bf16")
    hostrun.counts(library)
    decode(case, splits=2)
    values, scale, zero = decoded(case.weight)
    copied, _ = hostrun.counts(library)
    blocks = 2  # of 64 rows: each reads x
    assert copied == values.nbytes + scale.nbytes + zero.nbytes + blocks * case.x.nbytes


# which kernel --------------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where bigops/_cuda was built, for other architectures than all."""
    monkeypatch.setattr(machine, "cuda_archs", ("80", "90a", "120"))
    machine.cuda_runs_on.cache_clear()
    yield
    machine.cuda_runs_on.cache_clear()


@pytest.mark.usefixtures("built")
def test_code_runs_on_later_devices_of_its_generation() -> None:
    on = {
        arch
        for arch in (
            "sm_75",
            "sm_80",
            "sm_86",
            "sm_89",
            "sm_90",
            "sm_100",
            "sm_103",
            "sm_120",
            "sm_121",
            "gfx942",
            "interpreter",
        )
        if machine.cuda_runs_on(arch)
    }
    assert on == {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120", "sm_121"}


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("form", ["w8", "w4"])
def test_explain_names_the_kernel(form: str) -> None:
    case = make(form, 16, 1024, 2048, "bf16")
    said = bigops.explain("quantized_linear", case.x, case.weight, device="sm_90")
    assert said.kernel == f"cuda.quantized_linear.bf16.{form}"
    columns = 128 if form == "w8" else 256
    splits = 4 if form == "w8" else 2
    assert said.config == {"block_n": 64, "block_k": columns, "splits": splits}
    assert "decode of 16 rows" in said.reason


@pytest.mark.usefixtures("built")
def test_explain_leaves_to_triton_what_these_do_not_serve() -> None:
    pytest.importorskip("triton")
    for form, m, device in (
        ("w4", 17, "sm_90"),
        ("int8", 4, "sm_90"),
        ("w4a8", 4, "sm_90"),
        ("w4", 4, "gfx942"),
        ("w4", 4, "sm_100"),
    ):
        case = make(form, m, 48, 256, "bf16")
        said = bigops.explain("quantized_linear", case.x, case.weight, device=device)
        assert said.kernel.startswith("triton.quantized_linear.bf16"), (form, m, device)


def test_without_the_library_triton_serves() -> None:
    if machine.cuda_archs:
        pytest.skip("bigops/_cuda is built here")
    pytest.importorskip("triton")
    assert "not built" in machine.cuda_error
    case = make("w4", 4, 48, 256, "bf16")
    said = bigops.explain("quantized_linear", case.x, case.weight, device="sm_90")
    assert said.kernel.startswith("triton.")
    assert not path.serves(case.call, case.weight, torch.device("cuda"))


def test_splits_fill_a_device_and_leave_each_block_a_pipeline() -> None:
    assert path.splits_for(4096, 4096, 4) == 4  # 16 stages of 256 columns
    assert path.splits_for(4096, 4096, 8) == 8
    assert path.splits_for(1024, 65536, 8) == 16
    assert path.splits_for(65536, 4096, 8) == 1
    assert path.splits_for(0, 0, 4) == 1


def test_bad_arguments() -> None:
    case = make("w4_zero", 4, 20, 64, "bf16")

    def call(**given: Any) -> None:
        names = (
            "x",
            "values",
            "scale",
            "zero_point",
            "pad",
            "k",
            "bits",
            "group",
            "bias",
            "residual",
            "activation",
            "splits",
        )
        usual = (
            case.x,
            *decoded(case.weight),
            12,
            64,
            4,
            32,
            case.bias,
            case.residual,
            "relu",
            1,
        )
        torch.ops.bigops.quantized_linear_decode(
            *{**dict(zip(names, usual, strict=True)), **given}.values()
        )

    call()
    for given, message in (
        ({"x": case.x.double()}, "x: expected dtype f32, bf16 or f16; got f64"),
        ({"x": torch.zeros(17, 64).bfloat16()}, r"x: expected shape \[at most 16, 64\]; got \[17"),
        ({"x": case.x[:, :60]}, r"x: expected shape \[at most 16, 64\]; got \[4, 60\]"),
        ({"bits": 2}, "bits: expected 8 or 4; got 2"),
        ({"bits": 8}, r"values: expected dtype s8; got u8"),
        ({"group": 48}, "group: expected 0, 32, 64 or 128; got 48"),
        ({"group": 64}, r"scale: expected shape \[1, 32\]; got \[2, 32\]"),
        ({"pad": 16}, "pad: expected the rows that fill up the last tile of 16; got 16"),
        ({"splits": 0}, "splits: expected 1 to 65535; got 0"),
        ({"bias": case.bias[:3]}, r"bias: expected shape \[20\]; got \[3\]"),  # type: ignore[index]
        ({"bias": torch.zeros(20)}, "bias: expected dtype bf16; got f32"),
        ({"residual": case.x}, r"residual: expected shape \[4, 20\]; got \[4, 64\]"),
        ({"activation": "swiglu"}, "activation: expected one that is no gated pair; got swiglu"),
        ({"activation": 99}, r"activation: expected a code from 0 to 11 \(none to reglu\); got 99"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**given)  # type: ignore[arg-type]


# planted faults and sanitizers ------------------------------------------------------------------


def arguments(case: Case, splits: int) -> tuple[Tensor, tuple[Any, ...]]:
    """(y, the arguments of `run_decode`) for a case with x [M, K]."""
    weight = case.weight
    m, n = case.x.shape[0], weight.n
    values, scale, zero_point = decoded(weight)
    y = torch.full((m, n), math.nan, dtype=case.x.dtype)
    partial = torch.full((splits, m, scale.shape[1]), math.nan) if splits > 1 else None
    tensors = (case.x, values, scale, zero_point, case.bias, case.residual, y, partial)
    numbers = (m, n, weight.k, *values.shape[:2], weight.group, weight.bits, act.CODES[case.name])
    return y, (*tensors, *numbers, splits, TYPES[case.x.dtype])


KERNEL = "quantized_linear.cu"
FAULTS = {
    "one group too many under way": ("copy_wait<S::stages - 2>", "copy_wait<S::stages - 1>"),
    "nibbles of one half": ("even.pair(words.x, 2 * half + 1)", "even.pair(words.x, 2 * half)"),
    "scale of another row": ("odd_scale = from.scale[in_group + 1]", "odd_scale = even_scale"),
    "zero point of the first group": ("from.zero[in_group]", "from.zero[tile * kTile + 2 * row]"),
    "lines not exchanged": ("row / 2 ^ (at / 2 % 2 * 2)", "row / 2"),
    "one slice forgotten": ("for (int s = 0; s < kSlices; ++s)", "for (int s = 0; s < 1; ++s)"),
    "one split forgotten": ("for (int s = 0; s < task.splits", "for (int s = 1; s < task.splits"),
    "barrier forgotten": ("__syncthreads();  // everybody", "// everybody"),
}


def fails(fault: str) -> bool:
    """Whether some schedule gives wrong values with the fault."""
    library = hostrun.build(SOURCE, "canary", (KERNEL, *FAULTS[fault]))
    for seed, early in hostrun.SCHEDULES:
        case = make("w4_zero", 10, 70, 1400, "bf16", "gelu")
        y, given = arguments(case, 2)
        hostrun.call(library, "run_decode", *given, seed=seed, early=early)
        try:
            case.check_forward(y)
        except AssertionError:
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_gives_wrong_values(fault: str) -> None:
    assert fails(fault)


def apart(
    folder: Path, sanitize: str, fault: hostrun.Fault | None, case: Case, splits: int, **how: Any
) -> tuple[int, str]:
    """(exit code, what it said) of one call in a process of its own; values held where it ends."""
    library = hostrun.build(SOURCE, sanitize, fault)
    y, given = arguments(case, splits)
    kind = "" if sanitize == "canary" else sanitize
    done = hostrun.call_apart(library, "run_decode", *given, folder=folder, sanitize=kind, **how)
    if done.returncode == 0:
        case.check_forward(y)
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_divergent_barrier_ends_the_run(tmp_path: Path) -> None:
    fault = (
        KERNEL,
        "__syncthreads();  // the stages",
        "if (warp != 3) __syncthreads();  // the stages",
    )
    code, said = apart(tmp_path, "canary", fault, make("w4", 3, 70, 300, "bf16"), 1)
    assert code != 0
    assert "divergent barrier: threads wait at __syncthreads in line" in said


@hostrun.needs("asan")
@pytest.mark.slow
@pytest.mark.parametrize("form", [*KINDS, "w4"])
def test_address_sanitizer_finds_nothing(form: str, tmp_path: Path) -> None:
    for dtype, (m, n, k), splits in (("bf16", (16, 70, 1400), 2), ("f32", (1, 17, 263), 1)):
        case = make(form, m, n, k, dtype, "gelu")
        code, said = apart(tmp_path, "asan", None, case, splits, seed=7)
        assert code == 0, said


@hostrun.needs("asan")
@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        ("from.x + x_row * S::x_pitch", "from.x + (x_row + 8) * S::x_pitch"),
        ("tile0 + of < task.tiles", "tile0 + of <= task.tiles"),
    ],
    ids=["of shared memory", "of the weight"],
)
def test_address_sanitizer_finds_an_overrun(change: tuple[str, str], tmp_path: Path) -> None:
    case = make("w4_row", 3, 70, 1100, "bf16")  # all stages: the last one ends the memory
    code, said = apart(tmp_path, "asan", (KERNEL, *change), case, 1)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in said, said


@hostrun.needs("tsan")
@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
@pytest.mark.parametrize("barrier", ["", "everybody", "the stages"])
def test_thread_sanitizer(barrier: str, early: bool, tmp_path: Path) -> None:
    """On one block; without the first barrier, and without the one before the sums."""
    fault = (KERNEL, f"__syncthreads();  // {barrier}", f"// {barrier}") if barrier else None
    # five stages of 256 columns: the last one lies where the sums are put
    case = make("w4_zero", 3, 64, 1280, "bf16", "relu")
    code, said = apart(tmp_path, "tsan", fault, case, 1, early=early)
    if fault is None:
        assert code == 0, said
    else:
        assert code == 66, said
        assert "ThreadSanitizer: data race" in said


# on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(bool(machine.cuda_error), reason=machine.cuda_error)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_on_a_gpu(form: str, dtype: str, m: int) -> None:
    for n, k in ((4096, 4096), (1000, 5003)):
        case = make(form, m, n, k, dtype, "gelu")
        weight = case.weight.map(Tensor.cuda)
        inputs = [None if t is None else t.cuda() for t in case.inputs]
        with expect(f"cuda.quantized_linear.{dtype}"):
            y = bigops.quantized_linear(inputs[0], weight, *inputs[1:], "gelu")
            again = bigops.quantized_linear(inputs[0], weight, *inputs[1:], "gelu")
        assert torch.equal(y, again)
        case.check_forward(y.cpu())
