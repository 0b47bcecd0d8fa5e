"""What is the Triton kernels' own in fused_linear: tiles, strides, extreme values, planted faults.

Their values by the public function are in test_values.py, beside those of all other ways.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")


from bigops.kernels import fused_linear as kernels
from bigops.kernels.common import activation, epilogue, gemm, product, tile_walk
from bigops.kernels.common.activation import NAMES
from bigops.kernels.common.tiles import TileConfig
from tests.support import triton_interpreter
from tests.support.cases.linear import GATED, act, slope
from tests.support.guarded import guarded
from tests.support.kernel_checks import in_far_rows
from tests.support.planted import CAUGHT, plant
from tests.support.tolerance import check

triton_interpreter.install()

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    grad: Tensor
    name: str

    @property
    def code(self) -> int:
        return NAMES.index(self.name)


def make(m: int, n: int, k: int, dtype: torch.dtype, name: str) -> Case:
    rows = 2 * n if name in GATED else n
    x, residual, grad = torch.randn(m, k), torch.randn(m, n), torch.randn(m, n)
    weight, bias = torch.randn(rows, k) / max(k, 1) ** 0.5, torch.randn(rows)
    return Case(*(t.to(dtype) for t in (x, weight, bias, residual, grad)), name)


def plain_forward(case: Case, dtype: torch.dtype, bias: bool, residual: bool) -> list[Tensor]:
    x, weight = case.x.to(dtype), case.weight.to(dtype)
    z = F.linear(x, weight, case.bias.to(dtype) if bias else None)
    y = act(case.name, z)
    return [y + case.residual.to(dtype) if residual else y, z]


def check_forward(case: Case, y: Tensor, z: Tensor | None, bias: bool, residual: bool) -> None:
    y64, z64 = plain_forward(case, torch.float64, bias, residual)
    y_plain, z_plain = plain_forward(case, case.x.dtype, bias, residual)
    z_scale = case.x.double().abs() @ case.weight.double().abs().t()
    if bias:
        z_scale = z_scale + case.bias.double().abs()
    if case.name in GATED:
        gate64, up64 = z64.chunk(2, dim=1)
        gate_scale, up_scale = z_scale.chunk(2, dim=1)
        gate_name = GATED[case.name]
        y_scale = gate_scale * slope(gate_name, gate64) * up64.abs()
        y_scale = y_scale + act(gate_name, gate64).abs() * up_scale
    else:
        y_scale = z_scale * slope(case.name, z64)
    if residual:
        y_scale = y_scale + case.residual.double().abs()
    check(y, y64, y_plain, y_scale, what=f"{case.name} y")
    if z is not None:
        check(z, z64, z_plain, z_scale, what=f"{case.name} preact")


def plain_backward(case: Case, z: Tensor, dtype: torch.dtype) -> list[Tensor]:
    z = z.to(dtype).requires_grad_()
    act(case.name, z).backward(case.grad.to(dtype))
    gz = z.grad
    assert gz is not None
    return [gz @ case.weight.to(dtype), gz.t() @ case.x.to(dtype), gz.sum(dim=0)]


def check_backward(case: Case, z: Tensor, grads: tuple[Tensor, ...]) -> None:
    truth, plain = (plain_backward(case, z, t) for t in (torch.float64, case.x.dtype))
    z64, grad64 = z.double(), case.grad.double().abs()
    if case.name in GATED:
        gate, up = z64.chunk(2, dim=1)
        gate_name = GATED[case.name]
        gz_scale = torch.cat(
            [
                grad64 * up.abs() * slope(gate_name, gate),
                grad64 * slope(gate_name, gate) * gate.abs(),
            ],
            dim=1,
        )
    else:
        gz_scale = grad64 * slope(case.name, z64)
    scales = [
        gz_scale @ case.weight.double().abs(),
        gz_scale.t() @ case.x.double().abs(),
        gz_scale.sum(dim=0),
    ]
    for what, out, ref, near, scale in zip(
        ("grad x", "grad weight", "grad bias"), grads, truth, plain, scales, strict=True
    ):
        check(out, ref, near, scale, what=f"{case.name} {what}")


def run_and_check(
    case: Case, module: ModuleType = kernels, config: TileConfig | None = None
) -> None:
    """Forward and backward of one case, values and guards."""
    with guarded():
        y, z = module.forward(
            case.x, case.weight, case.bias, case.residual, case.code, True, config
        )
    check_forward(case, y, z, bias=True, residual=True)
    with guarded():
        grads = module.backward(
            case.grad, case.x, case.weight, z, case.code, True, True, True, config
        )
    check_backward(case, z, grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_optional_arguments(bias: bool, residual: bool, name: str, dtype: torch.dtype) -> None:
    case = make(33, 20, 35, dtype, name)
    with guarded():
        y, z = kernels.forward(
            case.x,
            case.weight,
            case.bias if bias else None,
            case.residual if residual else None,
            case.code,
        )
    assert z is None
    check_forward(case, y, None, bias, residual)


@pytest.mark.parametrize("name", ["tanh", "swiglu"])
@pytest.mark.parametrize("parts", [1, 4])
def test_tile_larger_than_the_problem_and_epilogue_in_parts(parts: int, name: str) -> None:
    config = TileConfig(128, 64, 32, 8, 4, 3, parts)
    run_and_check(make(130, 70, 50, torch.float16, name), config=config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "name"),
    [((256, 200, 250), name) for name in ("none", "gelu", "geglu")]
    + [(shape, name) for shape in [(129, 255, 96), (77, 31, 256)] for name in NAMES],
    ids=str,
)
def test_wide_sweep(shape: tuple[int, int, int], name: str, dtype: torch.dtype) -> None:
    run_and_check(make(*shape, dtype, name))


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("name", ["none", "silu", "reglu"])
def test_only_the_asked_gradients_are_made(name: str, needs: tuple[int, ...]) -> None:
    case = make(20, 18, 9, torch.float32, name)
    z = kernels.forward(case.x, case.weight, case.bias, None, case.code, True)[1]
    full = kernels.backward(case.grad, case.x, case.weight, z, case.code, True, True, True)
    some = kernels.backward(case.grad, case.x, case.weight, z, case.code, *map(bool, needs))
    assert [part.shape == (0,) for part in some] == [not needed for needed in needs]
    # Other flags are another kernel: the numerics rule holds it, not the bits of the first.
    asked = zip(needs, full, some, strict=True)
    check_backward(case, z, tuple(part if needed else whole for needed, whole, part in asked))


def test_any_strides() -> None:
    case = make(40, 33, 50, torch.float32, "swiglu")
    wide = torch.randn(66, 110)
    wide[:, 3:103:2] = case.weight
    strided = Case(
        case.x.t().contiguous().t(),
        wide[:, 3:103:2],
        torch.stack([case.bias, case.bias], dim=1)[:, 0],
        case.residual[:1].expand(40, 33),
        case.grad[:, :1].expand(40, 33),
        case.name,
    )
    run_and_check(strided)
    expanded = make(40, 33, 50, torch.float32, "none")
    run_and_check(expanded._replace(grad=torch.ones(()).expand(40, 33)))


def test_offsets_past_32_bits(tmp_path: Path) -> None:
    case = make(18, 20, 40, torch.float16, "gelu")
    run_and_check(case._replace(x=in_far_rows(tmp_path, case.x)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on inf - inf and the like
@pytest.mark.parametrize("name", [name for name in NAMES if name not in GATED])
def test_extreme_values(name: str) -> None:
    """Large values and NaN by the rule; infinities give exactly what float64 gives."""
    inf, nan = float("inf"), float("nan")
    values = [inf, -inf, -1e4, -90.0, -20.0, -0.7, -1e-3, -0.0, 0.0, 1e-30, 0.6, 9.0, 90.0, nan]
    z, one = torch.tensor(values)[:, None], torch.ones(1, 1)
    y, _ = kernels.forward(z, one, activation=NAMES.index(name))
    grads = kernels.backward(torch.ones(14, 1), z, one, z, NAMES.index(name), True, False, False)
    truths, plains = [], []
    for found, dtype in ((truths, torch.float64), (plains, torch.float32)):
        leaf = z.to(dtype).requires_grad_()
        out = act(name, leaf)
        found += [out, *torch.autograd.grad(out.sum(), leaf)]
    size = z[2:].double().abs()
    scales = [size * slope(name, size), slope(name, size) * (1 + size)]
    for out, truth, plain, scale in zip((y, grads[0]), truths, plains, scales, strict=True):
        check(out[2:], truth[2:], plain[2:], scale.nan_to_num(), what=name)
        expected = truth[:2].float()
        assert torch.equal(out[:2].isnan(), expected.isnan())
        assert torch.equal(out[:2].nan_to_num(7), expected.nan_to_num(7))


SMOOTH = ("gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on squares that overflow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*SMOOTH, *(n for n in GATED if GATED[n] in SMOOTH)])
def test_the_slope_of_huge_values_is_their_limit(name: str, dtype: torch.dtype) -> None:
    """0 or 1 up to the largest number, whose square and cube are infinite. The limit is exact."""
    sizes = [1e4, 1e10, 5e13, 1e18, 1.8e19, 1.9e19, 1e30, torch.finfo(dtype).max]
    z = torch.tensor(sizes + [-size for size in sizes]).to(dtype)[:, None]
    rises = GATED.get(name, name) in ("gelu", "gelu_tanh", "silu")
    limit = ((z > 0) & rises).to(dtype)
    grad = torch.full_like(z, 3.0)
    preact = torch.cat([z, torch.full_like(z, 2.0)], dim=1) if name in GATED else z
    gz, gb = kernels.preact_gradient(grad, preact, NAMES.index(name), True, True)
    want = limit * (6.0 if name in GATED else 3.0)
    assert gz is not None
    assert gb is not None
    assert torch.equal(gz[:, :1], want)
    assert torch.equal(gb[:1], want.sum(0))


def test_bad_arguments() -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    with pytest.raises(TypeError, match=r"x: expected one of .*; got torch.float64"):
        kernels.forward(x.double(), w.double())
    with pytest.raises(TypeError, match=r"weight: expected torch.float32 .*; got torch.float16"):
        kernels.forward(x, w.half())
    with pytest.raises(ValueError, match=r"activation: expected a code in 0..11; got 12"):
        kernels.forward(x, w, activation=12)
    with pytest.raises(ValueError, match=r"preact: expected a tensor .*; got None"):
        kernels.backward(torch.randn(4, 6), x, w, None, 3, True, True, True)


# --- planted faults: the checks above must see each of them -----------------------------------


USED = (activation, epilogue, tile_walk, gemm, product)


def planted(folder: Path, old: str, new: str) -> ModuleType:
    """A copy of the kernels with ``old`` replaced by ``new``."""
    return plant(kernels, folder, old, new, *USED)


FAULTS = {
    "store without mask": (
        "tl.store(c_tile, acc.to(c.dtype.element_ty), mask=mask)",
        "tl.store(c_tile, acc.to(c.dtype.element_ty))",
    ),
    "K edge not masked": ("(rk[None, :] < K - k0)", "(rk[None, :] < K)"),
    "last K step dropped": ("range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "residual before activation": (
        "acc = activate(acc, ACT)",
        "acc = activate(acc + 0.01, ACT)",
    ),
    "tile skipped": ("(index % band) % band_rows", "(index % band) % GROUP_M"),
    "up column of the gate": ("tl.cast(N, tl.int64) * stride_bn", "0 * stride_bn"),
    "wrong gradient": ("g * u * derivative(z, ACT)", "g * derivative(z, ACT)"),
    "bias gradient misses a row": (
        "total += g\n",
        "total += tl.where(rows[:, None] == 3, 0.0, g)\n",
    ),
    "last partial sum dropped": ("(rows < R)", "(rows < R - 1)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_in_the_kernels_is_caught(fault: str, tmp_path: Path) -> None:
    module = planted(tmp_path, *FAULTS[fault])
    with pytest.raises(CAUGHT):
        run_and_check(make(70, 45, 70, torch.float32, "swiglu"), module)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("tanh", "d = 1.0 - t * t", "d = 1.0 - t"),
        ("silu", "d = s * (1.0 + x * (1.0 - s))", "d = s * (1.0 + x * s)"),
        ("gelu", "0.7071067811865476", "0.7"),
        ("gelu_tanh", "0.134145", "0.13"),
        ("tanh", "0.1333083063364029", "0.13"),
    ],
)
def test_planted_fault_in_an_activation_is_caught(
    name: str, old: str, new: str, tmp_path: Path
) -> None:
    module = planted(tmp_path, old, new)
    with pytest.raises(AssertionError, match="too far"):
        run_and_check(make(37, 45, 70, torch.float32, name), module)


def test_guards_alone_see_an_unmasked_store(tmp_path: Path) -> None:
    module = planted(tmp_path, *FAULTS["store without mask"])
    case = make(37, 45, 70, torch.float32, "none")
    caught = pytest.raises(AssertionError, match="outside its output")
    with triton_interpreter.unchecked(), caught, guarded():
        module.forward(case.x, case.weight)


def test_a_copy_without_a_fault_passes(tmp_path: Path) -> None:
    run_and_check(make(37, 45, 70, torch.float32, "geglu"), planted(tmp_path, "M,", "M,"))
