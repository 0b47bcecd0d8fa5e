"""Fp8Linear: recovery and frozen state; `compress_` with `Fp8()`, receipts of it, saved files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import Fp8
from bigops.compress.config import from_json, to_json
from bigops.formats.fp8 import Fp8Weight
from bigops.nn import Fp8Linear
from bigops.ops.fp8_linear import fp8_linear
from tests.support.tolerance import snr_db

CONFIGS = (Fp8(), Fp8("tensor"), Fp8("block"), Fp8("block", "none"), Fp8(activations="none"))
# Of two layers of random normal weights; see tests/formats/test_fp8.py.
SNR_FLOOR_DB = 25.0


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(150, 140), nn.ReLU(), nn.Linear(140, 9))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_compress_makes_fp8_layers_that_save_and_load(config: Fp8, tmp_path: Path) -> None:
    model, x = small().eval(), torch.randn(7, 150)
    dense = copy.deepcopy(model)
    record = bigops.compress_(model, config, keep="all")  # the CPU has no kernel
    assert len(record.done) == 2
    assert type(model[0]) is type(model[2]) is Fp8Linear
    with torch.no_grad(), bigops.backend.record() as ran:
        y = model(x)
        assert ran == ["reference.fp8_linear"] * 2
        assert SNR_FLOOR_DB < snr_db(y, dense(x)) < 60
    if not model[0].frozen:
        bigops.freeze_(model)
    weight = Fp8Weight.from_dense(dense[2].weight, config.scales, config.activations)
    assert torch.equal(model[2].values.float(), weight.values.float())
    assert torch.equal(model[2].scale, weight.scale)
    bigops.save(model, tmp_path / "m.safetensors")
    loaded = bigops.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
        assert torch.equal(model(x), y)
    assert loaded[0].values.dtype == torch.float8_e4m3fn
    assert from_json(to_json(config)) == config
    assert model[0].nbytes < dense[0].weight.nbytes / 3


def test_the_recovery_state_trains_straight_through() -> None:
    layer = Fp8Linear(150, 20, activation="gelu", scales="block")
    x = torch.randn(5, 150)
    with torch.enable_grad():
        y = layer(x)
        y.sum().backward()
    dense = Fp8Weight.from_dense(layer.weight, "block").to_dense()
    twin: Tensor = dense.clone().requires_grad_()
    want = bigops.fused_linear(x, twin, layer.bias.detach(), None, "gelu")
    want.sum().backward()
    assert torch.equal(y, want)
    assert torch.equal(layer.weight.grad, twin.grad)


def test_a_frozen_layer_is_the_op() -> None:
    layer = Fp8Linear(33, 20, activation="silu").eval()
    weight = Fp8Weight.from_dense(layer.weight)
    layer.freeze()
    x, residual = torch.randn(5, 33), torch.randn(5, 20)
    want = fp8_linear(x, weight, layer.bias, residual, "silu")
    assert torch.equal(layer(x, residual), want)
    assert torch.equal(layer.half().bfloat16().float()(x, residual) * 0, want * 0)
    assert layer.values.dtype == torch.float8_e4m3fn
    assert layer.scale.dtype == torch.float32


def test_broken_storage_is_refused() -> None:
    layer, other = Fp8Linear(33, 20).freeze(), Fp8Linear(33, 21).freeze()
    state = layer.state_dict()
    for key, value, message in (
        ("scale", layer.scale * 0, "scale: expected finite values above 0"),
        ("values", layer.values.float(), "values: expected dtype float8_e4m3fn"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**state, key: value})
    with pytest.raises(
        RuntimeError, match=r"values: expected a weight of \[20, 33\]; got \[21, 33\]"
    ):
        layer.load_state_dict({**other.state_dict(), "bias": layer.bias})
    layer.load_state_dict(state)


def test_bad_forms() -> None:
    with pytest.raises(ValueError, match="scales: expected one of tensor, row, block; got 'group'"):
        Fp8("group")
    with pytest.raises(ValueError, match="activations: expected 'none' or 'dynamic' for a layer"):
        Fp8(activations="static")
    with pytest.raises(TypeError, match=r"Fp8 \+ Int8: only Sparse"):
        Fp8() + bigops.Int8()
    with pytest.raises(ValueError, match="activations: expected 'none' or 'dynamic' for a layer"):
        Fp8Linear(3, 4, activations="u8")
