"""bigops.deploy on tiny models of many types of transformers: right, or refused with the reason."""

from __future__ import annotations

import copy

import pytest
import torch

import bigops
from tests.support.kernels_ran import needs_extension

pytest.importorskip("transformers")

from tests.accept.census import tiny, verbs

pytestmark = [pytest.mark.slow, needs_extension]

# Encoders, decoders, both; relative positions, mixtures of experts, convolutions, shared layers.
KINDS = ["albert", "bart", "clip", "deberta-v2", "dinov2", "falcon", "gemma2", "gpt2", "mixtral"]
KINDS += ["mobilebert", "opt", "qwen3", "t5", "vit", "whisper"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_model_gives(kind: str) -> None:
    small = tiny.build(kind)
    plain = verbs.Plain(small)
    deployed = bigops.deploy(copy.deepcopy(small.model), small.inputs)
    with torch.no_grad():
        got = tiny.outputs(deployed, small.inputs)
    assert len(got) == len(plain.outputs)
    for i, output in enumerate(got):
        plain.hold(f"output {i}", output)
    # a float model of this kind has products and norms, and they are ours
    assert deployed.counts["epilogue"] or deployed.counts["pack"] or deployed.counts["norm"]
