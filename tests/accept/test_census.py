"""The census of transformers' model types: a sample is run anew, the whole file held to its rule.

``python -m tests.accept.census`` runs all types, for most of an hour, and writes census.json.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bigops
from tests.accept.conftest import Accept
from tests.support.kernels_ran import needs_extension

pytest.importorskip("transformers")

from tests.accept.census import tiny, twin, verbs

pytestmark = [pytest.mark.slow, needs_extension]

FILE = Path(__file__).parent / "census.json"
SAMPLE = [
    *("bart", "clip", "convbert", "deberta", "deit", "diffllama", "falcon", "gemma3_text"),
    *("gpt_neox", "informer", "mixtral", "olmo2", "switch_transformers", "umt5", "wav2vec2"),
]


def outcomes(lines: dict[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
    """right, left, refused, no, wrong or foreign, of each cell."""
    return {
        (kind, verb): line[verb].partition(":")[0] if "built" in line else "not built"
        for kind, line in lines.items()
        for verb in verbs.VERBS
    }


def test_a_sample_is_as_the_file_says(tmp_path: Path, accept: Accept) -> None:
    found = tmp_path / "census.json"
    call = [sys.executable, "-W", "ignore", "-m", "tests.accept.census", "--json", str(found)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*call, *SAMPLE], capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    lines = json.loads(found.read_text())["types"]
    committed = json.loads(FILE.read_text())["types"]
    expected = outcomes({kind: committed[kind] for kind in SAMPLE})
    assert outcomes(lines) == expected, done.stdout
    accept.result(types=len(lines), cells=len(expected))


def test_no_cell_of_the_file_is_wrong() -> None:
    lines = json.loads(FILE.read_text())["types"]
    found = outcomes(lines)
    bad = [f"{k}: {lines[k][v]}" for (k, v), o in found.items() if o in ("wrong", "foreign")]
    assert not bad, bad
    assert set(found.values()) <= {"right", "left", "refused", "no", "not built"}


@pytest.mark.parametrize("kind", SAMPLE)
def test_smoothing_changes_no_bit(kind: str) -> None:
    small = tiny.build(kind)
    found = verbs._outcome(lambda: verbs.smoothed(kind, small, verbs.Plain(small), {}))
    assert found in ("right", "left", "no: two plain calls differ")


def _outcome(verb: str) -> str:
    """The outcome for llama."""
    small = tiny.build("llama")
    call = verbs.VERBS[verb]
    return verbs._outcome(lambda: call("llama", small, verbs.Plain(small), {}))


@pytest.mark.parametrize("verb", ["fuse_", "Int8", "save and load", "LoRA"])
def test_a_planted_fault_is_wrong(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer off: by 0.1 % fused, by a scale, after loading, and an adapter without gradient."""
    assert _outcome(verb) == "right"
    name = "model.layers.0.mlp.up_proj"
    fuse, load, add_lora = bigops.fuse_, bigops.load, bigops.add_lora_

    exact = twin.dequantised

    def fused(model: Any, *rest: Any) -> Any:
        record = fuse(model, *rest)
        model.get_submodule(name).register_forward_hook(lambda m, x, y: y * 1.001)
        return record

    def other_scale(model: Any) -> Any:
        made = exact(model)
        made.get_submodule(name).weight.data.mul_(1.1)
        return made

    def loaded(path: Any, model: Any) -> Any:
        made = load(path, model=model)
        made.get_submodule(name).bias = torch.nn.Parameter(torch.full((64,), 1e-3))
        return made

    def without_gradient(model: Any, rank: int) -> Any:
        record = add_lora(model, rank)
        layer = model.get_submodule(name)
        base = copy.deepcopy(layer)
        layer.forward = lambda x: base(x).detach()
        return record

    monkeypatch.setattr(bigops, "fuse_", fused)
    monkeypatch.setattr(twin, "dequantised", other_scale)
    monkeypatch.setattr(bigops, "load", loaded)
    monkeypatch.setattr(bigops, "add_lora_", without_gradient)
    assert _outcome(verb).startswith("wrong: ")
