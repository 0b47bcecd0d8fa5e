"""The census of transformers and timm: a sample is run anew, the files held to their rule.

``python -m tests.accept.census`` runs all types of transformers, for most of an hour, and writes
census.json; with ``--timm`` 150 networks of timm, into census_timm.json.
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

from tests.accept.census import transformers_types, twin, verbs

pytestmark = [pytest.mark.slow, needs_extension]

HERE = Path(__file__).parent
SAMPLES = {
    "transformers": [
        *("bart", "clip", "convbert", "deberta", "deit", "diffllama", "falcon", "gemma3_text"),
        *("gpt_neox", "informer", "mixtral", "olmo2", "switch_transformers", "umt5", "wav2vec2"),
    ],
    "timm": ["test_vit", "gmixer_12_224", "mobilenetv3_small_050", "test_vit_relpos"],
}
FILES = {"transformers": "census.json", "timm": "census_timm.json"}


def committed(package: str) -> dict[str, dict[str, Any]]:
    """The line of each model in the committed file."""
    lines: dict[str, dict[str, Any]] = json.loads((HERE / FILES[package]).read_text())["models"]
    return lines


def outcomes(lines: dict[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
    """right, left, refused, no, wrong or foreign, of each cell."""
    return {
        (kind, verb): line[verb].partition(":")[0] if "built" in line else "not built"
        for kind, line in lines.items()
        for verb in verbs.VERBS
    }


@pytest.mark.parametrize("package", SAMPLES)
def test_a_sample_is_as_the_file_says(package: str, tmp_path: Path, accept: Accept) -> None:
    pytest.importorskip(package)
    sample, found = SAMPLES[package], tmp_path / "census.json"
    call = [sys.executable, "-W", "ignore", "-m", "tests.accept.census", "--json", str(found)]
    call += ["--timm", *sample] if package == "timm" else sample
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    lines = json.loads(found.read_text())["models"]
    expected = outcomes({kind: committed(package)[kind] for kind in sample})
    assert outcomes(lines) == expected, done.stdout
    accept.result(models=len(lines), cells=len(expected))


@pytest.mark.parametrize("package", FILES)
def test_no_cell_of_the_file_is_wrong(package: str) -> None:
    lines = committed(package)
    found = outcomes(lines)
    bad = [f"{k}: {lines[k][v]}" for (k, v), o in found.items() if o in ("wrong", "foreign")]
    assert not bad, bad
    assert set(found.values()) <= {"right", "left", "refused", "no", "not built"}


@pytest.mark.parametrize("kind", SAMPLES["transformers"])
def test_smoothing_changes_no_bit(kind: str) -> None:
    small = transformers_types.build(kind)
    found = verbs._outcome(lambda: verbs.smoothed(small, verbs.Plain(small), {}))
    assert found in ("right", "left", "no: two plain calls differ")


def _outcome(verb: str) -> str:
    """The outcome for llama."""
    small = transformers_types.build("llama")
    call = verbs.VERBS[verb]
    return verbs._outcome(lambda: call(small, verbs.Plain(small), {}))


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
