"""DTensor sharding rules: two processes give what one gives, gradients and placements included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bigops.ops import activation as act
from bigops.ops.fused_linear import reference
from tests.ops import sharding_factors as factors
from tests.ops import sharding_worker as worker
from tests.support import tolerance
from tests.support.cases import cross_entropy as cross_entropy_cases
from tests.support.cases import low_rank as low_rank_cases
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What two ranks computed for every case; the worker itself asserts where results lie."""
    folder = tmp_path_factory.mktemp("sharding")
    run_ranks("-m", "tests.ops.sharding_worker", str(folder))
    return torch.load(folder / "seen.pt", weights_only=True)


def _alone(name: str, dtype: torch.dtype, reference_op: bool) -> dict[str, Tensor]:
    """The case in one process: by plain torch in ``dtype``, or by our op."""
    case, whole = worker.CASES[name], worker.tensors(name)
    grad = whole.pop("grad")
    weight: Any = worker.stored(case.op, whole.pop("weight"))
    leaves = {k: None if t is None else t.to(dtype).requires_grad_() for k, t in whole.items()}
    kept = weight
    if reference_op:
        dense = weight if case.op == "fused" else weight.to_dense()
        if case.op in ("fused", "values"):
            leaves["weight"] = weight = dense.detach().to(dtype).requires_grad_()
        else:
            weight = dense.to(dtype)
        y = reference(leaves["x"], weight, leaves["bias"], leaves["residual"], case.activation)
    else:
        if case.op in ("fused", "values"):
            leaves["weight"] = weight if case.op == "fused" else weight.values
        y = worker.call(
            case.op, weight, leaves["x"], leaves["bias"], leaves["residual"], case.activation
        )
    (y * grad.to(dtype)).sum().backward()
    grads = {f"grad_{k}": t.grad for k, t in leaves.items() if t is not None}
    if reference_op and case.op == "values":
        grads["grad_weight"] = _sampled(kept, grads["grad_weight"])
    return {"y": y.detach(), **grads}


def _sampled(weight: Any, dense: Tensor) -> Tensor:
    """The entries of a matrix [N, K] where ``weight`` stores its float32 values, in that shape."""
    at = weight.positions()
    n, k = (size - 1 for size in weight.shape)
    inside = dense[at.row.clamp(max=n), at.word.clamp(max=k)]
    return torch.where(at.stored & (at.row <= n), inside, 0).unsqueeze(-1)


def _scales(name: str) -> dict[str, Tensor | float]:
    """Magnitudes that rounding acts on, for the result and every gradient."""
    case, whole = worker.CASES[name], worker.tensors(name)
    weight: Any = worker.stored(case.op, whole["weight"])
    dense = (weight if case.op == "fused" else weight.to_dense()).detach().abs()
    x, grad = whole["x"].abs(), whole["grad"].abs()
    z = F.linear(x, dense, None if whole["bias"] is None else whole["bias"].abs())
    top = float(z.max())
    # relu2 and the gate of swiglu are as steep as their input (times the slope of silu) is large.
    slope = {**tolerance.LIPSCHITZ, "relu2": 2 * top, "swiglu": 1.1 * top}[case.activation]
    gz = (grad.max() * slope).expand(*z.shape)
    grad_weight = gz.reshape(-1, gz.shape[-1]).T @ x.reshape(-1, x.shape[-1])
    scales: dict[str, Tensor | float] = {
        "y": top * slope + (0.0 if whole["residual"] is None else whole["residual"].abs().max()),
        "grad_x": gz @ dense,
        "grad_weight": _sampled(weight, grad_weight) if case.op == "values" else grad_weight,
        "grad_bias": gz.reshape(-1, gz.shape[-1]).sum(0),
        "grad_residual": grad,
    }
    return scales


@pytest.mark.parametrize("name", worker.CASES)
def test_two_ranks_equal_one(name: str, seen: dict[str, dict[str, Tensor]]) -> None:
    out = seen[name]
    one, truth = _alone(name, torch.float32, False), _alone(name, torch.float64, True)
    plain, scales = _alone(name, torch.float32, True), _scales(name)
    assert set(out) == set(one) == set(truth)
    for key, value in out.items():
        if key == "y" and worker.CASES[name].op in ("quantized", "sparse"):
            # Activations are quantised row by row and summed as integers: nothing may differ.
            assert torch.equal(value, one[key]), f"{name}: {key}"
        else:
            tolerance.check(value, truth[key], plain[key], scales[key], what=f"{name}: {key}")


def test_a_sum_left_open_would_be_seen(seen: dict[str, dict[str, Tensor]]) -> None:
    """Planted: half the weight gradient, as from one rank's rows alone."""
    name = "rows"
    truth, plain = _alone(name, torch.float64, True), _alone(name, torch.float32, True)
    whole = worker.tensors(name)
    scale = _scales(name)["grad_weight"]
    gz = act.epilogue_backward(
        "gelu", whole["grad"], F.linear(whole["x"], whole["weight"], whole["bias"])
    )
    halves = [gz[rows].T @ whole["x"][rows] for rows in (slice(0, 3), slice(3, 6))]
    tolerance.check(sum(halves), truth["grad_weight"], plain["grad_weight"], scale)
    with pytest.raises(AssertionError, match="element"):
        tolerance.check(halves[0], truth["grad_weight"], plain["grad_weight"], scale)


def test_a_split_from_the_cache_would_be_seen(seen: dict[str, dict[str, Tensor]]) -> None:
    assert seen["planted"]["caught"]


def test_the_raw_op_has_gradients(seen: dict[str, dict[str, Tensor]]) -> None:
    whole = worker.tensors("rows")

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        x, weight = (whole[key].to(dtype).requires_grad_() for key in ("x", "weight"))
        y = F.gelu(F.linear(x, weight))
        (y * whole["grad"].to(dtype)).sum().backward()
        return {"y": y.detach(), "grad_x": x.grad, "grad_weight": weight.grad}

    truth, plain, scales = alone(torch.float64), alone(torch.float32), _scales("rows")
    for key, value in seen["raw"].items():
        tolerance.check(value, truth[key], plain[key], scales[key], what=key)


def _bounds(kind: str, name: str) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor | float]]:
    """Truth, plain torch, scale and rounding of the result and of every gradient."""
    whole = factors.tensors(kind, name)
    grad = whole.pop("grad")
    if kind == "factors":
        inputs = tuple(whole[key] for key in low_rank_cases.NAMES)
        case = low_rank_cases.LowRankCase(inputs, grad, factors.FACTORS[name].activation, 1.0)
        names: tuple[str, ...] = low_rank_cases.NAMES
        scales, roundings = case.carried(True), case.carried(False)
    else:
        loss, names = factors.LOSSES[name], ("x", "weight", "bias")
        options = {"reduction": loss.reduction, "class_weight": whole["class_weight"]}
        given = (whole[key] for key in ("x", "weight", "bias", "target"))
        case = cross_entropy_cases.Case(*given, {**options, **(loss.options or {})})
        case.grad = grad
        y, *both = case.scales()
        scales, roundings = (y, both[0]), (0.0, both[1])
    parts = (case.plain(torch.float64), case.plain(torch.float32), scales, roundings)
    bounds = {"y": tuple(part[0] for part in parts)}
    for i, key in enumerate(names):
        if whole[key] is not None:
            bounds[f"grad_{key}"] = tuple(part[1][i] for part in parts)
    return bounds


@pytest.mark.parametrize(
    ("kind", "name"),
    [("factors", n) for n in factors.FACTORS] + [("loss", n) for n in factors.LOSSES],
)
def test_factors_and_losses_on_two_ranks(kind: str, name: str, seen: dict[str, Any]) -> None:
    out, bounds = seen[f"{kind}.{name}"], _bounds(kind, name)
    given = {k for k, t in factors.tensors(kind, name).items() if t is not None}
    assert set(out) == {"y"} | {f"grad_{k}" for k in factors.trained(kind, name) if k in given}
    for key, value in out.items():
        ref, plain, scale, rounding = bounds[key]
        tolerance.check(value, ref, plain, scale, rounding=rounding, what=f"{name}: {key}")


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [
        ("factors", "rank", "y"),
        ("factors", "rows", "grad_v"),
        ("loss", "tokens", "y"),
        ("loss", "tokens", "grad_weight"),
        ("loss", "mean", "y"),
    ],
)
def test_one_ranks_share_of_factors_and_losses_would_be_seen(
    kind: str, name: str, key: str
) -> None:
    """Planted: what the first rank has by itself, before the sum over ranks."""
    whole = factors.tensors(kind, name)
    grad = whole.pop("grad")
    if name == "rank":  # one column of u and one row of v
        whole["u"], whole["v"] = whole["u"][:, :1], whole["v"][:1]
        whole["bias"] = whole["residual"] = None
    else:
        rows = slice(0, 3)
        whole |= {k: whole[k][rows] for k in ("x", "residual", "target") if k in whole}
        grad = grad if grad.dim() == 0 else grad[rows]
    wanted = {k: None if t is None else t.clone() for k, t in whole.items()}
    for k in factors.trained(kind, name):
        if wanted[k] is not None:
            wanted[k].requires_grad_()
    y = factors.call(kind, name, wanted)
    part = y.detach()
    if key != "y":
        (part,) = torch.autograd.grad(y, [wanted[key.removeprefix("grad_")]], grad)
    ref, plain, scale, rounding = _bounds(kind, name)[key]
    with pytest.raises(AssertionError, match="element"):
        tolerance.check(part, ref, plain, scale, rounding=rounding)


def test_u8_between_layers_on_two_ranks(seen: dict[str, dict[str, Tensor]]) -> None:
    x = worker.tensors("rows")["x"]
    for name, value in seen["qparams"].items():
        op = "sparse" if name == "sparse" else "quantized"
        want = worker.qparams_chain(op, x, lambda tensor, letter: tensor)
        assert torch.equal(value, want), name


def test_training_2_4_values_on_two_ranks(seen: dict[str, dict[str, Tensor]]) -> None:
    """Whole numbers: no bit may differ."""
    for name, want in worker.train_2_4(lambda tensor, letter: tensor).items():
        assert want.abs().max() <= 256, name  # bfloat16 holds it
        assert torch.equal(seen["2:4"][name], want), name


def test_torch_tensor_parallel_plan(seen: dict[str, dict[str, Tensor]]) -> None:
    """ColwiseParallel and RowwiseParallel on two of our layers."""

    def alone(dtype: torch.dtype) -> dict[str, Tensor]:
        ours = worker.plan_model()
        model = nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 8)).to(dtype)
        for theirs, layer in ((model[0], ours[0]), (model[2], ours[1])):
            theirs.load_state_dict(layer.state_dict())
        y = model(worker.tensors("rows")["x"].to(dtype))
        y.square().sum().backward()
        grads = {
            f"{i}.{kind}": getattr(model[2 * i], kind).grad
            for i in (0, 1)
            for kind in ("weight", "bias")
        }
        return {"y": y.detach(), **grads}

    truth, plain = alone(torch.float64), alone(torch.float32)
    assert set(seen["plan"]) == set(truth)
    for key, value in seen["plan"].items():
        tolerance.check(value, truth[key], plain[key], truth[key].abs().max(), what=key)


def test_nothing_is_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    code = (
        "import sys, bigops.parallel.sharding; "
        "assert 'torch.distributed.tensor' not in sys.modules, 'imported'; print('lazy')"
    )
    assert run_ranks("-c", code, size=1) == ["lazy\n"]
