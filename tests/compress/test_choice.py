"""Which layer gets which config, and when the old one had better stay: names, bytes, kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import bigops
from bigops import Fp8, Int4, Int8, LowRank, Sparse, compress_, freeze_
from bigops.backend import machine
from bigops.compress import build, choose, measure
from bigops.graph import sites as sites_module
from bigops.graph.sites import Sites
from bigops.nn import (
    Fp8Linear,
    Linear,
    LowRankLinear,
    QuantLinear,
    QuantLowRankLinear,
    SparseLinear,
)
from bigops.ops.choice import Choice
from bigops.timing import Ratio
from tests.support.kernels_ran import needs_extension


class Net(nn.Module):
    """Two layers that can be compressed, one that shares its weight, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 64)
        self.fc, self.fc2 = nn.Linear(64, 48), Linear(48, 64, activation="gelu")
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc2(self.fc(self.table(ids))))


def nbytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


# --- names ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"*": Int4(), "fc": Int8()}, {"fc": Int8(), "fc2": Int4()}),
        ({"fc": Int8(), "fc*": Int4()}, {"fc": Int8(), "fc2": Int4()}),
        ({"fc?": Int8(), "*": Int4()}, {"fc": Int4(), "fc2": Int8()}),
        ({"fc": None, "*": Int8()}, {"fc2": Int8()}),
        ({"*": Int8(), "fc2": None}, {"fc": Int8()}),
        ({"f*": Int8(), "head": None}, {"fc": Int8(), "fc2": Int8()}),
        ({"fc": Int8()}, {"fc": Int8()}),
        (Int8(), {"fc": Int8(), "fc2": Int8()}),
    ],
)
def test_the_exact_name_then_the_first_pattern(
    config: Any, want: Mapping[str, bigops.compress.config.Config]
) -> None:
    layers = choose.find(Sites(Net()))
    chosen, left = choose.assign(layers, choose.check_patterns(config))
    assert chosen == want
    assert chosen.keys() | left.keys() == {"fc", "fc2", "head"}


def test_an_exact_name_with_characters_of_patterns() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(64, 64), "a0": nn.Linear(64, 64)})
    record = compress_(model, {"a[0]": Int8()})
    assert [d.name for d in record.done] == ["a[0]"]  # the pattern would be a0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"*": Int8(), "fc*": Int4()},
            r"no layer is left for 'fc\*': all that match it go by '\*'",
        ),
        ({"fc": Int8(), "f?": Int4(), "*": None}, r"no layer is left for 'f\?': .* go by 'fc'"),
        ({"fc*": None, "fc2*": Int8()}, r"no layer is left for 'fc2\*': .* go by 'fc\*'"),
        ({"*": Int8(), "encoder": None}, r"no layer to compress matches 'encoder'"),
        ({"*": Int8(), "head": Int4()}, r"matches 'head'.*left: head \(its weight is shared with"),
        (
            {"*": Int8(), "table": Int4()},
            r"no layer to compress matches 'table'; layers.*: fc, fc2; .*left: .*table \(its "
            r"weight is shared with head.weight, which Int8\(\) would store in another form",
        ),
    ],
)
def test_a_pattern_that_no_layer_gets_is_refused(config: Any, message: str) -> None:
    model = Net()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        compress_(model, config)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_what_is_left_is_listed_with_its_reason() -> None:
    model = Net().eval()
    record = compress_(model, {"fc": None, "fc2": Int8()})
    assert record.reason("fc") == "config['fc'] is None"
    assert "shared with" in (record.reason("head") or "")
    assert compress_(Net(), {"fc": Int8()}).reason("fc2") == "no pattern matches it"
    assert type(model.fc) is nn.Linear


def test_none_and_exact_names_survive_json() -> None:
    config = {"fc": None, "fc?": Int8(), "*": LowRank(3, exact=True)}
    again = bigops.compress.config.from_json(bigops.compress.config.to_json(config))
    assert list(again.items()) == list(config.items())  # type: ignore[union-attr]


# --- bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        Int8(),
        Int4(),
        Int8(activations="none", group=32, symmetric=False),
        Fp8(),
        Sparse(0.5),
        Sparse(0.3, "1x1"),
        Sparse(0.9, "16x16", "bf16"),
        Sparse(0.5, "1x1") + Int8(),
        Sparse(0.9) + Int8(),
        LowRank(2),
        LowRank(7) + Int8(),
        LowRank(energy=0.3),
    ],
    ids=str,
)
def test_no_layer_grows_nor_grows_by_its_pattern(config: Any, dtype: torch.dtype) -> None:
    shapes = [(1, 32), (3, 7), (10, 300), (16, 64), (80, 70), (200, 130)]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(k, n) for n, k in shapes).to(dtype)

    dense, small = model(), model()
    record = compress_(small, config, keep="all")
    alone = model()
    if isinstance(config, bigops.compress.SparseInt8 | bigops.compress.LowRankInt8):
        compress_(alone, config.int8)
    for i in range(len(shapes)):
        assert nbytes(small[i]) <= min(nbytes(dense[i]), nbytes(alone[i])), shapes[i]
        if type(small[i]) is nn.Linear:
            assert record.reason(str(i))
    for entry in record.done:
        assert entry.bytes_after == nbytes(small[int(entry.name)])
        assert entry.bytes_before == nbytes(dense[int(entry.name)])


def test_int8_takes_the_place_of_a_pattern_that_costs_more() -> None:
    model = nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 128)).eval()
    record = compress_(model, {"0": Sparse(0.5, "1x1") + Int8(), "1": LowRank(63) + Int8()})
    assert type(model[0]) is type(model[1]) is QuantLinear
    for entry, words in zip(record.done, ("it would take", "it would take"), strict=True):
        assert "by Int8()" in entry.what
        assert f"; in place of {'Sparse' if entry.name == '0' else 'LowRank'}" in entry.why
        assert words in entry.why
    kept = nn.Sequential(nn.Linear(256, 128))
    compress_(kept, Sparse(0.9) + Int8())
    assert type(kept[0]) is bigops.nn.SparseLinear


def test_a_size_is_known_before_anything_is_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner in (QuantLinear, Fp8Linear, QuantLowRankLinear):
        monkeypatch.setattr(owner, "make_storage", lambda self: pytest.fail("converted"))
    for config in (Int8(), Int4(), Fp8(), LowRank(2) + Int8()):
        model = nn.Sequential(nn.Linear(6, 5, dtype=torch.bfloat16))
        record = compress_(model, config, keep="all")
        assert "bytes where" in (record.reason("0") or "")


def test_known_sizes_are_those_of_the_frozen_layer() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(130, 70, dtype=torch.bfloat16)
    for config in (
        Int8(),
        Int8(symmetric=False),
        Int4(),
        Int4(group=None, symmetric=False),
        Fp8(),
        Fp8(scales="block"),
        LowRank(5) + Int8(),
        Int8(activations="static"),
    ):
        layer = build.build(dense, build.Choice(config, (0.1, 3.0)))
        known = layer.least_bytes()
        assert known == nbytes(layer.freeze()), config  # type: ignore[operator]
    factors = build.build(dense, build.Choice(LowRank(5)))
    assert factors.least_bytes() == nbytes(factors)


def test_a_layer_to_be_trained_has_its_size_said_and_decided_when_frozen() -> None:
    model = nn.Sequential(nn.Linear(16, 24))
    record = compress_(model, Sparse(0.5), freeze=False)
    assert "once frozen it would take" in record.done[0].why
    freeze_(model)
    assert model[0].frozen


# --- kernels -------------------------------------------------------------------------------


@needs_extension
def test_a_layer_that_no_kernel_serves_stays_unless_all_is_asked_for() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    record = compress_(model, {"0": Fp8(), "1": Fp8(scales="block", activations="none")})
    assert not record.done
    for name in ("0", "1"):
        assert (record.reason(name) or "").startswith("no kernel serves it on cpu: no CPU kernel")
    assert [type(layer) for layer in model] == [nn.Linear] * 2
    record = compress_(model, Fp8(), keep="all")
    assert [type(layer) for layer in model] == [Fp8Linear] * 2
    assert all("no kernel serves it on cpu" in entry.why for entry in record.done)
    with pytest.raises(ValueError, match="keep: expected one of faster, all; got 'most'"):
        compress_(model, Int8(), keep="most")


@needs_extension
@pytest.mark.parametrize("config", [Int8(), Sparse(0.9), LowRank(4), LowRank(4) + Int8()], ids=str)
def test_the_chooser_of_the_op_is_asked(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for kind in (QuantLinear, SparseLinear, LowRankLinear, QuantLowRankLinear):
        real: Any = kind.explain

        def explain(layer: Any, x: torch.Tensor, real: Any = real) -> Choice:
            found = real(layer, x)
            asked.append(found.op)
            return Choice.of(found.op, f"reference.{found.op}", f"planted for {found.op}")

        monkeypatch.setattr(kind, "explain", explain)
    model = nn.Sequential(nn.Linear(64, 64))
    record = compress_(model, config)
    assert "no kernel serves it on cpu: planted for" in (record.reason("0") or "")
    assert asked


def test_an_installation_without_kernels_keeps_all_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "without_kernel", lambda module, x: "no kernel serves it: none")
    monkeypatch.setattr(machine, "extension", None)
    model = nn.Sequential(nn.Linear(64, 64))
    record = compress_(model, Int8())
    assert type(model[0]) is QuantLinear
    assert record.done[0].why == "asked for; no kernel serves it: none"


@pytest.mark.parametrize(("keep", "swapped"), [("faster", False), ("all", True)])
@pytest.mark.parametrize("config", [Int8(), Fp8(), LowRank(3)], ids=str)
def test_a_slower_layer_is_kept_only_where_all_is(
    keep: str, swapped: bool, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = sites_module.Contest(1.0, 3.0, Ratio(0.33, 0.3, 0.4))
    monkeypatch.setattr("bigops.compress.apply.contest", lambda *a, **k: lost)
    model = nn.Sequential(nn.Linear(64, 64))
    record = compress_(model, config, torch.randn(4, 64), keep=keep)
    assert (type(model[0]) is not nn.Linear) is swapped
    if swapped:
        assert "measured 1 us before, 3 us after, x0.33" in record.done[0].why
        assert str(record.done[0]).count(" us") == 2  # each time is said once
        assert record.done[0].speedup == lost.speedup
    else:
        assert "the original is faster: measured" in (record.reason("0") or "")


def test_what_reads_bfloat16_values_is_explained_for_them() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    compress_(model, Sparse(0.8, values="bf16"))
    assert measure.kernel_of(model[0], torch.randn(2, 64))  # the layer casts x


@pytest.mark.parametrize("config", [bigops.Int8(), bigops.Sparse(0.5), bigops.LowRank(2)])
def test_a_layer_on_meta_stays_and_says_why(config: Any) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    record = bigops.compress_(model, config, keep="all")
    assert record.reason("1") == "it is on meta, without numbers to compress"
    assert type(model[1]) is nn.Linear
    with pytest.raises(ValueError, match="matched, but left: 1 .it is on meta"):
        bigops.compress_(model, {"1": config})


NARROW = [
    Int8(),
    Int4(group=128),
    Fp8(),
    Sparse(0.8),
    LowRank(40),
    Sparse(0.8) + Int8(),
    LowRank(40) + Int8(),
]


@pytest.mark.parametrize("config", NARROW, ids=str)
@pytest.mark.parametrize("sizes", [(1, 64), (64, 1), (2, 3), (30, 30)])
def test_narrow_layers_refuse_no_model(config: Any, sizes: tuple[int, int]) -> None:
    """Fewer columns than a group has, fewer rows than a tile, a side below the rank."""
    k, n = sizes
    model = nn.Sequential(nn.Linear(128, k), nn.Linear(k, n), nn.Linear(n, 128), nn.Linear(128, 96))
    record = compress_(model, config, keep="all")
    named = [entry.name for entry in (*record.done, *record.skipped)]
    assert sorted(named) == ["0", "1", "2", "3"]
    assert any(done.name == "3" for done in record.done)
    if config == LowRank(40):
        assert "rank 40" in (record.reason("1") or "")
    assert model(torch.randn(2, 128)).shape == (2, 96)
