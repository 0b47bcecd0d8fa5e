"""What is the Triton kernel's own in linear_cross_entropy: refusals and planted faults.

Its values by the public function are in test_values.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bigops.kernels import linear_cross_entropy as kernels
from bigops.ops import linear_cross_entropy as op
from bigops.ops.linear_cross_entropy import triton as _triton_loss
from tests.support import triton_interpreter
from tests.support.cases.cross_entropy import ALL, make
from tests.support.planted import plant

triton_interpreter.install()
schema = sys.modules["bigops.ops.linear_cross_entropy.schema"]
assert op

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass over a chunk as a GPU takes it."""
    monkeypatch.setattr(schema, "chunk_op", _triton_loss.serve_chunk)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_target_out_of_range_reads_nothing_and_gives_nan() -> None:
    target = torch.tensor([7, -1, 2])
    losses, _ = kernels.chunk(
        torch.randn(3, 7), target, None, None, None, 7.0, -100, 0.0, 0.0, 0.0, True
    )
    assert losses.isnan().tolist() == [True, True, False]


def test_float64_takes_the_reference() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64)
    args = (torch.tensor([1, 2, 3]), None, None, None, 5.0, -100, 0.0, 0.0, 0.0, False)
    losses, *_ = _triton_loss.serve_chunk(logits, *args, True)
    assert losses.dtype == torch.float64
    with pytest.raises(TypeError, match=r"logits: expected one of .*; got torch.float64"):
        kernels.chunk(logits, *args)


FAULTS = {
    "last block dropped": ("range(0, V, BLOCK)", "range(0, V - BLOCK, BLOCK)"),
    "sum not rescaled": ("total * tl.exp(top - shift)", "total"),
    "target not taken off": ("g - on_target, g", "g, g"),
    "slope of the cap": ("g *= 1.0 - u * u", "g *= 1.0 - u"),
    "edge not masked": ("mask=in_v)\n\n\ndef", "mask=in_v | True)\n\n\ndef"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = FAULTS[fault]
    planted = plant(kernels, tmp_path, old, new)
    monkeypatch.setattr(kernels, "chunk", planted.chunk)
    with pytest.raises(Exception, match="too far|out of bounds|NaN at other"):
        make(3, 600, 5, torch.float32, ignored=0.0, **ALL["all, none"]).check()
