"""Values of the Triton kernels of fp8_linear under the interpreter, by the numerics rule."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")


import bigops
from bigops.formats import fp8
from bigops.formats.fp8 import Fp8Weight
from bigops.kernels.common.tiles import TileConfig
from bigops.kernels.fp8_linear import forward as kernels
from bigops.kernels.fp8_linear import rows
from bigops.kernels.fp8_linear import tiles as fp8_tiles
from bigops.ops import activation as act
from bigops.ops.fp8_linear import triton as path
from tests.ops.fused_linear.test_triton import guarded
from tests.support import triton_interpreter
from tests.support.cases.compressed import DTYPES, FP8, Case, make
from tests.support.cases.linear import PLAIN
from tests.support.kernel_checks import (
    check_refusals,
    check_rows_that_are_not_finite,
    in_far_rows,
    rows_of_all_kinds,
)
from tests.support.kernels_ran import expect
from tests.support.planted import CAUGHT, plant

triton_interpreter.install()

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, on NaN and inf
]
KINDS = ("fp8", "fp8_block", "w_fp8")  # one of each kind of sums
UNITS = fp8_tiles.UNITS
# Ragged against the tiles of configs/fp8_linear/interpreter.json.
SHAPES = [
    (1, 1, 1),
    (2, 33, 65),
    (31, 1, 32),
    (64, 64, 64),
    (3, 70, 129),
    (5, 7, 0),
    (0, 7, 5),
    (5, 0, 7),
]


def kernel_of(form: str, dtype: str) -> str:
    return f"triton.fp8_linear.{dtype}.{'f8' if form.startswith('w') else 'f8a8'}"


def call(case: Case, module: ModuleType = kernels, **given: Any) -> Tensor:
    """The kernels on the flat inputs of a case, outputs between guards."""
    weight: Fp8Weight = given.pop("weight", case.weight)
    x, bias, residual = case.inputs
    form = (weight.scales, weight.activations)
    with guarded():
        y: Tensor = module.forward(
            x, *weight.tensors().values(), *form, bias, residual, act.CODES[case.name], **given
        )
    return y


def run(
    form: str, dtype: str, lead: int | list[int], n: int, k: int, name: str = "none", **more: Any
) -> None:
    """One case by the path that a GPU takes: values by the rule, the kernel by its name."""
    case = make(form, lead, n, k, dtype, name, **more)
    with guarded(), expect(kernel_of(form, dtype)):
        y = path.forward(case.call)
    case.check_forward(y)


# rows of x as codes ------------------------------------------------------------------------


def assert_rows(x: Tensor, block: bool, given: Tensor | None = None) -> None:
    with guarded():
        q, scale = rows.quantize_activations(x, block, given)
    want = fp8.act_quant(x, block, given)
    k = x.shape[1]
    assert torch.equal(scale.t().isnan(), want.scale.isnan())
    assert torch.equal(scale.t().nan_to_num(), want.scale.nan_to_num())
    assert torch.equal(q[:, :k].view(torch.float8_e4m3fn).float(), want.q)
    assert not bool((q == 128).any()), "a zero with a sign, NaN where units take e4m3fnuz"
    assert not q[:, k:].any(), "columns beyond K that are not 0"
    assert q.shape[1] % 128 == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["row", "block", "static"])
@pytest.mark.parametrize("k", [1, 64, 150])
def test_rows_are_rounded_to_the_bit_as_the_reference_does(k: int, how: str, dtype: str) -> None:
    given = torch.tensor([0.01]) if how == "static" else None
    assert_rows(rows_of_all_kinds(k).to(DTYPES[dtype]), how == "block", given)


def test_every_code_and_tie_is_rounded_as_torch_casts() -> None:
    codes = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (0.0, 1e9)]
    x = torch.cat([codes, ties, *beside, torch.tensor([448.01, 1e9])])
    assert_rows(torch.stack([x, -x]), False, torch.ones(1))


def test_rows_of_any_strides_are_rounded_alike() -> None:
    x = torch.randn(5, 170)
    for block in (False, True):
        want = rows.quantize_activations(x, block)
        for layout in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
            got = rows.quantize_activations(layout, block)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FP8)
def test_every_format_and_dtype(form: str, dtype: str) -> None:
    run(form, dtype, 37, 45, 150, "gelu")


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("form", ["fp8", "fp8_block", "w_fp8", "w_fp8_block"])
def test_every_kind_of_unit(form: str, units: str) -> None:
    """More than one block of rows and of columns of W."""
    case = make(form, 20, 140, 290, "bf16", "silu")
    case.check_forward(call(case, units=units))


def test_units_give_the_same_numbers() -> None:
    """Every code of W by 1, in float32: one product, exact in every unit; NaN stays NaN."""
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    values = codes.view(torch.uint8).unsqueeze(1).repeat(1, 16).view(torch.float8_e4m3fn)
    want = codes.float().expand(16, 256)
    nan = want.isnan()
    one, config = torch.ones(1), TileConfig(16, 128, 32, 8, 4, 2, 1)
    for dtype, activations in (*((d, "none") for d in DTYPES), ("f32", "static")):
        x, given = torch.eye(16).to(DTYPES[dtype]), None if activations == "none" else one
        for units in UNITS:
            form = ("tensor", activations, None, None, 0, config, units)
            y = kernels.forward(x, values, one.view(1, 1), given, *form)
            assert bool(y[nan].isnan().all())
            assert torch.equal(y[~nan].float(), want[~nan]), (dtype, form, units)


@pytest.mark.parametrize("name", PLAIN)
def test_every_activation(name: str) -> None:
    run("fp8", "f32", 5, 37, 83, name)


@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int, int], form: str) -> None:
    run(form, "bf16", *shape, "silu")


@pytest.mark.parametrize("lead", [[], [0], [4, 0], [2, 3], [2, 1, 3, 2, 2]], ids=str)
def test_leading_dimensions(lead: list[int]) -> None:
    run("fp8_block", "f32", lead, 6, 7, "tanh")


@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True)])
def test_optional_arguments(bias: bool, residual: bool) -> None:
    run("fp8", "f16", 33, 20, 35, "gelu", bias=bias, residual=residual)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "fp8_block", "w_fp8_block"])
@pytest.mark.parametrize("tile", [(128, 128, 128, 4), (16, 32, 64, 1)], ids=str)
def test_tiles_of_other_sizes_and_epilogue_in_parts(tile: tuple[int, ...], form: str) -> None:
    *block, parts = tile
    case = make(form, 50, 140, 200, "bf16", "relu")
    case.check_forward(call(case, config=TileConfig(*block, 8, 4, 3, parts)))


@pytest.mark.parametrize("form", ["fp8_static", "fp8_block", "w_fp8"])
def test_any_strides(form: str) -> None:
    case = make(form, 20, 10, 64, "f32", "gelu")

    def odd(t: Tensor | None) -> Any:
        return None if t is None else t.repeat_interleave(2, -1)[..., ::2]

    values = case.weight.values.view(torch.uint8)
    weight = case.weight.replace(
        values=odd(values).view(torch.float8_e4m3fn),
        scale=case.weight.scale.t().contiguous().t(),
        x_scale=odd(case.weight.x_scale),
    )
    case.x, case.bias = case.x.t().contiguous().t(), odd(case.bias)
    case.check_forward(call(case, weight=weight))
    case.residual = case.residual[:1].expand(20, 10)  # type: ignore[index]
    case.check_forward(call(case, weight=weight))


@pytest.mark.parametrize("form", ["fp8", "fp8_tensor", "fp8_block"])
def test_rows_of_zeros_and_scales_whose_product_is_none(form: str) -> None:
    """1e-36 by 1e-6, summed up over large numbers of neither: scales meet the sums in turn."""
    case = make(form, 5, 20, 130, "f32", bias=False, residual=False)
    case.x[0] = 0
    case.x[1] *= 1e-36
    weight = Fp8Weight.from_dense(torch.randn(20, 130) * 1e-6, **FP8[form])
    case.weight, case.dense = weight, weight.to_dense(torch.float64)
    y = call(case)
    assert not y[0].any()
    seen = fp8.act_quant(case.x, form == "fp8_block").dense(torch.float64)
    truth = seen @ case.dense.t()
    held = truth[1].abs() > 1e-42  # the least step of float32 is 1.4e-45
    assert bool(held.any())
    assert bool(((y[1].double() - truth[1]).abs() <= 2e-45 + 1e-5 * truth[1].abs().max()).all())
    assert bool(y[1][held].any())


@pytest.mark.parametrize("form", ["fp8", "fp8_block", "fp8_static", "w_fp8"])
def test_a_row_with_nan_or_infinity_is_nan_and_no_other(form: str) -> None:
    case = make(form, 20, 19, 137, "bf16", "relu")
    check_rows_that_are_not_finite(case, call, form == "w_fp8")


@pytest.mark.parametrize("form", KINDS)
def test_offsets_past_32_bits(form: str, tmp_path: Path) -> None:
    case = make(form, 18, 20, 40, "f16", "gelu")
    case.x = in_far_rows(tmp_path, case.x)
    case.check_forward(call(case))


def test_bitwise_equal_from_run_to_run() -> None:
    for form in KINDS:
        case = make(form, 30, 40, 100, "f32", "gelu")
        assert torch.equal(call(case), call(case))


def test_bad_arguments() -> None:
    check_refusals(kernels, Fp8Weight.from_dense(torch.randn(5, 8)), "row", "dynamic")


# which kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FP8)
@pytest.mark.parametrize(
    ("arch", "units"),
    [
        ("sm_80", "none"),
        ("sm_86", "none"),
        ("sm_89", "e4m3fn"),
        ("sm_90", "e4m3fn"),
        ("sm_100", "e4m3fn"),
        ("sm_120", "e4m3fn"),
        ("gfx90a", "none"),
        ("gfx942", "e4m3fnuz"),
        ("gfx950", "e4m3fn"),
    ],
)
def test_explain_names_kernel_config_and_unit(form: str, arch: str, units: str) -> None:
    case = make(form, 64, 48, 256, "bf16")
    said = bigops.explain("fp8_linear", case.x, case.weight, device=arch)
    assert said.kernel == kernel_of(form, "bf16")
    kind = said.kernel.rpartition(".")[2]
    config = fp8_tiles.choose_config(arch, kind, torch.bfloat16, 64)
    file = f"fp8_linear/{fp8_tiles.table_for(arch).device}.json"
    assert said.config == {**config.of_one_form(), "units": units, "file": file}
    assert f"aligned {kind} bf16 tile for 64 rows from kernels/configs/{file}; " in said.reason
    how = {"none": "has no unit", "e4m3fn": "e4m3fn units", "e4m3fnuz": "converted in the kernel"}
    assert ("widened to the dtype of x" if kind == "f8" else how[units]) in said.reason


# --- planted faults: the checks above must see each of them -----------------------------------


FAULTS = {
    "scale of a row forgotten": ("fp8", "*= tl.load(scale + col0", "+= tl.load(scale + col0"),
    "scale of W forgotten": ("fp8_tensor", "acc *= tl.load(scale)", "acc *= 1.0"),
    "scale of a row of x forgotten": ("fp8", "*= tl.load(x_scale", "+= tl.load(x_scale"),
    "first block's scale of W for all": ("fp8_block", "(s_tile + k0 // SPAN)", "(s_tile)"),
    "first block's scale of x for all": ("fp8_block", "tl.cast(k0 // SPAN", "tl.cast(0 // SPAN"),
    "first rows' scale of W for all": ("w_fp8_block", "(col0 // SPAN) * GROUPS", "0 * GROUPS"),
    "ties away from even": ("fp8", "0x7FFFF + ((bits >> 20) & 1)", "0x80000"),
    "numbers cut off": ("fp8", "(bits + 0x7FFFF + ((bits >> 20) & 1))", "bits"),
    "small numbers as normal ones": ("fp8", "a < 0.015625", "a < 0.0"),
    "sign lost": ("fp8", "code + 128, code", "code, code"),
    "no saturation": ("fp8_static", "-LARGEST), LARGEST)", "-479.0), 479.0)"),
    "K edge not masked": ("w_fp8", "(rk[None, :] < K - k0)", "(rk[None, :] < K)"),
    "scale of x ignored": ("fp8_static", "one * tl.load(given)", "one * 0.01"),
    "last K step dropped": ("fp8", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    "wrong bias of float16": ("fp8_none", "* 256.0", "* 128.0"),
    "halves of e4m3fnuz": ("fp8_fnuz", "acc *= 4.0", "acc *= 2.0"),
    "-0 of e4m3fnuz": ("fp8_fnuz", "tl.where(code == 128, 0, code)", "code"),
}


def planted_case(form: str) -> tuple[Case, dict[str, Any]]:
    units = {"fp8_none": "none", "fp8_fnuz": "e4m3fnuz"}.get(form, "e4m3fn")
    sizes = (5, 140, 262) if form == "w_fp8_block" else (20, 33, 262)
    case = make(form if form in FP8 else "fp8", *sizes, "f32", "gelu")
    if form == "fp8":  # numbers on ties and below 2^-6 of their scale
        case.x[:, :240] = torch.arange(240).float() / 8 * torch.tensor([1.0, -1.0]).repeat(120)
        case.x[:, 200:240] *= 1e-5
        case.x[:, 240] = 448
    if form == "fp8_fnuz":
        values = case.weight.values.view(torch.uint8)
        values[5, 7] = 128
    return case, {"units": units}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault: str, tmp_path: Path) -> None:
    form, old, new = FAULTS[fault]
    module = plant(kernels, tmp_path, old, new, rows)
    case, how = planted_case(form)
    case.dense = case.weight.to_dense(torch.float64)

    def held() -> None:
        case.check_forward(call(case, module, **how))
        got = module.quantize_activations(case.x, False, case.weight.x_scale)
        want = rows.quantize_activations(case.x, False, case.weight.x_scale)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    with pytest.raises(CAUGHT):
        held()


@pytest.mark.slow
@pytest.mark.parametrize("form", sorted({form for form, *_ in FAULTS.values()}))
def test_a_copy_without_a_fault_passes(form: str, tmp_path: Path) -> None:
    case, how = planted_case(form)
    case.dense = case.weight.to_dense(torch.float64)
    case.check_forward(call(case, plant(kernels, tmp_path, "M,", "M,", rows), **how))


# on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("m", [1, 17, 700])
@pytest.mark.parametrize("form", FP8)
def test_on_a_gpu(form: str, m: int) -> None:
    """Values by the rule, and codes of x to the bit."""
    for n, k in ((4096, 4096), (1000, 5003)):
        case = make(form, m, n, k, "bf16", "gelu")
        weight = Fp8Weight(*(t.cuda() if isinstance(t, Tensor) else t for t in case.weight))
        inputs = [None if t is None else t.cuda() for t in case.inputs]
        with expect(kernel_of(form, "bf16")):
            y = bigops.fp8_linear(inputs[0], weight, *inputs[1:], "gelu")
            again = bigops.fp8_linear(inputs[0], weight, *inputs[1:], "gelu")
        assert torch.equal(y, again)
        case.check_forward(y.cpu())
        if not form.startswith("w"):
            assert inputs[0] is not None
            q, by = rows.quantize_activations(inputs[0], form == "fp8_block", weight.x_scale)
            want = fp8.act_quant(case.x, form == "fp8_block", case.weight.x_scale)
            codes = q[:, :k].view(torch.float8_e4m3fn)
            assert torch.equal(codes.float().cpu(), want.q)
            assert torch.equal(by.t().cpu(), want.scale)
