"""Every rival computes the case's layer, in each format; absent packages are left out by name."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bigops.benches import families, harness, rivals, rivals_onnx, rivals_openvino, rivals_zentorch
from bigops.benches.harness import Case, LeftOut, Side
from tests.support import tolerance

# Signal-to-noise against float64 on normal data: below these a side computes something else.
# One scale for a whole tensor costs int8 about 6 dB against one a row.
FLOOR_DB = {"fp32": 100, "bf16": 40, "int8": 30, "int4": 30}
GROUP = 64
M, K, N = 16, 256, 128
RIVALS = {
    "openvino": rivals_openvino.available,
    "onnxruntime": rivals_onnx.available,
    "zentorch": rivals_zentorch.available,
}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def _layer(dtype: torch.dtype, bias: bool = True, residual: bool = False, n: int = N) -> Any:
    x, weight = torch.randn(M, K).to(dtype), (torch.randn(n, K) * K**-0.5).to(dtype)
    offset = torch.randn(n).to(dtype) if bias else None
    return x, weight, offset, torch.randn(M, N).to(dtype) if residual else None


def _case(dtype: str = "fp32", **more: Any) -> Case:
    return Case("an_op", "tiny", M, K, N, dtype, **more)


def _sides(
    family: str, dtype: torch.dtype, activation: str, bias: bool, residual: bool
) -> tuple[list[Side], Tensor]:
    n = 2 * N if activation in rivals.GATED else N
    x, weight, offset, more = _layer(dtype, bias, residual, n)
    case = _case("fp32" if dtype == torch.float32 else "bf16")
    if family == "int4":
        packed = rivals.round_int4(weight, GROUP)
        weight = packed.to_dense()
        sides = families.int4_sides(case, x, packed, offset, activation, more)
    else:
        make = {
            "fp32": families.dense_fp32_sides,
            "bf16": families.dense_bf16_sides,
            "int8": families.dense_int8_sides,
        }[family]
        sides = make(case, x, weight, offset, activation, more)
    wide = [None if t is None else t.double() for t in (x, weight, offset, more)]
    plain = rivals.eager(activation, residual)
    return sides, plain(*(wide if residual else wide[:3]))


VARIANTS = [
    ("none", False, False),
    ("gelu", True, False),
    ("gelu_tanh", True, False),
    ("relu2", True, False),
    ("silu", True, True),
    ("swiglu", False, False),
]


@pytest.mark.parametrize(("activation", "bias", "residual"), VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
@pytest.mark.parametrize("family", FLOOR_DB)
def test_every_rival_computes_the_layer(
    family: str, dtype: torch.dtype, activation: str, bias: bool, residual: bool
) -> None:
    if family == "fp32" and dtype != torch.float32:
        pytest.skip("no float32 products for a bf16 case")
    sides, truth = _sides(family, dtype, activation, bias, residual)
    names = [side.provider for side in sides]
    assert len(set(names)) == len(names)
    floor = FLOOR_DB["bf16"] if dtype == torch.bfloat16 and family == "fp32" else FLOOR_DB[family]
    for side in sides:
        if "compile" in side.provider:
            continue  # a compilation is for `bigops bench`
        db = tolerance.snr_db(side.call(), truth)
        assert db > floor, f"{side.provider}: {db:.1f} dB"


def test_a_perturbed_weight_falls_through_the_floor() -> None:
    sides, truth = _sides("int8", torch.float32, "none", False, False)
    assert all(tolerance.snr_db(side.call() * 1.05, truth) < FLOOR_DB["int8"] for side in sides)


@pytest.mark.parametrize("name", RIVALS)
def test_an_installed_rival_is_in_every_family_it_serves(name: str) -> None:
    if not RIVALS[name]():
        pytest.skip(f"{name} is not installed")
    served = {
        "openvino": {"fp32": 1, "bf16": 1, "int8": 4, "int4": 3},
        "onnxruntime": {"fp32": 1, "bf16": 0, "int8": 2, "int4": 2},
        "zentorch": {"fp32": 1, "bf16": 1, "int8": 1, "int4": 2},
    }[name]
    for family, count in served.items():
        sides, _ = _sides(family, torch.float32, "gelu", True, False)
        assert sum(side.provider.startswith(name) for side in sides) == count, family


def test_stock_torch_is_in_every_family() -> None:
    for family, wanted in {
        "fp32": {"onednn"},
        "bf16": {"onednn"} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set(),
        "int8": {"torch int8 onednn", "torch int8 fbgemm", "torch int8pack"},
        "int4": {"torch int4pack"},
    }.items():
        sides, _ = _sides(family, torch.float32, "gelu", True, False)
        assert wanted <= {side.provider for side in sides}, family


@pytest.mark.parametrize("family", FLOOR_DB)
def test_rivals_rotate_their_weights_where_the_case_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    turn = itertools.cycle

    def counted(items: Any) -> Any:
        counts.append(len(items))
        return turn(items)

    monkeypatch.setattr(harness.itertools, "cycle", counted)
    monkeypatch.setattr(harness, "PAST_CACHE", 4 * N * K * 4)  # four copies in fp32
    x, weight, _, _ = _layer(torch.float32)
    case = _case(rotate=True)
    if family == "int4":
        families.int4_sides(case, x, rivals.round_int4(weight, GROUP), None, "none")
    else:
        make = getattr(families, f"dense_{family}_sides")
        make(case, x, weight, None, "none")
    if family == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN packs no bf16 on this CPU")
    least = {"fp32": 4, "bf16": 8, "int8": 16, "int4": 28}[family]
    assert counts
    assert min(counts) >= least


def test_int4_rounding_is_to_the_nearest_in_its_group() -> None:
    weight = torch.randn(4, 128)
    packed = rivals.round_int4(weight, 32)
    assert packed.scale.shape == (4, 4)
    assert packed.group == 32
    assert packed.nbytes == 4 * 128 // 2 + 2 * 16
    assert torch.equal(packed.scale, packed.scale.bfloat16().float())
    off = (packed.to_dense() - weight).abs()
    # half a step, and what rounding the scale to bf16 clips from the largest value
    assert bool((off <= packed.scale.repeat_interleave(32, dim=1) * 0.53).all())
    with pytest.raises(ValueError, match="group: expected a divisor of K = 128, got 48"):
        rivals.round_int4(weight, 48)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    gone = {"openvino", "onnxruntime", "zentorch"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in gone else find(n))
    rivals_openvino.core.cache_clear()
    x, weight, bias, _ = _layer(torch.float32)
    layer = rivals.Layer(_case(), x, weight, bias, "none")
    with pytest.raises(LeftOut, match="openvino is not installed"):
        rivals_openvino.fp32(layer)
    with pytest.raises(LeftOut, match="onnxruntime or onnx is not installed"):
        rivals_onnx.fp32(layer)
    with pytest.raises(LeftOut, match="zentorch is not installed"):
        rivals_zentorch.linear(layer, torch.float32)


def test_groups_that_no_kernel_serves_are_left_out() -> None:
    x, weight, _, _ = _layer(torch.float32)
    layer, odd = rivals.Layer(_case(), x, weight, None, "none"), rivals.round_int4(weight, 8)
    with pytest.raises(LeftOut, match="no groups of 8"):
        rivals.int4_weight_only(layer, odd)
    with pytest.raises(LeftOut, match="no groups of 8"):
        rivals_onnx.int4(layer, odd, 0)
