"""A checkpoint of transformers' Trainer goes on in a loop of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from bigops import FormatError
from bigops.train import AdamW, TrainState

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")


def model() -> torch.nn.Module:
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8, "vocab_size": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))  # its head is tied


def test_what_trainer_wrote_is_loaded(tmp_path: Path) -> None:
    trained = model()
    optimizer = AdamW(trained.parameters(), lr=1e-3)
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (12, 8))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = transformers.Trainer(
        trained, arguments, train_dataset=rows, optimizers=(optimizer, schedule)
    )
    trainer.train()
    folder = tmp_path / "checkpoint-3"

    fresh = model()
    parts = {"model": fresh, "optimizer": AdamW(fresh.parameters(), lr=1e-2)}
    parts["schedule"] = LambdaLR(parts["optimizer"], lambda step: 1 / (1 + step))
    state = TrainState(**parts)
    values = state.load(folder)
    assert values["step"] == 3
    for name, tensor in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    saved = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    for key, held in parts["optimizer"].state_dict()["state"].items():
        assert torch.equal(held["exp_avg_sq"], saved[key]["exp_avg_sq"])
    assert parts["schedule"].last_epoch == 3
    assert fresh.lm_head.weight is fresh.transformer.wte.weight

    state.save(tmp_path / "own", 3)
    assert state.load(tmp_path / "own")["step"] == 3
    (folder / "optimizer.pt").write_bytes(b"cut")
    with pytest.raises(FormatError, match=r"optimizer.pt: expected what transformers' Trainer"):
        state.load(folder)
