"""compress_ on torch's attention and encoder layers: opened, called, closed where all is dense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import Int4, Int8, LowRank, Sparse, backend, compress_
from bigops.nn import MultiheadAttention, QuantLinear
from tests.support import tolerance

X = torch.randn(3, 6, 64, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [5]])
INNER = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]


def make(layers: int = 2, **given: Any) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(64, 4, 128, **{"batch_first": True, **given})
    return nn.TransformerEncoder(layer, layers).eval()


def twin_of(model: nn.Module, twin: nn.Module) -> nn.Module:
    """``twin`` with the dequantised weights of ``model``."""
    with torch.no_grad():
        for path, layer in model.named_modules():
            if not getattr(layer, "computes_weight", None):
                continue
            above, _, leaf = path.rpartition(".")
            own: Any = twin.get_submodule(above if leaf == "in_proj" else path)
            to = own.in_proj_weight if leaf == "in_proj" else own.weight
            to.copy_(layer.weight)  # type: ignore[arg-type]
    return twin


@pytest.mark.parametrize(
    "config", [Int4(), Int8(activations="none"), Sparse(0.5), LowRank(8)], ids=str
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_numbers_are_those_of_the_dequantised_twin(config: Any, norm_first: bool) -> None:
    model = make(norm_first=norm_first)
    record = compress_(model, config)
    assert [e.name for e in record.done] == [f"layers.{i}.{n}" for i in (0, 1) for n in INNER]
    twin = twin_of(model, make(norm_first=norm_first))
    exact = copy.deepcopy(twin).double()
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    for given in ({}, {"src_key_padding_mask": PADDING}, {"mask": mask, "is_causal": True}):
        wide = {n: t.double() if n == "mask" else t for n, t in given.items()}
        with torch.no_grad():
            got, plain, truth = model(X, **given), twin(X, **given), exact(X.double(), **wide)
        there = ~PADDING if "src_key_padding_mask" in given else torch.ones_like(PADDING)
        largest = truth[there].abs().max()
        tolerance.check(got[there], truth[there], plain[there], largest)


def test_every_product_runs_compressed() -> None:
    """The fast path, which reads weights, is off; padding and a plain first layer included."""
    for config in (Int8(), {"layers.1.*": Int8()}, {"layers.1.linear*": Int8()}):
        model = make()
        count = len(compress_(model, config).done)
        for given in ({}, {"src_key_padding_mask": PADDING}):
            with backend.record() as names, torch.no_grad():
                y = model(X, **given)
            assert len([n for n in names if "quantized_linear" in n]) == count, names
            assert y.isfinite().all()


@pytest.mark.parametrize("config", [{"*": Int8()}, {"*linear1": Int8()}], ids=str)
def test_compiled(config: Any) -> None:
    """A compiled layer sees plain tensors for weights, and takes no fast path all the same."""
    torch._dynamo.reset()
    model = make(1)
    count = len(compress_(model, config).done)
    run = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        want = model(X)
        run(X)
        with backend.record() as names:
            got = run(X)
    assert len([n for n in names if "quantized_linear" in n]) == count, names
    assert tolerance.snr_db(got, want) > 40


def test_a_planted_fault_is_seen() -> None:
    model = make()
    compress_(model, Int4())
    twin = twin_of(model, make())
    model.layers[0].self_attn.in_proj.scale.data.mul_(1.1)
    with torch.no_grad():
        assert (model(X) - twin(X)).abs().max() > 1e-3


def test_what_stays_dense_is_torchs_own_again() -> None:
    model = make()
    before = dict(model.named_modules())
    record = compress_(model, {"layers.1.*out_proj": Int8()})
    assert model.layers[0].self_attn is before["layers.0.self_attn"]
    assert isinstance(model.layers[1].self_attn, MultiheadAttention)
    assert type(model.layers[1].self_attn.in_proj) is nn.Linear
    assert record.reason("layers.0.self_attn.in_proj") == "no pattern matches it"
    keys = {k for k in model.state_dict() if "attn" in k and "out_proj" not in k}
    assert keys == {k for k in make().state_dict() if "attn" in k and "out_proj" not in k}
    with pytest.raises(ValueError, match="no layer to compress matches 'x'"):
        compress_(model, {"x": Int8()})
    assert model.layers[0].self_attn is before["layers.0.self_attn"]


@pytest.mark.parametrize("low_memory", [False, True])
def test_files_and_plans(low_memory: bool, tmp_path: Path) -> None:
    model = make()
    record = compress_(model, Int8(), low_memory=low_memory)
    bigops.save(model, tmp_path / "m.st")
    loaded = bigops.load(tmp_path / "m.st", model=make())
    planned = make()
    compress_(planned, record.plan())
    again = make()
    compress_(again, Int8())
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model(X)
        for twin in (loaded, planned, again, copy.deepcopy(model)):
            assert torch.equal(twin(X), want)
    assert isinstance(loaded.layers[0].self_attn, MultiheadAttention)  # type: ignore[index]
    assert isinstance(loaded.layers[0].self_attn.in_proj, QuantLinear)  # type: ignore[index]


class Alone(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(64, 4, **given)
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attn(x, x, x)[0])  # type: ignore[no-any-return]


def test_what_stays_closed_says_why() -> None:
    tied, hooked, marked = Alone(), Alone(), Alone()
    tied.again = tied.attn.in_proj_weight  # type: ignore[assignment]
    hooked.attn.register_forward_hook(lambda module, args, y: module.in_proj_weight.sum())
    marked.attn.out_proj.scale = 2.0  # type: ignore[assignment]
    for model, said in (
        (Alone(kdim=64, vdim=64, add_bias_kv=True), "add_bias_kv"),
        (Alone(add_zero_attn=True), "add_zero_attn"),
        (tied, "in_proj_weight of attn is shared with again"),
        (hooked, "it has a forward hook, which may read"),
        (marked, "its out_proj stays: it has scale"),
    ):
        record = compress_(model, Int8())
        reason = record.reason("attn.out_proj") or ""
        assert reason.startswith("MultiheadAttention uses its weight without calling it")
        assert said in reason, reason
        assert [e.name for e in record.done] == ["fc"]
        assert type(model.attn) is nn.MultiheadAttention


def test_what_is_trained_first_stays() -> None:
    """The fast path reads float weights, and no rounding is seen."""
    model = make().train()
    record = compress_(model, Int8(), freeze=False)
    assert record.done == []
    assert "until it is frozen" in (record.reason("layers.0.linear1") or "")


def test_a_decoder_attends_to_other_tensors() -> None:
    torch.manual_seed(2)
    layer = nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)
    model = nn.TransformerDecoder(layer, 1).eval()
    base = copy.deepcopy(model)
    memory = torch.randn(3, 9, 64)
    record = compress_(model, Int4(), (X, memory), keep="all")
    names = {e.name for e in record.done}
    assert names >= {f"layers.0.multihead_attn.{n}_proj" for n in ("in", "out")}
    twin = twin_of(model, base)
    with torch.no_grad():
        got, plain = model(X, memory), twin(X, memory)
        truth = copy.deepcopy(twin).double()(X.double(), memory.double())
    tolerance.check(got, truth, plain, truth.abs().max())
