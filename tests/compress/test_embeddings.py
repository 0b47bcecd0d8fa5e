"""compress_ on embeddings, tied weights and Conv1D: who gets what, one storage, files, freezing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bigops
from bigops import W4A8, Fp8, Int4, Int8, LowRank, Sparse, compress_, freeze_
from bigops.compress import config as configs
from bigops.compress import measure
from bigops.compress.receipt import Receipt
from bigops.nn import QuantEmbedding, QuantLinear

IDS = torch.arange(14).view(2, 7) * 7 % 100
BOTH = Int8(embeddings=True)


class Net(nn.Module):
    """A tied head, positions, and an embedding that no storage can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(100, 64, 0), nn.Embedding(32, 64)
        self.capped = nn.Embedding(4, 64, max_norm=1.0)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 100)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(torch.arange(ids.shape[-1])) + self.capped(ids % 4) * 0
        return self.head(torch.relu(self.fc(x)))  # type: ignore[no-any-return]


def make() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def call(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)  # type: ignore[no-any-return]


def done(config: Any, **given: Any) -> tuple[Any, Any]:
    model = make()
    return model, compress_(model, config, **given)


def names(record: Any) -> list[str]:
    return [entry.name for entry in record.done]


@pytest.mark.parametrize("config", [Int8(), W4A8, {"*": Int8()}, {"fc": Int4()}])
def test_what_does_not_name_embeddings_leaves_them(config: Any) -> None:
    model, record = done(config)
    assert names(record) == ["fc"]
    assert record.reason("head") == "its weight is shared with table.weight"
    assert {u.name for u in record.unseen} >= {"table.weight", "place.weight"}
    assert type(model.table) is nn.Embedding


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        (BOTH, ["table", "place", "fc", "head"]),
        ({"table": Int8(), "head": Int8()}, ["table", "head"]),
        ({"place": Int4(group=32), "fc": Int8()}, ["place", "fc"]),
        ({"p*": Int4(embeddings=True), "*": Int8()}, ["place", "fc"]),
        ({"*": Int8(), "p*": Int4(embeddings=True)}, ["place", "fc"]),
        ({"place": None, "*": BOTH}, ["table", "fc", "head"]),
        ({"t*": Int8(embeddings=True), "*": Int8()}, ["table", "fc", "head"]),
        (Sparse(0.5) + Int8(embeddings=True), ["place", "fc"]),
        (LowRank(8) + Int8(embeddings=True), ["place", "fc"]),
    ],
    ids=str,
)
def test_what_names_them_takes_them(config: Any, taken: list[str]) -> None:
    model, record = done(config)
    assert names(record) == taken
    for name in {"table", "place"} & {*taken}:
        assert isinstance(model.get_submodule(name), QuantEmbedding)
    assert model(IDS).isfinite().all()


def test_why_the_others_stay() -> None:
    _, record = done(BOTH)
    assert record.reason("capped") == "its max_norm writes to the weight in each call"
    said = (
        r"'t\*'.*left: table \(its weight is shared with head.weight, which "
        r"Int8\(embeddings=True\) would store in another form\)"
    )
    with pytest.raises(ValueError, match=said):
        done({"t*": Int4(embeddings=True), "*": BOTH})


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 8


def test_what_does_more_than_an_embedding_stays() -> None:
    model = nn.Sequential(Scaled(10, 64), nn.Linear(64, 64))
    record = compress_(model, BOTH)
    assert names(record) == ["1"]
    assert "Scaled, which may do more than an embedding" in (record.reason("0") or "")


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    "config", [BOTH, Int4(embeddings=True), Int8(symmetric=False, embeddings=True)], ids=str
)
def test_one_storage(config: Any, low_memory: bool, tmp_path: Path) -> None:
    model, record = done(config, low_memory=low_memory)
    bias = model.head.bias
    table, head = model.table, model.head
    assert (type(table), type(head)) == (QuantEmbedding, QuantLinear)
    assert head.values is table.values
    assert head.scale is table.scale
    assert head.zero_point is table.zero_point
    assert head.bias is bias
    # each byte once: those of the record are those of the model
    left = sum(p.nbytes for p in model.capped.parameters())
    assert sum(e.bytes_after for e in record.done) + left == measure.model_bytes(model)
    assert sum(e.bytes_before for e in record.done) + left == record.model_bytes
    assert "one storage with table" in str(record)
    want = call(model)
    bigops.save(model, tmp_path / "m.st")
    held = {id(p): p.nbytes for p in model.parameters()}
    assert (tmp_path / "m.st").stat().st_size < sum(held.values()) + 12_000
    loaded = bigops.load(tmp_path / "m.st", model=make())
    planned = make()
    compress_(planned, record.plan())
    copied = copy.deepcopy(model)
    copied.load_state_dict(model.state_dict())
    for twin in (loaded, planned, copied):
        own: Any = twin
        assert torch.equal(call(own), want)
        assert own.head.values is own.table.values
        assert own.head.values is not head.values


def test_a_file_alone_builds_embeddings(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 8)).eval()
    compress_(model, BOTH)
    bigops.save(model, tmp_path / "m.st")
    again = bigops.load(tmp_path / "m.st")
    assert isinstance(again[0], QuantEmbedding)
    assert torch.equal(again(IDS % 50), model(IDS % 50))
    with pytest.raises(bigops.FormatError, match="num_embeddings 50; the model's has 51"):
        bigops.load(tmp_path / "m.st", model=nn.Sequential(nn.Embedding(51, 64), nn.Linear(64, 8)))


def test_the_model_computes_with_the_dequantised_weights() -> None:
    model, _ = done(Int4(embeddings=True))
    twin = make()
    with torch.no_grad():
        for name in ("table", "place", "fc", "head"):
            getattr(twin, name).weight.copy_(getattr(model, name).dense_weight())
    truth, plain, got = call(copy.deepcopy(twin).double()), call(twin), call(model)
    assert (got - truth).abs().max() <= 4 * (plain - truth).abs().max()


def test_trained_first() -> None:
    model, record = done(BOTH, freeze=False)
    assert model.head.weight is model.table.weight
    assert sum(e.bytes_after for e in record.done) == sum(e.bytes_before for e in record.done)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.table.weight.detach().clone()
    model(IDS).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.table.weight, before)
    want = call(model)
    frozen = freeze_(model)
    assert model.head.values is model.table.values
    assert torch.equal(call(model), want)
    left = sum(p.nbytes for p in model.capped.parameters())
    assert sum(e.bytes_after for e in frozen.done) + left == measure.model_bytes(model)
    assert compress_(make(), {"fc": Int8()}).reason("head") is not None


def test_times_leave_no_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are there for their bytes; a head that is slower keeps its embedding, too."""
    from bigops.compress import apply
    from bigops.graph.sites import Contest
    from bigops.timing import Ratio

    slow, fast = Contest(1, 2, Ratio(0.5, 0.4, 0.6)), Contest(2, 1, Ratio(2, 1.9, 2.1))

    def contest_of(lost: type) -> Any:
        return lambda old, new, x, training: slow if isinstance(new, lost) else fast

    monkeypatch.setattr(apply, "contest", contest_of(QuantEmbedding))
    _, record = done(BOTH, example_inputs=IDS)
    assert names(record) == ["table", "place", "fc", "head"]
    monkeypatch.setattr(apply, "contest", contest_of(QuantLinear))
    _, record = done(BOTH, example_inputs=IDS)
    assert names(record) == ["place"]
    assert record.reason("table") == "its weight is shared with head.weight, which stays"


def test_receipt_and_json(tmp_path: Path) -> None:
    before = make()
    after = copy.deepcopy(before)
    compress_(after, BOTH)
    receipt = Receipt.measure(before, after, IDS, with_compile=False, pairs=30)
    found = {layer.name: layer for layer in receipt.layers}
    assert found["table"].kind == "QuantEmbedding"
    assert found["table"].shape == [100, 64]
    assert "quantized_embedding" in found["table"].kernel
    again = configs.from_json(configs.to_json({"a": BOTH, "*": Int4(embeddings=True)}))
    assert again == {"a": BOTH, "*": Int4(embeddings=True)}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"table": Fp8()}, r"config\['table'\]: expected Int8\(\.\.\) or Int4\(\.\.\) for an emb"),
        ({"table": Sparse(0.5)}, "for an embedding; got Sparse"),
        ({"capped": Int8()}, r"left: capped \(its max_norm"),
        ({"nothing*": BOTH}, "embeddings, by their names or with embeddings=True: table, place"),
    ],
)
def test_errors(config: Any, said: str) -> None:
    model = make()
    before = [*model.named_modules()]
    with pytest.raises(ValueError, match=said):
        compress_(model, config)
    assert [*model.named_modules()] == before
    with pytest.raises(TypeError, match="embeddings: expected a bool"):
        Int8(embeddings=1)  # type: ignore[arg-type]


# --- Conv1D ----------------------------------------------------------------------------------


def gpt2(seed: int = 0) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    sizes = {"vocab_size": 100, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)
    return transformers.GPT2LMHeadModel(config).eval()


def test_conv1d(tmp_path: Path) -> None:
    model = gpt2()
    block = model.transformer.h[0]
    dense, bias = block.attn.c_attn.weight.detach().clone(), block.attn.c_attn.bias
    block.mlp.c_fc.marked = "by a host"
    with torch.no_grad():
        want = model(IDS).logits
    record = compress_(model, Int8())
    assert [n.rpartition(".")[2] for n in names(record)] == ["c_attn", "c_proj", "c_fc", "c_proj"]
    layer = block.attn.c_attn
    assert isinstance(layer, QuantLinear)
    assert (layer.in_features, layer.out_features) == (64, 192)
    assert layer.bias is bias
    assert block.mlp.c_fc.marked == "by a host"
    stored = bigops.formats.QuantizedWeight.from_dense(dense.t())
    assert torch.equal(layer.dense_weight(), stored.to_dense())
    with torch.no_grad():
        got = model(IDS).logits
    assert (got - want).abs().max() < 0.05 * want.abs().max()
    bigops.save(model, tmp_path / "m.st")
    again = bigops.load(tmp_path / "m.st", model=gpt2(1))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, got)
    with pytest.raises(RuntimeError, match="save_pretrained: expected layers"):
        model.save_pretrained(tmp_path)


def test_conv1d_that_would_be_trained_stays() -> None:
    """Its key would hold the transpose, which loads as something else where it is square."""
    model = gpt2()
    record = compress_(model, {"*c_*": Int8()}, freeze=False)
    assert record.done == []
    assert all("would have the transpose" in entry.reason for entry in record.skipped[:4])
