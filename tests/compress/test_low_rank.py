"""compress_ by factors: LowRank, LowRank + Int8, and their rows in the receipt."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import Int4, Int8, LowRank, Receipt, Sparse, compress_, freeze_
from bigops.compress import config as configs
from bigops.compress.config import LowRankInt8
from bigops.graph import sites as sites_module
from bigops.nn import Linear, LowRankLinear, QuantLinear, QuantLowRankLinear
from bigops.timing import Ratio
from tests.support import tolerance


def dense_model() -> nn.Sequential:
    """The last layer saves nothing from rank 5 on: 5 x (24 + 6) > 24 x 6."""
    return nn.Sequential(
        Linear(64, 48, activation="gelu"), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 6)
    )


def compressed_model(freeze: bool = True) -> nn.Sequential:
    """Factors in int8, in float, and one dense layer in int8."""
    model = dense_model()
    plan = {"0": LowRank(6) + Int8(), "1": LowRank(5), "3": Int8()}
    compress_(model, plan, freeze=freeze)
    return model.eval()


def snapshot(model: nn.Module) -> list[Any]:
    return [
        *((name, id(m), type(m), m.training) for name, m in model.named_modules()),
        *((n, id(p), p._version, p.requires_grad) for n, p in model.named_parameters()),
        *((n, id(b), b._version) for n, b in model.named_buffers()),
    ]


def _contest(ratio: float) -> Any:
    result = sites_module.Contest(1.0, 1.0 / ratio, Ratio(ratio, ratio - 0.1, ratio + 0.1))
    return lambda *a, **k: result


# --- configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        LowRank(64),
        LowRank(energy=0.9),
        LowRank(8, exact=True) + Int8(),
        LowRank(8) + Int8(),
        Int8() + LowRank(energy=1.0),
        {"b": LowRank(3), "*": LowRank(energy=0.5) + Int8()},
    ],
    ids=str,
)
def test_config_survives_json(plan: Any) -> None:
    assert configs.from_json(configs.to_json(plan)) == plan


def test_config_is_data() -> None:
    assert LowRank(8) + Int8() == Int8() + LowRank(8) == LowRankInt8(LowRank(8))
    assert str(LowRank(8) + Int8()) == "LowRank(rank=8) + Int8()"
    assert str(LowRank(energy=1)) == "LowRank(energy=1.0)"
    assert configs.from_json('{"low_rank": {"rank": 8}, "int8": {}}') == LowRank(8) + Int8()
    assert hash(LowRank(8)) == hash(LowRank(8))
    assert bigops.LowRank is configs.LowRank


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: LowRank(), ValueError, "rank, energy: expected one of the two; got None and None"),
        (lambda: LowRank(3, 0.5), ValueError, "rank, energy: expected one of the two"),
        (lambda: LowRank(0), ValueError, "rank: expected at least 1; got 0"),
        (lambda: LowRank(True), TypeError, "rank: expected an int; got bool"),
        (lambda: LowRank(2, exact=1), TypeError, "exact: expected a bool; got int"),  # type: ignore[arg-type]
        (lambda: LowRank(2.0), TypeError, "rank: expected an int; got float"),  # type: ignore[arg-type]
        (lambda: LowRank(energy=0.0), ValueError, "energy: expected above 0 and at most 1; got 0"),
        (lambda: LowRank(energy=float("nan")), ValueError, "energy: expected above 0 .*; got nan"),
        (lambda: LowRank(energy=1.1), ValueError, "energy: expected above 0 and at most 1"),
        (lambda: LowRank(energy="0.9"), TypeError, "energy: expected a float; got str"),  # type: ignore[arg-type]
        (lambda: LowRank(2) + LowRank(2), TypeError, r"LowRank \+ LowRank: only Sparse \+ Int8"),  # type: ignore[operator]
        (lambda: LowRank(2) + Int4(), TypeError, r"LowRank \+ Int4: only .* LowRank \+ Int8"),
        (lambda: Sparse(0.5) + LowRank(2), TypeError, r"Sparse \+ LowRank: only"),
        (lambda: LowRank(2) + Int8() + Int8(), TypeError, r"LowRankInt8 \+ Int8: only"),
        (
            lambda: LowRank(2) + Int8(activations="static"),
            ValueError,
            r"int8: expected Int8\(\) beside LowRank; got Int8\(activations='static'\)",
        ),
        (lambda: configs.from_json('{"low_rank": {}}'), ValueError, "rank, energy: expected one"),
        (lambda: configs.from_json('{"low_rank": {"k": 1}}'), ValueError, "config: expected"),
        (
            lambda: configs.from_json('{"low_rank": {"rank": 1}, "sparse": {"sparsity": 0.5}}'),
            ValueError,
            "config: expected",
        ),
    ],
)
def test_config_errors(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


# --- compress_ -----------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False])
def test_low_rank_alone_is_trainable_and_leaves_what_saves_nothing(freeze: bool) -> None:
    model = dense_model().eval()
    weights = [model[i].weight.detach().clone() for i in (0, 1)]
    last = model[3]
    record = compress_(model, LowRank(6), freeze=freeze)
    assert [d.name for d in record.done] == ["0", "1"]
    assert model[3] is last
    assert record.reason("3") == (
        "rank 6 saves nothing: 6 x (24 + 6) entries of the factors for 24 x 6 of the weight"
    )
    for layer, weight, done in zip(model, weights, record.done, strict=False):
        assert type(layer) is LowRankLinear
        assert not layer.training
        values = torch.linalg.svdvals(weight.double())
        error = (layer.to_dense().detach().double() - weight.double()).square().sum()
        assert float(error) == pytest.approx(float(values[6:].square().sum()), rel=1e-4)
        assert (done.bytes_after, done.density) == (layer.nbytes, layer.density)
        assert done.bytes_after < done.bytes_before
        assert "Linear -> LowRankLinear by LowRank(rank=6), rank 6" in done.what
        assert done.why.partition("; no kernel")[0].endswith("trainable at this rank")
    assert model[0].activation == "gelu"
    json.dumps(record.to_dict())


def test_energy_chooses_a_rank_for_each_layer() -> None:
    model = dense_model()
    squares = [torch.linalg.svdvals(model[i].weight.detach().double()).square() for i in (0, 1)]
    record = compress_(model, {"[01]": LowRank(energy=0.5)})
    for layer, values, done in zip(model, squares, record.done, strict=False):
        share = values.cumsum(0) / values.sum()
        assert layer.rank == int((share < 0.5).sum()) + 1
        assert f"rank {layer.rank}" in done.what
    assert model[0].rank != model[1].rank
    full = dense_model()
    before = snapshot(full)
    record = compress_(full, LowRank(energy=1.0))  # every rank is full: nothing is saved
    assert snapshot(full) == before
    assert all("saves nothing" in left.reason for left in record.skipped)
    assert len(record.skipped) == 3


def test_a_rank_above_the_smaller_side_is_left() -> None:
    record = compress_(dense_model(), LowRank(1000))
    assert not record.done
    assert "rank 1000 saves nothing" in (record.reason("0") or "")


def test_int8_factors_at_once_and_after_training_are_the_same() -> None:
    x = torch.randn(5, 64)
    torch.manual_seed(1)
    at_once = dense_model().eval()
    torch.manual_seed(1)
    by_steps = dense_model().eval()
    record = compress_(at_once, {"[01]": LowRank(6) + Int8()})
    for d in record.done:
        assert "Linear -> QuantLowRankLinear by LowRank(rank=6) + Int8(), rank 6" in d.what
        assert d.bytes_after == at_once[int(d.name)].nbytes < d.bytes_before / 3
        assert d.why.partition("; no kernel")[0] == "asked for"
    compress_(by_steps, {"[01]": LowRank(6)})
    record = compress_(by_steps, {"[01]": Int8()}, freeze=False)
    assert [d.what for d in record.done] == [
        f"LowRankLinear -> QuantLowRankLinear by Int8(), rank {6}"
    ] * 2
    assert all(not by_steps[i].frozen for i in (0, 1))
    assert "trainable, in floating point until freeze_" in str(record)
    compress_(by_steps, {"[01]": Int8()})  # in recovery state: frozen at its rank
    assert all(type(by_steps[i]) is QuantLowRankLinear and by_steps[i].frozen for i in (0, 1))
    with torch.inference_mode():
        assert torch.equal(at_once(x), by_steps(x))


def test_fine_tuning_keeps_the_rank_until_freezing() -> None:
    model = dense_model()
    compress_(model, {"0": LowRank(4) + Int8(), "1": LowRank(3)}, freeze=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, target = torch.randn(32, 64), torch.randn(32, 6)
    before = [model[i].u.detach().clone() for i in (0, 1)]
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(old, model[i].u) for i, old in zip((0, 1), before, strict=True))
    model.eval()
    with torch.no_grad():
        expected = model(x)
    record = freeze_(model)
    assert [d.what for d in record.done] == ["QuantLowRankLinear frozen"]
    assert record.reason("1") == "its factors are all it has; Int8() makes them int8"
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    for i, rank in ((0, 4), (1, 3)):
        dense = model[i].dense_weight() if i == 0 else model[i].to_dense()
        assert int(torch.linalg.matrix_rank(dense.detach(), rtol=1e-5)) == rank
    assert not freeze_(nn.Sequential(model[1])).done


def test_bias_dtype_and_fixed_parameters_stay() -> None:
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    linear.weight.requires_grad_(False)
    model = nn.Sequential(linear, nn.Linear(48, 48, bias=False))
    with torch.inference_mode():
        compress_(model, LowRank(4))
    assert torch.equal(model[0].bias, linear.bias)
    assert model[0].bias.requires_grad
    assert not model[0].u.requires_grad
    assert model[0].u.dtype == torch.bfloat16
    assert model[1].bias is None
    model[1](torch.randn(2, 48)).sum().backward()  # made under inference_mode, trained all the same
    assert model[1].v.grad is not None


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("config", [LowRank(4), LowRank(4) + Int8()], ids=str)
@pytest.mark.parametrize(("ratio", "swapped"), [(0.5, False), (1.5, True)])
def test_a_layer_that_gets_slower_is_left(
    ratio: float, swapped: bool, config: Any, freeze: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigops.compress.apply.contest", _contest(ratio))
    model = dense_model()
    before = snapshot(model)
    record = compress_(model, {"[01]": config}, torch.randn(8, 64), freeze=freeze)
    assert (len(record.done) == 2) is swapped
    assert (snapshot(model) != before) is swapped
    for left in record.skipped:
        assert left.name == "3" or "the original is faster: measured" in left.reason


def test_what_is_timed_is_what_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []

    def contest(old: nn.Module, new: nn.Module, x: Tensor, training: bool) -> Any:
        timed.append(new)
        return _contest(1.5)()

    monkeypatch.setattr("bigops.compress.apply.contest", contest)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(64, 2) @ torch.randn(2, 64))
    record = compress_(model, LowRank(energy=0.5) + Int8(), torch.randn(8, 64), freeze=False)
    assert all(type(layer) is QuantLowRankLinear and layer.frozen for layer in timed)
    assert not any(layer.frozen for layer in model)
    # one contest for each rank, however many layers share it
    assert sorted({layer.rank for layer in timed}) == sorted({layer.rank for layer in model})
    assert len(timed) == len({layer.rank for layer in model}) >= 2
    assert all(d.speedup is not None for d in record.done)


# --- bad input leaves the model as it was ---------------------------------------------------


@pytest.mark.parametrize("config", [LowRank(2), LowRank(energy=0.9) + Int8()], ids=str)
@pytest.mark.parametrize(("leaf", "value"), [("weight", torch.nan), ("bias", torch.inf)])
def test_nan_names_the_layer_and_changes_nothing(config: Any, leaf: str, value: float) -> None:
    model = dense_model()
    with torch.no_grad():
        getattr(model[3], leaf).view(-1)[0] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"3.{leaf}: expected finite values; got 1 NaN or inf"):
        compress_(model, config)
    assert snapshot(model) == before


@pytest.mark.parametrize("leaf", ["u", "v"])
def test_nan_in_a_factor_is_named(leaf: str) -> None:
    model = dense_model()
    compress_(model, {"0": LowRank(2), "1": LowRank(2) + Int8()}, freeze=False)
    for i, verb in ((1, freeze_), (0, lambda m: compress_(m, Int8()))):
        kept = getattr(model[i], leaf)[0, 0].item()
        with torch.no_grad():
            getattr(model[i], leaf)[0, 0] = torch.nan
        before = snapshot(model)
        with pytest.raises(ValueError, match=rf"{i}.{leaf}: expected finite values; got 1 NaN"):
            verb(model)
        assert snapshot(model) == before
        with torch.no_grad():
            getattr(model[i], leaf)[0, 0] = kept


def test_configs_that_a_layer_does_not_take_change_nothing() -> None:
    model = dense_model()
    compress_(model, {"0": LowRank(2), "1": Sparse(0.5)}, freeze=False)
    before = snapshot(model)
    for config in (Sparse(0.5), Int4(), Int8(symmetric=False), LowRank(1)):
        with pytest.raises(ValueError, match=r"config: expected Int8\(\) for a low-rank layer"):
            compress_(model, {"3": Int8(), "0": config})
        assert snapshot(model) == before
    with pytest.raises(ValueError, match=r"expected a dense layer for LowRank.*got a SparseLinear"):
        compress_(model, {"3": Int8(), "1": LowRank(2)})
    assert snapshot(model) == before


@pytest.mark.parametrize("broken", ["factors", "freeze"])
def test_a_failure_midway_changes_nothing(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense_model()
    before = snapshot(model)
    owner, name = {
        "factors": (LowRankLinear, "from_svd"),
        "freeze": (QuantLowRankLinear, "freeze"),
    }[broken]
    real, calls = getattr(owner, name), []

    def second_fails(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("planted")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, second_fails)
    with pytest.raises(MemoryError, match="planted"):
        compress_(model, LowRank(2) + Int8())
    assert snapshot(model) == before


def test_layers_that_share_a_factor_are_left() -> None:
    model = nn.Sequential(LowRankLinear(8, 8, 2), LowRankLinear(8, 8, 2), nn.Linear(8, 8))
    model[1].u = model[0].u
    record = compress_(model, Int8())
    assert record.reason("0") == "its u is shared with 1.u"
    assert record.reason("1") == "its u is shared with 0.u"
    assert type(model[2]) is QuantLinear


# --- receipt -------------------------------------------------------------------------------


def test_the_receipt_has_both_kinds_of_factors() -> None:
    before, after, x = dense_model().eval(), compressed_model(), torch.randn(4, 64)
    receipt = Receipt.measure(before, after, x, pairs=2, with_compile=False)
    rows = {row.name: row for row in receipt.layers}
    assert [rows[n].kind for n in "013"] == ["QuantLowRankLinear", "LowRankLinear", "QuantLinear"]
    for name in "01":
        row, layer = rows[name], after[int(name)]
        assert row.shape == [layer.out_features, layer.in_features]
        assert row.density == pytest.approx(layer.density)
        assert row.bytes_after == sum(t.nbytes for t in layer.state_dict().values())
        assert row.us_after is not None
    assert "quantized_linear" in rows["0"].kernel
    assert "low_rank_linear" in rows["1"].kernel
    text = str(receipt)
    assert f"layer 0: QuantLowRankLinear by {rows['0'].kernel}" in text
    assert "48 x 64" in text
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_compressed_models_stay_close_to_what_they_were() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(torch.randn(64, 8) @ torch.randn(8, 64) / 8)
    x = torch.randn(32, 64)
    with torch.no_grad():
        truth = model(x)
        compress_(model, LowRank(energy=0.9999))
        assert [layer.rank for layer in model] == [8, 8]
        assert tolerance.snr_db(model(x), truth) > 100
        compress_(model, Int8())
        assert tolerance.snr_db(model(x), truth) > 30
    assert all(type(layer) is QuantLowRankLinear for layer in model)
