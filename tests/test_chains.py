"""u8 between layers: QuantLinear and SparseLinear that pass it on, and compress_ that lets them."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops.compress import config
from bigops.nn import Linear, QuantLinear, SparseLinear, chains
from bigops.nn.compressed_linear import CompressedLinear
from bigops.nn.sites import Sites
from bigops.ops._quantize import from_grid, quantize_rows, static_grid, to_grid
from tests.kernels_ran import expect, needs_extension
from tests.tolerance import check

pytestmark = needs_extension
STATIC = bigops.Int8(activations="static")
SPARSE = bigops.Sparse(0.5) + STATIC
BOTH = [pytest.param(STATIC, id="int8"), pytest.param(SPARSE, id="sparse")]


def never_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is swapped, however the timing on this machine comes out."""
    monkeypatch.setattr("bigops.nn.sites.Contest.lost", property(lambda self: False))


@pytest.fixture(autouse=True)
def _swap_all(monkeypatch: pytest.MonkeyPatch) -> None:
    never_lost(monkeypatch)


def block(bias: bool = True, k: int = 24) -> nn.Sequential:
    return nn.Sequential(
        Linear(k, 48, activation="gelu"), nn.Identity(), Linear(48, k, bias=bias)
    ).eval()


def floats(model: nn.Module) -> nn.Module:
    """The same model with floats between its layers."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, CompressedLinear):
            module.give_u8(None)
    return twin


# the layers ----------------------------------------------------------------------------------


def pair(form: str) -> tuple[CompressedLinear, CompressedLinear]:
    layers: list[CompressedLinear] = []
    for k, n, name in ((24, 48, "gelu"), (48, 10, "none")):
        source = Linear(k, n, activation=name)
        layer: CompressedLinear = (
            QuantLinear.from_linear(source, activations="static")
            if form == "quant"
            else SparseLinear.from_linear(source, 0.5, activations="static")
        )
        layer.calibrate(torch.tensor([-3.0, 4.0] if k == 24 else [-0.2, 2.5]))
        layers.append(layer.eval().freeze())
    return layers[0], layers[1]


@pytest.mark.parametrize("form", ["quant", "sparse"])
def test_a_layer_gives_u8_and_the_next_takes_it(form: str) -> None:
    first, second = pair(form)
    x, residual = torch.randn(7, 24), torch.randn(7, 10)
    with torch.no_grad():
        hidden = first(x)
        want = second(hidden, residual)
        first.give_u8(second.x_grid)
        with expect("_linear.f32.", "_u8", "_linear.u8."):
            u8 = first(x)
            got = second(u8, residual)
    assert u8.dtype == torch.uint8
    assert torch.equal(u8, to_grid(hidden, second.x_grid))
    assert torch.equal(got, want)
    assert "gives u8" in repr(first)
    assert "y_grid" in first.state_dict()
    assert first.give_u8(None)(x).dtype == torch.float32


@pytest.mark.parametrize("form", ["quant", "sparse"])
@pytest.mark.parametrize("wanted", ["x", "first.bias", "second.bias"])
@pytest.mark.parametrize("training", [False, True])
def test_where_a_gradient_is_wanted_floats_pass(form: str, wanted: str, training: bool) -> None:
    """The same numbers, and the gradient of the dequantised layers straight through."""
    first, second = pair(form)
    first.give_u8(second.x_grid)
    model = nn.Sequential(first, second).train(training)
    for p in model.parameters():
        p.requires_grad_(False)
    x = torch.randn(7, 24)
    with torch.no_grad():
        want = model(x)
    leaf = {"x": x, "first.bias": first.bias, "second.bias": second.bias}[wanted]
    assert leaf is not None
    leaf.requires_grad_()
    y = model(x)
    (got,) = torch.autograd.grad(y.square().sum(), leaf)

    def truth(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        given = {"x": x, "first.bias": first.bias, "second.bias": second.bias}
        leaves = {name: t.detach().to(dtype) for name, t in given.items()}
        leaves[wanted].requires_grad_()
        h = leaves["x"]
        for name, layer in (("first.bias", first), ("second.bias", second)):
            rows = quantize_rows(h.detach().float(), "static", layer.x_grid)
            seen = ((rows.q - rows.zero_point) * rows.scale).to(dtype)
            w = layer.dense_weight().to(dtype)
            h = nn.functional.linear(h + (seen - h.detach()), w, leaves[name])
            if layer is first:
                h = nn.functional.gelu(h)
        (g,) = torch.autograd.grad(h.square().sum(), leaves[wanted])
        size = h.detach().abs().amax() * 2
        return h.detach(), g, size

    y64, g64, size = truth(torch.float64)
    plain_y, plain_g, _ = truth(torch.float32)
    scale = 1 + y64.abs().amax()
    check(y.detach(), y64, plain_y, scale, what="y")
    check(want, y64, plain_y, scale, what="u8 y")
    check(got, g64, plain_g, 48 * 7 * size * scale, what=wanted)


@pytest.mark.parametrize("form", ["quant", "sparse"])
def test_vmap_compile_and_export(form: str) -> None:
    first, second = pair(form)
    plain = nn.Sequential(first, second)
    x = torch.randn(4, 7, 24)
    with torch.no_grad():
        want = plain(x)
        first.give_u8(second.x_grid)
        got = torch.vmap(plain)(x)  # by floats: torch.func may want a gradient
        assert torch.equal(got, want) or form == "sparse"
        check(got, want.double(), want, 1 + want.double().abs().amax())
        torch._dynamo.reset()
        with expect("_u8"):
            assert torch.equal(torch.compile(plain, fullgraph=True)(x), want)
        assert torch.equal(torch.export.export(plain, (x,)).module()(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floats_in_the_place_of_u8_are_the_same_numbers(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    for lo, hi in itertools.product((-7.3, -1.0, -1e-3, 0.0), (0.1, 1.0, 3.3, 61.0)):
        grid = static_grid(lo, hi)
        rows = quantize_rows(from_grid(every, grid, dtype), "static", grid)
        off = (rows.q - every.float()).abs()
        far = (every.float() - grid[1]).abs() > 128
        assert float(off.max()) <= (1.0 if dtype == torch.bfloat16 else 0.0)
        assert not off[~far].any()


def test_a_layer_in_recovery_takes_u8_by_its_grid() -> None:
    layer = QuantLinear.from_linear(Linear(24, 10), activations="static")
    q = torch.randint(0, 256, (5, 24), dtype=torch.uint8)
    with pytest.raises(ValueError, match="x_grid: expected a calibrated layer"):
        layer(q)
    layer.calibrate(torch.tensor([-1.0, 2.0]))
    for training in (True, False):
        layer.train(training)
        assert torch.equal(layer(q), layer(from_grid(q, layer.x_grid)))
    with torch.no_grad():
        got = layer(q)
    assert torch.equal(got, layer.freeze()(q))
    with pytest.raises(TypeError, match="x: expected a floating dtype, since the layer has no x_"):
        QuantLinear.from_linear(Linear(24, 10))(q)


def test_grids_keep_their_dtype_and_are_checked_when_loaded() -> None:
    for form in ("quant", "sparse"):
        first, second = pair(form)
        first.give_u8(second.x_grid)
        state = first.state_dict()
        x = torch.randn(3, 24)
        with torch.no_grad():
            want = first(x)
        moved = copy.deepcopy(first).bfloat16()
        assert moved.y_grid.dtype == moved.x_grid.dtype == torch.float32
        assert moved(x.bfloat16()).dtype == torch.bfloat16  # its bias wants a gradient
        for name in ("x_grid", "y_grid"):
            broken = {**state, name: torch.tensor([0.0, 1.0])}
            with pytest.raises(RuntimeError, match=f"{name}: expected a finite scale above 0"):
                first.load_state_dict(broken)
        with torch.no_grad():
            assert torch.equal(first(x), want)  # nothing was taken over
        meta = type(first).from_arguments(first.arguments())
        meta.load_state_dict(state, assign=True)
        with torch.no_grad():
            assert torch.equal(meta(x), want)


@pytest.mark.parametrize(
    ("layer", "grid", "kind", "message"),
    [
        (lambda: QuantLinear(8, 8), torch.ones(2), ValueError, "got a trainable QuantLinear"),
        (lambda: SparseLinear(8, 8, values="fp32").freeze(), torch.ones(2), ValueError,
         "give_u8: expected a frozen QuantLinear, or .* got a frozen SparseLinear"),
        (lambda: SparseLinear(8, 8, values="fp32").freeze().thaw(), torch.ones(2), ValueError,
         "got a thawed SparseLinear"),
        (lambda: QuantLinear(8, 8).freeze(), torch.zeros(2), ValueError, "grid: expected a finite"),
        (lambda: QuantLinear(8, 8).freeze(), torch.ones(2).half(), TypeError, "grid: expected dt"),
        (lambda: SparseLinear(8, 8, activations="often"), None, ValueError,
         "activations: expected dynamic or static; got 'often'"),
        (lambda: SparseLinear(8, 8, values="bf16", activations="static"), None, ValueError,
         "activations: expected 'dynamic' with values 'bf16'; got 'static'"),
        (lambda: SparseLinear(8, 8, activations="static").freeze(), None, ValueError,
         "x_grid: expected a calibrated layer"),
    ],
)  # fmt: skip
def test_errors(layer: Any, grid: Tensor | None, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        layer().give_u8(grid)


# compress_ -----------------------------------------------------------------------------------


class Traced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.up, self.down = Linear(24, 48, activation="gelu"), Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.norm(x)), residual=x)


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = block()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else self.net(-x)


class NoSoleReader(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.c = Linear(24, 48), Linear(48, 24), Linear(48, 24)
        self.d = Linear(48, 48)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        if self.how == "two readers":
            return self.b(h) + self.c(h)
        if self.how == "returned":
            return self.b(h) + self.c(x.repeat(1, 2)), h
        if self.how == "function":
            return self.b(torch.relu(h)) + self.c(x.repeat(1, 2))
        if self.how == "residual":
            return self.b(h, residual=h[..., :24]) + self.c(x.repeat(1, 2))
        if self.how == "own residual":
            return self.d(h, residual=h)
        if self.how == "module":
            return self.b(self.drop(h)) + self.c(x.repeat(1, 2))
        return (self.b(h) if self.training else self.c(h)) + self.b(x.repeat(1, 2))  # by mode


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize(
    ("make", "first", "second", "how"),
    [
        (block, "0", "2", "traced"),
        (Traced, "up", "down", "traced"),
        (Untraced, "net.0", "net.2", "traced"),
    ],
)
def test_a_proven_chain_passes_u8(
    make: Any, first: str, second: str, how: str, config: Any
) -> None:
    model = make().eval()
    x = torch.randn(9, 24)
    record = bigops.compress_(model, config, x)
    entry = next(d for d in record.done if d.name == first)
    assert f"gives u8 to {second} ({how}" in entry.why
    last = next(d for d in record.done if d.name == second)
    assert "gives floats: nothing proves that a single layer alone reads it" in last.why
    layer = model.get_submodule(first)
    assert torch.equal(layer.y_grid, model.get_submodule(second).x_grid)
    with torch.no_grad():
        with expect("_u8", "_linear.u8."):
            got = model(x)
        assert torch.equal(got, floats(model)(x))
    assert torch.equal(model(x).detach(), got) or config is not STATIC  # grad mode: floats pass


@pytest.mark.parametrize(
    "how", ["two readers", "returned", "function", "residual", "own residual", "module", "by mode"]
)
def test_without_a_sole_reader_floats_pass(how: str) -> None:
    model = NoSoleReader(how).eval()
    x = torch.randn(9, 24)
    record = bigops.compress_(model, STATIC, x)
    assert "gives floats: nothing proves" in next(d for d in record.done if d.name == "a").why
    assert model.a.y_grid is None
    with torch.no_grad():
        model(x)


def test_what_a_reader_must_be() -> None:
    x = torch.randn(9, 24)
    model = block(bias=False)
    record = bigops.compress_(model, STATIC, x)
    assert "gives floats: its reader has no bias" in record.done[0].why
    model = block()
    record = bigops.compress_(model, {"0": STATIC, "2": bigops.Int8()}, x)
    assert "its reader is no frozen layer with static" in record.done[0].why
    record = bigops.compress_(block(), bigops.Int8(), x)
    assert "gives" not in str(record)  # no layer takes u8
    model = nn.Sequential(*block(), *block()).eval()
    record = bigops.compress_(model, {"2": bigops.Int8(), "*": STATIC}, x)
    assert "its reader is no frozen layer with static" in record.done[0].why
    assert "gives u8 to 3" in record.done[1].why  # whatever it does with its own x
    with torch.no_grad():
        assert torch.equal(model(x), floats(model)(x))


def test_neighbours_where_nothing_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigops.nn.dataflow._trace", lambda module: "not today")
    model = nn.Sequential(block(), nn.Dropout(0.1), block()).eval()
    x = torch.randn(9, 24)
    record = bigops.compress_(model, STATIC, x)
    by_name = {d.name: d.why for d in record.done}
    assert "gives u8 to 0.2 (neighbours in nn.Sequential)" in by_name["0.0"]
    assert "gives floats" in by_name["0.2"]
    with torch.no_grad():
        assert torch.equal(model(x), floats(model)(x))
    found = chains.find(Sites(nn.Sequential(model[0][0], nn.Dropout(0.1), model[0][2])))
    assert not found


def test_a_hook_keeps_floats() -> None:
    model = block()
    x = torch.randn(9, 24)
    bigops.compress_(model, STATIC, x)
    model[0].give_u8(None)
    model[1].register_forward_hook(lambda *args: None)
    assert "gives floats" in chains.link(model, ["0"])["0"]


def test_freeze_links_what_was_trained() -> None:
    model = block()
    x = torch.randn(9, 24)
    record = bigops.compress_(model, STATIC, x, freeze=False)
    assert "u8" not in str(record)
    model.train()
    model(x).sum().backward()
    record = bigops.freeze_(model.eval())
    assert "gives u8 to 2 (traced" in record.done[0].why
    with torch.no_grad(), expect("_u8"):
        model(x)


@pytest.mark.parametrize("config", BOTH)
@pytest.mark.parametrize("given", [False, True])
def test_save_and_load(config: Any, given: bool, tmp_path: Path) -> None:
    model = block()
    x = torch.randn(9, 24)
    bigops.compress_(model, config, x)
    with torch.no_grad():
        want = model(x)
    bigops.save(model, tmp_path / "m.safetensors")
    loaded = bigops.load(tmp_path / "m.safetensors", block() if given else None).eval()
    with torch.no_grad(), expect("_u8", "_linear.u8."):
        assert torch.equal(loaded(x), want)


@pytest.mark.parametrize("config", [bigops.Int8(), bigops.Sparse(0.5) + bigops.Int8()])
def test_files_without_grids_say_nothing_of_them(config: Any) -> None:
    """So that older files load, and older versions read what has no grids."""
    model = block()
    bigops.compress_(model, config)
    for layer in (model[0], model[2]):
        arguments = layer.arguments()
        assert "y_grid" not in arguments
        assert arguments.get("activations") in (None, "dynamic")
        again = type(layer).from_arguments(arguments)
        again.load_state_dict(layer.state_dict(), assign=True)
        assert again.y_grid is None


def test_sparse_static_config_as_data() -> None:
    assert config.from_json(config.to_json(SPARSE)) == SPARSE
    assert config.from_json(config.to_json({"a*": SPARSE})) == {"a*": SPARSE}
    assert str(SPARSE) == "Sparse(0.5) + Int8(activations='static')"
    with pytest.raises(ValueError, match=r"int8: expected Int8\(\) or Int8\(activations='static'"):
        bigops.Sparse(0.5) + bigops.Int8(symmetric=False)
    with pytest.raises(ValueError, match="example_inputs: expected inputs to calibrate"):
        bigops.compress_(block(), SPARSE)


def test_a_wrong_grid_is_seen() -> None:
    """The planted fault: a giver on another grid than its reader."""
    model = block()
    x = torch.randn(9, 24)
    bigops.compress_(model, STATIC, x)
    with torch.no_grad():
        want = floats(model)(x)
        model[0].y_grid[0] *= 1.01
        assert not torch.equal(model(x), want)
