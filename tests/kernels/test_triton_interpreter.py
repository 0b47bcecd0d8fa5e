"""Canaries of the interpreter repair: what it mends is really broken, what it checks is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from tests.support import triton_interpreter
from tests.support.tolerance import check

triton_interpreter.install()

ROOT = Path(__file__).parents[2]


@triton.jit
def _dot(a, b, c, N: tl.constexpr):
    r = tl.arange(0, N)
    tile = r[:, None] * N + r[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))


@triton.jit
def _cast(source, target, N: tl.constexpr):
    r = tl.arange(0, N)
    tl.store(target + r, tl.load(source + r).to(target.dtype.element_ty))


@triton.jit
def _arithmetic(x, y, out, N: tl.constexpr):
    r = tl.arange(0, N)
    a, b = tl.load(x + r), tl.load(y + r)
    tl.store(out + r, tl.where(a < b, a + b, a * b - a))


@triton.jit
def _copy(x, y, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + r, mask=r < n)
    if MASKED:
        tl.store(y + r, values, mask=r < n)
    else:
        tl.store(y + r, values)


@triton.jit
def _read_past(x, y, n, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)
    tl.store(y + r, tl.load(x + r), mask=r < n)


@triton.jit
def _everyone_stores(y):
    tl.store(y + tl.program_id(0) // 2, tl.program_id(0))


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 16, 16, generator=generator).bfloat16()
    return a, b, torch.randn(256, generator=generator)


def _errors() -> dict[str, float]:
    """Error of a bf16 dot, and how many of 256 casts to bf16 differ from torch's."""
    a, b, values = _inputs()
    c = torch.empty(16, 16)
    _dot[(1,)](a, b, c, N=16)
    narrow = torch.empty(256, dtype=torch.bfloat16)
    _cast[(1,)](values, narrow, N=256)
    error = (c.double() - a.double() @ b.double()).abs().max()
    return {
        "dot": float(error),
        "cast": int((narrow != values.bfloat16()).sum()),
        "fp8": _differing(torch.float8_e4m3fn),
    }


def _between(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a float8, what lies halfway and beside it, and what lies past the largest."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).float()
    numbers = codes[codes.isfinite()].unique()
    ties = (numbers[1:] + numbers[:-1]) / 2
    past = torch.tensor([1.01, 1.1, 2.0, 1e6, float("inf")]) * numbers.max()
    odd = torch.tensor([float("nan"), -0.0, 1e-30, -1e-30])
    beside = [torch.nextafter(ties, torch.full_like(ties, s * 1e9)) for s in (-1, 1)]
    return torch.cat([numbers, ties, *beside, past, -past, odd])


def _saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """torch's cast, of what the hardware's saturating cast makes of numbers past the largest."""
    largest = torch.finfo(dtype).max
    return torch.where(values.isnan(), values, values.clamp(-largest, largest)).to(dtype)


def _differing(dtype: torch.dtype) -> int:
    """How many casts to and from a float8 differ from torch's, over all codes and between them."""
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    values = _between(dtype)
    values = torch.nn.functional.pad(values, (0, 2048 - len(values)))
    narrow = torch.empty(2048, dtype=dtype)
    _cast[(1,)](values, narrow, N=2048)
    pairs = [(narrow.float(), _saturated(values, dtype).float())]
    for wide in (torch.float32, torch.float16, torch.bfloat16):
        out = torch.empty(256, dtype=wide)
        _cast[(1,)](codes, out, N=256)
        pairs.append((out.float(), codes.to(wide).float()))
    return sum(int(((got != want) & ~(got.isnan() & want.isnan())).sum()) for got, want in pairs)


@pytest.mark.slow
def test_unrepaired_interpreter_is_wrong() -> None:
    """Should this fail with a newer triton, the repair of what it mends can go."""
    code = (
        "import json; from tests.support import triton_interpreter as t; t.install = lambda: None\n"
        "from tests.kernels import test_triton_interpreter as m; print(json.dumps(m._errors()))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert not errors["dot"] < 100, "bf16 dot of random data: expected garbage"
    assert errors["fp8"] > 50, "float8: expected casts that round otherwise and do not saturate"
    assert errors["cast"] > 50, "float32 to bf16: expected truncation, wrong for half of the values"


def test_repaired_dot_and_cast_are_right() -> None:
    a, b, _ = _inputs()
    c = torch.empty(16, 16)
    _dot[(1,)](a, b, c, N=16)
    scale = a.double().abs() @ b.double().abs()
    check(c, a.double() @ b.double(), a.float() @ b.float(), scale, what="dot")
    assert _errors()["cast"] == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2])
def test_every_code_of_float8_is_cast_as_hardware_does(dtype: torch.dtype) -> None:
    assert _differing(dtype) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_round_to_nearest_even(dtype: torch.dtype) -> None:
    values = torch.randn(64) * 8
    values[:6] = torch.tensor([0.0, -0.0, float("nan"), 1.0625, 2.125, 4.25])  # the last are ties
    out = torch.empty(64, dtype=dtype)
    _cast[(1,)](values, out, N=64)
    want = values.to(dtype).float()
    assert torch.equal(out.float().isnan(), want.isnan())
    assert torch.equal(out.float().nan_to_num(), want.nan_to_num())


def test_special_values_survive_the_cast_to_bfloat16() -> None:
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([inf, -inf, nan, 3.4e38, 1e-40, -1e-40, 0.0, 1 + 2**-8])
    out = torch.empty(8, dtype=torch.bfloat16)
    _cast[(1,)](values, out, N=8)
    expected = values.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7))


def test_bfloat16_arithmetic_rounds_after_each_step() -> None:
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty(64, dtype=torch.bfloat16)
    _arithmetic[(1,)](x, y, out, N=64)
    assert torch.equal(out, torch.where(x < y, x + y, x * y - x))


PARTS = (interpreter, interpreter.InterpreterBuilder, interpreter.GridExecutor)


def _repaired() -> list[dict[str, object]]:
    """What the repair may change, as it is now."""
    return [dict(vars(part)) for part in PARTS]


def test_install_twice_changes_nothing() -> None:
    before = _repaired()
    triton_interpreter.install()
    assert _repaired() == before


@pytest.mark.parametrize("name", ["_convert_float", "create_dot", "create_fneg", "_init_args_hst"])
def test_a_repair_that_does_not_fit_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever step it fails, and once more when it is asked again."""
    owner = next(part for part in PARTS if name in vars(part))
    monkeypatch.setattr(sys.modules["tests.support.interpreter_repair"], "_applied", False)
    monkeypatch.delattr(owner, name)
    before = _repaired()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"triton {triton.__version__}: .* has no {name}"):
            triton_interpreter.install()
        assert _repaired() == before


def test_a_triton_that_the_repair_was_not_written_for_is_said() -> None:
    assert [triton_interpreter.why_not(v) for v in ("3.8.0", "3.9.1+git")] == ["", ""]
    for version in ("3.7.1", "3.10.0", "4.0", "unknown"):
        assert triton_interpreter.why_not(version).endswith(f"3.8 and 3.9; this is {version}")


def test_an_interpreter_that_the_repair_does_not_fit_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.7.0")
    with pytest.raises(pytest.skip.Exception, match=r"this is 3\.7\.0"):
        triton_interpreter.install()


def test_where_kernels_are_compiled_nothing_is_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the repair imported, which needs parts of triton that only some versions have."""
    before = _repaired()
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.delitem(sys.modules, "tests.support.interpreter_repair")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    triton_interpreter.install()
    assert "tests.support.interpreter_repair" not in sys.modules
    assert _repaired() == before


@pytest.mark.slow
def test_every_test_of_triton_is_imported_without_the_repair() -> None:
    """As `pytest -m gpu` does."""
    code = """
import importlib, sys
from pathlib import Path
for file in sorted(Path("tests").glob("**/test_*.py")):
    if "triton" in file.read_text():
        importlib.import_module(".".join(file.with_suffix("").parts))
names = ("triton_interpreter", "interpreter_repair")
print(*(f"tests.support.{name}" in sys.modules for name in names))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]


def test_unmasked_store_is_caught() -> None:
    x, y = torch.randn(20), torch.empty(20)
    _copy[(2,)](x, y, 20, MASKED=True, BLOCK=16)
    assert torch.equal(x, y)
    with pytest.raises((IndexError, InterpreterError), match=r"store out of bounds.* of y"):
        _copy[(2,)](x, y, 20, MASKED=False, BLOCK=16)


def test_unmasked_load_is_caught() -> None:
    with pytest.raises((IndexError, InterpreterError), match=r"load out of bounds.* of x"):
        _read_past[(1,)](torch.randn(20), torch.empty(20), 20, BLOCK=32)


def test_race_between_programs_is_caught() -> None:
    with pytest.raises(RuntimeError, match=r"race: programs .* store to one address"):
        _everyone_stores[(4,)](torch.empty(2, dtype=torch.int32))
