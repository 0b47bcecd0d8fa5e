"""bigops.add_lora_: idle patterns are refused, and an error leaves the model whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bigops.graph import add_lora_
from bigops.nn import GatedMLP, LoRALinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2)
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.mlp = GatedMLP(16, 24)
        self.norm = nn.LayerNorm(16)
        self.emb = nn.Embedding(5, 16)


def whole() -> nn.Module:
    """Two blocks, one of whose layers has an adapter, and one flag that is off."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    model[1].q_proj = LoRALinear.from_linear(nn.Linear(16, 16), 2, name="first")
    model[0].norm.bias.requires_grad_(False)
    return model


def state(model: nn.Module) -> Any:
    """Modules and parameters by identity and place, with flags, modes and active adapters."""
    return [
        [
            (name, id(m), type(m), m.training, getattr(m, "active", None))
            for name, m in model.named_modules(remove_duplicate=False)
        ],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
    ]


# patterns ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["*q_proj", "no_such_layer"], "'no_such_layer' matches none"),
        (["*q_proj", "*.k_proj", "*o_proj"], r"'\*.k_proj' matches none; '\*o_proj' matches none"),
        (
            ["*q_proj", "v_proj"],
            r"'v_proj' matches none, as whole paths are matched \(did you mean '\*.v_proj': 0.v_pr",
        ),
        (
            ["*gate_proj", "*up_proj", "*down_proj"],
            r"'\*gate_proj' matches 0.mlp.gate_proj, a part of a GatedMLP's stacked parameter, "
            r"which takes no adapter \(target 0.mlp.down_proj, or .*; '\*up_proj' matches 0.mlp.up",
        ),
        (["*q_proj", "*.norm"], r"'\*.norm' matches 0.norm, a LayerNorm"),
        (["*q_proj", "*.emb"], r"'\*.emb' matches 0.emb, a Embedding"),
        (["*q_proj", "*.mlp"], r"'\*.mlp' matches 0.mlp, a GatedMLP"),
        (
            "*gate_proj",
            "expected a layer that can be swapped; got .* matches 0.mlp.gate_proj, a part",
        ),
        ([], "expected a layer that can be swapped; got .*: no pattern"),
    ],
)
def test_a_pattern_that_no_linear_layer_gets_is_refused(targets: Any, match: str) -> None:
    model = whole()
    before = state(model)
    with pytest.raises(ValueError, match="^targets: .*" + match):
        add_lora_(model, 2, targets)
    assert state(model) == before


def test_a_block_by_itself_is_named() -> None:
    with pytest.raises(ValueError, match="'gate_proj' matches gate_proj, .* down_proj, or"):
        add_lora_(GatedMLP(8, 12), 2, ["down_proj", "gate_proj"])


def test_projections_that_no_adapter_takes_are_in_the_record() -> None:
    record = add_lora_(whole(), 2, ["*_proj"])
    left = {entry.name for entry in record.skipped}
    assert left == {
        f"{i}.{n}" for i in range(2) for n in ("attn.out_proj", "mlp.gate_proj", "mlp.up_proj")
    }
    assert {entry.name for entry in record.done} == {
        f"{i}.{n}" for i in range(2) for n in ("q_proj", "v_proj", "mlp.down_proj")
    }
    assert "a part of a GatedMLP" in str(record.reason("0.mlp.up_proj"))


def test_a_layer_is_matched_by_each_of_its_paths() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Linear(8, 8)})
    model["b"] = model["a"]
    record = add_lora_(model, 2, ["b", "c"])
    assert record.reason("a") == "the same module is also reachable as b"


class Narrow(nn.Module):
    """A layer with one output, and an adapter of which there is one already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(16, 16), nn.Linear(16, width)


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("rank", [4, np.int64(4)])
def test_a_narrow_layer_is_left_and_the_model_adapted(width: int, rank: Any) -> None:
    model = Narrow(width)
    record = add_lora_(model, rank)
    assert [done.name for done in record.done] == ["body"]
    assert record.reason("score") == (f"rank: expected 1 to {width}, its smaller side; got 4")
    assert type(model.score) is nn.Linear
    assert not model.score.weight.requires_grad


def test_a_second_adapter_too_wide_for_some_layer() -> None:
    model = Narrow(3)
    add_lora_(model, 2)
    record = add_lora_(model, 4, name="second")
    assert [done.name for done in record.done] == ["body"]
    assert "its smaller side" in (record.reason("score") or "")
    assert list(model.score.adapters) == ["default"]  # type: ignore[arg-type]


def test_all_layers_are_too_narrow() -> None:
    model = Narrow(3)
    before = state(model)
    with pytest.raises(ValueError, match="score: left as it is: rank: expected 1 to 3"):
        add_lora_(model, 4, "score")
    for rank, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="rank: expected"):
            add_lora_(model, rank)  # type: ignore[arg-type]
    assert state(model) == before


# atomic -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "", "keys", "pop", "training", "type", 3, None])
def test_a_name_that_modules_cannot_have_changes_nothing(name: Any) -> None:
    """`nn.ModuleDict` has attributes of its own, which it refuses as keys with a KeyError."""
    model = whole()
    before = state(model)
    with pytest.raises(ValueError, match=r"0.q_proj: name: expected a name"):
        add_lora_(model, 2, "*_proj", name=name)
    assert state(model) == before
    layer = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="name: expected a name"):
        LoRALinear.from_linear(layer, 2, name=name)
    assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"name": "first"}, ValueError, "1.q_proj: name: expected a new name; got 'first'"),
        ({"rank": 17}, ValueError, "rank: expected 1 to 16"),
        ({"dropout": 1.5}, ValueError, "0.*: dropout: expected at least 0 and below 1"),
        ({"alpha": float("nan")}, ValueError, "0.*: alpha: expected a finite number"),
    ],
)
def test_an_argument_that_does_not_fit_changes_nothing(
    arguments: dict[str, Any], error: Any, match: str
) -> None:
    model = whole()
    before = state(model)
    with pytest.raises(error, match=match):
        add_lora_(model, **{"rank": 2, "targets": "*_proj", **arguments})
    assert state(model) == before


def test_a_merged_layer_is_named_and_nothing_changes() -> None:
    model = whole()
    model[1].q_proj.merge()
    before = state(model)
    with pytest.raises(RuntimeError, match="1.q_proj: add_adapter: expected an unmerged layer"):
        add_lora_(model, 2, "*_proj")
    assert state(model) == before


def test_a_parameter_that_cannot_be_frozen_gives_all_back() -> None:
    model = whole()
    model[1].norm.register_parameter("late", Unfrozen(torch.ones(2)))
    before = state(model)
    with pytest.raises(RuntimeError, match="planted"):
        add_lora_(model, 2, "*_proj")
    assert state(model) == before


class Unfrozen(nn.Parameter):
    """Refuses to be frozen, as a parameter that is no leaf does."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if not requires_grad:
            raise RuntimeError("planted")
        return self
