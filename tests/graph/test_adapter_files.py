"""Adapters in PEFT's files: trained here they load there, and back, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bigops import FormatError, Int8, add_lora_, compress_
from bigops.train import load_adapter_, save_adapter

peft = pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def ours() -> nn.Module:
    model = Net()
    add_lora_(model, 4, "up", alpha=6, dropout=0.1)
    add_lora_(model, 2, "down", alpha=3, rank_stabilized=True)
    for p in model.down.adapters.parameters():
        p.requires_grad_(True)
    return trained(model).eval()


def test_ours_in_peft_and_back(tmp_path: Path) -> None:
    model = ours()
    expected = model(X)
    save_adapter(model, tmp_path / "a", base_model="net")
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path / "a").eval()
    assert (theirs(X) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert theirs.base_model.model.up.lora_A.default.weight.equal(model.up.adapters["default"].a)
    theirs.save_pretrained(tmp_path / "b")
    again = Net()
    load_adapter_(again, tmp_path / "b", "second")
    assert again.up.adapters["second"].a.equal(model.up.adapters["default"].a)
    assert again.down.adapters["second"].b.equal(model.down.adapters["default"].b)
    assert again.down.adapters["second"].scale == pytest.approx(3 / 2**0.5)
    assert again.up.adapters["second"].dropout == 0.1
    assert (again.eval()(X) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not again.up.base_weight.requires_grad


@pytest.mark.parametrize("rslora", [False, True])
def test_theirs_in_ours(rslora: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["up", "down"],
        use_rslora=rslora,
        rank_pattern={"down": 2},
        alpha_pattern={"down": 7},
    )
    theirs = trained(peft.get_peft_model(Net(), config)).eval()
    theirs.save_pretrained(tmp_path)
    for base in (Net(), compressed()):
        load_adapter_(base, tmp_path)
        adapter = base.down.adapters["default"]
        assert adapter.rank == 2
        assert adapter.scale == pytest.approx(7 / (2**0.5 if rslora else 2))
    model = Net()
    load_adapter_(model, tmp_path)
    expected = theirs(X)
    assert (model.eval()(X) - expected).abs().max() < 1e-5 * expected.abs().max()


def compressed() -> nn.Module:
    model = Net()
    compress_(model, Int8())
    return model


def _config(change: dict[str, Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))

    return rewrite


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        change(held)
        save_file(held, folder / "adapter_model.safetensors")

    return rewrite


UP = "base_model.model.up.lora_A.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "kind": (_config({"peft_type": "LOHA"}), "expected peft_type 'LORA'; got 'LOHA'"),
    "dora": (_config({"use_dora": True}), "expected use_dora False; got True"),
    "bias": (_config({"bias": "all"}), "expected bias 'none'; got 'all'"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "expected adapter_config.json"),
    "half": (_weights(lambda w: w.pop(UP)), r"expected pairs of lora_A and lora_B"),
    "shape": (
        _weights(lambda w: w.update({UP: torch.zeros(4, 9)})),
        r"up: expected factors of shapes \[4, 8\] and \[24, 4\]; got \[4, 9\]",
    ),
    "layer": (
        _weights(lambda w: [w.update({k.replace(".up.", ".gate."): w.pop(k)}) for k in [*w]]),
        "expected a linear layer gate; got none",
    ),
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678"),
        "adapter_model.safetensors; got SafetensorError",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_leaves_the_model(case: str, tmp_path: Path) -> None:
    save_adapter(ours(), tmp_path)
    change, message = BAD[case]
    change(tmp_path)
    model = Net()
    with pytest.raises(FormatError, match=message):
        load_adapter_(model, tmp_path)
    assert type(model.up) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name: expected an adapter of the model; got 'other'"):
        save_adapter(ours(), tmp_path / "a", "other")
    assert not (tmp_path / "a").exists()
