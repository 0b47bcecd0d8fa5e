"""bigops.nn.QuantLowRankLinear: two int8 factors, their products, recovery state and storage."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import backend
from bigops.backend import machine
from bigops.formats.low_rank import LowRankWeight
from bigops.formats.quantized import QuantizedWeight
from bigops.nn import LowRankLinear, QuantLinear, QuantLowRankLinear
from bigops.ops.low_rank_linear import low_rank_linear
from bigops.ops.quantized_linear import op as product
from tests.support import tolerance
from tests.support.cases.compressed import DTYPES, Case, kernel_of
from tests.support.kernels_ran import ISAS, expect, isa, needs_extension

SNR_FLOOR_DB = 37.0  # 39.5 to 41.8 on the cases below and 12 seeds; 6 bits in u give 35


def _layer(
    k: int = 70, n: int = 50, rank: int = 18, activation: str = "none", dtype: str = "f32"
) -> QuantLowRankLinear:
    low = LowRankLinear(k, n, rank, activation=activation, dtype=DTYPES[dtype])
    return QuantLowRankLinear.from_low_rank(low).eval()


def _input(layer: QuantLowRankLinear, *lead: int, dtype: str = "f32") -> tuple[Tensor, Tensor]:
    """x off centre, so that zero points are of every size, and a residual."""
    x = torch.randn(*lead, layer.in_features) + torch.randn(*lead, 1)
    return x.to(DTYPES[dtype]), torch.randn(*lead, layer.out_features).to(DTYPES[dtype])


def _outer(layer: QuantLowRankLinear, x: Tensor, residual: Tensor | None) -> Case:
    """The second product; what the first gives it is plain torch's, rounded in the same way.

    The first is the truth of no rounding of its own: it is held to float64 in
    tests/ops/quantized_linear/test_values.py, and in float32 it is the same to the bit.
    """
    factors = layer.storage()
    h = product.reference(x.detach(), factors.v)
    bias = None if layer.bias is None else layer.bias.detach()
    dense = factors.u.to_dense(torch.float64)
    grad = torch.randn(*x.shape[:-1], layer.out_features).to(x.dtype)
    return Case(h, factors.u, dense, True, bias, residual, grad, layer.activation)


# --- values --------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_forward(dtype: str, activation: str) -> None:
    layer = _layer(activation=activation, dtype=dtype).freeze()
    x, residual = _input(layer, 3, 4, dtype=dtype)
    with torch.no_grad(), backend.record() as names:
        y = layer(x, residual)
    assert names == [kernel_of("int8", machine.extension.isa(), dtype, 12)] * 2
    _outer(layer, x, residual).check_forward(y)


@needs_extension
@pytest.mark.parametrize("level", ISAS)
@pytest.mark.parametrize("rank", [0, 1, 17])
def test_every_instruction_set(level: str, rank: int) -> None:
    layer = _layer(33, 21, rank, "relu").freeze()
    x, residual = _input(layer, 5)
    with torch.no_grad(), isa(level), expect(kernel_of("int8", level, "f32", 5)):
        y = layer(x, residual)
    _outer(layer, x, residual).check_forward(y)


def test_rule_fails_on_a_factor_that_is_off_by_one_step() -> None:
    layer = _layer().freeze()
    x, residual = _input(layer, 6)
    case = _outer(layer, x, residual)
    step = -1 if layer.v_values[0, 0, 0, 0] > 0 else 1
    layer.v_values[0, 0, 0, 0] += step
    layer.v_row_sum[0] += step
    layer.storage().validate()
    with torch.no_grad():
        y = layer(x, residual)
    with pytest.raises(AssertionError, match="float64 says"):
        case.check_forward(y)


def test_frozen_gradients_are_those_of_the_dequantised_factors() -> None:
    layer = _layer(activation="gelu").freeze()
    x, residual = _input(layer, 7)
    x.requires_grad_()
    residual.requires_grad_()
    case = _outer(layer, x, residual.detach())
    y = layer(x, residual)
    gx, *others = torch.autograd.grad(y, [x, layer.bias, residual], case.grad)
    (gh, *truth), (gh32, *plain) = case.truth(torch.float64)[1], case.truth(torch.float32)[1]
    scale, *scales = case.scales()[1]
    v = layer.storage().v.to_dense(torch.float64)
    tolerance.check(gx, gh @ v, gh32 @ v.float(), scale @ v.abs(), what="gradient of x")
    for got, want, base, by in zip(others, truth, plain, scales, strict=True):
        tolerance.check(got, want, base, by)


def _snr(layer: QuantLowRankLinear, x: Tensor) -> float:
    u, v = (f.detach().double() for f in (layer.u, layer.v))
    truth = x.double() @ v.t() @ u.t()
    twin = copy.deepcopy(layer).freeze()
    twin.bias = None
    with torch.no_grad():
        return tolerance.snr_db(twin(x), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n", "rank"), [(70, 50, 18), (256, 128, 32), (512, 300, 8)])
def test_signal_to_noise_against_the_float_factors(k: int, n: int, rank: int, dtype: str) -> None:
    layer = _layer(k, n, rank, dtype=dtype)
    assert _snr(layer, torch.randn(64, k).to(DTYPES[dtype])) > SNR_FLOOR_DB


def test_the_floor_fails_on_six_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def coarse(layer: QuantLowRankLinear) -> LowRankWeight:
        step = layer.u.detach().abs().amax(1, keepdim=True) / 31
        return LowRankWeight.from_factors((layer.u / step).round() * step, layer.v, QuantizedWeight)

    layer, x = _layer(256, 128, 32), torch.randn(64, 256)
    monkeypatch.setattr(QuantLowRankLinear, "make_storage", coarse)
    assert _snr(layer, x) < SNR_FLOOR_DB


def test_a_row_with_nan_gives_a_row_of_nan_and_touches_no_other() -> None:
    layer = _layer().freeze()
    x, _ = _input(layer, 4)
    with torch.no_grad():
        expected = layer(x)
        x[1, 3] = torch.nan
        y = layer(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])


# --- recovery ------------------------------------------------------------------------------


def test_training_runs_on_rounded_factors_with_a_straight_through_gradient() -> None:
    layer = _layer().train()
    x, residual = _input(layer, 6)
    factors = layer.make_storage()
    u, v = factors.u.to_dense(), factors.v.to_dense()
    assert torch.equal(layer.trained_weight().detach(), u @ v)
    y = layer(x, residual)
    assert torch.equal(y.detach(), low_rank_linear(x, u, v, layer.bias, residual).detach())
    grad = torch.randn_like(y)
    gu, gv = torch.autograd.grad(y, [layer.u, layer.v], grad)

    def by_hand(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        g, a, b, c = (t.detach().to(dtype) for t in (grad, x, u, v))
        return g.t() @ (a @ c.t()), (g @ b).t() @ a

    sizes = grad.abs().double(), x.abs().double(), u.abs().double(), v.abs().double()
    scales = sizes[0].t() @ (sizes[1] @ sizes[3].t()), (sizes[0] @ sizes[2]).t() @ sizes[1]
    for got, ref, plain, scale in zip(
        (gu, gv), by_hand(torch.float64), by_hand(torch.float32), scales, strict=True
    ):
        tolerance.check(got, ref, plain, scale)


def test_fine_tuning_keeps_the_rank_and_freezing_the_numbers() -> None:
    layer = _layer(24, 16, 3).train()
    x, target = torch.randn(64, 24), torch.randn(64, 16)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    layer.eval()
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer.freeze()(x).detach(), expected)
    assert int(torch.linalg.matrix_rank(layer.dense_weight(), rtol=1e-5)) == 3


# --- storage -------------------------------------------------------------------------------

BUFFERS = ["u_row_sum", "u_scale", "u_values", "v_row_sum", "v_scale", "v_values"]


def test_freeze_leaves_only_the_storage() -> None:
    layer = _layer()
    x, residual = _input(layer, 5)
    with torch.no_grad():
        before = layer(x, residual)
    assert layer.freeze() is layer
    assert layer.freeze().frozen
    assert sorted(layer.state_dict()) == ["bias", *BUFFERS]
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    # u: 50 rows fill 64, 18 columns 20; v: 18 rows fill 32, 70 columns 72
    assert layer.nbytes == 64 * 20 + 2 * 64 * 4 + 32 * 72 + 2 * 32 * 4 + 50 * 4
    for mode in (True, False):
        assert torch.equal(layer.train(mode)(x, residual).detach(), before)
    factors = layer.storage()
    want = factors.u.to_dense(torch.float64) @ factors.v.to_dense(torch.float64)
    assert torch.equal(layer.dense_weight(), want.float())
    assert layer.density == pytest.approx(18 * 120 / 3500)
    for text in ("rank=18", "frozen"):
        assert text in repr(layer)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rank", [0, 5])
def test_state_and_arguments_make_the_layer_again(frozen: bool, rank: int) -> None:
    layer = QuantLowRankLinear(20, 12, rank, bias=False, activation="relu").eval()
    other = QuantLowRankLinear(20, 12, rank, bias=False, activation="relu").eval()
    if frozen:
        layer.freeze()
        other.freeze()
    x, _ = _input(layer, 4)
    meta = QuantLowRankLinear.from_arguments(layer.arguments()).eval()
    meta.load_state_dict(layer.state_dict(), assign=True)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        expected = layer(x)
        for again in (meta, other, copy.deepcopy(layer)):
            assert torch.equal(again(x), expected)
    assert meta.arguments() == layer.arguments()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u_scale", torch.zeros(1, 64), "u_scale: expected finite values above 0"),
        ("v_scale", torch.full((1, 32), torch.inf), "v_scale: expected finite values above 0"),
        (
            "v_values",
            torch.zeros(2, 9, 16, 4, dtype=torch.int8),
            r"v_values: expected shape \[2, 18, 16, 4\]; got \[2, 9, 16, 4\]",
        ),
        ("u_values", torch.zeros(4, 5, 16, 4), "u_values: expected dtype int8; got float32"),
        ("v_row_sum", torch.ones(32, dtype=torch.int32), "v_row_sum: expected the sums of the"),
        ("u_row_sum", None, r'Missing key.*"u_row_sum"'),
    ],
)
def test_frozen_refuses_broken_state(name: str, value: Tensor | None, message: str) -> None:
    layer = _layer().freeze()
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    state: dict[str, Any] = {**before, name: value}
    state = {key: t for key, t in state.items() if t is not None}
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    assert all(torch.equal(t, before[key]) for key, t in layer.state_dict().items())


def test_casts_leave_the_storage_alone() -> None:
    layer = _layer().freeze().to(torch.bfloat16)
    assert layer.u_scale.dtype == layer.v_scale.dtype == torch.float32
    assert layer.u_values.dtype == torch.int8
    assert layer.bias.dtype == torch.bfloat16
    assert layer(torch.randn(2, 70, dtype=torch.bfloat16)).dtype == torch.bfloat16


# --- paths ---------------------------------------------------------------------------------


def test_compiled_exported_vmapped_and_under_autocast() -> None:
    layer = _layer(activation="gelu").freeze()
    x, _ = _input(layer, 2, 3)
    with torch.no_grad():
        expected = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
        assert torch.equal(torch.vmap(layer)(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            cast = layer(x)
        exported = torch.export.export(layer, (x,), strict=True).module()
        assert torch.equal(exported(x), expected)
        assert torch.equal(cast, layer.to(torch.bfloat16)(x.bfloat16()))


def test_explain_names_the_kernel_that_runs() -> None:
    layer = _layer().freeze()
    x, _ = _input(layer, 3)
    factors = layer.storage()
    told = bigops.explain("low_rank_linear", x, factors.u, factors.v, layer.bias)
    with torch.no_grad(), backend.record() as names:
        layer(x)
    assert set(names) == {told.kernel}
    assert "x v^T, then u, both by quantized_linear" in told.reason
    # Triton takes 32 columns and more: here the two products are served apart.
    both = bigops.explain("low_rank_linear", x, factors.u, factors.v, device="sm_90").kernel
    assert "quantized_linear" in both


# --- errors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: QuantLowRankLinear(4, 3, 4), ValueError, "rank: expected 0 to 3"),
        (lambda: QuantLowRankLinear(4, 3, 1.0), TypeError, "rank: expected an int; got float"),  # type: ignore[arg-type]
        (lambda: QuantLowRankLinear(4, 3, 1, activation="swiglu"), ValueError, "activation"),
        (
            lambda: QuantLowRankLinear.from_low_rank(nn.Linear(4, 3)),
            TypeError,
            "layer: expected a LowRankLinear; got Linear",
        ),
        (
            lambda: QuantLowRankLinear.from_low_rank(_layer().freeze()),
            ValueError,
            "layer: expected float factors; got a frozen layer",
        ),
        (
            lambda: QuantLinear.from_linear(_layer()),
            TypeError,
            "linear: expected a torch.nn.Linear; got QuantLowRankLinear",
        ),
        (lambda: _layer().freeze()(torch.randn(2, 69)), ValueError, r"x: expected shape \[.., 70"),
        (
            lambda: _layer().freeze()(torch.randn(2, 70).double()),
            TypeError,
            "x: expected dtype float32, bfloat16, float16; got float64",
        ),
        (
            lambda: _layer().freeze()(torch.zeros(2, 70, dtype=torch.uint8)),
            TypeError,
            "x: expected a floating dtype, since the layer has no x_qparams",
        ),
        (
            lambda: _layer().freeze()(torch.randn(2, 70), torch.randn(2, 49)),
            ValueError,
            r"residual: expected shape \[2, 50\]; got \[2, 49\]",
        ),
        (
            lambda: _layer().freeze()(torch.randn(2, 70).bfloat16()),
            TypeError,
            "bias: expected dtype bfloat16, that of x; got float32",
        ),
        (
            lambda: LowRankWeight.from_factors(
                torch.full((3, 2), torch.nan), torch.ones(2, 4), QuantizedWeight
            ),
            ValueError,
            "^u: expected finite values",
        ),
        (
            lambda: LowRankWeight.from_factors(torch.ones(3, 2), torch.ones(1, 4), QuantizedWeight),
            ValueError,
            r"v: expected 2 rows for u of \[3, 2\]; got \[1, 4\]",
        ),
        (
            lambda: LowRankWeight.from_factors(torch.ones(3, 4), torch.ones(4, 5), QuantizedWeight),
            ValueError,
            r"u, v: expected a rank of at most 3.*got 4",
        ),
    ],
)
def test_errors_name_the_argument(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_op_refuses_factors_of_two_kinds() -> None:
    u, v = torch.randn(5, 2), torch.randn(2, 6)
    x, q, w = torch.randn(3, 6), QuantizedWeight.from_dense(u), QuantizedWeight.from_dense(v)
    with pytest.raises(TypeError, match="v: expected a QuantizedWeight, as the other"):
        low_rank_linear(x, q, v)
    with pytest.raises(TypeError, match="u: expected a QuantizedWeight, as the other"):
        low_rank_linear(x, u, w)
    for form in ({"scale": 2.0}, {"base": torch.randn(5, 6)}):
        with pytest.raises(ValueError, match="base, scale: expected None and 1 with quantised"):
            low_rank_linear(x, q, w, **form)  # type: ignore[arg-type]
    assert low_rank_linear(x, q, w).shape == (3, 5)


def test_nan_refuses_to_freeze_and_leaves_the_layer() -> None:
    layer = _layer()
    with torch.no_grad():
        layer.v[0, 0] = torch.nan
    with pytest.raises(ValueError, match="v: expected finite values"):
        layer.freeze()
    assert not layer.frozen
    assert layer.u is not None


def test_a_frozen_layer_is_exported_as_the_root() -> None:
    layer = QuantLowRankLinear(16, 12, 4).freeze().eval()
    again = QuantLowRankLinear.from_arguments(layer.arguments()).eval()
    again.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 16)
    for module in (layer, again):
        assert torch.equal(torch.export.export(module, (x,)).module()(x), layer(x))
