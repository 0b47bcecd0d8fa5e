"""smooth_: the same numbers in floating point, better ones in int8, or left with the reason."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bigops
from bigops import Int8, compress_, smooth_
from bigops.compress.smooth import _Input
from bigops.graph import channels as channels_module
from tests.support import tolerance

STATIC = Int8("static")


class Block(nn.Module):
    """A pre-norm block: siblings behind a norm, a residual, a chain by relu."""

    def __init__(self, d: int, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.before, self.after = norm(d), norm(d)
        self.value, self.gate = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Dropout(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        x = x + self.value(h) * torch.sigmoid(self.gate(h))
        return x + self.mlp(self.after(x))


def with_outliers(d: int = 64, norm: type[nn.Module] = nn.LayerNorm, by: float = 50) -> nn.Module:
    """Two blocks whose norms and rows make 5 channels ``by`` times as large as the others."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(d, norm), Block(d, norm))
    with torch.no_grad():
        for block in model:
            for made in (block.before.weight, block.after.weight, block.mlp[0].weight):
                made[torch.randperm(d)[:5]] *= by
    return model


def stream(d: int = 64, count: int = 4, size: int = 8) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randn(size, d, generator=made) for _ in range(count)]


@torch.no_grad()
def error_db(model: nn.Module, exact: nn.Module, x: Tensor, config: Any, data: Any) -> float:
    """Squared error of the compressed model over the square of the output, in dB."""
    model = copy.deepcopy(model).eval()
    compress_(model, config, data=data, keep="all")
    truth = exact(x.double())
    return 10 * math.log10(float((model(x) - truth).square().sum() / truth.square().sum()))


def check_same(model: nn.Module, before: nn.Module, x: Tensor) -> None:
    """The rule of the project, with the float64 model before as the truth."""
    with torch.no_grad():
        truth = copy.deepcopy(before).double().eval()(x.double())
        plain, out = before.eval()(x), model.eval()(x)
    tolerance.check(out, truth, plain, 0.0, what="smoothed")


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("alpha", [0.5, "search"])
def test_floating_point_stays_and_int8_gains(alpha: Any, norm: type[nn.Module]) -> None:
    before = with_outliers(norm=norm)
    # 32 rows would leave static ranges that other rows go beyond, which nothing makes good
    model, data, x = copy.deepcopy(before), stream(size=128), torch.randn(64, 64)
    record = smooth_(model, data, alpha)
    assert len(record.done) == 12
    check_same(model, before, x)
    exact = copy.deepcopy(before).double().eval()
    for config, calibrated, bits in ((STATIC, data, 1.0), (Int8(), None, 0.5)):
        was, now = (error_db(m, exact, x, config, calibrated) for m in (before, model))
        assert now < was - bits * 20 * math.log10(2), config


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    k=st.integers(2, 40),
    alpha=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    bias=st.booleans(),
)
def test_powers_of_two_change_no_number(
    seed: int, k: int, alpha: float, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(k, bias=bias), nn.Linear(k, 7, bias), nn.ReLU())
    model.extend([nn.Linear(7, 5, bias)])
    with torch.no_grad():
        model[0].weight.mul_(10 ** (4 * torch.rand(k) - 2))
    model, before = model.to(dtype), copy.deepcopy(model).to(dtype)
    x = torch.randn(9, k, dtype=dtype)
    smooth_(model, [x], alpha, least=1)
    scales = (model[1].weight / before[1].weight).double().log2()
    assert torch.equal(scales, scales.round())
    with torch.no_grad():
        truth, plain = copy.deepcopy(before).double()(x.double()), before(x)
        tolerance.check(model(x), truth, plain, 0.0)


def test_the_scales_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32))
    with torch.no_grad():
        model[0].weight[3] = 100.0
    before, data = copy.deepcopy(model), stream()
    smooth_(model, data, 0.7)
    x = torch.cat([before[0](batch) for batch in data]).abs().amax(0).double()
    w = before[1].weight.abs().amax(0).double()
    s = x**0.7 / w**0.3
    s = s / s.median()
    made = (model[1].weight / before[1].weight)[0].double()
    assert torch.equal(made, s.log2().round().exp2())
    assert torch.equal(model[0].weight.double() * made, before[0].weight.double())
    assert torch.equal(model[0].bias.double() * made, before[0].bias.double())


def test_data_may_be_cut_anyhow_and_is_read_once() -> None:
    rows = torch.cat(stream())
    states = []
    for size in (1, 5, 32):
        model = with_outliers()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=size)
        smooth_(model, loader)
        states.append(model.state_dict())
    for state in states[1:]:
        # the deeper norms see sums in another order; no rounded scale is near its edge here
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_rows_of_a_search_do_not_go_by_batches() -> None:
    rows, kept = torch.randn(1000, 4), []
    for size in (1, 7, 1000):
        given = _Input(4, 128)
        for part in rows.split(size):
            given.add(part)
        kept.append(given.rows)
    assert kept[0].shape == (128, 4)
    assert all(torch.equal(k, kept[0]) for k in kept)


def test_no_outliers_nothing_to_do() -> None:
    model = with_outliers(by=1)
    before = copy.deepcopy(model.state_dict())
    record = smooth_(model, stream())
    assert not record.done
    reason = record.reason("0.value") or ""
    assert reason.startswith("no outliers: its largest channel is ")
    assert reason.endswith("x the median one, below 4x")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert smooth_(model, stream(), least=1).done


class Attention(nn.Module):
    """What is left: behind a residual, a softmax, gelu; a tied, a parametrised, an unused layer."""

    def __init__(self, d: int = 64) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(10, d), nn.LayerNorm(d)
        self.q, self.fc, self.out = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.head, self.never, self.twin = (nn.Linear(d, n) for n in (10, d, d))
        self.head.weight, self.twin.weight = self.table.weight, self.out.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.table(ids))
        x = x + self.q(x).softmax(-1)
        return self.head(self.out(nn.functional.gelu(self.fc(x.relu()))))


def test_each_linear_layer_that_is_left_has_its_reason() -> None:
    record = smooth_(Attention(), [{"ids": torch.arange(10)}], least=1)
    reasons = {entry.name: entry.reason for entry in record.skipped}
    cannot = "its input cannot be scaled: "
    assert reasons == {
        "q": cannot + "aten.add reads it, too",
        "fc": cannot + "it is of no norm or linear layer: aten.add makes it",
        "out": cannot + "it is of no norm or linear layer: aten.gelu makes it",
        "table": cannot + "aten.embedding reads it, too",
        "head": "its weight is that of table",
        "never": "the data never calls it",
        "twin": "its weight is that of out",
    }


@pytest.mark.parametrize("mode", [True, False])
def test_everything_but_the_numbers_stays(mode: bool) -> None:
    model = with_outliers().train(mode)
    model[0].mlp.eval()
    before = {n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    drawn = torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert smooth_(model, stream()).done
    assert before == {n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    state = copy.deepcopy(model.state_dict())
    model(stream()[0]).square().mean().backward()
    optimizer.step()
    assert not torch.equal(state["0.value.weight"], model[0].value.weight)


def nothing() -> Iterator[Tensor]:
    yield from ()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: smooth_(m, nothing()), ValueError, r"got none \(a generator gives its batches"),
        (lambda m: smooth_(m, torch.ones(2, 64)), TypeError, "data: expected an iterable"),
        (lambda m: smooth_(m, None), TypeError, "data: expected an iterable"),
        (lambda m: smooth_(m, stream(), 1.5), ValueError, "alpha: expected from 0 to 1; got 1.5"),
        (lambda m: smooth_(m, stream(), "best"), TypeError, "alpha: expected a float or"),
        (lambda m: smooth_(m, stream(), least=0.5), ValueError, "least: expected a ratio"),
        (lambda m: smooth_(m, stream(), least="4"), TypeError, "least: expected a float; got str"),
        (lambda m: smooth_(m, [torch.randn(2, 63)]), RuntimeError, "normalized_shape"),
        (
            lambda m: smooth_(m, [*stream(), torch.full((2, 64), torch.nan)]),
            ValueError,
            "data: expected finite inputs .* NaN or inf for 0.value in batch 4",
        ),
        (lambda m: smooth_(7, stream()), TypeError, "model: expected a torch.nn.Module"),
    ],
)
def test_bad_input_is_refused_and_the_model_is_as_before(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    model = with_outliers()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    with pytest.raises(error, match=message):
        call(model)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_exhausted_generator_is_named() -> None:
    data = (x for x in stream())
    smooth_(with_outliers(), data)
    with pytest.raises(ValueError, match="got none .a generator gives its batches once"):
        compress_(with_outliers(), STATIC, data=data, keep="all")


def test_a_scale_that_a_dtype_does_not_hold_leaves_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 8)).half()
    with torch.no_grad():
        model[0].weight[:5] = 8000.0
        model[1].weight[0, 0] = 3000.0
    record = smooth_(model, [x.half() for x in stream()], 1.0)
    assert not record.done
    assert record.reason("1") == "torch.float16 would not hold 1.weight times its scales"


def test_a_smoothed_model_is_saved_and_compressed_like_any_other(tmp_path: Any) -> None:
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:3] *= 60
    record = smooth_(model, stream())
    assert "alpha 0.5" in str(record)
    assert json.loads(json.dumps(record.to_dict()))["verb"] == "smooth_"
    compress_(model, STATIC, data=stream(), keep="all")
    bigops.save(model, tmp_path / "m.safetensors")
    again = bigops.load(tmp_path / "m.safetensors")
    assert torch.equal(again(stream()[0]), model(stream()[0]))


def test_it_is_no_proof_to_trust_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were gelu taken for one that lets scales through, the numbers would say so."""
    rules = channels_module.channel_rules
    model = nn.Sequential(nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[:5] *= 50
    before, x = copy.deepcopy(model), stream()[0]
    assert not smooth_(model, stream()).done
    monkeypatch.setattr(rules, "HOMOGENEOUS", {*rules.HOMOGENEOUS, torch.ops.aten.gelu})
    assert smooth_(model, stream()).done
    with pytest.raises(AssertionError, match="smoothed: element"):
        check_same(model, before, x)


# --- transformers ------------------------------------------------------------------------------


SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 128, "vocab_size": 50}


def llama(transformers: Any) -> nn.Module:
    config = transformers.LlamaConfig(num_key_value_heads=2, **SMALL)
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


def bert(transformers: Any) -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL))  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [llama, bert])
def test_transformers(make: Callable[[Any], nn.Module]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    before = make(transformers).eval()
    with torch.no_grad():
        for name, p in before.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                p[torch.randperm(len(p))[:5]] *= 50
    model, data = copy.deepcopy(before), [{"input_ids": torch.randint(0, 50, (3, 9))}] * 2
    record = smooth_(model, data)
    with torch.no_grad():
        truth = next(iter(copy.deepcopy(before).double()(**data[0]).values()))
        out, plain = (next(iter(m(**data[0]).values())) for m in (model, before))
    tolerance.check(out, truth, plain, 0.0)
    done = {entry.name.rpartition(".")[2] for entry in record.done}
    if make is bert:  # behind each norm of BERT is a residual connection
        assert not done
        assert "BertSelfOutput returns it" in (
            record.reason("encoder.layer.0.intermediate.dense") or ""
        )
        return
    assert {*("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")} <= done
    assert {"input_layernorm", "post_attention_layernorm"} <= done
    assert "LlamaModel returns it" in (record.reason("lm_head") or "")  # among its hidden states
    assert "attention" in (record.reason("model.layers.0.self_attn.o_proj") or "")
