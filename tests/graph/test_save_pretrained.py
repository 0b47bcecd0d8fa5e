"""save_pretrained of models with swapped layers: what would not load is refused by name."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bigops

transformers = pytest.importorskip("transformers")
IDS = torch.arange(6)[None] % 5


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("verb", ["fuse_", "pack_"])
def test_layers_with_the_entries_of_a_linear_are_saved(verb: str, tmp_path: Path) -> None:
    model = llama()
    want = logits(model)
    assert getattr(bigops, verb)(model).done
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), want)


VERBS: dict[str, Any] = {
    "Int8": lambda m: bigops.compress_(m, bigops.Int8(), keep="all"),
    "sparse in recovery": lambda m: bigops.compress_(m, bigops.Sparse(0.5), freeze=False),
    "low rank": lambda m: bigops.compress_(m, bigops.LowRank(4)),
    "low_memory": lambda m: bigops.compress_(m, bigops.Int8(), keep="all", low_memory=True),
    "adapters": lambda m: bigops.add_lora_(m, rank=2),
    "adapters after Int8": lambda m: (
        bigops.compress_(m, {"*q_proj": bigops.Int8()}, keep="all"),
        bigops.add_lora_(m, rank=2),
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_others_are_refused_and_nothing_is_written(verb: str, tmp_path: Path) -> None:
    model = llama()
    VERBS[verb](model)
    for given in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"save_pretrained: expected layers.*layers\.0\."):
            given.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
    bigops.save(model, tmp_path / "model.safetensors")
    assert logits(model).isfinite().all()


def test_verbs_go_on_as_before(tmp_path: Path) -> None:
    """What guards is no holder of a layer, and goes where the layers are dense again."""
    model = llama()
    first = bigops.compress_(model, {"*q_proj": bigops.Int8()}, keep="all")
    second = bigops.compress_(model, {"*up_proj": bigops.Int8()}, keep="all")
    assert len(first.done) == len(second.done) == 2
    model = llama()
    bigops.pack_(model)
    bigops.unpack_(model)
    model.save_pretrained(tmp_path)
    assert bigops.compress_(model, bigops.Int8(), keep="all").done
