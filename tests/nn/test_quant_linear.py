"""bigops.nn.QuantLinear: int8 storage, its recovery state and its storage."""

import pytest
import torch

import bigops.backend as backend
from bigops.formats.quantized import QuantizedWeight
from bigops.nn import Linear, QuantLinear
from bigops.ops.quantized_linear import quantized_linear
from tests.support import tolerance
from tests.support.kernels_ran import named


def _kernels(call) -> set[str]:  # type: ignore[no-untyped-def]
    with backend.record() as names:
        call()
    return set(names)


# Each bits, group, kind of scale and of activations once.
FORMS: list[dict[str, object]] = [
    {},
    {"symmetric": False, "activations": "symmetric"},
    {"activations": "static"},
    {"group": 32, "symmetric": False},
    {"bits": 4, "group": 32},
    {"bits": 4, "group": 64, "symmetric": False, "activations": "dynamic"},
    {"bits": 4},
]


def _layer(activation: str = "relu", form: dict[str, object] | None = None) -> QuantLinear:
    layer = QuantLinear.from_linear(Linear(40, 24, activation=activation), **(form or {}))
    if layer.x_qparams is not None:
        layer.calibrate(torch.tensor([-3.0, 3.0]))
    return layer


def test_inference_runs_the_int8_op_on_the_quantised_weight() -> None:
    layer = _layer().eval()
    x, residual = torch.randn(5, 40), torch.randn(5, 24)
    with torch.inference_mode():
        out = layer(x, residual)
        names = _kernels(lambda: layer(x))
    expected = quantized_linear(
        x, QuantizedWeight.from_dense(layer.weight), layer.bias, residual, "relu"
    )
    assert torch.equal(out, expected.detach())
    assert names
    assert all("quantized_linear" in name for name in names), names


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_runs_on_rounded_weights_with_a_straight_through_gradient(
    form: dict[str, object],
) -> None:
    layer = _layer("none", form)
    x = torch.randn(6, 40)
    dense = layer.make_storage().to_dense()
    assert torch.equal(layer.trained_weight(), dense)
    layer(x).sum().backward()
    ref64 = torch.ones(6, 24).double().t() @ x.double()
    assert layer.weight.grad is not None
    plain = torch.ones(6, 24).t() @ x
    tolerance.check(layer.weight.grad, ref64, plain, x.abs().double().sum(0), what="grad")


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_freezes_saves_and_loads(form: dict[str, object]) -> None:
    layer = _layer("relu", form).eval()
    x = torch.randn(5, 40)
    with torch.no_grad():
        before = layer(x)
        names = _kernels(lambda: layer(x))
    integer = layer.activations != "none"
    kernel = named("quantized_linear", f".w{layer.bits}{'a8' * integer}")
    assert names
    assert all(kernel in name for name in names), names
    layer.freeze()
    assert torch.equal(layer(x).detach(), before)
    state = layer.state_dict()
    assert ("zero_point" in state) is not layer.symmetric
    assert ("row_sum" in state) is integer
    assert ("x_qparams" in state) is (layer.activations == "static")
    meta = QuantLinear.from_arguments(layer.arguments())
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x).detach(), before)
    other = _layer("relu", form).freeze()
    other.load_state_dict(state)
    with torch.no_grad():
        other.bias.copy_(layer.bias)
    assert torch.equal(other(x).detach(), before)
    for text in (f"bits={layer.bits}", f"activations={layer.activations}"):
        assert text in repr(layer)


def test_static_layers_are_calibrated_first() -> None:
    layer = QuantLinear.from_linear(Linear(40, 24), activations="static").eval()
    x = torch.randn(5, 40)
    with pytest.raises(ValueError, match="x_qparams: expected a calibrated layer"):
        layer.freeze()
    layer.calibrate(x)
    layer.calibrate(torch.empty(0, 40))
    with torch.no_grad():
        first = layer(x)
        layer.calibrate(100 * x)
        assert not torch.equal(layer(x), first)
    qparams = layer.x_qparams.clone()
    layer.calibrate(x)
    assert torch.equal(layer.x_qparams, qparams)
    scale, zero = qparams.tolist()
    assert -zero * scale == pytest.approx(100 * float(x.min()), abs=scale)
    assert (255 - zero) * scale == pytest.approx(100 * float(x.max()), abs=scale)
    with pytest.raises(ValueError, match="lo, hi: expected finite"):
        layer.calibrate(x * torch.inf)
    with pytest.raises(ValueError, match="calibrate: expected .*; got a frozen one"):
        layer.freeze().calibrate(x)
    with pytest.raises(ValueError, match="calibrate: expected .*; got activations 'dynamic'"):
        _layer().calibrate(x)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"bits": 2}, "bits: expected 8 or 4"),
        ({"group": 48}, "group: expected None, 32, 64 or 128"),
        ({"group": 64, "activations": "dynamic"}, "group: expected None with an int8"),
        ({"activations": "often"}, "activations: expected one of"),
    ],
)
def test_forms_that_are_not_there(form: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantLinear(8, 8, **form)  # type: ignore[arg-type]


def test_freeze_leaves_only_the_storage_and_the_same_numbers() -> None:
    layer = _layer().eval()
    x = torch.randn(5, 40)
    with torch.no_grad():
        before = layer(x)
    size = layer.nbytes
    assert layer.freeze() is layer
    assert layer.freeze().frozen
    assert sorted(layer.state_dict()) == ["bias", "row_sum", "scale", "values"]
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight.clone(), layer.dense_weight())
    assert layer.nbytes == 40 * 32 + 2 * 32 * 4 + 24 * 4 < size  # in tiles of 16 rows
    for mode in (True, False):
        layer.train(mode)
        assert torch.equal(layer(x).detach(), before)


def test_frozen_gradient_for_x_is_that_of_the_dequantised_weight() -> None:
    layer = _layer("none").freeze()
    x = torch.randn(5, 40, requires_grad=True)
    layer(x).sum().backward()
    w = layer.dense_weight()
    ones = torch.ones(5, 24)
    ref64 = ones.double() @ w.double()
    assert x.grad is not None
    tolerance.check(x.grad, ref64, ones @ w, w.double().abs().sum(0), what="gradient of x")


def test_recovery_keeps_no_storage() -> None:
    layer, x = _layer().eval(), torch.randn(2, 40)
    plain = layer.nbytes
    with torch.no_grad():
        layer(x)
    assert layer.storage().values is not layer.storage().values
    assert layer.nbytes == plain
    assert sorted(layer.state_dict()) == ["bias", "weight"]


def test_storage_made_under_inference_mode_can_be_differentiated() -> None:
    layer = _layer().eval()
    with torch.inference_mode():
        layer(torch.randn(2, 40))
        layer.freeze()
    x = torch.randn(2, 40, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_frozen_state_dict_round_trips() -> None:
    layer, other = _layer().freeze(), _layer().freeze()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 40)
    assert torch.equal(other(x), layer(x))
    meta = QuantLinear.from_arguments(layer.arguments())
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta(x), layer(x))


def test_frozen_refuses_broken_state() -> None:
    layer = _layer().freeze()
    before = layer.values.clone()
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"scale: expected finite values above 0"):
        layer.load_state_dict({**state, "scale": torch.zeros(1, 32)})
    with pytest.raises(RuntimeError, match=r"values: expected shape \[2, 10, 16, 4\]"):
        layer.load_state_dict({**state, "values": torch.zeros(2, 9, 16, 4, dtype=torch.int8)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"scale"'):
        layer.load_state_dict({k: v for k, v in state.items() if k != "scale"})
    assert torch.equal(layer.values, before)


def test_casts_leave_the_storage_alone() -> None:
    layer = _layer().freeze().to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert layer.values.dtype == torch.int8
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 40, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_nan_refuses_to_freeze_and_leaves_the_layer() -> None:
    layer = _layer()
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        layer.freeze()
    assert not layer.frozen
    assert layer.weight is not None


def test_frozen_compiles_without_breaks() -> None:
    layer = _layer().freeze().eval()
    x = torch.randn(3, 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_compiled_and_functorch_calls_take_the_float_path() -> None:
    layer = _layer().eval()
    x = torch.randn(3, 40)
    stacked = {n: torch.stack([p, 2 * p]).detach() for n, p in layer.named_parameters()}
    with torch.no_grad():
        expected = layer.train()(x)
        layer.eval()
        assert torch.equal(torch.compile(layer, backend="aot_eager")(x), expected)
        out = torch.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
    tolerance.check(out[0], expected.double(), expected, expected.abs().max())


def test_a_frozen_source_is_refused() -> None:
    with pytest.raises(ValueError, match="got a frozen one"):
        QuantLinear.from_linear(_layer().freeze())
