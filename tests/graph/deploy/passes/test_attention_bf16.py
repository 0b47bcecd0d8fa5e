"""Attention in bfloat16 between products of u8, and nowhere else."""

from __future__ import annotations

import pytest
import torch

import bigops
from bigops.graph.deploy.passes import attention, attention_bf16
from bigops.graph.deploy.passes.rewrite import arguments, is_call
from bigops.ops.attention.choose import op
from tests.graph.deploy.encoder import Encoder, inputs
from tests.graph.deploy.passes.exported import graph_of
from tests.support import tolerance


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (bigops.Int8(), 1),
        (bigops.Sparse(0.5) + bigops.Int8(), 1),
        (bigops.Int8(activations="none"), 0),
        (bigops.Int4(group=32), 0),
        ({"k": None, "*": bigops.Int8()}, 0),  # one that keeps its numbers
    ],
    ids=str,
)
def test_between_products_of_u8(config: object, count: int) -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    bigops.compress_(model, config)
    given = inputs(2, 9)
    graph = graph_of(model, *given.values())
    with torch.no_grad():
        attention.run(graph)
        graph.recompile()
        before = graph(*given.values())
        assert attention_bf16.run(graph) == count
        assert attention_bf16.run(graph) == 0  # of what is so already
        graph.recompile()
        after = graph(*given.values())
    calls = [n for n in graph.graph.nodes if is_call(n, op)]
    assert [arguments(n)["bf16"] for n in calls] == [bool(count)]
    for one, other in zip(before.values(), after.values(), strict=True):
        assert tolerance.snr_db(other, one) > (35 if count else 200)
