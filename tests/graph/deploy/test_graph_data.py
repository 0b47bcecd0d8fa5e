"""Graphs as plain data, and sizes as expressions: what a file says is checked, not run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from bigops.graph.deploy import graph_data
from bigops.graph.deploy.signature import Expression
from tests.graph.deploy.passes.exported import graph_of


class All(nn.Module):
    """Arguments of every kind."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        y = x.to(torch.float64).masked_fill(x > 0, float("-inf"))
        a, b = y.split(2, dim=1)
        return a.reshape(n * 2, -1), torch.zeros(n + 1, dtype=torch.int32, device="cpu"), b[:, ::2]


def test_a_graph_goes_through_json() -> None:
    graph = graph_of(All(), torch.randn(3, 4))
    for node in list(graph.graph.nodes):
        if node.op == "call_module":
            graph.graph.erase_node(node)
    graph.graph.set_codegen(torch.fx.graph.CodeGen())
    nodes = json.loads(json.dumps(graph_data.describe(graph.graph)))
    again = torch.fx.GraphModule(nn.Module(), graph_data.build(nodes))
    graph.recompile()
    x = torch.randn(5, 4)
    for a, b in zip(graph(x), again(x), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    assert graph_data.describe(again.graph) == nodes


NODE = ["call_function", "y", "aten.relu.default", {"tuple": [{"node": "x"}]}, {"dict": {}}]


@pytest.mark.parametrize(
    "node",
    [
        "relu",
        NODE[:4],
        ["call_method", *NODE[1:]],
        ["call_function", "x", *NODE[2:]],
        ["call_function", "y; import os", *NODE[2:]],
        ["call_function", "y", "os.system", *NODE[3:]],
        ["call_function", "y", "aten.from_file.default", *NODE[3:]],
        ["call_function", "y", "aten.relu.nothing", *NODE[3:]],
        ["call_function", "y", "builtins.eval", *NODE[3:]],
        ["get_attr", "y", "a.b; c", {"tuple": []}, {"dict": {}}],
        [*NODE[:3], {"tuple": [{"node": "z"}]}, {"dict": {}}],
        [*NODE[:3], {"tuple": [{"dtype": "load"}]}, {"dict": {}}],
        [*NODE[:3], {"tuple": [{"float": "1"}]}, {"dict": {}}],
        [*NODE[:3], [{"node": "x"}], {"dict": {}}],
    ],
    ids=str,
)
def test_other_data_is_refused(node: object) -> None:
    first = ["placeholder", "x", "x", {"tuple": []}, {"dict": {}}]
    graph_data.build([first, NODE])
    with pytest.raises(graph_data.GraphError):
        graph_data.build([first, node])


def test_expressions_are_sizes_and_nothing_else() -> None:
    assert Expression("2*s0 + min(s1, 3)").of({"s0": 5, "s1": 9}) == 13
    assert Expression("s0 % 2 == 0 and s0 <= 8").of({"s0": 6})
    for text in (
        "__import__('os')",
        "s0.x",
        "s0[0]",
        "2**s0",
        "(lambda: 1)()",
        "'a'",
        "open",
        "1 +",
    ):
        if text == "open":
            continue  # a name is a symbol, and none is given
        with pytest.raises(ValueError, match="expression of sizes"):
            Expression(text)
    with pytest.raises(NameError):
        Expression("open").of({})


def test_numbers_that_json_has_no_word_for() -> None:
    for number in (math.inf, -math.inf):
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, number)),))
        text = json.dumps(graph_data.describe(graph), allow_nan=False)
        module = torch.fx.GraphModule(nn.Module(), graph_data.build(json.loads(text)))
        assert module(torch.zeros(1))[0].item() == number
