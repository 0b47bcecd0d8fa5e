"""Static activations in QuantLinear and SparseLinear: u8 handed in by a caller, files, freeze_."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.compress import config, store
from bigops.formats.quantize import act_quant, dequantize_u8, quantize_u8, static_qparams
from bigops.nn import Linear, QuantLinear, SparseLinear
from bigops.nn.compressed_linear import CompressedLinear
from tests.support.kernels_ran import expect, needs_extension
from tests.support.saved_models import rewrite_as_older
from tests.support.tolerance import check

pytestmark = needs_extension
STATIC = bigops.Int8(activations="static")
SPARSE = bigops.Sparse(0.5) + STATIC
W4A8_STATIC = bigops.Int4(group=None, activations="static")
FORMS = ["quant", "sparse"]


@pytest.fixture(autouse=True)
def _swap_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is swapped, and nothing is timed for it."""
    level = lambda sides, **_: {name: np.ones(30) for name in sides}  # noqa: E731
    monkeypatch.setattr("bigops.timing.interleave", level)


def block(bias: bool = True, k: int = 24) -> nn.Sequential:
    return nn.Sequential(
        Linear(k, 48, activation="gelu"), nn.Identity(), Linear(48, k, bias=bias)
    ).eval()


def static_layer(form: str) -> CompressedLinear:
    source = Linear(48, 10)
    layer: CompressedLinear = (
        QuantLinear.from_linear(source, activations="static")
        if form == "quant"
        else SparseLinear.from_linear(source, 0.5, activations="static")
    )
    layer.calibrate(torch.tensor([-0.2, 2.5]))
    return layer.eval().freeze()


# u8 from the caller --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_u8_on_the_qparams_is_taken_as_it_lies(form: str) -> None:
    layer = static_layer(form)
    x, residual = torch.randn(7, 48), torch.randn(7, 10)
    with torch.no_grad():
        with expect("_linear.u8."):
            got = layer(quantize_u8(x, layer.x_qparams), residual)
        assert torch.equal(got, layer(x, residual))
    assert got.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", ["bias", "residual"])
def test_a_gradient_through_u8(form: str, wanted: str) -> None:
    """The numbers that u8 stands for take its place; the bias and the residual have gradients."""
    layer = static_layer(form).requires_grad_(False)
    q, residual = torch.randint(0, 256, (7, 48), dtype=torch.uint8), torch.randn(7, 10)
    with torch.no_grad():
        want = layer(q, residual)
    leaf = {"bias": layer.bias, "residual": residual}[wanted]
    assert leaf is not None
    leaf.requires_grad_()
    y = layer(q, residual)
    (got,) = torch.autograd.grad(y.square().sum(), leaf)
    x64, w64 = (
        dequantize_u8(q, layer.x_qparams, torch.float32).double(),
        layer.dense_weight().double(),
    )
    assert layer.bias is not None
    y64 = x64 @ w64.T + layer.bias.detach().double() + residual.detach().double()
    plain = (x64.float() @ w64.float().T + layer.bias.detach()) + residual.detach()
    scale = 1 + x64.abs() @ w64.abs().T
    check(y.detach(), y64, plain, scale, what="y")
    check(want, y64, plain, scale, what="y without a gradient")
    g64, plain_g = 2 * y64, 2 * plain
    if wanted == "bias":
        g64, plain_g, scale = g64.sum(0), plain_g.sum(0), scale.sum(0)
    check(got, g64, plain_g, 2 * scale, what=wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_in_the_place_of_u8_are_the_same_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for lo, hi in itertools.product((-7.3, -1.0, -1e-3, 0.0), (0.1, 1.0, 3.3, 61.0)):
        qparams = static_qparams(lo, hi)
        rows = act_quant(dequantize_u8(every, qparams, dtype), "static", qparams)
        off = (rows.q - every.float()).abs()
        far = (every.float() - qparams[1]).abs() > 128
        assert float(off.max()) <= (1.0 if dtype == torch.bfloat16 else 0.0)
        assert not off[~far].any()


def test_a_layer_in_recovery_takes_u8_by_its_qparams() -> None:
    layer = QuantLinear.from_linear(Linear(24, 10), activations="static")
    q = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    with pytest.raises(ValueError, match="x_qparams: expected a calibrated layer"):
        layer(q)
    layer.calibrate(torch.tensor([-1.0, 2.0]))
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(q), layer(dequantize_u8(q, layer.x_qparams)))
    with torch.no_grad():
        got = layer(q)
    assert torch.equal(got, layer.freeze()(q))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_layer_without_a_qparams_refuses_u8(frozen: bool, grad: bool) -> None:
    for make in (QuantLinear.from_linear, SparseLinear.from_linear):
        layer = make(Linear(24, 10)).eval()
        layer = layer.freeze() if frozen else layer
        with torch.set_grad_enabled(grad), pytest.raises(TypeError, match="x: expected a floating"):
            layer(torch.zeros(3, 24, dtype=torch.uint8))


@pytest.mark.parametrize("form", FORMS)
def test_vmap_compile_and_export(form: str) -> None:
    layer = static_layer(form)
    q = torch.randint(0, 256, (4, 7, 48), dtype=torch.uint8)
    with torch.no_grad():
        want = layer(q)
        got = torch.vmap(layer)(q)  # by floats: torch.func may want a gradient
        assert torch.equal(got, want) or form == "sparse"
        check(got, want.double(), want, 1 + want.double().abs().amax())
        torch._dynamo.reset()
        with expect("_linear.u8."):
            assert torch.equal(torch.compile(layer, fullgraph=True)(q), want)
        assert torch.equal(torch.export.export(layer, (q,)).module()(q), want)


# state and files -----------------------------------------------------------------------------


def test_a_qparams_keeps_its_dtype_and_is_checked_when_loaded() -> None:
    for form in FORMS:
        layer = static_layer(form)
        state = layer.state_dict()
        x = torch.randn(3, 48)
        with torch.no_grad():
            want = layer(x)
        moved = copy.deepcopy(layer).bfloat16()
        assert moved.x_qparams is not None
        assert moved.x_qparams.dtype == torch.float32
        assert moved(x.bfloat16()).dtype == torch.bfloat16
        broken = {**state, "x_qparams": torch.tensor([0.0, 1.0])}
        with pytest.raises(RuntimeError, match="x_qparams: expected a finite scale above 0"):
            layer.load_state_dict(broken)
        with torch.no_grad():
            assert torch.equal(layer(x), want)  # nothing was taken over
        meta = type(layer).from_arguments(layer.arguments())  # type: ignore[attr-defined]
        meta.load_state_dict(state, assign=True)
        with torch.no_grad():
            assert torch.equal(meta(x), want)


def as_written_with_y_grid(path: Path, model: nn.Module) -> None:
    """The file that a version wrote whose frozen static layers gave u8 to the next one."""
    bigops.save(model, path)

    def with_y_grid(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["tree"]["children"]["0"]["args"]["y_grid"] = True
        tensors["0.y_grid"] = tensors["2.x_qparams"].clone()

    rewrite_as_older(path, with_y_grid)


@pytest.mark.parametrize("plan", [STATIC, SPARSE], ids=FORMS)
def test_files_of_layers_that_gave_u8_still_load(plan: Any, tmp_path: Path) -> None:
    model, x, path = block(), torch.randn(9, 24), tmp_path / "m.safetensors"
    bigops.compress_(model, plan, x)
    with torch.no_grad():
        want = model(x)
    as_written_with_y_grid(path, model)
    layers = store.load_compressed(path)
    with torch.no_grad():
        assert torch.equal(bigops.load(path)(x), want)
        assert torch.equal(bigops.load(path, block())(x), want)
        assert torch.equal(bigops.load(path, copy.deepcopy(model))(x), want)
        assert torch.equal(layers["2"](layers["0"](x)), want)
    state = {**model.state_dict(), "0.y_grid": torch.ones(2)}  # by torch.save
    state = {name.replace("x_qparams", "x_grid"): t for name, t in state.items()}
    again = copy.deepcopy(model)
    again[2].x_qparams.zero_()
    assert again.load_state_dict(state).unexpected_keys == []
    with torch.no_grad():
        assert torch.equal(again(x), want)
    bigops.save(bigops.load(path), tmp_path / "again.safetensors")
    assert "y_grid" not in json.dumps(store.read_header(tmp_path / "again.safetensors"))


def test_a_foreign_y_grid_is_not_read_past(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = nn.Sequential(nn.Linear(4, 4))
    bigops.save(model, path)
    rewrite_as_older(path, lambda _, tensors: tensors.update({"0.y_grid": torch.ones(2)}))
    for given in (None, nn.Sequential(nn.Linear(4, 4))):
        with pytest.raises(bigops.FormatError, match="y_grid"):
            bigops.load(path, given)


@pytest.mark.parametrize("plan", [STATIC, SPARSE], ids=FORMS)
@pytest.mark.parametrize("given", [False, True])
def test_save_and_load(plan: Any, given: bool, tmp_path: Path) -> None:
    model = block()
    x = torch.randn(9, 24)
    bigops.compress_(model, plan, x)
    with torch.no_grad():
        want = model(x)
    bigops.save(model, tmp_path / "m.safetensors")
    loaded = bigops.load(tmp_path / "m.safetensors", block() if given else None).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), want)


@pytest.mark.parametrize("plan", [bigops.Int8(), bigops.Sparse(0.5) + bigops.Int8()])
def test_files_without_qparams_say_nothing_of_them(plan: Any) -> None:
    """So that older files load, and older versions read what has no qparams."""
    model = block()
    bigops.compress_(model, plan)
    for layer in (model[0], model[2]):
        arguments = layer.arguments()
        assert arguments.get("activations") in (None, "dynamic")
        again = type(layer).from_arguments(arguments)
        again.load_state_dict(layer.state_dict(), assign=True)
        assert again.x_qparams is None


def test_sparse_static_config_as_data() -> None:
    assert config.from_json(config.to_json(SPARSE)) == SPARSE
    assert config.from_json(config.to_json({"a*": SPARSE})) == {"a*": SPARSE}
    assert str(SPARSE) == "Sparse(0.5) + Int8(activations='static')"
    with pytest.raises(ValueError, match=r"int8: expected Int8\(\) or Int8\(activations='static'"):
        bigops.Sparse(0.5) + bigops.Int8(symmetric=False)
    with pytest.raises(ValueError, match="example_inputs: expected inputs to calibrate"):
        bigops.compress_(block(), SPARSE)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            lambda: SparseLinear(8, 8, activations="often"),
            "activations: expected dynamic or static; got 'often'",
        ),
        (
            lambda: SparseLinear(8, 8, values="bf16", activations="static"),
            "activations: expected 'dynamic' with values 'bf16'; got 'static'",
        ),
        (
            lambda: SparseLinear(8, 8, activations="static").freeze(),
            "x_qparams: expected a calibrated layer",
        ),
    ],
)
def test_errors(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer()


# models --------------------------------------------------------------------------------------


class Reads(nn.Module):
    """Two layers whose middle the model's own code reads, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

    def forward(self, x: Tensor, hidden: bool = False) -> Any:
        if self.how == "untraceable" and float(x.sum()) > 1e9:
            return x
        if self.how == "optional" and not hidden:
            return self.net(x)
        if self.how == "iterated":
            return torch.cat([x := layer(x) for layer in self.net], 1)
        if self.how == "sliced":
            h = self.net[:1](x)
            return self.net[1:](h) * torch.sigmoid(h)
        h = self.net[0](x)
        return self.net[1](h) + h


@pytest.mark.parametrize("how", ["untraceable", "optional", "iterated", "sliced"])
@pytest.mark.parametrize("plan", [STATIC, W4A8_STATIC, SPARSE], ids=["w8a8", "w4a8", "sparse"])
@pytest.mark.parametrize("verb", ["compress_", "freeze_"])
def test_no_u8_reaches_the_code_of_a_model(how: str, plan: Any, verb: str) -> None:
    """Floats pass between frozen static layers, whoever reads them and by whatever call."""
    model, x = Reads(how).eval(), torch.randn(9, 24)
    bigops.compress_(model, plan, x, freeze=verb == "compress_")
    with torch.no_grad():
        want = model(x, how == "optional")
        if verb == "freeze_":
            bigops.freeze_(model)
        for middle in (model.net[0](x), *(m(x) for m in model.net)):
            assert middle.dtype == torch.float32
        got = model(x, how == "optional")
    assert torch.equal(got, want)
